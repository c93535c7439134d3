"""Checkpoints: named parts of plain containers and tensors, written whole or not at all, verified, read without running code."""

import contextlib
import errno
import hashlib
import os
import pickle
import pickletools
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgan.runtime.distributed import print0
from vgan.runtime.errors import UserError, is_out_of_memory
from vgan.runtime.renamed import upgrade_config

DAMAGED, REJECTED = (
    "damaged-",
    "rejected-",
)  # what is put before the name of a checkpoint that is not used again
FORMAT = 2  # raised when the meaning of the parts changes; 1 had no digest and is still read
_NAME = re.compile(r"checkpoint-(\d{9,})\.pt")
_PARTS = {
    "format",
    "cur_nimg",
    "config",
    "sizes",
    "data",
    "G",
    "D",
    "G_ema",
    "opt_G",
    "opt_D",
    "scaler_G",
    "scaler_D",
}
# What a file may make a reader work on. A billion weights need about 10,000 leaves, 2 MB of pickle and 6 levels.
_MOST_PICKLE_BYTES, _MOST_OPCODES, _MOST_LEAVES, _MOST_DEPTH = 8_000_000, 1_000_000, 200_000, 24
_STORAGES = ["Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double"]
_NAMED = {
    "torch._utils _rebuild_tensor_v2",
    "collections OrderedDict",
    *(f"torch {name}Storage" for name in _STORAGES),
}
# All that reading a hostile file may raise; torch's reader of pickles passes on whatever its opcodes stumble over.
_UNREADABLE = (
    pickle.PickleError, zipfile.BadZipFile, struct.error, RuntimeError, EOFError, ValueError, LookupError, TypeError,
    AttributeError, ArithmeticError, AssertionError, ImportError, MemoryError,
)  # fmt: skip


class Damaged(UserError):
    """A checkpoint that cannot be read, or is not vgan's; another one may serve."""


def best_path(run_dir: Path) -> Path:
    """Return where the best checkpoint is written."""
    return run_dir / "best.pt"


def find_best(run_dir: Path) -> Path | None:
    """Return the best checkpoint of a run folder, if there is one."""
    path = best_path(run_dir)
    return path if path.is_file() else None


def path_at(run_dir: Path, cur_nimg: int) -> Path:
    """checkpoint-<images seen, 9 digits>.pt"""
    return run_dir / f"checkpoint-{cur_nimg:09d}.pt"


def nimg_of(path: Path) -> int:
    """The images seen that a checkpoint's name tells."""
    found = _NAME.fullmatch(path.name)
    assert found is not None, path
    return int(found[1])


def all_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(
        (p for p in run_dir.glob("checkpoint-*.pt") if _NAME.fullmatch(p.name)), key=nimg_of
    )


