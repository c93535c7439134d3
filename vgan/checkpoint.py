"""Checkpoints: named parts of plain containers and tensors, written whole or not at all, read without running code."""

import contextlib
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from vgan.errors import UserError

FORMAT = 1  # raised when the meaning of the parts changes
_NAME = re.compile(r"checkpoint-(\d{9})\.pt")
_PARTS = {"format", "cur_nimg", "config", "sizes", "data", "G", "D", "G_ema", "opt_G", "opt_D", "scaler_G", "scaler_D"}


def path_at(run_dir: Path, cur_nimg: int) -> Path:
    """checkpoint-<images seen, 9 digits>.pt"""
    return run_dir / f"checkpoint-{cur_nimg:09d}.pt"


def all_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(p for p in run_dir.glob("checkpoint-*.pt") if _NAME.fullmatch(p.name))


def save(path: Path, parts: dict[str, Any], keep: int) -> None:
    """Write `parts` and then remove all but the newest `keep` checkpoints.

    The bytes go to a temporary file, to the disk, and only then to the final name: a kill at any moment leaves the old
    checkpoints or the new one. Raises UserError, with the old ones untouched, where the disk is full or read-only.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save({"format": FORMAT, **parts}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch's zip writer reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = e.strerror if isinstance(e, OSError) else str(e).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); free space, then the same command goes on") from e
    _sync_folder(path.parent)
    for old in all_checkpoints(path.parent)[:-keep]:
        old.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the new name durable; Windows has no such call and needs none."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def find(ckpt: str | Path) -> Path:
    """The checkpoint file that a file or a run folder means; raises UserError if there is none."""
    path = Path(ckpt).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"ckpt={ckpt}: no such file or folder; give a checkpoint file or a run folder")
    found = all_checkpoints(path)
    if not found:
        raise UserError(f"ckpt={ckpt}: the folder holds no checkpoint-*.pt; give a run folder that has reached a checkpoint")
    return found[-1]


def load(path: Path) -> dict[str, Any]:
    """The parts of a checkpoint, on the CPU. Nothing in the file is run. Raises UserError where it is damaged or foreign."""
    fix = "delete or move it, and the same command goes on from the checkpoint before it"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch writes the sums but does not look at them
        if damaged:
            raise zipfile.BadZipFile(damaged)
        parts = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: not a readable checkpoint (damaged, or not vgan's); {fix}") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}); check its permissions") from e
    if not isinstance(parts, dict) or not parts.keys() >= _PARTS:
        raise UserError(f"{path}: not a vgan checkpoint (parts are missing); {fix}")
    if parts["format"] != FORMAT:
        raise UserError(f"{path}: has format {parts['format']}, this vgan reads {FORMAT}; use the version that wrote it")
    return parts
