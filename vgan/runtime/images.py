"""Images between networks and files: conversion between [-1, 1] and uint8, and grids."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# The side of square images in px, or height and width of others.
Resolution = int | tuple[int, int]

SIDES = (16, 1024)  # the smallest and the largest side, px
_RULE = (
    "must be N or [H,W] from 16 to 1024 px: the shorter side 4 to 7 times a power of two, the "
    "longer a multiple of that power of two, at most 4 times as long"
)


def height_width(resolution: Resolution) -> tuple[int, int]:
    """Return height and width in px."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def parse_resolution(resolution: int | Sequence[int]) -> Resolution:
    """Return the side of a square as int, or (height, width). Raises ValueError for others.

    Networks halve the images until the shorter side has 4 to 7 px, so both sides must be multiples
    of the same power of two.
    """
    sides = [resolution] * 2 if isinstance(resolution, int) else list(resolution)
    is_pair = len(sides) == 2 and all(type(side) is int for side in sides)
    if not is_pair or not all(SIDES[0] <= side <= SIDES[1] for side in sides):
        raise ValueError(_RULE)
    step = 2 ** count_halvings(min(sides))
    height, width = (side // step * step for side in sides)
    if [height, width] != sides or max(sides) > 4 * min(sides):
        smaller = str(height) if height == width else f"[{height},{width}]"
        raise ValueError(_RULE + (f"; try {smaller}" if [height, width] != sides else ""))
    return height if height == width else (height, width)


def count_halvings(shorter_side: int) -> int:
    """Return how often a side in px can be halved until it has 4 to 7 px."""
    return shorter_side.bit_length() - 3


def format_px(resolution: Resolution) -> str:
    """Return '64 px', or '64 x 96 px' (height x width)."""
    height, width = height_width(resolution)
    return f"{height} px" if height == width else f"{height} x {width} px"


def to_uint8(images: Tensor) -> Tensor:
    """Convert (N, C, H, W) from [-1, 1] to uint8: rounded and clipped to 0..255."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 to float32 in [-1, 1]; the inverse of `to_uint8`."""
    return images.float() / 127.5 - 1


def to_rgb(images: Tensor) -> Tensor:
    """Convert uint8 or [-1, 1] images (N, C, H, W) to three channels.

    Grey is repeated. Transparent images, whose colours are multiplied by alpha, are laid on white.
    """
    if images.shape[1] == 4:
        white = 255 if images.dtype == torch.uint8 else 1
        return images[:, :3] + (white - images[:, 3:])
    return images.expand(-1, 3, -1, -1)


def to_straight_alpha(pixels: np.ndarray) -> np.ndarray:
    """Divide the colours of uint8 RGBA (..., 4) by alpha, as PNG and WebP store them.

    Networks see and draw colours multiplied by alpha, so that what is hidden does not count. Other
    numbers of channels are returned as they are.
    """
    if pixels.shape[-1] != 4:
        return pixels
    alpha = pixels[..., 3:].astype(np.float32)
    colours = pixels[..., :3] * (255 / np.maximum(alpha, 1))
    return np.concatenate([colours.round().clip(0, 255).astype(np.uint8), pixels[..., 3:]], axis=-1)


def on_white(image: np.ndarray) -> np.ndarray:
    """Lay an RGBA image (H, W, 4) with straight alpha on white; return others as they are."""
    if image.shape[-1] != 4 or image.ndim != 3:
        return image
    alpha = image[:, :, 3:].astype(np.float32) / 255
    return (image[:, :, :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def grid(images: Tensor, columns: int | None = None) -> np.ndarray:
    """Arrange uint8 (N, C, H, W) as one image (rows H, columns W) or (rows H, columns W, 3 or 4).

    Images are in reading order; empty cells are black, or transparent. columns defaults to
    ceil(sqrt(N)). RGBA, with colours multiplied by alpha, becomes straight alpha.
    """
    n, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows = math.ceil(n / columns)
    tiles = np.zeros((rows * columns, height, width, channels), np.uint8)
    tiles[:n] = images.permute(0, 2, 3, 1).cpu().numpy()
    image = tiles.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    image = to_straight_alpha(image.reshape(rows * height, columns * width, channels))
    return image[:, :, 0] if channels == 1 else image


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel `factor` times in both directions."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def zoom_for(img_resolution: Resolution, side: int = 64) -> int:
    """Return the factor by which an image in a grid becomes about `side` px wide, or wider."""
    return max(1, side // min(height_width(img_resolution)))
