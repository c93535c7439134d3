"""Pictures between networks and files: [-1, 1] to uint8 and back, grids."""

import math

import numpy as np
import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """(N, C, H, W) in [-1, 1] -> uint8 0..255, rounded; what lies outside is clipped."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: the inverse of `to_uint8`."""
    return images.float() / 127.5 - 1


def grid(images: Tensor, columns: int | None = None) -> np.ndarray:
    """uint8 (N, C, H, W) -> one picture (rows H, columns W) or (rows H, columns W, 3), in reading order.

    columns defaults to the smallest square-ish grid that is at least as wide as high; empty places are black.
    """
    n, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows = math.ceil(n / columns)
    tiles = np.zeros((rows * columns, height, width, channels), np.uint8)
    tiles[:n] = images.permute(0, 2, 3, 1).cpu().numpy()
    sheet = tiles.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    return sheet[:, :, 0] if channels == 1 else sheet


def enlarge(sheet: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel `factor` times in both directions, so that a grid of 32 px pictures can be looked at."""
    return sheet.repeat(factor, axis=0).repeat(factor, axis=1)


def zoom_for(img_resolution: int) -> int:
    """The enlargement at which a picture in a grid is at least 64 px wide."""
    return max(1, 64 // img_resolution)
