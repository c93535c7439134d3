"""What a data set holds, before it is trained on: sizes, modes, formats, classes, unreadable pictures, duplicates."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vgan.data.source import BadImage, Source, read_in_order


@dataclass
class Survey:
    """What was found among the pictures that were looked at."""

    looked_at: int
    bad: list[str] = field(default_factory=list)  # name (reason) of what cannot be read
    small: list[str] = field(default_factory=list)  # name (width x height) of what must be enlarged
    duplicates: list[list[str]] = field(
        default_factory=list
    )  # groups of names, equal as training sees them
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) in px
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    labels: dict[int, int] = field(default_factory=dict)  # item -> class of all that can be read
    digest: str = ""  # of the packed data, if all was looked at

    @property
    def good(self) -> int:
        """How many pictures can be read."""
        return self.looked_at - len(self.bad)

    def per_class(self, label_dim: int) -> list[int]:
        """How many readable pictures each of label_dim classes has."""
        counts = Counter(self.labels.values())
        return [counts[label] for label in range(label_dim)]

    @property
    def copies(self) -> int:
        """How many pictures could be removed and none would be missing."""
        return sum(len(group) - 1 for group in self.duplicates)


def evenly(count: int, most: int) -> Sequence[int]:
    """At most `most` of the items 0 .. count - 1, evenly spaced, the first and the last among them."""
    return (
        range(count)
        if count <= most
        else np.linspace(0, count - 1, most).round().astype(int).tolist()
    )


def survey(source: Source, most: int | None = None) -> Survey:
    """Read all pictures of a source, or `most` of them, and say what they are. Takes as long as packing; writes nothing.

    Two pictures are duplicates where no pixel differs after they became squares of the resolution, whatever their files are.
    """
    items = range(len(source)) if most is None else evenly(len(source), most)
    found = Survey(len(items))
    packed, same = hashlib.sha256(), _Same()
    for i, item in zip(items, read_in_order(source.examine, items, "looking")):
        if isinstance(item, BadImage):
            found.bad.append(str(item))
            continue
        content = item.pixels.tobytes()
        packed.update(content)
        same.add(item.name, content)
        found.labels[i] = item.label
        found.sizes[item.size] += 1
        found.modes[item.mode] += 1
        found.formats[item.format] += 1
        if min(item.size) < source.img_resolution:
            found.small.append(f"{item.name} ({item.size[0]} x {item.size[1]})")
    found.duplicates = same.groups()
    if len(items) == len(source):  # as the store works it out
        packed.update(np.array(list(found.labels.values()), dtype=np.int64).tobytes())
        found.digest = packed.hexdigest()
    return found


def duplicates(images: Iterable[np.ndarray]) -> list[list[str]]:
    """Groups of pictures without any difference, by their numbers."""
    same = _Same()
    for i, image in enumerate(images):
        same.add(f"picture {i}", image.tobytes())
    return same.groups()


class _Same:
    """Names by the digest of their pixels: 16 bytes a picture, whatever its size."""

    def __init__(self) -> None:
        self._names: dict[bytes, list[str]] = {}

    def add(self, name: str, content: bytes) -> None:
        self._names.setdefault(hashlib.blake2b(content, digest_size=16).digest(), []).append(name)

    def groups(self) -> list[list[str]]:
        return [names for names in self._names.values() if len(names) > 1]
