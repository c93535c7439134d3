"""Directions of the latent space: principal components of what the generator's layers see of z."""

import math

import torch
from torch import Tensor, nn

from vgan.inference.latents import Film
from vgan.models.generator import GeneratorBase
from vgan.runtime.errors import UserError


def components(G: GeneratorBase) -> Tensor:
    """Return unit vectors (z_dim, z_dim), one a row: the principal components, strongest first.

    They are those of the responses of the first layer to z ~ N(0, I) (Haerkoenen et al. 2020,
    GANSpace), with modulation those of all layers that receive z. These layers are linear, so that
    the components are the eigenvectors of W^T W for their stacked weights W (Shen & Zhou 2021,
    SeFa). Each is turned so that its largest entry is positive. Raises UserError for a network of
    another kind.
    """
    first = getattr(getattr(G, "input", None), "scale", None)
    if not isinstance(first, nn.Linear):
        problem = f"components: {type(G).__name__} has no linear first layer"
        raise UserError(f"{problem}; use motion=walk or interpolate")
    layers = [first, *getattr(G, "modulations", [])]
    W = torch.cat([layer.weight[:, : G.z_dim] for layer in layers])  # z comes before the class
    # On the CPU and in float64, so that every device finds the same directions.
    V = torch.linalg.eigh((W.T @ W).cpu().double())[1].flip(1).T
    largest = V.gather(1, V.abs().argmax(1, keepdim=True))
    return (V * largest.sign()).to(W)


def component(G: GeneratorBase, number: int) -> Tensor:
    """Return principal component `number` of `components`, from 1. Raises UserError for others."""
    if not 1 <= number <= G.z_dim:
        rule = f"must be from 1 to {G.z_dim}, the dimension of this model's z"
        raise UserError(f"component={number}: {rule}")
    return components(G)[number - 1]


def move(z: Tensor, c: Tensor, direction: Tensor, strength: float, frames: int, loop: bool) -> Film:
    """Move images z (N, z_dim), c (N, label_dim) along a unit vector (z_dim,).

    The film goes from -strength to +strength in `frames` frames, slowly at both ends, and back with
    loop; without it, the far end is the last frame.
    """
    count = 2 * frames if loop else frames + 1
    t = -strength * torch.cos(torch.arange(count, device=z.device) * math.pi / frames)
    return Film(z + t[:, None, None] * direction, c.expand(count, *c.shape))
