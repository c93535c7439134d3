"""Damaged and hostile inputs, made from a seed for test_fuzz.py."""

import io
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from vgan.runs import checkpoint

MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F", "LA", "YCbCr", "I;16"]
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]
# Contents of a checkpoint: plain values and tensors under names and numbers, nested.
TENSORS = st.builds(
    lambda dtype, values, shape: (
        torch.tensor(values[:4] * 3, dtype=torch.float32).to(dtype).reshape(shape)
    ),
    st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
    ),
    st.lists(st.integers(0, 100), min_size=4, max_size=4),
    st.sampled_from([(12,), (3, 4), (2, 1, 6), (1, 3, 2, 2)]),
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | TENSORS
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.integers()
TREES = st.recursive(
    LEAVES,
    lambda node: st.lists(node, max_size=4) | st.dictionaries(KEYS, node, max_size=4),
    max_leaves=16,
)


def picture(rng: random.Random) -> bytes:
    """A small valid picture of a random kind."""
    while True:
        size = (rng.randint(1, 40), rng.randint(1, 40))
        buffer = io.BytesIO()
        noise = np.frombuffer(rng.randbytes(size[0] * size[1] * 3), np.uint8).reshape(
            size[1], size[0], 3
        )
        try:
            mode = rng.choice(MODES)
            image = Image.fromarray(noise)
            image = (image.convert("L") if mode in ("1", "I;16") else image).convert(mode)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # for mode I as PNG
                image.save(buffer, format=rng.choice(FORMATS))
            with Image.open(buffer) as written:  # Pillow 12 writes some that it cannot read
                written.load()
        except (OSError, ValueError, KeyError):  # that mode cannot be had in that format
            continue
        return buffer.getvalue()


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, replaced by numbers that are too large."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        if not data:
            break
        at = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rng.randint(1, 50)]
        elif kind == 3:
            data[at : at + 4] = rng.choice(
                [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00", rng.randbytes(4)]
            )
        elif kind == 4:
            data[at:at] = bytes(data[at : at + rng.randint(1, 200)])
        else:
            data[at:at] = rng.randbytes(rng.randint(1, 50))
    return bytes(data)


def value(rng: random.Random) -> Any:
    """Any value of a kind that a checkpoint or a config may hold, likely a bad one."""
    choices: list[Callable[[], Any]] = [
        lambda: rng.choice([0, 1, -1, 2**31, 2**63 - 1, -(2**63), 10**30, 17, 3]),
        lambda: rng.choice([0.0, -1.5, 1e308, float("nan"), float("inf")]),
        lambda: rng.choice(
            [
                "",
                "x",
                "vgan.models.generator.Generator",
                "os.system",
                "\x00",
                "a" * 999,
                "${seed}",
                "{",
                "1e9",
            ]
        ),
        lambda: rng.choice([None, True, False]),
        lambda: [value(rng) for _ in range(rng.randint(0, 3))],
        lambda: {rng.choice(["_target_", "a", "blocks"]): value(rng)},
        lambda: torch.zeros(rng.choice([(), (0,), (3,), (2, 2), (1, 1, 1, 1)])),
        lambda: torch.zeros(1).expand(2**40),
        lambda: torch.zeros(
            3,
            dtype=rng.choice(
                [torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.complex64]
            ),
        ),
    ]
    return rng.choice(choices)()


def changed(parts: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The parts of a checkpoint with one to three of them replaced, removed or added somewhere."""

    def copy(node: Any) -> Any:
        return {k: copy(v) for k, v in node.items()} if isinstance(node, dict) else node

    parts = copy(parts)
    for _ in range(rng.randint(1, 3)):
        node: Any = parts
        while True:
            if not node:
                break
            key = rng.choice(list(node))
            if isinstance(node[key], dict) and rng.random() < 0.85:
                node = node[key]
                continue
            if rng.random() < 0.2:
                del node[key]
            else:
                node[key if rng.random() < 0.9 else "new"] = value(rng)
            break
    return parts


def hostile_checkpoint(path: Path, valid: bytes, parts: dict[str, Any], rng: random.Random) -> None:
    """Write a file that is damaged somewhere, or intact with other values, of format 1, 2 or 3."""
    kind = rng.randrange(7)
    broken = changed(parts, rng)
    if kind == 0:
        path.write_bytes(damaged(valid, rng))
    elif kind == 1:
        length = 8 + int.from_bytes(valid[:8], "little")
        header = damaged(valid[8:length], rng)
        path.write_bytes(len(header).to_bytes(8, "little") + header + valid[length:])
    elif kind == 2 and digest(broken) != "none":
        checkpoint.save(path, broken, keep=1)
    elif kind == 3:
        damaged_archive(path, parts, rng)
    elif kind == 4:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            pickled = b"\x80\x02}." if rng.random() < 0.5 else b"\x00" * 10_000_000
            archive.writestr("a/data.pkl", pickled)
            archive.writestr("a/version", "3")
    else:
        broken = changed(broken, rng)
        torch.save({**broken, "format": rng.choice([1, 2]), "digest": digest(broken)}, path)


def damaged_archive(path: Path, parts: dict[str, Any], rng: random.Random) -> None:
    """Write a checkpoint of format 2 with a damaged pickle and matching checksums."""
    buffer = io.BytesIO()
    torch.save({**parts, "format": 2, "digest": checkpoint.digest(parts)}, buffer)
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(path, "w") as made:
        for entry in archive.infolist():
            content = archive.read(entry)
            is_target = entry.filename.endswith("data.pkl") or rng.random() < 0.02
            made.writestr(entry.filename, damaged(content, rng) if is_target else content)


def digest(parts: dict[str, Any]) -> str:
    """The right digest, where the parts have one that can be worked out."""
    sizes = [leaf.numel() for leaf in _leaves(parts) if isinstance(leaf, torch.Tensor)]
    if any(n > 10**8 for n in sizes):
        return "none"
    try:
        return checkpoint.digest(parts)
    except (ValueError, RuntimeError, TypeError):
        return "none"


def _leaves(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [leaf for child in node.values() for leaf in _leaves(child)]
    if isinstance(node, list):
        return [leaf for child in node for leaf in _leaves(child)]
    return [node]
