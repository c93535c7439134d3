"""What every data set offers to the store, and the stated rules that turn any picture into a square of uint8."""

import contextlib
import io
import os
import re
import struct
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vgan.runtime.console import progress_bar
from vgan.runtime.errors import UserError
from vgan.runtime.rng import permute

FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "PPM",
)  # Pillow knows more, one of which runs programs
MOST_BYTES = 300_000_000  # of one picture's file
MOST_PIXELS = 90_000_000  # of one picture; Pillow's own limit is twice that
_LARGE = threading.Lock()  # large pictures are decoded one at a time
# All that libraries for pictures, zips and arrays raise on damaged files
UNREADABLE = (
    OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, AssertionError,
    MemoryError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
RESOLUTIONS = (16, 32, 64, 128, 256)
T = TypeVar("T")


class BadImage(Exception):
    """A picture that cannot be read; the store counts and names them."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} ({reason})")

    @classmethod
    def of(cls, name: str, e: Exception) -> "BadImage":
        """What one of UNREADABLE, raised while the item was read, says in a few words."""
        if isinstance(e, UnidentifiedImageError):
            return cls(name, "not a picture")
        return cls(name, str(e).splitlines()[0] if str(e) else type(e).__name__)


class Examined(NamedTuple):
    """An item, and what it was before it became a square."""

    name: str
    size: tuple[int, int]  # width and height in px, as stored
    mode: str  # Pillow's: RGB, RGBA, L, P, CMYK, ...
    format: str  # Pillow's: PNG, JPEG, ...; "array" or "drawn" where there are no files
    pixels: np.ndarray  # as `Source.read` gives them
    label: int


class Source(ABC):
    """A data set before it is packed: items that are read one by one, possibly from several threads."""

    name: str  # short, for folder names and messages
    img_resolution: int  # px
    img_channels: int  # 1 (grey) or 3 (RGB)
    label_names: tuple[str, ...] = ()  # empty: no labels
    skip_bad: bool = False  # leave unreadable items out instead of stopping

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int) -> tuple[np.ndarray, int]:
        """Item i: uint8 (img_resolution, img_resolution, img_channels) and its label (0 without labels).

        Raises BadImage if it cannot be read.
        """

    def examine(self, i: int) -> Examined:
        """Item i and what it was as given. Raises BadImage if it cannot be read."""
        pixels, label = self.read(i)
        mode = "L" if self.img_channels == 1 else "RGB"
        return Examined(
            f"picture {i}", (self.img_resolution, self.img_resolution), mode, "drawn", pixels, label
        )

    @abstractmethod
    def fingerprint(self) -> str:
        """A hex digest of all that decides the pixels and labels; cheap, without reading the pictures."""


@dataclass(frozen=True)
class Dataset:
    """A packed data set, opened without reading it."""

    name: str
    images: np.ndarray  # memory map, uint8 (N, H, W, C)
    labels: np.ndarray  # int64 (N,)
    label_names: tuple[str, ...]  # empty: no labels
    digest: str  # sha256 of pixels and labels
    stream: Any = (
        None  # the vgan.data.webdataset.Shards of which the images are the first, if there are more
    )

    def __len__(self) -> int:
        return len(self.images)

    def split(self, holdout: int) -> tuple[np.ndarray, np.ndarray]:
        """The items (int64) that are trained on and the `holdout` ones that are not; the same ones for every seed."""
        if not holdout:
            return np.arange(len(self)), np.arange(0)
        if len(self) - holdout < 2:
            raise UserError(
                f"holdout={holdout}: leaves {len(self) - holdout} of {len(self)} pictures to train on; give less"
            )
        items = np.arange(len(self))
        order = permute(
            torch.from_numpy(items), len(self), 0, torch.zeros((), dtype=torch.int64)
        ).numpy()
        return np.sort(order[holdout:]), np.sort(order[:holdout])

    def reals(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first n pictures uint8 (n, C, H, W) and their labels (n,); classes take turns where there are any."""
        items = np.arange(min(n, len(self)))
        if self.label_dim > 1:
            nth_of_class = np.zeros(len(self), dtype=np.int64)
            for label in range(self.label_dim):
                mine = self.labels == label
                nth_of_class[mine] = np.arange(mine.sum())
            items = np.lexsort((self.labels, nth_of_class))[:n]
        pixels = torch.from_numpy(np.ascontiguousarray(self.images[items]))
        return pixels.permute(0, 3, 1, 2), torch.from_numpy(self.labels[items])

    @property
    def img_resolution(self) -> int:
        return int(self.images.shape[1])

    @property
    def img_channels(self) -> int:
        return int(self.images.shape[3])

    @property
    def label_dim(self) -> int:
        return len(self.label_names)


def read_in_order(
    read: Callable[[int], T], items: Sequence[int], title: str
) -> Iterator[T | BadImage]:
    """read(i) of all items in their order, with a progress bar; a BadImage that it raises is given instead.

    Several threads read ahead (Pillow decodes outside the interpreter's lock), in bounded memory.
    """

    def read_or_bad(i: int) -> T | BadImage:
        try:
            return read(i)
        except BadImage as bad:
            return bad

    threads = os.cpu_count() or 1
    ahead: deque[Future[T | BadImage]] = deque()
    with ThreadPoolExecutor(threads) as pool, progress_bar(len(items), title, delay=1) as bar:
        try:
            for i in items:
                ahead.append(pool.submit(read_or_bad, i))
                if len(ahead) > 16 * threads:
                    yield ahead.popleft().result()
                    bar.update()
            while ahead:
                yield ahead.popleft().result()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)


