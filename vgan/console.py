"""Progress on a terminal; nothing where there is none, so that a log file holds lines and not bars."""

from typing import Any

from tqdm import tqdm


def progress_bar(total: int, what: str | None = None, delay: float = 2.0) -> "tqdm[Any]":
    """A bar of `total` pictures, at most 80 columns wide, shown once the work has taken `delay` seconds; a context manager."""
    return tqdm(total=total, desc=what, unit="img", delay=delay, disable=None, leave=False, ncols=79)
