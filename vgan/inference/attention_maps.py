"""What the networks look at, as maps over the picture: attention and gates of the generator, verdicts of the discriminator."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from vgan.models.generator import GatedSelfAttention
from vgan.models.layers import AdaptiveAttention2d
from vgan.runtime.device import autocast
from vgan.runtime.errors import UserError
from vgan.runtime.images import to_float, to_uint8

_TILE = 96  # px of a picture in a sheet, at least
_BAND = 14  # px of a line of text
_BACK, _INK = (24, 24, 28), (220, 220, 224)


@dataclass(frozen=True)
class Look:
    """One attention layer over N pictures, at h x w positions.

    weights (N, heads, h, w, h, w): where each position (the first two) looks; they sum to 1 over the last two. gates (N, groups,
    h, w) in (-1, 1) of adaptive attention, otherwise None. effect (N, h, w): how far the layer changed the features of
    each position.
    """

    weights: Tensor
    gates: Tensor | None
    effect: Tensor

    def strongest(self) -> Tensor:
        """(N, 2) row and column of the position that the layer changed most."""
        at = self.effect.flatten(1).argmax(1)
        return torch.stack([at // self.effect.shape[2], at % self.effect.shape[2]], dim=1)


@torch.no_grad()
def look(G: nn.Module, z: Tensor, c: Tensor, precision: str = "fp32") -> tuple[Tensor, list[Look]]:
    """Pictures as uint8 (N, C, H, W), and one Look for each attention layer, coarse ones first.

    Raises UserError for a generator without attention.
    """
    looks: list[Look] = []

    def record(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        (x,) = args
        weights = layer.attention.weights(x).unflatten(3, x.shape[2:]).unflatten(2, x.shape[2:])
        gates = layer.gates(x).float() if isinstance(layer, AdaptiveAttention2d) else None
        effect = (
            (output.float() - x.float()).norm(dim=1)
            if output.shape == x.shape
            else output.float().norm(dim=1)
        )
        looks.append(
            Look(weights.float().cpu(), None if gates is None else gates.cpu(), effect.cpu())
        )

    layers = [m for m in G.modules() if isinstance(m, (GatedSelfAttention, AdaptiveAttention2d))]
    if not layers:
        raise UserError(
            "show=attention: this generator has no attention; train with model=attn or model=adaptive"
        )
    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        with autocast(z.device, precision):
            images = to_uint8(G(z, c))
    finally:
        for hook in hooks:
            hook.remove()
    return images, looks


def has_attention(G: nn.Module) -> bool:
    """Whether `look` finds something."""
    return any(isinstance(m, (GatedSelfAttention, AdaptiveAttention2d)) for m in G.modules())


@torch.no_grad()
def verdicts(D: nn.Module, images: Tensor, c: Tensor, precision: str = "fp32") -> Tensor:
    """What each place of uint8 pictures (N, C, H, W) adds to the discriminator's verdict: (N, h, w), low where it looks fake."""
    with autocast(images.device, precision):
        return D.logit_map(to_float(images), c).float().cpu()  # type: ignore[operator]


def attention_sheet(
    images: Tensor, looks: list[Look], query: tuple[float, float] | None = None
) -> np.ndarray:
    """A row for each uint8 picture (N, C, H, W): itself, then where each head of each layer looks from one position, and gates.

    query: row and column of that position in pictures' heights and widths, in [0, 1); None takes the one that the layer changed
    most. Bright is where it looks; the position is framed. Returns (height, width, 3) uint8.
    """
    titles = ["picture"]
    columns: list[list[np.ndarray]] = [[_tile(image) for image in images]]
    for layer in looks:
        h, w = layer.effect.shape[1:]
        at = (
            layer.strongest()
            if query is None
            else torch.tensor([[int(query[0] * h), int(query[1] * w)]] * len(images))
        )
        for head in range(layer.weights.shape[1]):
            titles.append(f"{h} px, head {head + 1}")
            heats = [layer.weights[i, head, at[i, 0], at[i, 1]] for i in range(len(images))]
            tiles = [_heated(image, heat / heat.max()) for image, heat in zip(images, heats)]
            columns.append(
                [_framed(tile, row, col, h, w) for tile, (row, col) in zip(tiles, at.tolist())]
            )
        for group in range(layer.gates.shape[1] if layer.gates is not None else 0):
            titles.append(f"{h} px, gate {group + 1}")
            columns.append(
                [_signed(image, gate) for image, gate in zip(images, layer.gates[:, group])]
            )  # type: ignore[index]
    return _sheet(titles, columns)


