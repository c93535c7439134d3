"""Checkpoints: nested dicts of tensors and plain values in safetensors files.

Tensors are stored under their path, such as "G_ema/input.basis", and can be read by other tools.
The nesting and all plain values are one JSON text in the metadata of the file, beside the number of
the format and a SHA-256 of everything.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vgan.runs import checkpoint_v2
from vgan.runtime.distributed import print0
from vgan.runtime.errors import UserError, is_out_of_memory
from vgan.runtime.files import atomic_path
from vgan.runtime.renamed import upgrade_config

FORMAT = 3  # 1 and 2 were zip archives of torch.save; see checkpoint_v2
DAMAGED, REJECTED = "damaged-", "rejected-"  # prefixes of checkpoints that are not used again
REQUIRED_KEYS = frozenset(
    "config sizes data cur_nimg G D G_ema opt_G opt_D scaler_G scaler_D".split()  # noqa: SIM905
)
_BEST = "best.safetensors"
_MAGIC = "vgan checkpoint"
_NAME = re.compile(r"checkpoint-(\d{9,})\.(safetensors|pt)")
# Limits on what a file may make a reader do. A billion weights need 10,000 leaves and 6 levels.
_MAX_JSON_BYTES, _MAX_LEAVES, _MAX_DEPTH = 32_000_000, 200_000, 24
_UNREADABLE = (SafetensorError, *checkpoint_v2.ERRORS)


class Damaged(UserError):
    """A checkpoint that cannot be read, or is not one of vgan; another file may still be usable."""


def path_at(run_dir: Path, cur_nimg: int) -> Path:
    """Return run_dir/checkpoint-<cur_nimg, 9 digits>.safetensors."""
    return run_dir / f"checkpoint-{cur_nimg:09d}.safetensors"


def best_path(run_dir: Path) -> Path:
    """Return the path for the checkpoint with the best metric."""
    return run_dir / _BEST


def find_best(run_dir: Path) -> Path | None:
    """Return the checkpoint with the best metric, of any format; None without one."""
    path = best_path(run_dir)
    paths = [path, path.with_suffix(".pt")]
    return next((path for path in paths if path.is_file()), None)


def nimg_of(path: Path) -> int:
    """Return the number of images seen from the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first; of the same age, format 3 last."""
    paths = [path for path in run_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (nimg_of(path), path.suffix != ".pt"))


def save(path: Path, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint atomically, then remove all but the newest `keep` of its folder.

    A kill at any moment leaves either the old checkpoints or the new one. Where the disk has too
    little space, the oldest are removed first, but never the newest. A file of the same name in the
    old format is replaced. Raises UserError, without a change, if the disk is full or read-only.
    """
    with _one_line_errors(path):
        _make_room(path, sum(x.nbytes for _, x in walk(state) if isinstance(x, Tensor)))
        _write(path, state)
        if path.suffix == ".safetensors":
            path.with_suffix(".pt").unlink(missing_ok=True)
        for old in all_checkpoints(path.parent)[:-keep]:
            old.unlink(missing_ok=True)


def convert(path_in: Path, path_out: Path) -> None:
    """Write the checkpoint `path_in`, of any format, to `path_out` in the newest format.

    Raises UserError if one cannot be read or the other cannot be written.
    """
    state = load(path_in)
    with _one_line_errors(path_out):
        _write(path_out, state)


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())
        fix = "free space, then run the same command again"
        raise UserError(f"{path}: cannot be written ({reason:.200}); {fix}") from e


