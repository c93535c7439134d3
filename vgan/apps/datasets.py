"""vgan-data: describe a data set, check it, or pack it ahead of training."""

import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from vgan.config import DataConfig
from vgan.data.conditions import Conditions
from vgan.data.hub import HubImages
from vgan.data.open import build_dataset, build_source
from vgan.data.source import CHANNELS, Source
from vgan.data.survey import Survey, evenly, survey
from vgan.data.webdataset import Shards
from vgan.runtime.console import report_line
from vgan.runtime.files import write_png
from vgan.runtime.images import enlarge, format_px, grid, height_width, zoom_for

MAX_LISTED = 20  # problem files of a kind, or classes
MAX_NAMED = 3  # examples in a line of info
SHEET_COLUMNS, SHEET_ROWS = 12, 32
_MARGIN = 128  # px, for the names of classes


def data(cfg: DataConfig) -> int:
    """Do what `cfg.do` says and print the result; return the exit code.

    info and check read all images; check returns 1 if any is unreadable. pack writes them into the
    cache. Raises UserError for data that cannot be opened.
    """
    if cfg.do == "pack":
        pack(cfg.data)
        return 0
    source = build_source(cfg.data)
    found = survey(source)
    code = 0
    if cfg.do == "check":
        print("\n".join(problems(found)))
        code = 1 if found.bad else 0
    else:
        print("\n".join(info(source, found)))
    if cfg.sheet is not None:
        path = Path(cfg.sheet).expanduser()
        write_png(path, contact_sheet(source, found))
        print(report_line("sheet", str(path)))
    return code


def pack(node: dict[str, Any]) -> None:
    """Pack the images of a `data` node and print where they are."""
    start = time.perf_counter()
    dataset = build_dataset(node)
    elapsed = time.perf_counter() - start
    assert isinstance(dataset.images, np.memmap)
    folder = Path(str(dataset.images.filename)).parent
    size = sum(path.stat().st_size for path in folder.iterdir())
    images = f"{len(dataset):,} images of {format_px(dataset.img_resolution)}"
    print(report_line("packed", f"{dataset.name}: {images}, in {elapsed:.1f} s"))
    print(report_line("folder", str(folder)))
    print(report_line("size", f"{size / 1e6:,.1f} MB"))
    print(report_line("digest", dataset.digest))


def info(source: Source, found: Survey) -> list[str]:
    """Describe a data set in lines of at most 80 columns."""
    height, width = height_width(source.img_resolution)
    facts = {"data": f"{source.name}: {found.examined:,} images" + _named("unreadable", found.bad)}
    if isinstance(source, Shards):
        part = f"these are the first of {len(source.urls)} shards"
        facts["stream"] = f"{part} and are packed; training streams all"
    if isinstance(source, HubImages) and source.is_remote:
        facts["commit"] = f"{source.version} (data.revision=... stays with it)"
    size_mb = found.good * height * width * source.img_channels / 1e6
    color = CHANNELS[source.img_channels]
    order = "" if height == width else " (height x width)"
    facts["packed"] = f"{height} x {width} px{order}, {color}, {size_mb:,.1f} MB"
    facts |= originals(found, format_px(source.img_resolution))
    if source.label_names:
        facts["classes"] = classes(found.per_class(len(source.label_names)), source.label_names)
    elif source.condition_names:
        conditions = Conditions.of(source.conditions, source.condition_names)
        facts["conditions"] = conditions.describe()
    groups = [" = ".join(group) for group in found.duplicates]
    facts["duplicates"] = f"{found.copies:,}" + _named("groups", groups)
    facts["digest"] = found.digest
    return [report_line(name, text) for name, text in facts.items()]


def originals(found: Survey, size: str) -> dict[str, str]:
    """Describe sizes, modes and formats of the files; how many images are enlarged to `size`."""
    if not found.good:
        return {}
    by_size = sorted(found.sizes, key=lambda size: (min(size), max(size)))
    (usual, count), *_ = found.sizes.most_common(1)
    sizes = f"all {_px(usual)}"
    if len(by_size) > 1:
        sizes = f"{len(by_size):,} sizes, {_px(by_size[0])} to {_px(by_size[-1])}"
        sizes += f", most frequent {_px(usual)} ({count:,})"
    return {
        "sizes": sizes,
        "modes": _counted(found.modes),
        "formats": _counted(found.formats),
        "enlarged": f"{len(found.small):,}" + _named(f"below {size}", found.small),
    }