def verdict_sheet(images: Tensor, logits: Tensor) -> np.ndarray:
    """A row for each uint8 picture (N, C, H, W): itself, and over it what looks fake (red) or real (blue) by logits (N, h, w).

    Relativistic losses leave the logits' zero undecided, so each place is measured from its mean over the pictures.
    """
    centred = logits - logits.mean(dim=0 if len(logits) > 1 else (1, 2), keepdim=True)
    scaled = centred / centred.abs().max().clamp_min(1e-12)
    columns = [
        [_tile(image) for image in images],
        [_signed(image, -map_) for image, map_ in zip(images, scaled)],
    ]
    return _sheet(["picture", "red: looks fake"], columns)


def _side(image: Tensor) -> int:
    return image.shape[1] * -(-_TILE // image.shape[1])


def _tile(image: Tensor) -> np.ndarray:
    """uint8 (C, H, W) -> (side, side, 3), pixels kept square and sharp."""
    factor = _side(image) // image.shape[1]
    picture = image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _spread(values: Tensor, side: int) -> np.ndarray:
    """(h, w) -> (side, side, 1), smooth."""
    return F.interpolate(
        values[None, None].float(), (side, side), mode="bilinear", align_corners=False
    )[0, 0, :, :, None].numpy()


def _grey(image: Tensor) -> np.ndarray:
    return _tile(image).astype(np.float32).mean(axis=2, keepdims=True).repeat(3, axis=2)


def _heated(image: Tensor, heat: Tensor) -> np.ndarray:
    """Heat in [0, 1] over the darkened picture, from black through red and yellow to white."""
    t = _spread(heat.clamp(0, 1), _side(image))
    colour = 255 * np.concatenate(
        [np.clip(2.5 * t, 0, 1), np.clip(2.5 * t - 0.9, 0, 1), np.clip(4 * t - 3, 0, 1)], axis=2
    )
    return _mixed(0.55 * _grey(image), colour, 0.75 * np.sqrt(t))


def _signed(image: Tensor, values: Tensor) -> np.ndarray:
    """Values in [-1, 1] over the picture: blue below 0, red above."""
    t = _spread(values.clamp(-1, 1), _side(image))
    colour = np.where(t > 0, np.array([235.0, 64.0, 52.0]), np.array([56.0, 132.0, 255.0]))
    return _mixed(0.7 * _grey(image), colour, 0.8 * np.sqrt(np.abs(t)))


def _mixed(below: np.ndarray, above: np.ndarray, share: np.ndarray) -> np.ndarray:
    return (below * (1 - share) + above * share).round().clip(0, 255).astype(np.uint8)


def _framed(tile: np.ndarray, row: int, column: int, h: int, w: int) -> np.ndarray:
    picture = Image.fromarray(tile)
    dy, dx = tile.shape[0] / h, tile.shape[1] / w
    box = [column * dx, row * dy, (column + 1) * dx - 1, (row + 1) * dy - 1]
    ImageDraw.Draw(picture).rectangle(
        box, outline=(90, 230, 255), width=max(1, tile.shape[0] // 96)
    )
    return np.asarray(picture)


def _sheet(titles: list[str], columns: list[list[np.ndarray]]) -> np.ndarray:
    side, rows, gap = columns[0][0].shape[0], len(columns[0]), 4
    sheet = Image.new(
        "RGB", (len(columns) * (side + gap) + gap, rows * (side + gap) + gap + _BAND), _BACK
    )
    pen = ImageDraw.Draw(sheet)
    for x, (title, column) in enumerate(zip(titles, columns)):
        left = gap + x * (side + gap)
        pen.text(
            (left + side / 2, 2), title, fill=_INK, anchor="ma", font=ImageFont.load_default(10)
        )
        for y, tile in enumerate(column):
            sheet.paste(Image.fromarray(tile), (left, _BAND + gap + y * (side + gap)))
    return np.asarray(sheet)


attention_maps = look
patch_logits = verdicts
attention_grid = attention_sheet
patch_logits_grid = verdict_sheet
