"""Which process this is among how many, and what they say to each other; on one process all of it is a no-op.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE. Nothing here is needed to run on one device.
"""

import contextlib
import datetime
import os
import secrets
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from vgan.runtime.errors import UserError

T = TypeVar("T")
# An evaluation on rank 0 may take long while the others wait.
_PATIENCE = datetime.timedelta(hours=2)
_MEETING_S = 600  # from the first process that is there until the last one is


def rank() -> int:
    """This process's number, from 0; set by torchrun."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """The number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def print0(*text: object) -> None:
    """print on rank 0 alone, at once."""
    if rank() == 0:
        print(*text, flush=True)


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[None]:
    """The group of all processes while a run lasts: NCCL between GPUs, gloo otherwise."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank_, size = next(rendezvous("env://", timeout=_PATIENCE))
    store = dist.PrefixStore(meet(store, rank_, size), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank_, world_size=size, timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def meet(store: dist.Store, rank_: int, size: int) -> str:
    """A name that the processes of this group share, and no group before it had; returns when all have taken it.

    torchrun keeps its store when it starts a group again, and the dead one's addresses in it: a hang, seen with torch 2.15.
    Nothing that it tells its processes counts the groups; TORCHELASTIC_RESTART_COUNT is each machine's own. So the first
    process names the group, and each other one leaves a random token of its own. The first answers whatever tokens it
    finds, until all have confirmed its name: a token of the dead is answered too, but nobody confirms it, and the living one's
    takes its place. Raises UserError where somebody has not come after 10 minutes.
    """
    name, token, deadline = (
        secrets.token_hex(8),
        secrets.token_hex(8),
        time.monotonic() + _MEETING_S,
    )
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
            told = f"process {missing[0]} of {size} has not come in {_MEETING_S // 60} minutes"
            raise UserError(f"{told}; see what its machine says, then start all of them again")
        if missing:
            time.sleep(0.05)  # here rather than in the store, which hears no signal
    return name


@contextlib.contextmanager
def local_rank0_first() -> Iterator[None]:
    """The first process of each machine goes through the block before the others do: what it leaves on the disk, they find."""
    if world_size() > 1 and local_rank() != 0:
        dist.barrier()
    yield
    if world_size() > 1 and local_rank() == 0:
        dist.barrier()


def barrier() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every process: only its machine needs to have the run folder."""
    box = [make() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]  # type: ignore[return-value]


def all_gather(value: T) -> list[T]:
    """What each process has, in the order of their ranks, on every process."""
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


def broadcast_(values: list[Tensor]) -> None:
    """Replace tensors by rank 0's, in place."""
    if world_size() > 1:
        for value in values:
            dist.broadcast(value, 0)


class SharedFlags:
    """Lets all processes act on a wish of any of them in the same step.

    What was wished in one call is answered by the next, so that nobody waits: the exchange goes on during the step between.
    """

    def __init__(self, wishes: int) -> None:
        self._flags = torch.zeros(wishes)
        self._begun: dist.Work | None = None

    def __call__(self, *wishes: bool) -> list[bool]:
        if world_size() == 1:
            return list(wishes)
        answer = [False] * len(wishes)
        if self._begun is not None:
            self._begun.wait()
            answer = (self._flags > 0).tolist()
        self._flags = torch.tensor(wishes, dtype=torch.float32)
        self._begun = dist.all_reduce(self._flags, async_op=True)
        return answer

    def close(self) -> None:
        """Every process must come here after equally many calls."""
        if self._begun is not None:
            self._begun.wait()
