"""Which process this is among how many; on one process all of it is a no-op."""

import os


def rank() -> int:
    """This process's number, from 0; set by torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def print0(*text: object) -> None:
    """print on rank 0 alone, at once."""
    if rank() == 0:
        print(*text, flush=True)
