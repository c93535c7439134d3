"""Differentiable augmentation of batches inside the training step, so that small data sets are not learned by heart.

Reals and fakes pass through the same transforms before the discriminator sees them (Zhao et al. 2020, DiffAugment;
Karras et al. 2020, ADA), each transform with probability p for every picture. Shapes are static and there is no
branch on data, so the whole compiles.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vgan.randomness import Streams

# Each transform: images (N, C, H, W) in [-1, 1], apply (N, 1, 1, 1) of 0 or 1, u (N, 3) uniform in [0, 1) -> images.
Transform = Callable[[Tensor, Tensor, Tensor], Tensor]
_DRAWS = 4  # uniform numbers a transform and picture: one decides whether, three how


def flip(x: Tensor, apply: Tensor, u: Tensor) -> Tensor:
    """Left-right, in half of the chosen pictures."""
    return torch.where((apply > 0) & (u[:, 0].view(-1, 1, 1, 1) < 0.5), x.flip(3), x)


def translation(x: Tensor, apply: Tensor, u: Tensor, reach: float = 0.125) -> Tensor:
    """By whole pixels, up to an eighth of the size each way; black (0 in [-1, 1] is mid-grey) comes in from outside."""
    for dim in (2, 3):
        size = x.shape[dim]
        most = int(size * reach)
        shift = ((u[:, dim - 2] * (2 * most + 1)).long() - most) * apply.view(-1).long()  # (N,)
        source = torch.arange(size, device=x.device)[None] - shift[:, None]  # (N, size)
        shape = [len(x), 1, 1, 1]
        shape[dim] = size
        inside = ((source >= 0) & (source < size)).view(shape)
        x = x.gather(dim, source.clamp(0, size - 1).view(shape).expand_as(x)) * inside
    return x


def cutout(x: Tensor, apply: Tensor, u: Tensor, share: float = 0.5) -> Tensor:
    """A square of half the width, anywhere, becomes mid-grey."""
    hidden = apply.new_ones(())
    for dim in (2, 3):
        size = x.shape[dim]
        shape = [1, 1, 1, 1]
        shape[dim] = size
        at = torch.arange(size, device=x.device).view(shape)
        centre = (u[:, dim - 2] * size).view(-1, 1, 1, 1)
        hidden = hidden * ((at + 0.5 - centre).abs() < size * share / 2)
    return x * (1 - hidden * apply)


def colour(x: Tensor, apply: Tensor, u: Tensor) -> Tensor:
    """Brightness +-0.5, saturation times 0 to 2 (RGB only) and contrast times 0.5 to 1.5."""
    brightness, saturation, contrast = (u[:, i].view(-1, 1, 1, 1) for i in range(3))
    x = x + (brightness - 0.5) * apply
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (1 + (saturation * 2 - 1) * apply)
    middle = x.mean((1, 2, 3), keepdim=True)
    return middle + (x - middle) * (1 + (contrast - 0.5) * apply)


TRANSFORMS: dict[str, Transform] = {"flip": flip, "translation": translation, "cutout": cutout, "colour": colour}


class Augment:
    """The named transforms one after another, each with probability p a picture.

    __call__(images (N, C, H, W) in [-1, 1], p in [0, 1], streams, name) -> images; `name` keeps the draws of reals and
    fakes apart.
    """

    def __init__(self, transforms: Sequence[str] = ()) -> None:
        unknown = [t for t in transforms if t not in TRANSFORMS]
        if unknown:
            raise ValueError(f"transforms={unknown}: unknown; use some of {', '.join(TRANSFORMS)}")
        self.transforms = tuple(transforms)

    def __call__(self, images: Tensor, p: float | Tensor, streams: Streams, name: str) -> Tensor:
        if not self.transforms:
            return images
        u = streams.uniform(f"augment_{name}", _DRAWS * len(self.transforms))
        for i, transform in enumerate(self.transforms):
            draws = u[:, _DRAWS * i : _DRAWS * (i + 1)]
            apply = (draws[:, 0] < p).view(-1, 1, 1, 1).to(images.dtype)
            images = TRANSFORMS[transform](images, apply, draws[:, 1:])
        return images
