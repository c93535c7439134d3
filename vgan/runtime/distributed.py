"""Rank, world size and communication between processes; no-ops in a single process.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE.
"""

import contextlib
import datetime
import os
import secrets
import time
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous as open_store

from vgan.runtime.errors import UserError

T = TypeVar("T")
_TIMEOUT = datetime.timedelta(hours=2)  # rank 0 may evaluate for long while the others wait
_RENDEZVOUS_S = 600


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def print0(*text: object) -> None:
    """Print on rank 0 only, and flush."""
    if rank() == 0:
        print(*text, flush=True)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Open the process group for the time of a run: NCCL between GPUs, gloo otherwise."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank_, size = next(open_store("env://", timeout=_TIMEOUT))
    store = dist.PrefixStore(rendezvous(store, rank_, size), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank_, world_size=size, timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rendezvous(store: dist.Store, rank_: int, size: int) -> str:
    """Return a name shared by the processes of this group and by no earlier group.

    It serves as prefix of the store's keys. torchrun keeps its store when it restarts a group, with
    the addresses of the previous one in it: the new group would hang (seen with torch 2.15).
    TORCHELASTIC_RESTART_COUNT does not help, since it is counted per machine.

    Rank 0 chooses the name, and every other process sets a random token. Rank 0 answers each token
    with the name until all processes have confirmed it. Tokens of an earlier group are answered
    too, but nobody confirms them, and the tokens of this group replace them.

    Raises UserError where a process is missing after 10 minutes.
    """
    name, token = secrets.token_hex(8), secrets.token_hex(8)
    deadline = time.monotonic() + _RENDEZVOUS_S
    missing = list(range(1, size)) if rank_ == 0 else [0]
    if rank_ != 0:
        store.set(f"vgan/token/{rank_}", token)
    while missing:
        if rank_ == 0:
            for other in missing:
                if store.check([f"vgan/token/{other}"]):
                    store.set(f"vgan/answer/{store.get(f'vgan/token/{other}').decode()}", name)
            missing = [other for other in missing if not store.check([f"vgan/{name}/{other}"])]
        elif store.check([f"vgan/answer/{token}"]):
            name, missing = store.get(f"vgan/answer/{token}").decode(), []
            store.set(f"vgan/{name}/{rank_}", "here")
        if time.monotonic() > deadline:
            raise UserError(
                f"process {missing[0]} of {size} has not started within {_RENDEZVOUS_S // 60} "
                "minutes; see the output of its machine, then start all of them again"
            )
        if missing:
            time.sleep(0.05)  # a wait inside the store would block signals
    return name


@contextlib.contextmanager
def local_rank0_first() -> Iterator[None]:
    """Run the block on the first process of each machine, then on the others."""
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 only and return its result on every process."""
    result = [make() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(result, 0)
    return cast(T, result[0])


def all_gather(value: T) -> list[T]:
    """Return the values of all processes, in the order of their ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def mean_(values: Tensor) -> Tensor:
    """Replace values by their mean over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


class SharedFlags:
    """Flags that all processes see in the same step if any of them has set them.

    Calling it exchanges the flags. Each call returns the flags of the call before, so that no
    process waits: the exchange happens during the step in between.
    """

    def __init__(self, count: int) -> None:
        self._flags = torch.zeros(count)
        self._pending: dist.Work | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        if world_size() == 1:
            return list(flags)
        previous = [False] * len(flags)
        if self._pending is not None:
            self._pending.wait()
            previous = (self._flags > 0).tolist()
        self._flags = torch.tensor(flags, dtype=torch.float32)
        self._pending = dist.all_reduce(self._flags, async_op=True)
        return previous

    def close(self) -> None:
        """Wait for the last exchange. All processes must have made equally many calls."""
        if self._pending is not None:
            self._pending.wait()
