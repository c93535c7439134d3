"""Latents and labels by seed and image number, their images, and paths through latent space."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgan.models.generator import GeneratorBase
from vgan.runtime.device import autocast
from vgan.runtime.images import to_uint8
from vgan.runtime.rng import normal


def latents(
    G: GeneratorBase,
    index: Tensor,
    seed: int,
    label: int | Tensor | None = None,
    truncation: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return z (N, z_dim) and c (N, label_dim) of images `index` (N,) of a seed, on G's device.

    label: one class for all, one for each (N,), c itself as floats (N, label_dim), or None for
    class i modulo label_dim for image i, or for the conditions of G's examples in that order.
    truncation scales z towards 0, where the input of the first layer is at its mean for that class.
    """
    device = next(G.parameters()).device
    index = index.to(device)
    z = normal(seed, "sample", index, G.z_dim) * truncation
    if not G.label_dim:
        return z, z.new_zeros(len(z), 0)
    label = torch.as_tensor(default_labels(G, index) if label is None else label, device=device)
    if label.is_floating_point():
        return z, label.to(z)
    return z, F.one_hot(label.expand(len(index)), G.label_dim).float()


def default_labels(G: GeneratorBase, index: Tensor) -> Tensor:
    """Return class i modulo label_dim (N,) of images i in `index` (N,), or c of an example."""
    if G.conditions is None:
        return index % max(1, G.label_dim)
    examples = G.conditions.standardize(G.conditions.values)
    return examples[index.cpu() % len(examples)]


@torch.no_grad()
def render(G: GeneratorBase, z: Tensor, c: Tensor, precision: str = "fp32") -> Tensor:
    """Return uint8 images (N, C, H, W) on G's device from z (N, z_dim) and c (N, label_dim)."""
    with autocast(z.device, precision):
        return to_uint8(G(z, c))


def draw(
    G: GeneratorBase,
    index: Tensor,
    seed: int,
    label: int | Tensor | None = None,
    truncation: float = 1.0,
    precision: str = "fp32",
) -> Tensor:
    """Return the images `index` (N,) of a seed as uint8 (N, C, H, W) on G's device.

    The arguments are those of `latents`. An image depends on the seed and its number. The batch
    size may change how single values are rounded.
    """
    return render(G, *latents(G, index, seed, label, truncation), precision)


