"""Ways through the latent space: a latent and a class vector for every frame of a film."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vgan.runtime.rng import normal


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """From a (N, d) at t = 0 to b (N, d) at t = 1, for t (T,): (T, N, d), turning at a steady rate.

    The direction turns on the sphere and the length goes in a straight line, so that what lies between two draws from N(0, I) has
    the length of such draws; a straight line would pass near 0, where the model was never trained (White 2016).
    """
    length_a, length_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    u, v = (x / length.clamp_min(1e-12) for x, length in ((a, length_a), (b, length_b)))
    # of the half chords, not of the cosine: exact for directions that lie close together too
    angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
    t = t[:, None, None].to(a)
    sine = angle.sin()
    close = sine < 1e-4  # also opposite directions, between which no shortest way is the only one
    turned = (torch.sin((1 - t) * angle) * u + torch.sin(t * angle) * v) / sine.where(~close, 1.0)
    direction = torch.where(close, (1 - t) * u + t * v, turned)
    return direction * ((1 - t) * length_a + t * length_b)


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """The straight line from a (N, d) to b (N, d) at t (T,): (T, N, d)."""
    t = t[:, None, None].to(a)
    return (1 - t) * a + t * b


@dataclass(frozen=True)
class Film:
    """What `tiles` pictures side by side show in every frame: z (T, tiles, z_dim) and c (T, tiles, label_dim)."""

    z: Tensor
    c: Tensor

    def __len__(self) -> int:
        return len(self.z)


def through(z: Tensor, c: Tensor, tiles: int, frames: int, loop: bool) -> Film:
    """From each picture to the next: z (N, z_dim) by slerp, c (N, label_dim) in straight lines, `frames` a step.

    The N pictures are shared out among the tiles in their order; N must be a multiple of tiles. With loop the last one leads back
    to the first; without, it is the last frame.
    """
    z, c = (x.unflatten(0, (tiles, -1)).transpose(0, 1) for x in (z, c))  # (stops, tiles, d)
    stops = len(z)
    steps = stops if loop and stops > 1 else stops - 1
    t = torch.arange(frames, device=z.device) / frames
    parts_z = [slerp(z[i], z[(i + 1) % stops], t) for i in range(steps)]
    parts_c = [lerp(c[i], c[(i + 1) % stops], t) for i in range(steps)]
    if steps < stops:
        parts_z.append(z[-1:])
        parts_c.append(c[-1:])
    return Film(torch.cat(parts_z), torch.cat(parts_c))


def walk(z_dim: int, c: Tensor, seed: int, index: Tensor, steps: int, frames: int) -> Film:
    """A smooth random walk for each picture `index` (tiles,), of class c (tiles, d), that closes after steps * frames frames.

    Sums of waves with normal amplitudes: z(t) = sum_k (a_k cos 2 pi k t + b_k sin 2 pi k t) / sqrt(K), K = ceil(steps / 4).
    Every frame is distributed as N(0, I), the model's own input, and a quarter of the fastest wave takes it to something new.
    """
    waves = math.ceil(steps / 4)
    a, b = (
        normal(seed, f"walk {name}", index, waves * z_dim).unflatten(1, (waves, z_dim))
        for name in ("cosine", "sine")
    )  # (tiles, waves, z_dim)
    t = torch.arange(steps * frames, device=index.device) / (steps * frames)
    phase = 2 * math.pi * t[:, None] * torch.arange(1, waves + 1, device=index.device)  # (T, waves)
    z = torch.einsum("tk,nkd->tnd", phase.cos(), a) + torch.einsum("tk,nkd->tnd", phase.sin(), b)
    return Film(z / math.sqrt(waves), c.expand(len(t), *c.shape))
