"""vgan-data's room: look at a data set, check it, pack it ahead of time."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw

from vgan.config import validate_data
from vgan.data.open import build_dataset, build_source
from vgan.data.source import Source
from vgan.data.survey import Survey, evenly, survey
from vgan.data.webdataset import Shards
from vgan.runtime.console import report_line
from vgan.runtime.files import write_png
from vgan.runtime.images import enlarge, grid, zoom_for

LISTED = 20  # problem files of a kind
NAMED = 3  # of them in a line of info
SHEET_COLUMNS, SHEET_ROWS = 12, 32
_MARGIN = 128  # px for the names of classes


def data(cfg: DictConfig) -> int:
    """Do as `cfg` (a DataConfig) says and print it; returns the exit code. Raises UserError for data that cannot be had."""
    validate_data(cfg)
    node: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    if cfg.do == "pack":
        return _pack(node)
    source = build_source(node)
    found = survey(source)
    lines, code = _check(found) if cfg.do == "check" else (info(source, found), 0)
    print("\n".join(lines))
    if cfg.sheet is not None:
        path = Path(cfg.sheet).expanduser()
        write_png(path, contact_sheet(source, found))
        print(report_line("sheet", str(path)))
    return code


def _pack(node: dict[str, Any]) -> int:
    start = time.perf_counter()
    dataset = build_dataset(node)
    folder = Path(dataset.images.filename).parent  # type: ignore[attr-defined]
    taken = time.perf_counter() - start
    print(
        report_line(
            "packed",
            f"{dataset.name}: {len(dataset):,} pictures of {dataset.img_resolution} px, in {taken:.1f} s",
        )
    )
    print(report_line("folder", str(folder)))
    print(report_line("size", f"{sum(p.stat().st_size for p in folder.iterdir()) / 1e6:,.1f} MB"))
    print(report_line("digest", dataset.digest))
    return 0


def info(source: Source, found: Survey) -> list[str]:
    """What was found, as lines of at most 80 columns."""
    px, channels = source.img_resolution, source.img_channels
    size_mb = found.good * px * px * channels / 1e6
    told = {
        "data": f"{source.name}: {found.looked_at:,} pictures" + _named("unreadable", found.bad)
    }
    if isinstance(source, Shards):
        told["stream"] = (
            f"these are the first of {len(source.urls)} shards and are packed; training streams all"
        )
    told["become"] = (
        f"squares of {px} px in {'grey' if channels == 1 else 'RGB'}, {size_mb:,.1f} MB packed"
    )
    told |= originals(found, px)
    if source.label_names:
        told["classes"] = classes(found.per_class(len(source.label_names)), source.label_names)
    told["duplicates"] = f"{found.copies:,}" + _named(
        "groups", [" = ".join(group) for group in found.duplicates]
    )
    told["digest"] = found.digest
    return [report_line(name, text) for name, text in told.items()]


def originals(found: Survey, px: int) -> dict[str, str]:
    """Sizes, modes and formats of the pictures as given, and how many are enlarged to `px`."""
    if not found.good:
        return {}
    by_size = sorted(found.sizes, key=lambda size: (min(size), max(size)))
    (usual, count), *_ = found.sizes.most_common(1)
    sizes = f"all {_px(usual)} px"
    if len(by_size) > 1:
        sizes = f"{len(by_size):,} sizes, {_px(by_size[0])} to {_px(by_size[-1])} px, most frequent {_px(usual)} ({count:,})"
    told = {"sizes": sizes, "modes": _counted(found.modes), "formats": _counted(found.formats)}
    told["enlarged"] = f"{len(found.small):,}" + _named(f"below {px} px", found.small)
    return told


def classes(counts: Sequence[int], names: Sequence[str]) -> str:
    """How many classes there are, how even, and how many pictures each has; of many classes the largest and smallest."""
    order = (
        np.argsort(counts, kind="stable")[::-1].tolist()
        if len(counts) > LISTED
        else range(len(counts))
    )
    shown = [f"{names[i]} {counts[i]:,}" for i in order]
    if len(shown) > LISTED:
        shown = [*shown[: LISTED // 2], "...", *shown[-LISTED // 2 :]]
    return f"{len(counts):,}, of {min(counts):,} to {max(counts):,} pictures: {', '.join(shown)}"


def _check(found: Survey) -> tuple[list[str], int]:
    """Every problem file in a line of its own, and the exit code."""
    kinds = {
        "unreadable": found.bad,
        "enlarged": found.small,
        "duplicate": [f"{other} = {group[0]}" for group in found.duplicates for other in group[1:]],
    }
    lines = []
    for kind, names in kinds.items():
        lines += [f"{kind:<11} {name}" for name in names[:LISTED]]
        lines += [f"{kind:<11} and {len(names) - LISTED:,} more"] if len(names) > LISTED else []
    counts = ", ".join(f"{len(names):,} {kind}" for kind, names in kinds.items())
    verdict = "not to be packed without data.skip_bad=true" if found.bad else "fit for training"
    return [
        *lines,
        report_line("verdict", f"{found.looked_at:,} pictures, {counts}; {verdict}"),
    ], 1 if found.bad else 0


def contact_sheet(source: Source, found: Survey) -> np.ndarray:
    """Pictures as training will see them, evenly chosen, (H, W) or (H, W, 3) uint8; a row a class where there are classes."""
    groups = {"": list(found.labels)}
    if source.label_names:
        rows = evenly(len(source.label_names), SHEET_ROWS)
        groups = {
            source.label_names[k]: [i for i, label in found.labels.items() if label == k]
            for k in rows
        }
    columns = SHEET_COLUMNS if source.label_names else SHEET_COLUMNS**2
    strips = []
    for name, items in groups.items():
        if not items:
            continue
        pixels = np.stack([source.read(items[k])[0] for k in evenly(len(items), columns)])
        wide = max(SHEET_COLUMNS * -(-len(pixels) // SHEET_COLUMNS), SHEET_COLUMNS)
        pixels = np.concatenate(
            [pixels, np.zeros((wide - len(pixels), *pixels.shape[1:]), np.uint8)]
        )
        strip = enlarge(
            grid(torch.from_numpy(pixels).permute(0, 3, 1, 2), SHEET_COLUMNS),
            zoom_for(source.img_resolution),
        )
        strips.append(
            np.concatenate([_title(name, strip), strip], axis=1) if source.label_names else strip
        )
    return np.concatenate(strips)


def _title(name: str, strip: np.ndarray) -> np.ndarray:
    """The name of a class, black on white, as high as its strip and of as many channels."""
    margin = Image.new("L" if strip.ndim == 2 else "RGB", (_MARGIN, strip.shape[0]), "white")
    text = (
        name[:20].encode("latin-1", "replace").decode("latin-1")
    )  # what Pillow's plainest font has
    ImageDraw.Draw(margin).text((6, strip.shape[0] // 2 - 6), text, fill="black")
    return np.asarray(margin)


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def _named(what: str, names: Sequence[str]) -> str:
    """' (2 unreadable: a, b)', nothing where there are none; of many the first few."""
    if not names:
        return ""
    return f" ({len(names):,} {what}: {'; '.join(names[:NAMED])}{'; ...' if len(names) > NAMED else ''})"
