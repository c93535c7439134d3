"""The interface of data sets (`Source`) and the packed form that training reads (`Dataset`)."""

import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import UnidentifiedImageError

from vgan.data.conditions import Conditions
from vgan.runtime.console import progress_bar
from vgan.runtime.errors import UserError, first_line
from vgan.runtime.images import Resolution, height_width, parse_resolution
from vgan.runtime.rng import permute

CHANNELS = {1: "grey", 3: "RGB", 4: "RGBA"}
T = TypeVar("T")


class BadImage(Exception):
    """An image that cannot be read."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} ({reason})")

    @classmethod
    def of(cls, name: str, e: Exception) -> "BadImage":
        """Return the BadImage for an error that reading the item raised."""
        if isinstance(e, UnidentifiedImageError):
            return cls(name, "not an image")
        return cls(name, first_line(e))


class Examined(NamedTuple):
    """An item as training sees it, and its original size, mode and format."""

    name: str
    size: tuple[int, int]  # width and height in px, as stored
    mode: str  # Pillow's: RGB, RGBA, L, P, CMYK, ...
    format: str  # Pillow's: PNG, JPEG, ...; "array" or "drawn" where there are no files
    pixels: np.ndarray  # as `Source.read` returns them
    label: int


class Source(ABC):
    """A data set before it is packed. Items are read one by one, possibly by several threads.

    Subclasses implement `__len__`, `fingerprint` and at least one of `read` and `examine`.
    """

    name: str  # short, for folder names and messages
    img_resolution: Resolution
    img_channels: int  # 1 (grey), 3 (RGB) or 4 (RGBA, colours multiplied by alpha)
    label_names: tuple[str, ...] = ()  # empty: no classes
    condition_names: tuple[str, ...] = ()  # a source has classes or conditions, not both
    conditions: np.ndarray  # float64 (len(self), number of conditions), if there are any
    skip_bad: bool = False  # omit unreadable items instead of stopping
    sequential: bool = False  # whether reading an item again reads all before it again

    @abstractmethod
    def __len__(self) -> int: ...

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """Return item i as uint8 (H, W, img_channels) and its label.

        The label is 0 without classes. Raises BadImage if the item cannot be read.
        """
        item = self.examine(i)
        return item.pixels, item.label

    def examine(self, i: int) -> Examined:
        """Return item i with its original properties. Raises BadImage if it cannot be read."""
        pixels, label = self.read(i)
        mode = "L" if self.img_channels == 1 else CHANNELS[self.img_channels]
        height, width = height_width(self.img_resolution)
        return Examined(f"image {i}", (width, height), mode, "drawn", pixels, label)

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hex digest of all that determines pixels and labels, without reading images."""

    def targets(self, items: Sequence[int], labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return what comes with readable items: labels int64 (N,) and conditions float64 (N, k).

        labels: as `read` returns them. With conditions, the label of an image is its row of them.
        """
        if not self.condition_names:
            return np.array(labels, dtype=np.int64), np.zeros((len(labels), 0))
        return np.arange(len(items)), np.ascontiguousarray(self.conditions[items])


@dataclass(frozen=True)
class Dataset:
    """A packed data set, opened without reading it."""

    name: str
    images: np.ndarray  # memory map, uint8 (N, H, W, C)
    labels: np.ndarray  # int64 (N,): rows of `c_table`
    label_names: tuple[str, ...]  # of the classes; empty: no classes
    digest: str  # sha256 of pixels, labels and conditions
    conditions: Conditions | None = None
    stream: Any = None  # vgan.data.webdataset.Shards if `images` are only its first images

    def __len__(self) -> int:
        return len(self.images)

    def split(self, holdout: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the items (int64) for training and the `holdout` others, for any seed the same."""
        items = np.arange(len(self))
        if not holdout:
            return items, np.arange(0)
        remaining = len(self) - holdout
        if remaining < 2:
            raise UserError(
                f"holdout={holdout}: leaves {remaining} of {len(self)} images for training; "
                "give a smaller number"
            )
        epoch = torch.zeros((), dtype=torch.int64)
        order = permute(torch.from_numpy(items), len(self), 0, epoch).numpy()
        return np.sort(order[holdout:]), np.sort(order[:holdout])

    def reals(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return n images uint8 (n, C, H, W) and labels (n,), the first ones of each class.

        Classes alternate. There are fewer than n if the data set is smaller.
        """
        items = np.arange(min(n, len(self)))
        if len(self.label_names) > 1:
            nth_of_class = np.zeros(len(self), dtype=np.int64)
            for label in range(len(self.label_names)):
                of_class = self.labels == label
                nth_of_class[of_class] = np.arange(of_class.sum())
            items = np.lexsort((self.labels, nth_of_class))[:n]
        pixels = torch.from_numpy(np.ascontiguousarray(self.images[items]))
        return pixels.permute(0, 3, 1, 2), torch.from_numpy(self.labels[items])

    @property
    def img_resolution(self) -> Resolution:
        height, width = self.images.shape[1:3]
        return height if height == width else (height, width)

    @property
    def img_channels(self) -> int:
        return int(self.images.shape[3])

    @property
    def label_dim(self) -> int:
        """The width of c: the number of classes or of conditions, or 0."""
        return len(self.c_names)

    @property
    def c_names(self) -> tuple[str, ...]:
        """The names of the columns of c."""
        return self.conditions.key if self.conditions else self.label_names

    def c_table(self) -> torch.Tensor:
        """Return the c (label_dim,) of every label, in a row: one-hot classes or conditions."""
        if self.conditions:
            return self.conditions.standardize(self.conditions.values)
        return torch.eye(self.label_dim) if self.label_names else torch.zeros(1, 0)


def read_in_order(
    read: Callable[[int], T], items: Sequence[int], title: str
) -> Iterator[T | BadImage]:
    """Yield read(i) for all items in order, or the BadImage that it raised; shows a progress bar.

    Threads read ahead in bounded memory; Pillow decodes without holding the interpreter lock.
    """

    def read_or_bad(i: int) -> T | BadImage:
        try:
            return read(i)
        except BadImage as bad:
            return bad

    threads = os.cpu_count() or 1
    pending: deque[Future[T | BadImage]] = deque()
    with ThreadPoolExecutor(threads) as pool, progress_bar(len(items), title, delay=1) as bar:
        try:
            for i in items:
                pending.append(pool.submit(read_or_bad, i))
                if len(pending) > 16 * threads:
                    yield pending.popleft().result()
                    bar.update()
            while pending:
                yield pending.popleft().result()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)


def check_image_settings(resolution: int | Sequence[int], channels: int = 3) -> Resolution:
    """Return the resolution. Raises UserError unless the networks support it and the channels."""
    if channels not in CHANNELS:
        raise UserError(f"data.channels={channels}: must be 1 (grey), 3 (RGB) or 4 (RGBA)")
    try:
        return parse_resolution(resolution)
    except ValueError as e:
        shown = str(resolution).replace(" ", "")
        raise UserError(f"data.resolution={shown}: {e}") from e


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Return a sort key that orders numbers by value: img2 before img10."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(t), "") if t.isdecimal() else (1, 0, t) for t in parts if t]
