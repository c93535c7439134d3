"""Checkpoints from a background thread: the step waits for a copy of the tensors, not for the disk."""

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


def to_host(node: Any) -> Any:
    """A copy of nested containers in the host's memory, which later steps do not change.

    From a GPU the copies are only begun: wait for the device before reading them.
    """
    if isinstance(node, Tensor):
        if node.device.type != "cuda":
            return node.detach().to("cpu", copy=True)
        return torch.empty_like(node, device="cpu", pin_memory=True).copy_(
            node.detach(), non_blocking=True
        )
    if isinstance(node, dict):
        return {k: to_host(v) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(map(to_host, node))
    return node


def _begin_copy(parts: dict[str, Any]) -> "tuple[dict[str, Any], torch.cuda.Event | None]":
    """The copy, and what to wait for before it is read."""
    copied, done = to_host(parts), None
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        done = torch.cuda.Event()
        done.record()
    return copied, done


class CheckpointWriter:
    """Writes one checkpoint at a time; `begin` waits only where the one before is still being written.

    What is not finite is not written: the newest checkpoint on disk is always one to go back to. A checkpoint that cannot be
    written is told to `report` once, and the run goes on with the ones before it.
    """

    def __init__(self, keep: int, report: Callable[[str], None]) -> None:
        self._keep, self._report = keep, report
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._begun: Future[str | None] | None = None
        self.last_s = time.monotonic()  # when the newest one was begun
        self.failure: str | None = None  # why the newest is not on the disk
        self.stalled_s = 0.0  # in which steps waited

    def begin(self, path: Path, parts: dict[str, Any]) -> None:
        """Copy `parts` and write them to `path` while training goes on. Of several processes only the first does."""
        self.last_s = time.monotonic()
        if rank() != 0:
            return
        start = time.perf_counter()
        self.wait()
        self._begun = self._pool.submit(self._write, path, *_begin_copy(parts))
        self.stalled_s += time.perf_counter() - start

    def write(self, path: Path, parts: dict[str, Any]) -> bool:
        """Write a checkpoint that is not the newest, such as the best, and wait for it; whether it is on the disk."""
        self.wait()
        failure = self._write(path, *_begin_copy(parts))
        if failure:
            self._report(failure)
        return failure is None

    def _write(
        self, path: Path, parts: dict[str, Any], copied: "torch.cuda.Event | None"
    ) -> str | None:
        if copied is not None:
            copied.synchronize()
        if not _is_finite(parts):
            return f"{path}: not written, as its weights or moments are not finite"
        try:
            checkpoint.save(path, parts, self._keep)
        except UserError as e:
            return str(e)
        return None

    def wait(self) -> None:
        """Until nothing is being written; reports what could not be."""
        if self._begun is not None:
            self.failure, self._begun = self._begun.result(), None
            if self.failure:
                self._report(self.failure)

    def poll(self) -> None:
        """As `wait`, if that takes no time."""
        if self._begun is not None and self._begun.done():
            self.wait()

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()


def _is_finite(parts: dict[str, Any]) -> bool:
    """Whether all weights and moments are; a sum is enough to tell, and quick."""
    leaves = (
        leaf
        for name in ("G", "D", "G_ema", "opt_G", "opt_D")
        for _, leaf in checkpoint.walk(parts[name])
    )
    return all(
        bool(x.sum(dtype=torch.float64).isfinite())
        for x in leaves
        if isinstance(x, Tensor) and x.is_floating_point()
    )