def check_image_settings(resolution: int, channels: int = 3) -> None:
    """Raise UserError unless the networks can be built for such pictures."""
    if resolution not in RESOLUTIONS:
        raise UserError(
            f"data.resolution={resolution}: must be one of {', '.join(map(str, RESOLUTIONS))}"
        )
    if channels not in (1, 3):
        raise UserError(f"data.channels={channels}: must be 1 (grey) or 3 (RGB)")


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """For sorting: numbers inside names count as numbers, so that img2 comes before img10."""
    return [(0, int(t), "") if t.isdecimal() else (1, 0, t) for t in re.split(r"(\d+)", text) if t]


def examine_file(name: str, content: bytes, resolution: int, channels: int, label: int) -> Examined:
    """A picture's file, decoded and made a square. Raises BadImage for what is none or is damaged.

    A JPEG much too large is decoded at 1/2, 1/4 or 1/8 of its size, never below twice what is needed: twice as fast for
    400 px to 64 px, and half a grey level of 255 away on average.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            size, mode, kind = image.size, image.mode, str(image.format)
            image.draft(None, (2 * resolution, 2 * resolution))
            return Examined(
                name, size, mode, kind, to_square_uint8(image, resolution, channels), label
            )
    except UNREADABLE as e:
        raise BadImage.of(name, e) from e


def to_square_uint8(
    image: Image.Image, resolution: int, channels: int, crop: int | None = None
) -> np.ndarray:
    """Any picture as uint8 (resolution, resolution, channels), by these rules in this order:

    - turned upright as its EXIF orientation says;
    - 16-bit and 32-bit grey scaled from the full range of 16 bits to 8 (not clipped);
    - transparency (RGBA, LA, palette with a transparent colour) laid over white, the colour of paper: most pictures with
      transparency are made for it, and black would invent outlines;
    - palette, CMYK and all other modes converted to RGB, or to grey where channels is 1;
    - the largest centred square cut out (or the centred square of `crop` px where that is given and fits);
    - resized with Lanczos' filter, which is antialiased in Pillow: sharp without jagged edges; what is over 3 times too large
      is first averaged down in whole steps.

    Raises ValueError for more than 90 million pixels; large ones are worked on one at a time.
    """
    size = image.width * image.height
    if size > MOST_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels, over {MOST_PIXELS / 1e6:.0f} million"
        )
    with _LARGE if size > MOST_PIXELS / 8 else contextlib.nullcontext():
        return _square(image, resolution, channels, crop)


def _square(image: Image.Image, resolution: int, channels: int, crop: int | None) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((array.clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, image)
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size) if crop is None else min(crop, *image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side != resolution:
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, reducing_gap=3)
    return np.asarray(image, dtype=np.uint8).reshape(resolution, resolution, channels)
