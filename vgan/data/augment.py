"""Differentiable augmentation of batches inside the training step, against overfitting.

Reals and fakes pass through the same transforms before the discriminator (Zhao et al. 2020,
DiffAugment; Karras et al. 2020, ADA), each transform with probability p per image. Shapes are
static and no branch depends on data, so that everything compiles. The penalties are taken on the
augmented images, so no transform needs a second derivative.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vgan.runtime.rng import Streams

# Images (N, C, H, W) in [-1, 1], apply (N,) of 0 or 1, u (N, 3) uniform in [0, 1) -> images.
Transform = Callable[[Tensor, Tensor, Tensor], Tensor]
# apply, u -> one matrix per image: (N, 3, 3) from positions in the result to positions in the
# image, in half widths from the centre; or (N, 4, 4) from colours to colours.
Matrix = Callable[[Tensor, Tensor], Tensor]
_DRAWS = 4  # uniform numbers per transform and image: one selects it, three are parameters


# Whole pixels: exact copies.


def flip(x: Tensor, apply: Tensor, u: Tensor) -> Tensor:
    """Mirror half of the selected images left to right."""
    return torch.where(_wide((apply > 0) & (u[:, 0] < 0.5)), x.flip(3), x)


def quarter_turns(x: Tensor, apply: Tensor, u: Tensor) -> Tensor:
    """Rotate by 0, 90, 180 or 270 degrees; oblong images by 0 or 180."""
    turns = (u[:, 0] * 4).long() * apply.long()
    if x.shape[2] == x.shape[3]:
        x = torch.where(_wide(turns % 2 == 1), x.transpose(2, 3).flip(2), x)
    return torch.where(_wide(turns >= 2), x.flip(2, 3), x)


def translation(x: Tensor, apply: Tensor, u: Tensor, reach: float = 0.125) -> Tensor:
    """Shift by whole pixels, up to `reach` of the size; the uncovered part is mid-grey (0)."""
    for dim in (2, 3):
        size = x.shape[dim]
        most = int(size * reach)
        shift = ((u[:, dim - 2] * (2 * most + 1)).long() - most) * apply.long()  # (N,)
        source = torch.arange(size, device=x.device)[None] - shift[:, None]  # (N, size)
        shape = [len(x), 1, 1, 1]
        shape[dim] = size
        inside = ((source >= 0) & (source < size)).view(shape)
        x = x.gather(dim, source.clamp(0, size - 1).view(shape).expand_as(x)) * inside
    return x


def cutout(x: Tensor, apply: Tensor, u: Tensor, share: float = 0.5) -> Tensor:
    """Replace a square of `share` of the width, at a random place, by mid-grey."""
    hidden = apply.new_ones(())
    for dim in (2, 3):
        size = x.shape[dim]
        shape = [1, 1, 1, 1]
        shape[dim] = size
        at = torch.arange(size, device=x.device).view(shape)
        centre = _wide(u[:, dim - 2] * size)
        hidden = hidden * ((at + 0.5 - centre).abs() < size * share / 2)
    return x * (1 - hidden * _wide(apply))


# Geometry with interpolation: one matrix each, so that an image is resampled once.


def scale(apply: Tensor, u: Tensor) -> Tensor:
    """Scale both sides by 2^N(0, 0.2^2)."""
    s = torch.exp2(-0.2 * _normal(u[:, 0]) * apply)
    return _stretched(s, s)


def stretch(apply: Tensor, u: Tensor) -> Tensor:
    """Scale the width by 2^N(0, 0.2^2) and the height by its inverse."""
    s = torch.exp2(-0.2 * _normal(u[:, 0]) * apply)
    return _stretched(s, 1 / s)


def rotation(apply: Tensor, u: Tensor) -> Tensor:
    """Rotate by any angle."""
    angle = (u[:, 0] * 2 - 1) * math.pi * apply
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return _rows([c, -s, zero], [s, c, zero], [zero, zero, one])


def shift(apply: Tensor, u: Tensor) -> Tensor:
    """Shift by N(0, 0.125^2) of the size in both directions, also by parts of a pixel."""
    x, y = (-2 * 0.125 * _normal(u[:, i]) * apply for i in range(2))
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _rows([one, zero, x], [zero, one, y], [zero, zero, one])


# Colours: one matrix each, from (r, g, b, 1) to (r, g, b, 1).


def brightness(apply: Tensor, u: Tensor) -> Tensor:
    """Add N(0, 0.2^2)."""
    return _moved(_identity(apply, 3), (0.2 * _normal(u[:, 0]) * apply)[:, None].expand(-1, 3))


def contrast(apply: Tensor, u: Tensor) -> Tensor:
    """Multiply by 2^N(0, 0.5^2), around mid-grey."""
    factor = torch.exp2(0.5 * _normal(u[:, 0]) * apply)
    return _moved(_identity(apply, 3) * factor[:, None, None])


def luma_flip(apply: Tensor, u: Tensor) -> Tensor:
    """Invert the luma, not the hue, of half of the selected images (Householder reflection)."""
    flipped = apply * (u[:, 0] < 0.5)
    return _moved(_identity(apply, 3) - 2 * flipped[:, None, None] * _grey(apply))


def hue(apply: Tensor, u: Tensor) -> Tensor:
    """Rotate colours around the grey axis by any angle."""
    angle = ((u[:, 0] * 2 - 1) * math.pi * apply)[:, None, None]
    grey, identity = _grey(apply), _identity(apply, 3)
    # The cross product with the grey axis. As a constant it would be copied to a GPU at every call.
    cross = (identity.roll(-1, 2) - identity.roll(1, 2)) / math.sqrt(3)
    return _moved(angle.cos() * identity + angle.sin() * cross + (1 - angle.cos()) * grey)


def saturation(apply: Tensor, u: Tensor) -> Tensor:
    """Multiply the distance from grey by 2^N(0, 1)."""
    factor = torch.exp2(_normal(u[:, 0]) * apply)[:, None, None]
    return _moved(factor * _identity(apply, 3) + (1 - factor) * _grey(apply))


def colour(x: Tensor, apply: Tensor, u: Tensor) -> Tensor:
    """Apply the colour transform of DiffAugment.

    Brightness +-0.5, saturation times 0 to 2 (RGB only), contrast times 0.5 to 1.5 around the mean.
    Alpha stays as it is.
    """
    if x.shape[1] == 4:
        return torch.cat([colour(x[:, :3], apply, u), x[:, 3:]], 1)
    apply = _wide(apply)
    brightness, saturation, contrast = (_wide(u[:, i]) for i in range(3))
    x = x + (brightness - 0.5) * apply
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (1 + (saturation * 2 - 1) * apply)
    middle = x.mean((1, 2, 3), keepdim=True)
    return middle + (x - middle) * (1 + (contrast - 0.5) * apply)


COPIES: dict[str, Transform] = {
    "flip": flip,
    "quarter_turns": quarter_turns,
    "translation": translation,
}
GEOMETRY: dict[str, Matrix] = {
    "scale": scale,
    "rotation": rotation,
    "stretch": stretch,
    "shift": shift,
}
COLOURS: dict[str, Matrix] = {
    "brightness": brightness, "contrast": contrast, "luma_flip": luma_flip,
    "hue": hue, "saturation": saturation,
}  # fmt: skip
LAST: dict[str, Transform] = {"colour": colour, "cutout": cutout}
TRANSFORMS = (*COPIES, *GEOMETRY, *COLOURS, *LAST)


class Augment:
    """The named transforms, each with probability p per image.

    __call__(images (N, C, H, W) in [-1, 1], p in [0, 1], streams, name) -> images. `name` separates
    the random numbers of reals and fakes. Order: whole pixels, geometry, colours, cutout. Geometry
    mirrors the image at its border. The probability of rotation is 1 - sqrt(1 - p), as in ADA,
    since it leaves few images upright.
    """

    def __init__(self, transforms: Sequence[str] = ()) -> None:
        unknown = [t for t in transforms if t not in TRANSFORMS]
        if unknown:
            raise ValueError(f"transforms={unknown}: unknown; use some of {', '.join(TRANSFORMS)}")
        self.transforms = tuple(t for t in TRANSFORMS if t in transforms)

    def __call__(self, images: Tensor, p: float | Tensor, streams: Streams, name: str) -> Tensor:
        if not self.transforms:
            return images
        draws = streams.uniform(f"augment_{name}", _DRAWS * len(self.transforms))
        draws = draws.unflatten(1, (-1, _DRAWS))
        chosen = {}
        for i, transform in enumerate(self.transforms):
            chance = 1 - (1 - p) ** 0.5 if transform == "rotation" else p
            chosen[transform] = (draws[:, i, 0] < chance).to(images.dtype), draws[:, i, 1:]
        for transform, apply_and_u in chosen.items():
            if transform in COPIES:
                images = COPIES[transform](images, *apply_and_u)
        images = resample(images, [GEOMETRY[t](*how) for t, how in chosen.items() if t in GEOMETRY])
        images = recolour(images, [COLOURS[t](*how) for t, how in chosen.items() if t in COLOURS])
        for transform, apply_and_u in chosen.items():
            if transform in LAST:
                images = LAST[transform](images, *apply_and_u)
        return images


def resample(images: Tensor, steps: Sequence[Tensor]) -> Tensor:
    """Resample images by the product of their matrices (N, 3, 3), bilinear, mirrored at borders."""
    if not steps:
        return images
    if images.shape[2] != images.shape[3]:  # positions are in half widths and half heights
        steps = [_for_shape(step, *images.shape[2:]) for step in steps]
    product = steps[-1]
    for step in reversed(steps[:-1]):
        product = step @ product  # a position in the result passes the last step first
    grid = F.affine_grid(product[:, :2].contiguous(), list(images.shape), align_corners=False)
    # Mirrored at most twice; further out the border repeats, which keeps positions finite.
    grid = grid.clamp(-3, 3)
    if torch.are_deterministic_algorithms_enabled():
        moved = _grid_sample(images, grid)
    else:
        moved = F.grid_sample(
            images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )
    untouched = (product == torch.eye(3, device=product.device)).flatten(1).all(1)
    return torch.where(_wide(untouched), images, moved)  # exact, without rounding


def _for_shape(matrix: Tensor, height: int, width: int) -> Tensor:
    """Convert (N, 3, 3) from square to oblong images: a turn must not stretch."""
    ratios = matrix.new_ones(3, 3)
    ratios[0, 1], ratios[1, 0] = height / width, width / height
    return matrix * ratios


def _grid_sample(images: Tensor, grid: Tensor) -> Tensor:
    """Return what F.grid_sample returns, by four gathers; its own backward on CUDA uses atomics."""
    n, channels, height, width = images.shape
    corners = []
    for at, size in ((grid[..., 0], width), (grid[..., 1], height)):
        at = (at + 1) * size / 2  # from the outer edge of the first pixel
        at = (at + 2 * size) % (2 * size)
        at = (torch.minimum(at, 2 * size - at) - 0.5).clamp(0, size - 1)
        low = at.floor()
        high = (low + 1).clamp(max=size - 1)
        corners.append(((low.long(), 1 - at + low), (high.long(), at - low)))
    flat, moved = images.flatten(2), torch.zeros_like(images)
    for y, weight_y in corners[1]:
        for x, weight_x in corners[0]:
            source = (y * width + x).view(n, 1, -1).expand(-1, channels, -1)
            moved = moved + flat.gather(2, source).view_as(images) * (weight_x * weight_y)[:, None]
    return moved


def recolour(images: Tensor, steps: Sequence[Tensor]) -> Tensor:
    """Transform colours by the product of the matrices (N, 4, 4) of each image.

    Grey images use the part of the matrix that acts on grey. Colours of RGBA are multiplied by
    alpha, which stays as it is.
    """
    if not steps:
        return images
    product = steps[0]
    for step in steps[1:]:
        product = step @ product
    if images.shape[1] == 1:
        row = product[:, :3].mean(1)  # the result for (g, g, g)
        return images * _wide(row[:, :3].sum(1)) + _wide(row[:, 3])
    if images.shape[1] == 4:
        alpha = (images[:, 3:] + 1) / 2
        weighted = images[:, :3] + 1 - alpha  # alpha times the colour in [-1, 1]
        weighted = torch.einsum("nij,njhw->nihw", product[:, :3, :3], weighted)
        weighted = weighted + alpha * product[:, :3, 3, None, None]
        return torch.cat([weighted + alpha - 1, images[:, 3:]], 1)
    mixed = torch.einsum("nij,njhw->nihw", product[:, :3, :3], images)
    return mixed + product[:, :3, 3, None, None]


def _wide(x: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1)"""
    return x.view(-1, 1, 1, 1)


