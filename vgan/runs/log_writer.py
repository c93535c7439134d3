"""Statistics of a run: stats.jsonl, metrics.jsonl and TensorBoard curves."""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vgan.runs.trackers import Reporter
from vgan.runtime.distributed import print0, rank
from vgan.runtime.errors import UserError
from vgan.runtime.files import append_line, write_atomically, write_png

_MAX_SCALAR_BYTES = 10_000  # of an event; larger ones are images


def append_metrics(
    run_dir: Path,
    ckpt_name: str,
    cur_nimg: int,
    values: Mapping[str, float],
    protocol: Mapping[str, Any],
    extra: Mapping[str, float | None] | None = None,
) -> None:
    """Append the metrics of a checkpoint to metrics.jsonl. Raises UserError on a full disk."""
    line = {"ckpt": ckpt_name, "cur_nimg": cur_nimg, **values, **(extra or {})}
    append_line(run_dir / "metrics.jsonl", json.dumps({**line, "protocol": protocol}))


class TensorBoardFile:
    """A TensorBoard event file, which replaces the steps from `first_step` on of earlier files.

    It is written in the calling thread, so that a full disk raises OSError here. SummaryWriter
    writes in a thread of its own, which a full disk ends with a traceback.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow to import
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        unique = f"{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self.path = run_dir / f"events.out.tfevents.{time.time():.0f}.{unique}"
        self._file = open(self.path, "wb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, name: str, value: float | str | np.ndarray, step: int) -> None:
        """Add a number, a text, or an image (H, W) or (H, W, 3) uint8."""
        from torch.utils.tensorboard import summary

        if isinstance(value, str):
            content = summary.text(name, value)
        elif isinstance(value, np.ndarray):
            content = summary.image(name, value, dataformats="HW" if value.ndim == 2 else "HWC")
        else:
            content = summary.scalar(name, value)
        self._write(step=step, summary=content)

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _last_step(run_dir: Path) -> int:
    """Return the last step that the event files of a run have curves of; -1 without any."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    last = -1
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        with path.open("rb") as f, contextlib.suppress(DecodeError, ValueError):
            while header := f.read(12):  # the length of an event and its checksum
                length = int.from_bytes(header[:8], "little")
                if length > _MAX_SCALAR_BYTES:
                    f.seek(length + 4, os.SEEK_CUR)
                    continue
                content = f.read(length)
                if len(f.read(4)) < 4:  # cut short; this step may lack more curves
                    last = max(last - 1, -1)
                    break
                event = Event.FromString(content)
                if event.HasField("session_log"):
                    last = min(last, event.step - 1)
                elif event.HasField("summary"):
                    last = max(last, event.step)
    return last


