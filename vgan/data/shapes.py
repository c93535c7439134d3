"""data=shapes: coloured shapes drawn by code, which need no download.

Each image shows one antialiased filled shape in one of eight colours on a plain light background,
at a random place, size and rotation. The label is the shape. An image is a function of (seed,
index).
"""

import hashlib
import math
import threading
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
PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)  # (8, 3)
_BACKGROUND = (228.0, 252.0)  # range of each channel: off-white with a faint tint
RADIUS = (0.28, 0.4)  # of the image's width
_TILT = math.radians(30)  # at most, in both directions
_BLOCK = 500  # images drawn at once
_DRAWING = threading.Lock()


def _star(r: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Return the signed distance to a star: the edge from radius 1 to 0.42, folded ten times."""
    fold = 2 * math.pi / 5
    a = np.abs((angle + math.pi / 2) % fold - fold / 2)  # 0 at a notch, pi / 5 at a point
    x, y = r * np.cos(a), r * np.sin(a)
    ex, ey = math.cos(fold / 2) - 0.42, math.sin(fold / 2)
    return ((x - 0.42) * ey - y * ex) / math.hypot(ex, ey)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the signed distance to a rotated square with two half discs, exact near 0."""
    half, x, y = 0.52, np.abs(x), 0.1 - y  # half the square's side; y upwards
    u, v = (x + y) / math.sqrt(2), (x - y) / math.sqrt(2)  # along and across the upper right side
    square = np.maximum(np.abs(u), np.abs(v)) - half
    disc = np.hypot(u - half, v) - half
    return np.minimum(square, disc)


def outline(shape: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return signed distances, negative inside, to a shape of radius about 1; y is down."""
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
    """Return the share of each pixel that a shape covers: (N, size, size) float32 in [0, 1].

    shape, cx, cy, radius, turn: (N,). Lengths are in pixels, turn is in radians.
    """
    at = np.arange(size, dtype=np.float32) + 0.5
    x = (at[None, None, :] - cx[:, None, None]) / radius[:, None, None]
    y = (at[None, :, None] - cy[:, None, None]) / radius[:, None, None]
    c, s = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
    x, y = (c * x + s * y).astype(np.float32), (c * y - s * x).astype(np.float32)
    distance = np.empty((len(shape), size, size), np.float32)
    for kind in range(len(SHAPE_NAMES)):
        chosen = shape == kind
        distance[chosen] = outline(kind, x[chosen], y[chosen])
    return (0.5 - distance * radius[:, None, None]).clip(0, 1)


class Shapes(Source):
    """A data set of `size` images of `resolution` px; another `seed` gives other images."""

    def __init__(self, resolution: int = 32, size: int = 50_000, seed: int = 0) -> None:
        if not isinstance(check_image_settings(resolution), int):
            raise UserError(f"data.resolution={resolution}: shapes are square; give one number")
        if size < 2:
            raise UserError(f"data.size={size}: training needs at least 2 images")
        if seed < 0:
            raise UserError(f"data.seed={seed}: must be 0 or above")
        self.name, self.img_resolution, self.img_channels = "shapes", resolution, 3
        self._side = resolution
        self.label_names = SHAPE_NAMES
        self._size, self._seed = size, seed
        self._block = lru_cache(8)(self._draw_block)

    def __len__(self) -> int:
        return self._size

    def fingerprint(self) -> str:
        # The first images are included, so that it changes with the drawing.
        drawn = hashlib.sha256(self.render(np.arange(16))[0].tobytes()).hexdigest()
        settings = f"{self.img_resolution} {self._size} {self._seed} {drawn}"
        return hashlib.sha256(settings.encode()).hexdigest()

    def read(self, i: int) -> tuple[np.ndarray, int]:
        with _DRAWING:  # so that only one thread draws a block
            images, shapes = self._block(i // _BLOCK)
        return images[i % _BLOCK], int(shapes[i % _BLOCK])

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        return self.render(np.arange(block * _BLOCK, (block + 1) * _BLOCK))[:2]

    def render(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return images `index` (N,) as uint8 (N, H, W, 3), their shapes (N,) and colours (N,)."""
        size, i = self._side, torch.from_numpy(np.asarray(index, dtype=np.int64))
        shape = integers(self._seed, "shape", i, len(SHAPE_NAMES)).numpy()
        colour = integers(self._seed, "colour", i, len(COLOURS)).numpy()
        u = uniform(self._seed, "pose", i, 7).numpy()
        radius = size * (RADIUS[0] + u[:, 0] * (RADIUS[1] - RADIUS[0]))
        cx, cy = (radius + u[:, k] * (size - 2 * radius) for k in (1, 2))
        cover = coverage(shape, cx, cy, radius, (u[:, 3] * 2 - 1) * _TILT, size)[..., None]
        background = (_BACKGROUND[0] + u[:, 4:7] * (_BACKGROUND[1] - _BACKGROUND[0]))[
            :, None, None, :
        ]
        images = background + cover * (PALETTE[colour][:, None, None, :] - background)
        return images.round().astype(np.uint8), shape, colour
