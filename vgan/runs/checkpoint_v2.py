"""Checkpoints of formats 1 and 2: zip archives that torch.save wrote. Format 1 has no digest."""

import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from vgan.runtime.renamed import METRICS

# What zipfile and torch's unpickler raise for a damaged file, besides OSError.
ERRORS = (
    pickle.PickleError, zipfile.BadZipFile, struct.error, RuntimeError, EOFError, ValueError,
    LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, ImportError,
    MemoryError,
)  # fmt: skip
_MAX_PICKLE_BYTES = 8_000_000  # a billion weights need about 2 MB
_KEYS = {"controls": "strength", "rescue": "recovery", "varied": "diversity"}
_RECOVERY_KEYS = {"tries": "rollbacks", "fault_nimg": "failure_nimg"}


def read(path: Path) -> tuple[Any, Any, str, Any]:
    """Return format, digest, an empty header and the state as it was saved.

    Raises one of ERRORS for a damaged file. The entries must be uncompressed, so that the file's
    size bounds the memory, and their checksums must be right, which torch does not verify.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickle_bytes = sum(e.file_size for e in entries if e.filename.lower().endswith(".pkl"))
        if (
            any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            or sum(entry.file_size for entry in entries) > path.stat().st_size
            or pickle_bytes > _MAX_PICKLE_BYTES
            or archive.testzip()
        ):
            raise zipfile.BadZipFile("compressed, too large, or with a wrong checksum")
    with warnings.catch_warnings(), path.open("rb") as f:
        warnings.simplefilter("ignore")  # about files that raise an error as well
        state = torch.load(f, map_location="cpu", weights_only=True)
    return state.pop("format", None), state.pop("digest", None), "", state


def upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state with the keys of format 3."""
    state = _renamed(state, _KEYS)
    if "recovery" in state:
        state["recovery"] = _renamed(state["recovery"], _RECOVERY_KEYS)
    if "metrics" in state:
        state["metrics"] = _renamed(state["metrics"], METRICS)
    return state


def _renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return the dict with some of its keys replaced, in the same order."""
    return {names.get(key, key): value for key, value in values.items()}
