"""Attention maps and gates of the generator, and patch logits of the discriminator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from vgan.models.attention import AdaptiveAttention2d, GatedSelfAttention
from vgan.models.discriminator import DiscriminatorBase
from vgan.models.generator import GeneratorBase
from vgan.runtime.device import autocast
from vgan.runtime.errors import UserError
from vgan.runtime.images import enlarge, to_float, to_rgb, to_uint8

MAX_POSITIONS = 256  # of the attention layer that a page shows: 16 x 16
_TILE = 96  # smallest side of an image in a grid, px
_TEXT = 14  # height of a line of text, px
_GAP = 4
_BACKGROUND, _INK, _FRAME = (24, 24, 28), (220, 220, 224), (90, 230, 255)
_RED, _BLUE = np.array([235.0, 64.0, 52.0]), np.array([56.0, 132.0, 255.0])


@dataclass(frozen=True)
class AttentionMap:
    """One attention layer over N images, at h x w positions.

    position (N, 2): row and column of one position of each image. weights (N, heads, h, w): its
    attention to all positions, which sums to 1. gates (N, groups, h, w) in (-1, 1) of adaptive
    attention, else None.
    """

    position: Tensor
    weights: Tensor
    gates: Tensor | None


def attention_layers(G: nn.Module) -> list[GatedSelfAttention | AdaptiveAttention2d]:
    """Return the attention layers of a generator, coarse ones first."""
    return [m for m in G.modules() if isinstance(m, (GatedSelfAttention, AdaptiveAttention2d))]


def has_attention(G: nn.Module) -> bool:
    """Return whether a generator has attention layers."""
    return bool(attention_layers(G))


@torch.no_grad()
def attention_maps(
    G: GeneratorBase,
    z: Tensor,
    c: Tensor,
    precision: str = "fp32",
    query: tuple[float, float] | None = None,
) -> tuple[Tensor, list[AttentionMap]]:
    """Return uint8 images (N, C, H, W), and one AttentionMap for each layer, coarse ones first.

    query: the position as fractions of height and width, in [0, 1). None takes the one that the
    layer changed most. The maps are on the CPU. Raises UserError if the generator has no attention.
    """
    maps: list[AttentionMap] = []

    def record(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, (GatedSelfAttention, AdaptiveAttention2d))
        (x,) = args
        h, w = x.shape[2:]
        gates = layer.gates(x).float().cpu() if isinstance(layer, AdaptiveAttention2d) else None
        change = output.float()
        if output.shape == x.shape:
            change = change - x.float()
        place = change.norm(dim=1).flatten(1).argmax(1)
        if query is not None:
            place = torch.full_like(place, int(query[0] * h) * w + int(query[1] * w))
        # One row of the matrix: all of it takes gigabytes at 64 px.
        weights = layer.attention.weights(x, place)[:, :, 0].unflatten(2, (h, w))
        position = torch.stack([place // w, place % w], dim=1)
        maps.append(AttentionMap(position.cpu(), weights.float().cpu(), gates))

    hooks = [layer.register_forward_hook(record) for layer in attention_layers(G)]
    if not hooks:
        problem = "show=attention: this generator has no attention"
        raise UserError(f"{problem}; train with model=attn or model=adaptive")
    try:
        with autocast(z.device, precision):
            images = to_uint8(G(z, c))
    finally:
        for hook in hooks:
            hook.remove()
    return images, maps


def finest_attention(G: GeneratorBase) -> tuple[nn.Module, tuple[int, int, int]] | None:
    """Return the finest attention layer up to MAX_POSITIONS positions, and its (heads, h, w)."""
    layers = attention_layers(G)
    if not layers:
        return None
    device = next(G.parameters()).device
    z, c = torch.zeros(1, G.z_dim, device=device), torch.zeros(1, G.label_dim, device=device)
    for layer, layer_map in zip(reversed(layers), reversed(attention_maps(G, z, c)[1])):
        heads, h, w = layer_map.weights.shape[1:]
        if h * w <= MAX_POSITIONS:
            return layer, (heads, h, w)
    return None


@torch.no_grad()
def patch_logits(
    D: DiscriminatorBase, images: Tensor, c: Tensor, precision: str = "fp32"
) -> Tensor:
    """Return the logit (N, h, w) of each patch of uint8 images (N, C, H, W), low for fakes."""
    logit_map: Any = D.logit_map  # optional for discriminators
    with autocast(images.device, precision):
        return logit_map(to_float(images), c).float().cpu()


def attention_grid(images: Tensor, maps: Sequence[AttentionMap]) -> np.ndarray:
    """Draw a row for each uint8 image (N, C, H, W): the image, then attention and gates.

    Bright means attended to; the position that attends is framed. Returns (height, width, 3) uint8.
    """
    columns = {"image": [_tile(image) for image in images]}
    for layer in maps:
        h, w = layer.weights.shape[2:]
        for head in range(layer.weights.shape[1]):
            tiles = []
            for i, (row, column) in enumerate(layer.position.tolist()):
                heat = layer.weights[i, head]
                tiles.append(_framed(_with_heat(images[i], heat / heat.max()), row, column, h, w))
            columns[f"{h} px, head {head + 1}"] = tiles
        groups = () if layer.gates is None else layer.gates.unbind(1)
        for group, gates in enumerate(groups, start=1):
            columns[f"{h} px, gate {group}"] = _with_signs(images, gates)
    return _labelled_grid(columns)


def patch_logits_grid(images: Tensor, logits: Tensor) -> np.ndarray:
    """Draw a row for each uint8 image (N, C, H, W): the image, then fake parts red, real ones blue.

    logits (N, h, w): from `patch_logits`. Relativistic losses leave the zero of the logits
    undetermined, so that each patch is compared with its mean over the images. Returns (height,
    width, 3) uint8.
    """
    centred = logits - logits.mean(dim=0 if len(logits) > 1 else (1, 2), keepdim=True)
    scaled = centred / centred.abs().max().clamp_min(1e-12)
    tiles = [_tile(image) for image in images]
    return _labelled_grid({"image": tiles, "red: looks fake": _with_signs(images, -scaled)})


def image_grid(columns: dict[str, Tensor], rows: Sequence[str]) -> np.ndarray:
    """Draw columns of uint8 images (N, C, H, W) under their titles, with a title for each row."""
    tiles = {title: [_tile(image) for image in images] for title, images in columns.items()}
    return _labelled_grid(tiles, rows)


def _tile(image: Tensor) -> np.ndarray:
    """Enlarge uint8 (C, H, W) to (height, width, 3), a whole number of times."""
    pixels = to_rgb(image[None])[0].permute(1, 2, 0).cpu().numpy()
    return enlarge(pixels, -(-_TILE // min(image.shape[1:])))


def _grey(image: Tensor) -> np.ndarray:
    return _tile(image).astype(np.float32).mean(axis=2, keepdims=True).repeat(3, axis=2)


def _smooth(values: Tensor, tile: np.ndarray) -> np.ndarray:
    """Enlarge (h, w) to the size of a tile, (height, width, 1), by bilinear interpolation."""
    x = values[None, None].float()
    large = F.interpolate(x, tile.shape[:2], mode="bilinear", align_corners=False)
    return large[0, 0, :, :, None].numpy()


def _with_heat(image: Tensor, heat: Tensor) -> np.ndarray:
    """Draw heat in [0, 1] over the darkened image, from black through red and yellow to white."""
    grey = _grey(image)
    t = _smooth(heat.clamp(0, 1), grey)
    channels = [2.5 * t, 2.5 * t - 0.9, 4 * t - 3]
    colour = 255 * np.concatenate(channels, axis=2).clip(0, 1)
    return _blend(0.55 * grey, colour, 0.75 * np.sqrt(t))


def _with_signs(images: Tensor, values: Tensor) -> list[np.ndarray]:
    """Draw values (N, h, w) in [-1, 1] over each image: blue below 0, red above."""
    tiles = []
    for image, value in zip(images, values):
        grey = _grey(image)
        t = _smooth(value.clamp(-1, 1), grey)
        tiles.append(_blend(0.7 * grey, np.where(t > 0, _RED, _BLUE), 0.8 * np.sqrt(np.abs(t))))
    return tiles


def _blend(below: np.ndarray, above: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    return (below * (1 - opacity) + above * opacity).round().clip(0, 255).astype(np.uint8)


def _framed(tile: np.ndarray, row: int, column: int, h: int, w: int) -> np.ndarray:
    image = Image.fromarray(tile)
    dy, dx = image.height / h, image.width / w
    box = [column * dx, row * dy, (column + 1) * dx - 1, (row + 1) * dy - 1]
    ImageDraw.Draw(image).rectangle(box, outline=_FRAME, width=max(1, min(image.size) // 96))
    return np.asarray(image)


def _labelled_grid(columns: dict[str, list[np.ndarray]], rows: Sequence[str] = ()) -> np.ndarray:
    """Arrange columns of tiles (height, width, 3) under their titles, with titles left of rows."""
    tiles = next(iter(columns.values()))
    height, width = tiles[0].shape[:2]
    margin = 2 * _TEXT if rows else 0
    right, bottom = margin + len(columns) * (width + _GAP), _TEXT + len(tiles) * (height + _GAP)
    sheet = Image.new("RGB", (right + _GAP, bottom + _GAP), _BACKGROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for x, (title, column) in enumerate(columns.items()):
        left = margin + _GAP + x * (width + _GAP)
        pen.text((left + width / 2, 2), title, fill=_INK, anchor="ma", font=font)
        for y, tile in enumerate(column):
            sheet.paste(Image.fromarray(tile), (left, _TEXT + _GAP + y * (height + _GAP)))
    for y, title in enumerate(rows):
        middle = _TEXT + _GAP + y * (height + _GAP) + height / 2
        pen.text((margin / 2, middle), title, fill=_INK, anchor="mm", font=font)
    return np.asarray(sheet)
