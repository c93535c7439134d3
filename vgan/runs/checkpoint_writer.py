"""Checkpoints written in a background thread; training waits only for a copy of the tensors."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgan.runs import checkpoint
from vgan.runtime.distributed import rank
from vgan.runtime.errors import UserError

_WEIGHTS = ("G", "D", "G_ema", "opt_G", "opt_D")


def to_host(node: Any) -> Any:
    """Copy nested containers to host memory.

    Copies from a GPU are asynchronous: synchronize with the device before reading them.
    """
    if isinstance(node, Tensor):
        if node.device.type != "cuda":
            return node.detach().to("cpu", copy=True)
        pinned = torch.empty_like(node, device="cpu", pin_memory=True)
        return pinned.copy_(node.detach(), non_blocking=True)
    if isinstance(node, dict):
        return {key: to_host(child) for key, child in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(map(to_host, node))
    return node


class CheckpointWriter:
    """Writes one checkpoint at a time; `begin` waits only while the previous one is being written.

    A state that is not finite is not written, so that the newest checkpoint is always one to return
    to. `report` gets one line for each checkpoint that cannot be written; training continues.
    """

    def __init__(self, keep: int, report: Callable[[str], None]) -> None:
        self._keep, self._report = keep, report
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[str | None] | None = None
        self.last_s = time.monotonic()  # when the newest checkpoint was begun
        self.failure: str | None = None  # why the newest could not be written
        self.stalled_s = 0.0  # how long training has waited, in total

    def begin(self, path: Path, state: dict[str, Any]) -> None:
        """Copy `state` and write it to `path` in the background. Only rank 0 writes."""
        self.last_s = time.monotonic()
        if rank() != 0:
            return
        start = time.perf_counter()
        self.wait()
        self._pending = self._pool.submit(self._write, path, to_host(state), _record_event())
        self.stalled_s += time.perf_counter() - start

    def write(self, path: Path, state: dict[str, Any]) -> bool:
        """Write a checkpoint that is not the newest, such as the best; return whether it worked."""
        self.wait()
        failure = self._write(path, to_host(state), _record_event())
        if failure:
            self._report(failure)
        return failure is None

    def _write(
        self, path: Path, state: dict[str, Any], copied: "torch.cuda.Event | None"
    ) -> str | None:
        if copied is not None:
            copied.synchronize()
        if not _is_finite(state):
            return f"{path}: not written, as its weights or moments are not finite"
        try:
            checkpoint.save(path, state, self._keep)
        except UserError as e:
            return str(e)
        return None

    def wait(self) -> None:
        """Wait until nothing is being written, and report a failure."""
        if self._pending is not None:
            self.failure, self._pending = self._pending.result(), None
            if self.failure:
                self._report(self.failure)

    def poll(self) -> None:
        """Report a failure, without waiting."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()


def _record_event() -> "torch.cuda.Event | None":
    """Return an event after the copies begun so far; None without CUDA."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _is_finite(state: dict[str, Any]) -> bool:
    """Return whether all weights and moments are finite, which their sums tell."""
    leaves = [leaf for name in _WEIGHTS for _, leaf in checkpoint.walk(state[name])]
    tensors = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    return all(bool(x.sum(dtype=torch.float64).isfinite()) for x in tensors)
