"""The packed form of any source: a memory-mapped uint8 file with labels and a digest."""

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vgan.data.conditions import Conditions
from vgan.data.source import BadImage, Dataset, Source, read_in_order
from vgan.runtime.distributed import print0
from vgan.runtime.errors import UserError
from vgan.runtime.images import height_width

_ABANDONED_S = 24 * 3600  # a partly packed folder of this age is left over from a killed process
_NAMED = 3  # unreadable images named in a message


def default_cache_dir() -> Path:
    """Return VGAN_CACHE if set, else the cache folder of the platform."""
    if chosen := os.environ.get("VGAN_CACHE"):
        return Path(chosen).expanduser()
    if platform.system() == "Windows":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "vgan"
    if platform.system() == "Darwin":
        return Path.home() / "Library" / "Caches" / "vgan"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vgan"


def pack(source: Source, cache_dir: Path) -> Dataset:
    """Return the packed form of `source`. Packs it on first use, with a progress bar.

    Every process packs into a temporary folder of its own and renames it at the end. Of two at once
    the slower one drops its copy, and a killed one leaves nothing that looks complete. Raises
    UserError for fewer than two images, for unreadable ones unless source.skip_bad, and if the
    cache cannot be written.
    """
    final = cache_dir / f"{source.name}-{source.fingerprint()[:16]}"
    if not (final / "meta.json").is_file():
        if len(source) < 2:
            raise UserError(
                f"data: {source.name} has {len(source)} image(s), training needs at least 2; "
                "give more images"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Pillow, about damaged files
                _pack_into(source, final)
        except OSError as e:
            fix = "set data.cache_dir to a folder that can be written"
            if e.errno == errno.ENOSPC:
                fix = "free space"
            raise UserError(
                f"data.cache_dir={cache_dir}: cannot be written ({e.strerror or e}); {fix}"
            ) from e
    return _open(final)


def _open(folder: Path) -> Dataset:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy")
        same_count = len(images) == len(labels) == meta["count"]
        if not same_count or images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError("counts differ")
        conditions = None
        if names := meta.get("condition_names"):
            values = np.load(folder / "conditions.npy")
            if values.shape != (len(images), len(names)) or not np.isfinite(values).all():
                raise ValueError("counts differ")
            conditions = Conditions.of(values, names)
        label_names = tuple(meta["label_names"])
        return Dataset(meta["name"], images, labels, label_names, meta["digest"], conditions)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError) as e:
        raise UserError(f"{folder}: damaged cache; delete this folder to pack it again") from e


def _pack_into(source: Source, final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    _clean_abandoned(final.parent)
    shape = (*height_width(source.img_resolution), source.img_channels)
    needed = len(source) * (math.prod(shape) + 8)
    free = shutil.disk_usage(final.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    work = Path(tempfile.mkdtemp(prefix=".packing-", dir=final.parent))
    try:
        digest, items, labels, bad = hashlib.sha256(), [], [], []
        with open(work / "images.npy", "wb") as f:
            _write_header(f, source, len(source))
            for i, item in enumerate(read_in_order(source.read, range(len(source)), "packing")):
                if isinstance(item, BadImage):
                    bad.append(str(item))
                    continue
                pixels, label = item
                assert pixels.shape == shape
                assert pixels.dtype == np.uint8
                content = pixels.tobytes()
                digest.update(content)
                f.write(content)
                items.append(i)
                labels.append(label)
            _report_bad(source, bad, len(labels))
            f.seek(0)
            _write_header(f, source, len(labels))  # in place: numpy pads the header for any count
            f.flush()
            os.fsync(f.fileno())
        _finish(work, source, digest, *source.targets(items, labels))
        try:
            os.rename(work, final)
        except OSError:
            if not (final / "meta.json").is_file():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_header(f: BinaryIO, source: Source, count: int) -> None:
    shape = (count, *height_width(source.img_resolution), source.img_channels)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(f, header)


def _finish(
    work: Path, source: Source, digest: "hashlib._Hash", labels: np.ndarray, conditions: np.ndarray
) -> None:
    """Write labels and conditions, and then meta.json, which marks the folder as complete."""
    digest.update(labels.tobytes())
    digest.update(conditions.tobytes())
    np.save(work / "labels.npy", labels)
    if source.condition_names:
        np.save(work / "conditions.npy", conditions)
    meta = {
        "name": source.name,
        "count": len(labels),
        "label_names": list(source.label_names),
        "condition_names": list(source.condition_names),
        "digest": digest.hexdigest(),
    }
    (work / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _report_bad(source: Source, bad: list[str], good: int) -> None:
    """Print the unreadable images, or raise UserError for them."""
    if not bad:
        return
    named = "; ".join(bad[:_NAMED])
    if len(bad) > _NAMED:
        named += f"; and {len(bad) - _NAMED} more"
    if not source.skip_bad:
        raise UserError(
            f"data: {len(bad)} unreadable image(s): {named}; repair or remove them, "
            "or set data.skip_bad=true"
        )
    if good < 2:
        raise UserError(
            f"data: only {good} readable image(s), training needs at least 2; unreadable: {named}"
        )
    print0(f"data: skipped {len(bad)} unreadable image(s): {named}")


def _clean_abandoned(cache_dir: Path) -> None:
    """Remove the partly packed folders of killed processes."""
    for folder in cache_dir.glob(".packing-*"):
        with contextlib.suppress(OSError):
            times = [p.stat().st_mtime for p in folder.iterdir()]
            newest = max(times, default=folder.stat().st_mtime)
            if time.time() - newest > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
