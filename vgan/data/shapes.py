"""The embedded default: coloured shapes drawn by code, and an oracle that knows what they show.

One antialiased filled shape in one of eight colours on a plain light ground, at a random place, size and tilt. The
label is the shape; every picture is a pure function of (seed, index).
"""

import hashlib
import math
import threading
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from vgan.data.source import Source, check_image_settings
from vgan.runtime.errors import UserError
from vgan.runtime.rng import integers, uniform

SHAPE_NAMES = ("circle", "square", "triangle", "star", "plus", "ring", "crescent", "heart")
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 138, 14),
    "yellow": (240, 208, 32),
    "green": (44, 150, 60),
    "cyan": (36, 190, 207),
    "blue": (38, 84, 200),
    "purple": (130, 52, 170),
    "pink": (240, 120, 180),
}
COLOUR_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)  # (8, 3)
_GROUND = (228.0, 252.0)  # range of each channel of the ground: off-white with a faint tint
_RADIUS = (0.28, 0.4)  # of the picture's width
_TILT = math.radians(30)  # at most, either way
_BLOCK = 500  # pictures drawn at once
_DRAWING = threading.Lock()


def _star(r: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Five points: the line from a point at radius 1 to the notch at 0.42, folded ten times about the centre."""
    fold = 2 * math.pi / 5
    a = np.abs((angle + math.pi / 2) % fold - fold / 2)  # 0 at a notch, pi / 5 at a point
    x, y = r * np.cos(a), r * np.sin(a)
    ex, ey = math.cos(fold / 2) - 0.42, math.sin(fold / 2)
    return ((x - 0.42) * ey - y * ex) / math.hypot(ex, ey)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square standing on its corner with two half discs on its upper sides: exact where it matters, near the outline."""
    half, x, y = 0.52, np.abs(x), 0.1 - y  # half the square's side; y upwards
    u, v = (
        (x + y) / math.sqrt(2),
        (x - y) / math.sqrt(2),
    )  # along the upper right side, and across it
    square = np.maximum(np.abs(u), np.abs(v)) - half
    disc = np.hypot(u - half, v) - half
    return np.minimum(square, disc)


def outline(shape: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) of points to a shape of radius about 1, x to the right, y downwards."""
    r = np.hypot(x, y)
    ax, ay = np.abs(x), np.abs(y)
    name = SHAPE_NAMES[shape]
    if name == "circle":
        return r - 0.86
    if name == "square":
        return np.maximum(ax, ay) - 0.72
    if name == "triangle":
        return np.maximum(ax * math.sqrt(3) / 2 - y / 2, y) - 0.5
    if name == "star":
        return _star(r, np.arctan2(y, x))
    if name == "plus":
        return np.minimum(np.maximum(ax - 0.28, ay - 0.92), np.maximum(ax - 0.92, ay - 0.28))
    if name == "ring":
        return np.abs(r - 0.68) - 0.22
    if name == "crescent":
        return np.maximum(r - 0.92, 0.74 - np.hypot(x - 0.46, y))
    return _heart(x, y)


def coverage(
    shape: np.ndarray,
    cx: np.ndarray,
    cy: np.ndarray,
    radius: np.ndarray,
    turn: np.ndarray,
    size: int,
) -> np.ndarray:
    """How much of each pixel of N pictures a shape covers: (N, size, size) float32 in [0, 1]. Lengths in pixels, turn in
    radians."""
    at = np.arange(size, dtype=np.float32) + 0.5
    x = (at[None, None, :] - cx[:, None, None]) / radius[:, None, None]
    y = (at[None, :, None] - cy[:, None, None]) / radius[:, None, None]
    c, s = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
    x, y = (c * x + s * y).astype(np.float32), (c * y - s * x).astype(np.float32)
    distance = np.empty((len(shape), size, size), np.float32)
    for kind in range(len(SHAPE_NAMES)):
        mine = shape == kind
        distance[mine] = outline(kind, x[mine], y[mine])
    return (0.5 - distance * radius[:, None, None]).clip(0, 1)


class Shapes(Source):
    """The data set of `size` pictures of `resolution` px; `seed` chooses another set of the same kind."""

    def __init__(self, resolution: int = 32, size: int = 50_000, seed: int = 0) -> None:
        check_image_settings(resolution)
        if size < 2:
            raise UserError(f"data.size={size}: training needs at least 2 pictures")
        if seed < 0:
            raise UserError(f"data.seed={seed}: must be 0 or above")
        self.name, self.img_resolution, self.img_channels = "shapes", resolution, 3
        self.label_names = SHAPE_NAMES
        self._size, self._seed = size, seed
        self._block = lru_cache(8)(self._draw_block)

    def __len__(self) -> int:
        return self._size

    def fingerprint(self) -> str:
        drawn = hashlib.sha256(
            self.render(np.arange(16))[0].tobytes()
        ).hexdigest()  # changes with the drawing
        return hashlib.sha256(
            f"{self.img_resolution} {self._size} {self._seed} {drawn}".encode()
        ).hexdigest()

    def read(self, i: int) -> tuple[np.ndarray, int]:
        with _DRAWING:  # so that a block is drawn once, not once by each thread
            images, shapes = self._block(i // _BLOCK)
        return images[i % _BLOCK], int(shapes[i % _BLOCK])

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        return self.render(np.arange(block * _BLOCK, (block + 1) * _BLOCK))[:2]

    def render(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pictures number `index` (N,) as uint8 (N, H, W, 3), with their shapes (N,) and colours (N,)."""
        size, i = self.img_resolution, torch.from_numpy(np.asarray(index, dtype=np.int64))
        shape = integers(self._seed, "shape", i, len(SHAPE_NAMES)).numpy()
        colour = integers(self._seed, "colour", i, len(COLOURS)).numpy()
        u = uniform(self._seed, "pose", i, 7).numpy()
        radius = size * (_RADIUS[0] + u[:, 0] * (_RADIUS[1] - _RADIUS[0]))
        cx, cy = (radius + u[:, k] * (size - 2 * radius) for k in (1, 2))
        cover = coverage(shape, cx, cy, radius, (u[:, 3] * 2 - 1) * _TILT, size)[..., None]
        ground = (_GROUND[0] + u[:, 4:7] * (_GROUND[1] - _GROUND[0]))[:, None, None, :]
        images = ground + cover * (_PALETTE[colour][:, None, None, :] - ground)
        return images.round().astype(np.uint8), shape, colour


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in N pictures."""

    shape: np.ndarray  # int64 (N,), -1 where no shape is recognisable
    colour: np.ndarray  # int64 (N,), -1 where no colour is
    score: (
        np.ndarray
    )  # float32 (N,): overlap of the picture with the best shape it could be, 1 is perfect


class Oracle:
    """Names shape and colour of pictures like those of `Shapes`; exact on its own renderings.

    A picture is split into ground (the median of its border) and figure, whose colour is the nearest of the eight. The
    figure's cover is compared with every shape of the same area at the same place in every turn, by intersection over union.
    What overlaps by less than `threshold`, is not of one colour, or not of a size that `Shapes` draws, is not recognised. The
    default lets through all renderings (0.85 and more) and all that are softened over 3 px, but few over 5 px.
    """

    def __init__(self, resolution: int, threshold: float = 0.75, step_degrees: float = 6.0) -> None:
        self._size, self._threshold = resolution, threshold
        period = {"circle": 0, "ring": 0, "square": 90, "plus": 90, "triangle": 120, "star": 72}
        turns = [
            (k, t)
            for k, name in enumerate(SHAPE_NAMES)
            for t in np.arange(0, max(1, period.get(name, 360)), step_degrees)
        ]
        self._kinds = np.array([k for k, _ in turns])
        self._turns = np.radians([t for _, t in turns])
        fine, n = 128, len(SHAPE_NAMES)
        middle, radius = np.full(n, fine / 2), np.full(n, fine / 3)
        upright = coverage(np.arange(n), middle, middle, radius, np.zeros(n), fine)
        at = (np.arange(fine) + 0.5 - fine / 2) / (fine / 3)
        weight = upright.sum((1, 2))
        self._areas = (weight / (fine / 3) ** 2)[self._kinds]  # of a shape of radius 1
        x, y = upright.sum(1) @ at / weight, upright.sum(2) @ at / weight  # its centre of mass
        c, s = np.cos(self._turns), np.sin(self._turns)
        self._mass_x = c * x[self._kinds] - s * y[self._kinds]  # and where a turn puts it
        self._mass_y = s * x[self._kinds] + c * y[self._kinds]

    def __call__(self, images: np.ndarray) -> Reading:
        """images: uint8 (N, resolution, resolution, 3)."""
        shape, colour, score = zip(*(self._read(image.astype(np.float32)) for image in images))
        return Reading(np.array(shape), np.array(colour), np.array(score, dtype=np.float32))

    def _read(self, image: np.ndarray) -> tuple[int, int, float]:
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        difference = image - np.median(border, axis=0)
        far = np.linalg.norm(difference, axis=2)
        if far.max() < 50:
            return -1, -1, 0.0  # an empty ground
        axis = np.median(difference[far > 0.7 * far.max()], axis=0)
        apart = np.linalg.norm(_PALETTE - (axis + np.median(border, axis=0)), axis=1)
        colour = int(apart.argmin()) if apart.min() < 50 else -1
        cover = (difference @ axis / (axis @ axis)).clip(0, 1)
        impure = np.linalg.norm(difference - cover[..., None] * axis, axis=2).mean() / far.mean()
        shape, score = self._match(cover)
        return (shape if score >= self._threshold and impure < 0.25 else -1), colour, score

    def _match(self, cover: np.ndarray) -> tuple[int, float]:
        """The best shape for a cover (size, size) in [0, 1], and its intersection over union."""
        at, area = np.arange(self._size) + 0.5, float(cover.sum())
        mx, my = cover.sum(0) @ at / area, cover.sum(1) @ at / area
        radius = np.sqrt(area / self._areas)
        low, high = 0.8 * _RADIUS[0] * self._size, 1.2 * _RADIUS[1] * self._size
        fits = (radius > low) & (radius < high)
        if not fits.any():
            return -1, 0.0
        cx, cy = (m - radius * mass for m, mass in ((mx, self._mass_x), (my, self._mass_y)))
        could = coverage(
            self._kinds[fits], cx[fits], cy[fits], radius[fits], self._turns[fits], self._size
        )
        overlap = np.minimum(could, cover).sum((1, 2)) / np.maximum(could, cover).sum((1, 2))
        return int(self._kinds[fits][overlap.argmax()]), float(overlap.max())


def score_samples(reading: Reading, asked: np.ndarray) -> dict[str, float]:
    """precision: the share of N pictures that show the asked shape (N,) in a recognised colour; coverage: how many of
    the 64 pairs of shape and colour are among those; colours_seen, shapes_seen: likewise, of 8 each."""
    right = (reading.shape == asked) & (reading.colour >= 0)
    pairs = set(zip(reading.shape[right].tolist(), reading.colour[right].tolist()))
    return {
        "precision": float(right.mean()),
        "coverage": len(pairs),
        "shapes_seen": len({s for s, _ in pairs}),
        "colours_seen": len({c for _, c in pairs}),
    }
