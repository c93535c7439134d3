"""Images between networks and files: conversion between [-1, 1] and uint8, and grids."""

import math

import numpy as np
import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Convert (N, C, H, W) from [-1, 1] to uint8: rounded and clipped to 0..255."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 to float32 in [-1, 1]; the inverse of `to_uint8`."""
    return images.float() / 127.5 - 1


def grid(images: Tensor, columns: int | None = None) -> np.ndarray:
    """Arrange uint8 (N, C, H, W) as one image (rows H, columns W) or (rows H, columns W, 3).

    Images are in reading order; empty cells are black. columns defaults to ceil(sqrt(N)).
    """
    n, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows = math.ceil(n / columns)
    tiles = np.zeros((rows * columns, height, width, channels), np.uint8)
    tiles[:n] = images.permute(0, 2, 3, 1).cpu().numpy()
    image = tiles.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    image = image.reshape(rows * height, columns * width, channels)
    return image[:, :, 0] if channels == 1 else image


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel `factor` times in both directions."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def zoom_for(img_resolution: int) -> int:
    """Return the factor by which an image in a grid becomes at least 64 px wide."""
    return max(1, 64 // img_resolution)