def save(path: Path, parts: dict[str, Any], keep: int) -> None:
    """Write `parts` and then remove all but the newest `keep` checkpoints.

    The bytes go to a temporary file, to the disk, and only then to the final name: a kill at any moment leaves the old
    checkpoints or the new one. Where the disk has no room for it beside the old ones, the oldest are removed first, but never
    the newest. Raises UserError, with that one untouched, where the disk is full or read-only.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _make_room(path, sum(leaf.nbytes for _, leaf in walk(parts) if isinstance(leaf, Tensor)))
        with open(temporary, "wb") as f:
            parts = {k: v for k, v in parts.items() if k not in ("format", "digest")}
            torch.save({**parts, "format": FORMAT, "digest": digest(parts)}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
        for old in all_checkpoints(path.parent)[:-keep]:
            old.unlink(missing_ok=True)
    except (OSError, RuntimeError) as e:  # torch's zip writer reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = e.strerror if isinstance(e, OSError) else str(e).splitlines()[0]
        raise UserError(
            f"{path}: cannot be written ({reason}); free space, then the same command goes on"
        ) from e


def _make_room(path: Path, tensor_bytes: int) -> None:
    """Remove rejected checkpoints, then the oldest, all but the newest, as long as the next one would not fit.

    Raises OSError, with none removed, where that would not be enough.
    """
    needed = tensor_bytes + tensor_bytes // 50 + 1_000_000
    removable = sorted(path.parent.glob(f"{REJECTED}checkpoint-*.pt"))
    removable += [old for old in all_checkpoints(path.parent)[:-1] if old != path]
    room = sum(old.stat().st_size for old in removable)
    while (free := shutil.disk_usage(path.parent).free) < needed:
        if free + room < needed or not removable:
            raise OSError(
                errno.ENOSPC, f"needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
            )
        room -= removable[0].stat().st_size
        removable.pop(0).unlink()


def _sync_folder(folder: Path) -> None:
    """Make the new name durable; Windows and some network file systems have no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def walk(parts: Any) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of nested dicts, lists and tuples in their order; raises ValueError where there are too many or too deep."""
    waiting: list[tuple[str, int, Any]] = [("", 0, parts)]
    leaves = 0
    while waiting:
        path, depth, node = waiting.pop()
        children: list[tuple[str, Any]] = []
        if isinstance(node, dict):
            if not all(isinstance(k, (str, int)) for k in node):
                raise ValueError("a key is neither a name nor a number")
            children = [(f"{path}/{k!r}", child) for k, child in node.items()]
        elif isinstance(node, (list, tuple)):
            children = [(f"{path}/{i}", child) for i, child in enumerate(node)]
        leaves += 1
        if leaves + len(waiting) + len(children) > _MOST_LEAVES or depth > _MOST_DEPTH:
            raise ValueError("too many parts, or too deep")
        if children:
            waiting += [(name, depth + 1, child) for name, child in reversed(children)]
        else:
            yield path, node


def digest(parts: dict[str, Any]) -> str:
    """SHA-256 of every name and value; two checkpoints of the same digest hold the same to the last bit."""
    sha = hashlib.sha256()
    for path, leaf in walk(parts):
        if isinstance(leaf, Tensor):
            sha.update(f"{path} {leaf.dtype} {tuple(leaf.shape)}".encode())
            sha.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            sha.update(f"{path} {leaf!r}".encode())
    return sha.hexdigest()


def find(ckpt: str | Path) -> Path:
    """The newest checkpoint file that a file or a run folder means; raises UserError if there is none."""
    return _candidates(ckpt)[-1]


def _candidates(ckpt: str | Path) -> list[Path]:
    path = Path(ckpt).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(
            f"ckpt={ckpt}: no such file or folder; give a checkpoint file or a run folder"
        )
    found = all_checkpoints(path)
    if not found:
        raise UserError(
            f"ckpt={ckpt}: the folder holds no checkpoint-*.pt; give a run folder that has reached a checkpoint"
        )
    return found


def load_newest(ckpt: str | Path) -> tuple[Path, dict[str, Any]]:
    """Path and parts of a checkpoint file, or of the newest checkpoint of a run folder that can be read.

    A damaged one is passed over with a warning. Raises UserError if there is none left.
    """
    candidates = _candidates(ckpt)
    for path in reversed(candidates[1:]):
        try:
            return path, load(path)
        except Damaged as e:
            print0(f"passed over: {e}")
    return candidates[0], load(candidates[0])


def load(path: Path) -> dict[str, Any]:
    """The parts of a checkpoint, on the CPU. Nothing in the file is run, and no more memory is taken than it has bytes.

    Raises Damaged, a UserError, where it is damaged or foreign; a plain UserError where the file may be sound and cannot be read
    here: by this user, this vgan, in this memory.
    """
    try:
        path.open("rb").close()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check its permissions") from e
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of readers that stumble; what counts is said below
            _inspect(path)
            parts = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(parts, dict) or not parts.keys() >= _PARTS:
            raise Damaged(f"{path}: not a vgan checkpoint (parts are missing)")
        if parts["format"] not in (1, FORMAT):
            told = f"has format {parts['format']!r:.20}, this vgan reads {FORMAT}"
            raise UserError(f"{path}: {told}; use the version that wrote it")
        _check_tensors(parts)
        stated = parts.pop("digest", None)
        if parts["format"] == FORMAT and stated != digest(
            {k: v for k, v in parts.items() if k != "format"}
        ):
            raise ValueError("the digest does not fit")
        parts["config"] = upgrade_config(parts["config"])
        for old, new in (("controls", "strength"), ("rescue", "recovery"), ("varied", "diversity")):
            if old in parts:
                parts[new] = parts.pop(old)
        if "tries" in parts.get("recovery", {}):
            recovery = parts["recovery"]
            recovery["rollbacks"] = recovery.pop("tries")
            recovery["failure_nimg"] = recovery.pop("fault_nimg")
    except UserError:
        raise
    except _UNREADABLE as e:
        if is_out_of_memory(e):
            size = path.stat().st_size / 1e6
            raise UserError(
                f"{path}: its {size:,.0f} MB do not fit into memory; free some, then the same command goes on"
            ) from e
        raise Damaged(f"{path}: not a readable checkpoint (damaged, or not vgan's)") from e
    except OSError as e:
        raise Damaged(f"{path}: cannot be read ({e.strerror or e}); check the disk") from e
    return parts


def _inspect(path: Path) -> None:
    """Look at a file before anything of it is built; raises ValueError, or what zipfile and pickletools raise.

    Entries must lie uncompressed, so that the file's size bounds the memory; their sums must be right, which torch does not
    look at; and the pickle may name only what state dicts are made of. zipfile finds an archive behind anything, torch takes
    what does not begin as one for a format of its own: the file must be an archive from its first byte to its last.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        with path.open("rb") as f:
            if (
                f.read(4) != b"PK\x03\x04"
                or archive.comment
                or min(entry.header_offset for entry in entries) != 0
            ):
                raise ValueError("not an archive alone")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("entries overlap")
        pickles = [entry for entry in entries if entry.filename.lower().endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLE_BYTES:
            raise ValueError("not one small pickle")
        if archive.testzip():
            raise zipfile.BadZipFile("checksum")
        for i, (opcode, argument, _) in enumerate(pickletools.genops(archive.read(pickles[0]))):
            if i == _MOST_OPCODES:
                raise ValueError("a pickle that takes too long")
            if "GLOBAL" in opcode.name and argument not in _NAMED:
                raise ValueError(f"names {argument}")


def _check_tensors(parts: dict[str, Any]) -> None:
    """Plain values and dense tensors only: a tensor of few bytes may claim any size by strides of 0."""
    for path, leaf in walk(parts):
        if isinstance(leaf, Tensor):
            if (
                type(leaf) is not Tensor
                or leaf.layout is not torch.strided
                or leaf.nbytes > leaf.untyped_storage().nbytes()
            ):
                raise ValueError(f"{path}: not a plain tensor")
        elif not (
            leaf is None or isinstance(leaf, (str, int, float, bool)) or leaf in ({}, [], ())
        ):
            raise ValueError(f"{path}: not a plain value")