def to_host(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield each batch on the CPU. From a GPU, a batch is copied while the next one is computed."""
    waiting: tuple[Tensor, torch.cuda.Event] | None = None
    for images in batches:
        if images.device.type != "cuda":
            yield images.cpu()
            continue
        host = torch.empty_like(images, device="cpu", pin_memory=True)
        host.copy_(images, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        if waiting:
            waiting[1].synchronize()
            yield waiting[0]
        waiting = host, copied
    if waiting:
        waiting[1].synchronize()
        yield waiting[0]


class FromLatent(nn.Module):
    """A generator from z (N, z_dim) and, with classes, c (N, label_dim) to images (N, C, H, W).

    With an attention layer, the second output is its attention (N, heads, h w, h w).
    """

    def __init__(self, G: GeneratorBase, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.G = G
        self._weights: list[Tensor] = []
        self._hook = attention.register_forward_hook(self._record) if attention else None

    def _record(self, layer: Any, args: tuple[Tensor], _: Tensor) -> None:
        self._weights.append(layer.attention.weights(args[0]))

    def forward(self, z: Tensor, c: Tensor | None = None) -> Any:
        images = self.G(z, c if c is not None else z.new_zeros(z.shape[0], 0))
        return (images, self._weights.pop()) if self._hook else images

    def close(self) -> None:
        """Remove the hook from the generator."""
        if self._hook:
            self._hook.remove()


class Latents(nn.Module):
    """The latents z (N, z_dim) of image numbers (N,) int64 of a seed, as vgan-sample draws them."""

    def __init__(self, z_dim: int, seed: int) -> None:
        super().__init__()
        self.z_dim, self.seed = z_dim, seed

    def forward(self, numbers: Tensor) -> Tensor:
        return normal(self.seed, "sample", numbers, self.z_dim)


class FromNumbers(nn.Module):
    """A generator from image numbers (N,) int64 and, with classes, labels (N,) int64.

    The images are those of vgan-sample seeds=NUMBERS.
    """

    def __init__(self, G: GeneratorBase, seed: int) -> None:
        super().__init__()
        self.G, self.label_dim = G, G.label_dim
        self.latents = Latents(G.z_dim, seed)

    def forward(self, numbers: Tensor, labels: Tensor | None = None) -> Tensor:
        z = self.latents(numbers)
        if labels is None:
            return self.G(z, z.new_zeros(z.shape[0], 0))
        classes = torch.arange(self.label_dim, device=labels.device)
        return self.G(z, (labels[:, None] == classes).float())  # every exporter supports ==


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Interpolate spherically from a (N, d) at t = 0 to b (N, d) at t = 1.

    t: (T,). Returns (T, N, d). The direction turns at a constant rate and the length changes
    linearly. Points between two draws from N(0, I) then have the length of such draws. A straight
    line would pass near 0, where the model was not trained (White 2016).
    """
    length_a, length_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    u, v = a / length_a.clamp_min(1e-12), b / length_b.clamp_min(1e-12)
    # From the half chords, not from the cosine: that is exact for close directions too.
    angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
    t = t[:, None, None].to(a)
    sine = angle.sin()
    close = sine < 1e-4  # also for opposite directions, which have no unique shortest arc
    turned = (torch.sin((1 - t) * angle) * u + torch.sin(t * angle) * v) / sine.where(~close, 1.0)
    direction = torch.where(close, (1 - t) * u + t * v, turned)
    return direction * ((1 - t) * length_a + t * length_b)


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Interpolate linearly from a (N, d) to b (N, d) at t (T,). Returns (T, N, d)."""
    t = t[:, None, None].to(a)
    return (1 - t) * a + t * b


@dataclass(frozen=True)
class Film:
    """Inputs of T frames of `tiles` images: z (T, tiles, z_dim) and c (T, tiles, label_dim)."""

    z: Tensor
    c: Tensor

    def __len__(self) -> int:
        return len(self.z)


def interpolate(z: Tensor, c: Tensor, tiles: int, frames: int, loop: bool) -> Film:
    """Move from each image to the next: z (N, z_dim) by slerp, c (N, label_dim) linearly.

    Each step has `frames` frames. The tiles get equal shares of the N images, in order; N must be a
    multiple of tiles. With loop, the last image is followed by the first; otherwise it is the last
    frame.
    """
    stops_z = z.unflatten(0, (tiles, -1)).transpose(0, 1)  # (stops, tiles, d)
    stops_c = c.unflatten(0, (tiles, -1)).transpose(0, 1)
    stops = len(stops_z)
    steps = stops if loop and stops > 1 else stops - 1
    t = torch.arange(frames, device=z.device) / frames
    frames_z, frames_c = [], []
    for i in range(steps):
        after = (i + 1) % stops
        frames_z.append(slerp(stops_z[i], stops_z[after], t))
        frames_c.append(lerp(stops_c[i], stops_c[after], t))
    if steps < stops:
        frames_z.append(stops_z[-1:])
        frames_c.append(stops_c[-1:])
    return Film(torch.cat(frames_z), torch.cat(frames_c))


def walk(z_dim: int, c: Tensor, seed: int, index: Tensor, steps: int, frames: int) -> Film:
    """Take a smooth random walk for each image `index` (tiles,) with c (tiles, d).

    It closes after steps * frames frames. z is a sum of waves with normal amplitudes: z(t) = sum_k
    (a_k cos 2 pi k t + b_k sin 2 pi k t) / sqrt(K), with K = ceil(steps / 4). Every frame is
    distributed as N(0, I). A quarter of the fastest wave is enough for a different image.
    """
    waves = math.ceil(steps / 4)
    shape = (waves, z_dim)
    a = normal(seed, "walk cosine", index, waves * z_dim).unflatten(1, shape)  # (tiles, *shape)
    b = normal(seed, "walk sine", index, waves * z_dim).unflatten(1, shape)
    t = torch.arange(steps * frames, device=index.device) / (steps * frames)
    phase = 2 * math.pi * t[:, None] * torch.arange(1, waves + 1, device=index.device)  # (T, waves)
    z = torch.einsum("tk,nkd->tnd", phase.cos(), a) + torch.einsum("tk,nkd->tnd", phase.sin(), b)
    return Film(z / math.sqrt(waves), c.expand(len(t), *c.shape))
