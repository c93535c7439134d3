"""From a latent vector to a picture: the residual generator of the ladder's upper rungs, and the textbook one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vgan.models.layers import (
    AdaptiveAttention2d,
    BiasLeakyReLU,
    ConvToPixels,
    ResidualBlock,
    SelfAttention2d,
    count_stages,
    init_conv,
    run_layer,
    upsample2x,
)


class LatentInput(nn.Module):
    """z (N, z_dim) and one-hot c (N, label_dim) -> features (N, width, 4, 4): a learned 4x4 basis, scaled by a linear map.

    The class embedding starts at a fifth of z's size. With equal sizes, small generators followed the class alone: on the
    embedded shapes each class had collapsed to one picture after 20,000 images.
    """

    memory_format = (
        torch.channels_last
    )  # the whole network follows its input; another is for comparisons

    def __init__(self, z_dim: int, label_dim: int, width: int, embed_dim: int) -> None:
        super().__init__()
        self.label_dim = label_dim
        self.embed = nn.Linear(label_dim, embed_dim, bias=False) if label_dim else None
        if self.embed is not None:
            nn.init.normal_(self.embed.weight, std=0.2)
        features = z_dim + (embed_dim if label_dim else 0)
        self.scale = nn.Linear(features, width)
        nn.init.normal_(self.scale.weight, std=1 / math.sqrt(features))
        nn.init.zeros_(self.scale.bias)
        self.basis = nn.Parameter(torch.randn(width, 4, 4))

    def forward(self, z: Tensor, c: Tensor | None) -> Tensor:
        if self.embed is not None:
            if c is None:
                raise ValueError(
                    f"c=None: this generator knows {self.label_dim} classes; give one-hot c (N, {self.label_dim})"
                )
            z = torch.cat([z, self.embed(c)], dim=1)
        scale = self.scale(z)[:, :, None, None]
        x = scale * self.basis.to(
            scale.dtype
        )  # under autocast: float32 here would go on through the whole first stage
        return x.contiguous(memory_format=self.memory_format)


class GatedSelfAttention(nn.Module):
    """x + gate SelfAttention2d(x), one gate a channel that starts at 0 (Zhang et al. 2018). Shape kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = SelfAttention2d(channels, channels)
        self.gate = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate.to(x.dtype) * self.attention(x)


def attention_layer(kind: str, channels: int) -> nn.Module:
    """The switch between `model=sep`, `model=attn` and `model=adaptive`: kind is 'none', 'self' or 'adaptive'."""
    if kind == "none":
        return nn.Identity()
    if kind == "self":
        return GatedSelfAttention(channels)
    if kind == "adaptive":
        return AdaptiveAttention2d(channels, channels)
    raise ValueError(f"attention={kind}: unknown; use none, self or adaptive")


class GeneratorBase(nn.Module):
    """A network from z (N, z_dim) and one-hot c (N, label_dim) to images (N, C, H, W) in [-1, 1]."""

    z_dim: int
    label_dim: int
    img_resolution: int
    img_channels: int
    label_names: tuple[str, ...]  # set when a checkpoint is loaded


class Generator(GeneratorBase):
    """z (and a class) -> learned 4x4 basis -> residual stages with antialiased upsampling -> picture.

    forward(z, c): z (N, z_dim) ~ N(0, I); c (N, label_dim) one-hot, or None where label_dim is 0; returns
    (N, img_channels, img_resolution, img_resolution), where [-1, 1] is black to white (not clipped).

    widths: channels at 4, 8, 16, ... px (more than needed are ignored). conv: 'dense', 'grouped' or 'separable'. attention:
    'none', 'self' or 'adaptive', once at the end of the stages in attention_resolutions.

    patch_size > 1 ends at img_resolution / patch_size and draws that many pixels square from each feature (sub-pixel
    convolution, Shi et al. 2016): the finest stage, which costs most on a CPU, is left out.

    gradient_checkpointing keeps no features inside the layers and works them out again in the backward pass: less memory, about a third
    more work (Chen et al. 2016).

    Source: the residual, normalisation-free skeleton of Huang et al. 2024, "The GAN is dead; long live the GAN!".
    """

    def __init__(
        self,
        z_dim: int,
        img_resolution: int,
        widths: Sequence[int],
        img_channels: int = 3,
        label_dim: int = 0,
        blocks: int = 1,
        expansion: int = 2,
        conv: str = "separable",
        attention: str = "none",
        attention_resolutions: Sequence[int] = (8, 16),
        embed_dim: int = 64,
        patch_size: int = 1,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        stages = count_stages(img_resolution, img_channels, widths, patch_size)
        self.z_dim, self.label_dim = z_dim, label_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.gradient_checkpointing = gradient_checkpointing
        self.input = LatentInput(z_dim, label_dim, widths[0], embed_dim)
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths[:stages]):
            layers: list[nn.Module] = [
                ResidualBlock(width, conv, expansion, stages * blocks) for _ in range(blocks)
            ]
            if 4 << i in attention_resolutions:
                layers.append(attention_layer(attention, width))
            self.stages.append(nn.Sequential(*layers))
            if i + 1 < stages:  # mixed before upsampling, where it costs a quarter
                self.transitions.append(
                    init_conv(nn.Conv2d(width, widths[i + 1], 1, bias=False), gain=1)
                )
        self.act = BiasLeakyReLU(widths[stages - 1])
        self.to_rgb = ConvToPixels(widths[stages - 1], img_channels, patch_size)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        x = self.input(z, c)  # (N, widths[0], 4, 4)
        for i, stage in enumerate(self.stages):
            for layer in stage:  # type: ignore[attr-defined]
                x = run_layer(layer, x, self.gradient_checkpointing)
            if i < len(self.transitions):
                x = upsample2x(self.transitions[i](x))
        return self.to_rgb(self.act(x))


class PlainGenerator(GeneratorBase):
    """The textbook generator: a stack of 3x3 convolutions with ReLU, nearest upsampling between them, Tanh at the end.

    Same arguments, input and output range as `Generator` where they apply; `blocks` is the number of convolutions a
    stage. Source: Radford et al. 2016 (DCGAN), with upsampling in place of strided transposed convolutions (Odena et
    al. 2016) and without batch normalisation, so that a picture depends on its own z alone.
    """

    def __init__(
        self,
        z_dim: int,
        img_resolution: int,
        widths: Sequence[int],
        img_channels: int = 3,
        label_dim: int = 0,
        blocks: int = 1,
        embed_dim: int = 64,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        stages = count_stages(img_resolution, img_channels, widths, patch_size)
        self.z_dim, self.label_dim = z_dim, label_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.input = LatentInput(z_dim, label_dim, widths[0], embed_dim)
        layers: list[nn.Module] = [nn.ReLU()]
        width = widths[0]
        for i in range(stages):
            if i:
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            for _ in range(blocks):
                layers += [
                    init_conv(nn.Conv2d(width, widths[i], 3, padding=1), gain=math.sqrt(2)),
                    nn.ReLU(),
                ]
                width = widths[i]
        self.body = nn.Sequential(*layers)
        self.to_rgb = ConvToPixels(width, img_channels, patch_size)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        return self.to_rgb(self.body(self.input(z, c))).tanh()