class RunLogger:
    """Writes stats.jsonl and the TensorBoard events of a run, from `cur_nimg` images on.

    Later lines of an earlier session are removed. Curves that the event files lack are written
    again from stats.jsonl. A full disk does not end the run: lines wait in memory until they can be
    written, images are left out, and one warning is printed. Of several processes only the first
    writes. `reporter` gets the same numbers, texts and images as TensorBoard.
    """

    def __init__(self, run_dir: Path, cur_nimg: int, reporter: Reporter | None = None) -> None:
        self._run_dir, self._path = run_dir, run_dir / "stats.jsonl"
        self._reporter = reporter or Reporter("none")
        self._waiting: list[str] = []  # lines that are not in stats.jsonl yet
        self._events: TensorBoardFile | None = None
        self._events_from = 0  # the first step of the next event file
        self._warned = False
        if rank() == 0:
            self._cut_lines(cur_nimg)
            with self._warn_once():
                self._restart_curves(cur_nimg)

    def truncate(self, cur_nimg: int) -> None:
        """Remove what was written after cur_nimg images."""
        if rank() != 0:
            return
        self.close()
        self._waiting = [line for line in self._waiting if _nimg_of(line) <= cur_nimg]
        with self._warn_once():
            self._cut_lines(cur_nimg)
            self._restart_curves(cur_nimg)

    def _cut_lines(self, cur_nimg: int) -> None:
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        lines = [line + "\n" for line in text.splitlines() if _nimg_of(line) <= cur_nimg]
        if "".join(lines) != text:
            write_atomically(self._path, "".join(lines).encode(), durable=True)

    def _restart_curves(self, cur_nimg: int) -> None:
        """Begin an event file, and write into it the curves that are in no earlier one."""
        self._events_from = cur_nimg + 1
        newest = max(map(_nimg_of, self._lines()), default=-1)
        last = _last_step(self._run_dir)
        if last < newest:
            self._events_from = max(last, 0)  # inclusive, as that step may be incomplete
        self._write_curves(cur_nimg, [])

    def _lines(self) -> list[str]:
        text = ""
        if self._path.exists():
            text = self._path.read_text(encoding="utf-8", errors="replace")
        return text.splitlines() + self._waiting

    def write(self, cur_nimg: int, values: Mapping[str, Any]) -> None:
        """Append a line to stats.jsonl, with null for what is not finite, and add its curves."""
        if rank() != 0:
            return
        plain: dict[str, Any] = {"cur_nimg": cur_nimg}
        for name, value in values.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            plain[name] = value if finite else None
        line = json.dumps(plain)
        self._waiting.append(line)
        self._write_lines()
        with self._warn_once():
            self._write_curves(cur_nimg, [line])
        self._reporter.log(cur_nimg, _curve_values(plain))

    def image(self, cur_nimg: int, name: str, path: Path | None, grid: np.ndarray) -> None:
        """Add an image (H, W) or (H, W, 3) uint8 to the curves, and write it to `path` as PNG."""
        if rank() != 0:
            return
        if path:
            with self._warn_once():
                write_png(path, grid)
        self._write_lines()
        with self._warn_once():
            self._write_curves(cur_nimg, [], {name: grid})
        self._reporter.image(cur_nimg, name, grid)

    def _write_lines(self) -> None:
        with self._warn_once():
            if self._waiting:
                append_line(self._path, "\n".join(self._waiting))
                self._waiting = []

    def _write_curves(
        self, cur_nimg: int, lines: list[str], images: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Write lines and images to the event file, or to a new one with all lines it lacks.

        Raises OSError if the disk is full. The event file may then end within an event, which
        TensorBoard does not read past, so that the next call begins another.
        """
        events, self._events = self._events, None
        is_new = events is None
        if events is None:
            events = TensorBoardFile(self._run_dir, self._events_from)
            lines = [line for line in self._lines() if _nimg_of(line) >= self._events_from]
        try:
            for line in lines:
                _add_curves(events, json.loads(line))
            for name, image in (images or {}).items():
                events.add(name, image, cur_nimg)
            events.flush()
        except OSError:
            with contextlib.suppress(OSError):
                events.close()
            if is_new:
                events.path.unlink(missing_ok=True)
            else:
                self._events_from = cur_nimg
            raise
        self._events = events

    @contextlib.contextmanager
    def _warn_once(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UserError) as e:
            if not self._warned:
                print0(
                    f"\nStatistics and grids cannot be written ({e}). "
                    "Training continues, and statistics wait in memory."
                )
            self._warned = True

    def close(self) -> None:
        """Write what waits, and close the event file."""
        if rank() != 0:
            return
        self._write_lines()
        with self._warn_once():
            self._write_curves(self._events_from, [])
        if self._events is not None:
            with self._warn_once():
                self._events.close()
            self._events = None


def _add_curves(events: TensorBoardFile, line: dict[str, Any]) -> None:
    for name, value in _curve_values(line).items():
        events.add(name, value, line["cur_nimg"])


def _curve_values(line: dict[str, Any]) -> dict[str, float | str]:
    """Return the numbers and texts of a line of stats.jsonl, with NaN for null."""
    values = {name: math.nan if value is None else value for name, value in line.items()}
    del values["cur_nimg"]
    return {name: value for name, value in values.items() if isinstance(value, (int, float, str))}


def _nimg_of(line: str) -> float:
    """Return cur_nimg of a line of stats.jsonl; infinity if the line is damaged."""
    try:
        return float(json.loads(line)["cur_nimg"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return math.inf
