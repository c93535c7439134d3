"""Progress: a bar on a terminal; where there is none, lines for a log file, or nothing."""

import contextlib
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from tqdm import tqdm

LONG_S = 24 * 3600.0


def progress_bar(total: int, what: str | None = None, delay: float = 2.0) -> "tqdm[Any]":
    """A bar of `total` pictures, at most 80 columns wide, shown once the work has taken `delay` seconds; a context manager."""
    return tqdm(
        total=total, desc=what, unit="img", delay=delay, disable=None, leave=False, ncols=79
    )


def duration(seconds: float) -> str:
    """Two units of time: '5 s', '3 min 8 s', '2 h 5 min', '8 d 3 h'."""
    s = round(seconds)
    for name, length, smaller, part in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if s >= length:
            return f"{s // length} {name}" + (
                f" {s % length // part} {smaller}" if s % length // part else ""
            )
    return f"{s} s"


class IgnoreWriteErrors:
    """A text stream for a run's messages: what it cannot take, as on a full disk or a terminal that is gone, is left out."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.failed = stream, False

    def write(self, text: str) -> int:
        with self._watching():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._watching():
            self._stream.flush()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.failed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def ignore_write_errors() -> Iterator[None]:
    """While inside, stdout and stderr refuse nothing. After a failure they stay so: Python flushes them once more at its end."""
    before = sys.stdout, sys.stderr
    forgiving = [IgnoreWriteErrors(stream) for stream in before]
    sys.stdout, sys.stderr = forgiving  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in forgiving:
            stream.flush()
        if not any(stream.failed for stream in forgiving):
            sys.stdout, sys.stderr = before


class TrainingBar:
    """How far a run has come: a bar on a terminal, otherwise a line a tick.

    Speed and time left are those since the last tick, which follows the run more closely than a mean from its start. A run that
    would take more than a day says so once.
    """

    def __init__(self, total_nimg: int, cur_nimg: int, silent: bool) -> None:
        self._total, self._now, self._silent = total_nimg, cur_nimg, silent
        self._then_nimg, self._then_s, self._told = cur_nimg, time.perf_counter(), False
        bar = {
            "unit": "img",
            "unit_scale": True,
            "ncols": 79,
            "smoothing": 0.05,
            "disable": True if silent else None,
        }
        self._bar: tqdm[Any] = tqdm(total=total_nimg, initial=cur_nimg, **bar)  # type: ignore[arg-type]

    def update(self, images: int) -> None:
        """So many more images were seen; fewer, after going back."""
        self._now += images
        if images < 0:
            self._then_nimg, self._then_s = self._now, time.perf_counter()
        self._bar.update(images)

    def tick(self, losses: dict[str, float]) -> None:
        """Show the speed, the time left and the losses."""
        seconds, images = time.perf_counter() - self._then_s, self._now - self._then_nimg
        self._then_nimg, self._then_s = self._now, time.perf_counter()
        if self._silent or not images:
            return
        speed = images / max(seconds, 1e-9)
        left_s = (self._total - self._now) / speed
        shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self._bar.set_postfix_str(shown)
        if self._bar.disable:
            share = min(100, 100 * self._now / self._total)  # the last batch may reach beyond
            left = f", {duration(left_s)} left" if self._now < self._total else ""
            print(
                f"{self._now:>11,} images ({share:3.0f} %)  {speed:,.0f} img/s{left}  {shown}",
                file=sys.stderr,
                flush=True,
            )
        if left_s > LONG_S and not self._told:
            self._told = True
            hint = "total_kimg=... makes it shorter, a smaller size= faster; vgan-doctor compares settings"
            self._bar.write(
                f"at {speed:,.0f} img/s this run takes {duration(left_s)}; {hint}", file=sys.stderr
            )

    def close(self) -> None:
        self._bar.close()


def in_lines(parts: Sequence[str], lead: str = "") -> str:
    """Parts three columns apart after `lead`, in lines of at most 80 columns; further lines begin two columns in."""
    lines = [lead]
    for part in parts:
        if len(lines[-1]) + len(part) > 80 and lines[-1].strip():
            lines.append("  ")
        lines[-1] += f"{part}   "
    return "\n".join(line.rstrip() for line in lines)


def report_line(name: str, text: str) -> str:
    """A line of a report, broken at 80 columns: name on the left, text from column 12 on. A longer word stays whole."""
    return textwrap.fill(
        text,
        80,
        initial_indent=f"{name:<11} ",
        subsequent_indent=" " * 12,
        break_long_words=False,
        break_on_hyphens=False,
    )