def _normal(u: Tensor) -> Tensor:
    """Uniform in [0, 1) -> N(0, 1), clipped at 4 standard deviations."""
    return math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.99993, 0.99993))


def _rows(*rows: Sequence[Tensor]) -> Tensor:
    """Return matrices (N, rows, columns) of entries (N,)."""
    return torch.stack([torch.stack(list(row), 1) for row in rows], 1)


def _stretched(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _rows([x, zero, zero], [zero, y, zero], [zero, zero, one])


def _identity(like: Tensor, n: int) -> Tensor:
    """(N, n, n)"""
    return torch.eye(n, device=like.device, dtype=like.dtype).expand(len(like), n, n)


def _grey(like: Tensor) -> Tensor:
    """Return the projection on the grey axis (N, 3, 3)."""
    return torch.full((len(like), 3, 3), 1 / 3, device=like.device, dtype=like.dtype)


def _moved(linear: Tensor, offset: Tensor | None = None) -> Tensor:
    """(N, 3, 3) and (N, 3) -> (N, 4, 4)"""
    offset = linear.new_zeros(len(linear), 3) if offset is None else offset
    last = linear.new_zeros(len(linear), 1, 4)
    last[:, :, 3] = 1
    return torch.cat([torch.cat([linear, offset[:, :, None]], 2), last], 1)
