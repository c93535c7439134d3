"""Running means on the device, read once a tick into stats.jsonl and TensorBoard."""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgan.runtime.distributed import mean_, print0, rank
from vgan.runtime.errors import UserError
from vgan.runtime.files import append_line, write_atomically, write_png


class Stats:
    """Sums of scalar tensors that stay on the device until `means` is asked for, so that a step never waits."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Take one step's scalars. A name need not come in every step."""
        for name in sorted(values.keys() - self._sums.keys()):  # in one order on all processes
            self._sums[name] = torch.zeros_like(values[name], dtype=torch.float32)
        torch._foreach_add_(
            [self._sums[name] for name in values],
            [value.detach().float() for value in values.values()],
        )
        for name in values:
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean of each name since the last call, over all processes; empties the sums. Waits for the device once."""
        means = self.peek()
        self._sums, self._counts = {}, {}
        return means

    def peek(self) -> dict[str, float]:
        """As `means`, and keeps the sums."""
        names = list(self._sums)
        sums = mean_(torch.stack([self._sums[n] for n in names])).tolist() if names else []
        return {n: s / self._counts[n] for n, s in zip(names, sums)}

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last `means`, averaged over all processes, for a checkpoint between two ticks."""
        sums = mean_(torch.stack(list(self._sums.values()))).unbind() if self._sums else ()
        return {"sums": dict(zip(self._sums, sums)), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._sums = {n: s.to(device) for n, s in state["sums"].items()}
        self._counts = dict(state["counts"])


class TensorBoardFile:
    """TensorBoard's event file of a run, written in the thread that asks: a disk that refuses raises OSError here.

    torch's SummaryWriter writes from a thread of its own, which a full disk ends with a traceback. Steps from first_step on that
    earlier files hold are taken back.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # imports slowly
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._path = run_dir / name
        self._file = open(self._path, "wb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        try:
            self._write(file_version="brain.Event:2")
            self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))
            self.flush()
        except OSError:
            self.discard()
            raise

    def add(self, name: str, value: float | str | np.ndarray, step: int) -> None:
        """A number, a text, or a picture (H, W) or (H, W, 3) uint8."""
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

    def discard(self) -> None:
        """Close and remove the file, whatever the disk says."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


class RunLogger:
    """stats.jsonl and the TensorBoard events of a run folder, cut back to cur_nimg where a run goes on from there.

    A disk that refuses costs no run: lines and curves wait in memory and are written when it takes them again, grids are left
    out, and that is said once. Of several processes only the first writes.
    """

    def __init__(self, run_dir: Path, cur_nimg: int) -> None:
        self._path, self._run_dir = run_dir / "stats.jsonl", run_dir
        self._lines: list[str] = []  # that wait, as do
        self._curves: list[tuple[int, str, float | str | np.ndarray]] = []
        self._told = False
        self._board: TensorBoardFile | None = None
        if rank() == 0:
            self._cut_lines(cur_nimg)
            self._board = TensorBoardFile(run_dir, cur_nimg + 1)

    def truncate(self, cur_nimg: int) -> None:
        """Drop what was written after cur_nimg; it is about to be written again."""
        if rank() != 0:
            return
        self._lines = [line for line in self._lines if _nimg_of(line) <= cur_nimg]
        self._curves = [curve for curve in self._curves if curve[0] <= cur_nimg]
        self.close()
        with self._told_once():
            self._cut_lines(cur_nimg)
        with self._told_once():
            self._board = TensorBoardFile(self._run_dir, cur_nimg + 1)

    def _cut_lines(self, cur_nimg: int) -> None:
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        kept = "".join(line + "\n" for line in text.splitlines() if _nimg_of(line) <= cur_nimg)
        if kept != text:
            write_atomically(self._path, kept.encode(), durable=True)

    def write(self, cur_nimg: int, values: dict[str, Any]) -> None:
        """One object a tick, and a curve for every number. What is not finite is null there."""
        if rank() != 0:
            return
        plain = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self._lines.append(json.dumps({"cur_nimg": cur_nimg, **plain}))
        self._curves += [(cur_nimg, name, value) for name, value in values.items()]
        self._write_waiting()

    def image(self, cur_nimg: int, name: str, path: Path | None, sheet: np.ndarray) -> None:
        """A grid (H, W) or (H, W, 3) uint8 in TensorBoard, and as a PNG file where there is a path."""
        if rank() != 0:
            return
        with self._told_once():
            if path:
                write_png(path, sheet)
        self._curves.append((cur_nimg, name, sheet))
        self._write_waiting()
        self._curves = [curve for curve in self._curves if not isinstance(curve[2], np.ndarray)]

    def _write_waiting(self) -> None:
        with self._told_once():
            if self._lines:
                append_line(self._path, "\n".join(self._lines))
                self._lines = []
        with self._told_once():
            self._write_curves()

    def _write_curves(self) -> None:
        """Raises OSError where the disk refuses; the file then ends with half an event, and the next call begins another."""
        if not self._curves:
            return
        before, self._board = self._board, None
        board = before or TensorBoardFile(self._run_dir, self._curves[0][0])
        try:
            for cur_nimg, name, value in self._curves:
                board.add(name, value, cur_nimg)
            board.flush()
        except OSError:
            if board is before:
                with contextlib.suppress(OSError):
                    board.close()
            else:
                board.discard()  # all that it holds waits still; a tick a file would be too many
            raise
        self._board, self._curves = board, []

    @contextlib.contextmanager
    def _told_once(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UserError) as e:
            if not self._told:
                print0(
                    f"\nstatistics and grids cannot be written, training goes on and statistics wait ({e})"
                )
            self._told = True

    def close(self) -> None:
        self._write_waiting()
        if self._board is not None:
            with self._told_once():
                self._board.close()
            self._board = None


def _nimg_of(line: str) -> float:
    """The images seen of a line of stats.jsonl; infinite where it has none, as when a kill cut it short."""
    try:
        return float(json.loads(line)["cur_nimg"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return math.inf


def append_metrics(
    run_dir: Path, ckpt_name: str, cur_nimg: int, values: Any, protocol: Any, extra: Any
) -> None:
    line = {"ckpt": ckpt_name, "cur_nimg": cur_nimg, **values, **extra, "protocol": protocol}
    append_line(run_dir / "metrics.jsonl", json.dumps(line))
