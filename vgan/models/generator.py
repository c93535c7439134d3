"""Generators: the residual `Generator` and `PlainGenerator`, a stack of convolutions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vgan.data.conditions import Conditions
from vgan.models.attention import attention_layer
from vgan.models.layers import (
    BiasLeakyReLU,
    ConvToPixels,
    PointwiseConv2d,
    ResidualBlock,
    init_conv,
    init_normal,
    run_layer,
    upsample2x,
)
from vgan.models.sizes import coarsest_size, count_stages, default_patch_size, needs_checkpointing
from vgan.runtime.images import Resolution, parse_resolution


class LatentInput(nn.Module):
    """z (N, z_dim) and c (N, label_dim) -> features (N, width, *size).

    A learned basis of `size`, mostly 4x4, scaled per channel by a linear map of z and the class
    embedding. The class embedding starts at a fifth of the size of z: with equal sizes small
    generators ignored z, and on data=shapes each class had collapsed to one image after 20,000
    images.
    """

    memory_format = torch.channels_last  # all layers follow it; changed in comparisons only

    def __init__(
        self, z_dim: int, label_dim: int, width: int, embed_dim: int, size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.label_dim = label_dim
        self.embed = nn.Linear(label_dim, embed_dim, bias=False) if label_dim else None
        if self.embed is not None:
            init_normal(self.embed.weight, 0.2)
        features = z_dim + (embed_dim if label_dim else 0)
        self.scale = nn.Linear(features, width)
        init_normal(self.scale.weight, 1 / math.sqrt(features))
        nn.init.zeros_(self.scale.bias)
        self.basis = nn.Parameter(torch.empty(width, *size))
        init_normal(self.basis, 1.0)

    def latent(self, z: Tensor, c: Tensor | None) -> Tensor:
        """Return z, followed by the embedding of its class if there are classes."""
        if self.embed is None:
            return z
        if c is None:
            raise ValueError(
                f"c=None: this generator needs c (N, {self.label_dim}); "
                "give one-hot classes or standardized conditions"
            )
        return torch.cat([z, self.embed(c)], dim=1)

    def forward(self, z: Tensor, c: Tensor | None) -> Tensor:
        return self.features(self.latent(z, c))

    def features(self, latent: Tensor) -> Tensor:
        """Return the features (N, width, *size) of a result of `latent`."""
        scale = self.scale(latent)[:, :, None, None]
        # Under autocast a float32 basis would keep the whole first stage in float32.
        x = scale * self.basis.to(scale.dtype)
        return x.contiguous(memory_format=self.memory_format)


class GeneratorBase(nn.Module):
    """The base class of all generators: a network from latents and classes to images.

    forward(z, c): z (N, z_dim) ~ N(0, I); c (N, label_dim), or None where label_dim is 0.
    Returns (N, img_channels, H, W): -1 is black, 1 is white, not clipped. Of four channels the last
    is alpha, and the others are multiplied by it: -1 is black or transparent.
    """

    z_dim: int
    label_dim: int
    img_resolution: Resolution  # the side of a square in px, or height and width
    img_channels: int
    # Set when a checkpoint is loaded: the names of the classes, or what the conditions are.
    label_names: tuple[str, ...]
    conditions: Conditions | None = None

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class Generator(GeneratorBase):
    """A residual generator: learned basis, residual stages with antialiased upsampling, pixels.

    widths: channels at 4, 8, 16, ... px; further ones are ignored. conv: see `conv3x3`. attention:
    'none', 'self' or 'adaptive', once at the end of each stage in attention_resolutions (px).

    patch_size > 1 ends at img_resolution / patch_size and draws a square of that many pixels from
    each feature (sub-pixel convolution, Shi et al. 2016). This omits the finest stages, which cost
    the most on a CPU. None ends at 16 px, see `default_patch_size`.

    With modulation, z and class scale the channels of every stage, not only of the first. The
    scales start at 1. On emoji it kept more variety: recall 0.19 instead of 0.08
    (docs/log/settings.md).

    gradient_checkpointing recomputes the features of each layer in the backward pass: less memory,
    about a third more work (Chen et al. 2016). None does so from 512 px on.

    Source: the residual skeleton without normalisation of Huang et al. 2024, "The GAN is dead; long
    live the GAN!"; modulation Karras et al. 2019, "A style-based generator architecture".
    """

    def __init__(
        self,
        z_dim: int,
        img_resolution: int | Sequence[int],
        widths: Sequence[int],
        img_channels: int = 3,
        label_dim: int = 0,
        blocks: int = 1,
        expansion: int = 2,
        conv: str = "separable",
        attention: str = "none",
        attention_resolutions: Sequence[int] = (8, 16),
        embed_dim: int = 64,
        patch_size: int | None = 1,
        modulation: bool = False,
        gradient_checkpointing: bool | None = False,
    ) -> None:
        super().__init__()
        patch_size = patch_size or default_patch_size(img_resolution)
        stages = count_stages(img_resolution, img_channels, widths, patch_size)
        self.z_dim, self.label_dim = z_dim, label_dim
        self.img_resolution, self.img_channels = parse_resolution(img_resolution), img_channels
        self.gradient_checkpointing = needs_checkpointing(
            gradient_checkpointing, self.img_resolution
        )
        size = coarsest_size(img_resolution)
        self.input = LatentInput(z_dim, label_dim, widths[0], embed_dim, size)
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths[:stages]):
            stage = nn.Sequential()
            for _ in range(blocks):
                stage.append(ResidualBlock(width, conv, expansion, stages * blocks))
            if 4 << i in attention_resolutions:
                stage.append(attention_layer(attention, width))
            self.stages.append(stage)
            if i + 1 < stages:  # before upsampling, where it costs a quarter
                mix = PointwiseConv2d(width, widths[i + 1], bias=False)
                self.transitions.append(init_conv(mix, gain=1))
        modulated = widths[1:stages] if modulation else []
        self.modulations = nn.ModuleList(
            nn.Linear(self.input.scale.in_features, width) for width in modulated
        )
        for parameter in self.modulations.parameters():
            nn.init.zeros_(parameter)
        self.act = BiasLeakyReLU(widths[stages - 1])
        self.to_rgb = ConvToPixels(widths[stages - 1], img_channels, patch_size)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        latent = self.input.latent(z, c)
        x = self.input.features(latent)
        for i, stage in enumerate(self.stages):
            if i > 0 and self.modulations:
                x = x * (1 + self.modulations[i - 1](latent)[:, :, None, None])
            for layer in stage.children():
                x = run_layer(layer, x, self.gradient_checkpointing)
            if i < len(self.transitions):
                x = upsample2x(self.transitions[i](x))
        return self.to_rgb(self.act(x))


class PlainGenerator(GeneratorBase):
    """A stack of 3x3 convolutions with ReLU and nearest-neighbour upsampling, tanh at the end.

    Arguments as in `Generator`; `blocks` is the number of convolutions per stage. Source: Radford
    et al. 2016 (DCGAN), with upsampling instead of strided transposed convolutions (Odena et al.
    2016) and without batch normalisation, so that an image depends on its own z only.
    """

    def __init__(
        self,
        z_dim: int,
        img_resolution: int | Sequence[int],
        widths: Sequence[int],
        img_channels: int = 3,
        label_dim: int = 0,
        blocks: int = 1,
        embed_dim: int = 64,
        patch_size: int | None = 1,
    ) -> None:
        super().__init__()
        patch_size = patch_size or default_patch_size(img_resolution)
        stages = count_stages(img_resolution, img_channels, widths, patch_size)
        self.z_dim, self.label_dim = z_dim, label_dim
        self.img_resolution, self.img_channels = parse_resolution(img_resolution), img_channels
        size = coarsest_size(img_resolution)
        self.input = LatentInput(z_dim, label_dim, widths[0], embed_dim, size)
        self.body = nn.Sequential(nn.ReLU())
        width = widths[0]
        for i in range(stages):
            if i:
                self.body.append(nn.Upsample(scale_factor=2, mode="nearest"))
            for _ in range(blocks):
                conv = nn.Conv2d(width, widths[i], 3, padding=1)
                self.body.extend([init_conv(conv, gain=math.sqrt(2)), nn.ReLU()])
                width = widths[i]
        self.to_rgb = ConvToPixels(width, img_channels, patch_size)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        return self.to_rgb(self.body(self.input(z, c))).tanh()
