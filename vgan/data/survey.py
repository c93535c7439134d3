"""Surveys of data sets before training: sizes, formats, classes, unreadable images, duplicates."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vgan.data.source import BadImage, Source, read_in_order
from vgan.runtime.images import height_width


@dataclass
class Survey:
    """Findings among the images that were examined."""

    examined: int
    bad: list[str] = field(default_factory=list)  # name (reason) of unreadable images
    small: list[str] = field(default_factory=list)  # name (width x height) of enlarged images
    duplicates: list[list[str]] = field(default_factory=list)  # groups of names
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) in px
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    labels: dict[int, int] = field(default_factory=dict)  # item -> class, of readable images
    digest: str = ""  # of the packed data; empty unless all images were examined

    @property
    def good(self) -> int:
        """The number of readable images."""
        return self.examined - len(self.bad)

    def per_class(self, label_dim: int) -> list[int]:
        """Return the number of readable images of each of label_dim classes."""
        counts = Counter(self.labels.values())
        return [counts[label] for label in range(label_dim)]

    @property
    def copies(self) -> int:
        """The number of images that could be removed without losing a distinct one."""
        return sum(len(group) - 1 for group in self.duplicates)


def evenly(count: int, most: int) -> Sequence[int]:
    """Return at most `most` of the items 0 .. count - 1, evenly spaced from first to last."""
    if count <= most:
        return range(count)
    return np.linspace(0, count - 1, most).round().astype(int).tolist()


def survey(source: Source, most: int | None = None) -> Survey:
    """Read all images of a source, or `most` of them. Takes as long as packing; writes nothing.

    A part is evenly spaced, but the first ones where the source is sequential.

    Two images are duplicates where all pixels are equal after cropping and resizing.
    """
    count = len(source)
    items: Sequence[int] = range(count)
    if most is not None:
        items = range(min(count, most)) if source.sequential else evenly(count, most)
    found = Survey(len(items))
    height, width = height_width(source.img_resolution)
    packed, groups = hashlib.sha256(), _Groups()
    for i, item in zip(items, read_in_order(source.examine, items, "reading")):
        if isinstance(item, BadImage):
            found.bad.append(str(item))
            continue
        content = item.pixels.tobytes()
        packed.update(content)
        groups.add(item.name, content)
        found.labels[i] = item.label
        found.sizes[item.size] += 1
        found.modes[item.mode] += 1
        found.formats[item.format] += 1
        if item.size[0] < width or item.size[1] < height:
            found.small.append(f"{item.name} ({item.size[0]} x {item.size[1]})")
    found.duplicates = groups.duplicates()
    if len(items) == count:  # the same digest as in vgan.data.packed
        for target in source.targets(list(found.labels), list(found.labels.values())):
            packed.update(target.tobytes())
        found.digest = packed.hexdigest()
    return found


def find_duplicates(images: Iterable[np.ndarray]) -> list[list[str]]:
    """Return groups of equal images, as 'image 0' and so on."""
    groups = _Groups()
    for i, image in enumerate(images):
        groups.add(f"image {i}", image.tobytes())
    return groups.duplicates()


class _Groups:
    """Names grouped by the digest of their pixels: 16 bytes per image of any size."""

    def __init__(self) -> None:
        self._names: dict[bytes, list[str]] = {}

    def add(self, name: str, content: bytes) -> None:
        digest = hashlib.blake2b(content, digest_size=16).digest()
        self._names.setdefault(digest, []).append(name)

    def duplicates(self) -> list[list[str]]:
        return [names for names in self._names.values() if len(names) > 1]