def _write(path: Path, state: dict[str, Any]) -> None:
    """Write to a temporary file, flush it to the disk, then rename it."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(state, "", tensors))
    metadata = {"format": f"{_MAGIC} {FORMAT}", "sha256": digest(state, tree), "state": tree}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
    _sync_folder(path.parent)


def _make_room(path: Path, tensor_bytes: int) -> None:
    """Remove rejected checkpoints, then the oldest, until the next one fits. Keep the newest.

    Raises OSError, without removing any, if that would not be enough.
    """
    needed = tensor_bytes + tensor_bytes // 50 + 1_000_000
    removable = sorted(path.parent.glob(f"{REJECTED}checkpoint-*"))
    removable += [old for old in all_checkpoints(path.parent)[:-1] if old != path]
    reclaimable = sum(old.stat().st_size for old in removable)
    while (free := shutil.disk_usage(path.parent).free) < needed:
        if free + reclaimable < needed or not removable:
            reason = f"needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
            raise OSError(errno.ENOSPC, reason)
        reclaimable -= removable[0].stat().st_size
        removable.pop(0).unlink()


def _sync_folder(folder: Path) -> None:
    """Make a new name durable. Windows and some network file systems cannot do that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _encode(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `node` as JSON values and add its tensors to `tensors`.

    An object whose only key begins with "$" stands for what JSON lacks: a tensor, with its strides,
    on which fused optimizers depend; a tuple; or a dict with numbers as keys.
    """
    if isinstance(node, Tensor):
        while name in tensors or name == "__metadata__":  # {"a/b": x, "a": {"b": y}}
            name += "'"
        tensors[name] = node.detach().cpu().contiguous()
        dense = _is_dense(node.shape, node.stride())
        return {"$tensor": [name, *(node if dense else tensors[name]).stride()]}
    prefix = f"{name}/" if name else ""
    if isinstance(node, (list, tuple)):
        children = [_encode(child, f"{prefix}{i}", tensors) for i, child in enumerate(node)]
        return {"$tuple": children} if isinstance(node, tuple) else children
    if isinstance(node, dict):
        items = [(key, _encode(child, f"{prefix}{key}", tensors)) for key, child in node.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in node):
            return dict(items)
        return {"$items": items}
    return node


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Return what `_encode` was given. A tensor occurs once, so that the file bounds the memory."""
    if isinstance(node, list):
        return [_decode(child, tensors) for child in node]
    if not isinstance(node, dict):
        return node
    if "$tensor" in node:
        name, *stride = node["$tensor"]
        return _with_stride(tensors.pop(name), stride)
    if "$tuple" in node:
        return tuple(_decode(child, tensors) for child in node["$tuple"])
    items = node["$items"] if "$items" in node else node.items()
    return {key: _decode(child, tensors) for key, child in items}


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether the elements fill their memory in some order, each one once."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True


def _with_stride(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """Return a copy with the given strides; the original is a view of the file."""
    if not _is_dense(tensor.shape, stride):
        raise ValueError(f"strides {stride}")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def walk(state: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) of nested dicts, lists and tuples in their order.

    Raises ValueError if there are too many, or too deep, or if a key is no string or number.
    """
    waiting: list[tuple[str, int, Any]] = [("", 0, state)]
    leaves = 0
    while waiting:
        path, depth, node = waiting.pop()
        children: list[tuple[str, Any]] = []
        if isinstance(node, dict):
            if not all(isinstance(key, (str, int)) for key in node):
                raise ValueError("a key is neither a string nor a number")
            children = [(f"{path}/{key!r}", child) for key, child in node.items()]
        elif isinstance(node, (list, tuple)):
            children = [(f"{path}/{i}", child) for i, child in enumerate(node)]
        leaves += 1
        if leaves + len(waiting) + len(children) > _MAX_LEAVES or depth > _MAX_DEPTH:
            raise ValueError("too many values, or too deep")
        if children:
            waiting += [(name, depth + 1, child) for name, child in reversed(children)]
        else:
            yield path, node


def digest(state: dict[str, Any], header: str = "") -> str:
    """Return the SHA-256 of a header and of every path and value of `state`.

    Two checkpoints of the same digest are equal to the last bit.
    """
    sha = hashlib.sha256(header.encode())
    for path, leaf in walk(state):
        if isinstance(leaf, Tensor):
            sha.update(f"{path} {leaf.dtype} {tuple(leaf.shape)}".encode())
            flat = leaf.detach().cpu().contiguous().reshape(-1)
            sha.update(flat.view(torch.uint8).numpy().data)
        else:
            sha.update(f"{path} {leaf!r}".encode())
    return sha.hexdigest()


def is_checkpoint(path: Path) -> bool:
    """Return whether a file is a checkpoint; False for an exported generator.

    A safetensors file that cannot be read is judged by its name.
    """
    if path.suffix.lower() != ".safetensors":
        return True
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format", "").startswith(_MAGIC)
    except (OSError, SafetensorError):
        return path.name == _BEST or _NAME.fullmatch(path.name) is not None


def find(ckpt: str | Path) -> Path:
    """Return the checkpoint file `ckpt`, or the newest one of the run folder `ckpt`.

    Raises UserError if there is none.
    """
    return _candidates(ckpt)[-1]


def _candidates(ckpt: str | Path) -> list[Path]:
    path = Path(ckpt).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"ckpt={ckpt}: no such file or folder; give a checkpoint or a run folder")
    paths = all_checkpoints(path)
    if not paths:
        raise UserError(
            f"ckpt={ckpt}: the folder has no checkpoint-*.safetensors; "
            "give a run folder that has reached a checkpoint"
        )
    return paths


def load_newest(ckpt: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return path and state of a checkpoint file, or of the newest readable one of a run folder.

    Damaged ones are skipped with a warning. Raises UserError if none is left.
    """
    candidates = _candidates(ckpt)
    for path in reversed(candidates[1:]):
        try:
            return path, load(path)
        except Damaged as e:
            print0(f"Skipped: {e}")
    return candidates[0], load(candidates[0])


def load(path: Path) -> dict[str, Any]:
    """Return the state in a checkpoint, of any format, on the CPU. No code in the file is run.

    Raises Damaged, a UserError, if the file is damaged or not a checkpoint; a plain UserError if it
    may be intact but cannot be read here: by this user, this version, or in this memory.
    """
    try:
        with path.open("rb") as f:
            start = f.read(8)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check its permissions") from e
    read = checkpoint_v2.read if start.startswith(b"PK") else _read
    try:
        version, stated, header, state = read(path)
        if not isinstance(state, dict) or not state.keys() >= REQUIRED_KEYS:
            raise Damaged(f"{path}: not a vgan checkpoint (keys are missing)")
        _check_version(path, version)
        _check_values(state)
        if version > 1 and stated != digest(state, header):
            raise ValueError("the digest does not match")
        if version < 3:
            state = checkpoint_v2.upgrade(state)
        state["config"] = upgrade_config(state["config"])
        return state
    except UserError:
        raise
    except _UNREADABLE as e:
        if is_out_of_memory(e):
            problem = f"its {path.stat().st_size / 1e6:,.0f} MB do not fit into memory"
            fix = "free some, then run the same command again"
            raise UserError(f"{path}: {problem}; {fix}") from e
        raise Damaged(f"{path}: not a readable checkpoint (damaged, or not from vgan)") from e
    except OSError as e:
        raise Damaged(f"{path}: cannot be read ({e.strerror or e}); check the disk") from e


def _read(path: Path) -> tuple[int, str, str, Any]:
    """Return format, digest, JSON text and state of a file of format 3 or newer."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    magic, _, version = metadata["format"].rpartition(" ")
    tree = metadata["state"]
    if magic != _MAGIC or len(tree) > _MAX_JSON_BYTES:
        raise ValueError("not a checkpoint, or too large")
    _check_version(path, int(version))
    return int(version), metadata["sha256"], tree, _decode(json.loads(tree), tensors)


def _check_version(path: Path, version: Any) -> None:
    if version not in range(1, FORMAT + 1):
        problem = f"has format {version!r:.20}, this vgan reads 1 to {FORMAT}"
        raise UserError(f"{path}: {problem}; use the version that wrote it")


def _check_values(state: dict[str, Any]) -> None:
    """Raise ValueError unless all leaves are plain values or dense tensors.

    A tensor with strides of 0 has few bytes and can claim any size.
    """
    for path, leaf in walk(state):
        if isinstance(leaf, Tensor):
            strided = type(leaf) is Tensor and leaf.layout is torch.strided
            if not strided or leaf.nbytes > leaf.untyped_storage().nbytes():
                raise ValueError(f"{path}: not a dense tensor")
        elif not (leaf is None or isinstance(leaf, (str, int, float)) or leaf in ({}, [], ())):
            raise ValueError(f"{path}: not a plain value")
