"""Console output: progress bars, durations and lines of at most 80 columns."""

import contextlib
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TextIO, cast

from tqdm import tqdm

LONG_S = 24 * 3600.0  # a run longer than this gets a hint
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def progress_bar(
    total: int, what: str | None = None, delay: float = 2.0, unit: str = "img"
) -> "tqdm[Any]":
    """Return a bar of `total` units, shown on a terminal after `delay` s; a context manager."""
    return tqdm(total=total, desc=what, unit=unit, delay=delay, disable=None, leave=False, ncols=79)


def duration(seconds: float) -> str:
    """Format a time in at most two units: '5 s', '3 min 8 s', '2 h 5 min', '8 d 3 h'."""
    s = round(seconds)
    for (name, length), (smaller, part) in pairwise(_UNITS):
        if s >= length:
            rest = s % length // part
            return f"{s // length} {name}" + (f" {rest} {smaller}" if rest else "")
    return f"{s} s"


class IgnoreWriteErrors:
    """A text stream that drops what it cannot write, as on a full disk or a closed terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.failed = stream, False

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self.failed = True
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self.failed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def ignore_write_errors() -> Iterator[None]:
    """Ignore write errors of stdout and stderr inside the block.

    After a failure they stay replaced, since Python flushes both once more when it exits.
    """
    before = sys.stdout, sys.stderr
    streams = [IgnoreWriteErrors(stream) for stream in before]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        if not any(stream.failed for stream in streams):
            sys.stdout, sys.stderr = before


class TrainingBar:
    """The progress of a run: a bar on a terminal, otherwise one line per tick on stderr.

    Speed and remaining time are measured since the last tick, so that they follow changes. A run
    that would take more than a day prints a hint once. total_nimg, cur_nimg: in images.
    """

    def __init__(self, total_nimg: int, cur_nimg: int, silent: bool) -> None:
        self._total_nimg, self._cur_nimg, self._silent = total_nimg, cur_nimg, silent
        self._hint_shown = False
        self._start_interval()
        self._bar: tqdm[Any] = tqdm(
            total=total_nimg,
            initial=cur_nimg,
            unit="img",
            unit_scale=True,
            ncols=79,
            smoothing=0.05,
            disable=True if silent else None,
        )

    def _start_interval(self) -> None:
        self._tick_nimg, self._tick_s = self._cur_nimg, time.perf_counter()

    def update(self, images: int) -> None:
        """Advance by a number of images, negative after a roll-back."""
        self._cur_nimg += images
        if images < 0:
            self._start_interval()
        self._bar.update(images)

    def tick(self, losses: dict[str, float]) -> None:
        """Show the speed, the remaining time and the losses."""
        images, seconds = self._cur_nimg - self._tick_nimg, time.perf_counter() - self._tick_s
        self._start_interval()
        if self._silent or not images:
            return
        speed = images / max(seconds, 1e-9)
        left_s = (self._total_nimg - self._cur_nimg) / speed
        shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self._bar.set_postfix_str(shown)
        if self._bar.disable:
            percent = min(100, 100 * self._cur_nimg / self._total_nimg)  # the last batch overshoots
            left = f", {duration(left_s)} left" if left_s > 0 else ""
            line = f"{self._cur_nimg:>11,} images ({percent:3.0f} %)  {speed:,.0f} img/s{left}"
            print(f"{line}  {shown}", file=sys.stderr, flush=True)
        if left_s > LONG_S and not self._hint_shown:
            self._hint_shown = True
            self._bar.write(
                f"at {speed:,.0f} img/s this run takes {duration(left_s)}; a smaller total_kimg "
                "makes it shorter, a smaller size= faster; vgan-doctor compares settings",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def in_lines(parts: Sequence[str], lead: str = "") -> str:
    """Join parts, three spaces apart, in lines of at most 80 columns that start with `lead`.

    Further lines are indented by two columns.
    """
    lines = [lead]
    for part in parts:
        if len(lines[-1]) + len(part) > 80 and lines[-1].strip():
            lines.append("  ")
        lines[-1] += f"{part}   "
    return "\n".join(line.rstrip() for line in lines)


def report_line(name: str, text: str) -> str:
    """Format a line of a report: name on the left, text from column 12, wrapped at 80 columns."""
    return textwrap.fill(
        text,
        80,
        initial_indent=f"{name:<11} ",
        subsequent_indent=" " * 12,
        break_long_words=False,
        break_on_hyphens=False,
    )