def classes(counts: Sequence[int], names: Sequence[str]) -> str:
    """Describe the sizes of the classes; of many, name only the largest and the smallest."""
    order = list(range(len(counts)))
    if len(counts) > MAX_LISTED:
        order = np.argsort(counts, kind="stable")[::-1].tolist()
    shown = [f"{names[i]} {counts[i]:,}" for i in order]
    if len(shown) > MAX_LISTED:
        shown = [*shown[: MAX_LISTED // 2], "...", *shown[-MAX_LISTED // 2 :]]
    span = f"{min(counts):,} to {max(counts):,} images each"
    return f"{len(counts):,}, {span}: {', '.join(shown)}"


def problems(found: Survey) -> list[str]:
    """List problem files, one a line, and a verdict."""
    repeated = [(name, group[0]) for group in found.duplicates for name in group[1:]]
    kinds = {
        "unreadable": found.bad,
        "enlarged": found.small,
        "duplicate": [f"{name} = {first}" for name, first in repeated],
    }
    lines = []
    for kind, names in kinds.items():
        lines += [f"{kind:<11} {name}" for name in names[:MAX_LISTED]]
        if len(names) > MAX_LISTED:
            lines.append(f"{kind:<11} and {len(names) - MAX_LISTED:,} more")
    counts = ", ".join(f"{len(names):,} {kind}" for kind, names in kinds.items())
    verdict = "ready for training"
    if found.bad:
        verdict = "remove the unreadable ones, or set data.skip_bad=true"
    return [*lines, report_line("verdict", f"{found.examined:,} images, {counts}; {verdict}")]


def contact_sheet(source: Source, found: Survey) -> np.ndarray:
    """Return images as training sees them, (H, W) or (H, W, 3 or 4) uint8, evenly chosen.

    With classes, each has a row with its name on the left.
    """
    names = source.label_names
    groups, columns = {"": list(found.labels)}, SHEET_COLUMNS**2
    if names:
        chosen, columns = evenly(len(names), SHEET_ROWS), SHEET_COLUMNS
        groups = {names[k]: [i for i, c in found.labels.items() if c == k] for k in chosen}
    shown = {
        name: [items[k] for k in evenly(len(items), columns)]
        for name, items in groups.items()
        if items
    }
    # In their order, which a stream needs.
    images_of = {i: source.read(i)[0] for i in sorted(chain.from_iterable(shown.values()))}
    strips = []
    for name, items in shown.items():
        pixels = np.stack([images_of[i] for i in items])
        missing = -len(pixels) % SHEET_COLUMNS
        pixels = np.concatenate([pixels, np.zeros((missing, *pixels.shape[1:]), np.uint8)])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        strip = enlarge(grid(images, SHEET_COLUMNS), zoom_for(source.img_resolution))
        if names:
            strip = np.concatenate([_title(name, strip), strip], axis=1)
        strips.append(strip)
    return np.concatenate(strips)


def _title(name: str, strip: np.ndarray) -> np.ndarray:
    """Return a class name, black on white, with the height and channels of its strip."""
    mode = "L" if strip.ndim == 2 else CHANNELS[strip.shape[2]]
    margin = Image.new(mode, (_MARGIN, strip.shape[0]), "white")
    text = name[:20].encode("latin-1", "replace").decode("latin-1")  # what Pillow's font has
    ImageDraw.Draw(margin).text((6, strip.shape[0] // 2 - 6), text, fill="black")
    return np.asarray(margin)


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} px"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def _named(what: str, names: Sequence[str]) -> str:
    """Return ' (2 unreadable: a; b)' with the first few names, or '' without names."""
    if not names:
        return ""
    rest = "; ..." if len(names) > MAX_NAMED else ""
    return f" ({len(names):,} {what}: {'; '.join(names[:MAX_NAMED])}{rest})"
