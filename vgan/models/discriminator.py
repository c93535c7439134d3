"""A fully convolutional patch discriminator with a hand-written directional derivative."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vgan.models.layers import (
    BiasLeakyReLU,
    PointwiseConv2d,
    ResidualBlock,
    downsample2x,
    init_conv,
    init_normal,
    run_layer,
)
from vgan.models.sizes import coarsest_size, count_stages, default_patch_size, needs_checkpointing
from vgan.runtime.images import height_width, parse_resolution
from vgan.runtime.rng import Streams


class Verdict(NamedTuple):
    """What a judge says about a batch: logits at each scale, and their squared gradient norm."""

    logits: list[Tensor]  # (N, 1, h, w), float32
    grad_norm_sq: Tensor | None  # (N,), with respect to the features


class DiscriminatorBase(nn.Module):
    """The base class of all discriminators: a network from images and classes to logits.

    forward(x, c): x (N, C, H, W) in [-1, 1]; c (N, label_dim), or None if label_dim is 0.
    Returns (N, 1, h, w). Optional: `jvp` (for penalty=jvp), `logit_map` and `receptive_field_px`;
    with a judge_weight above 0, what `AidedDiscriminator` has besides.
    """

    label_dim: int
    judge_weight: float = 0.0  # share of `judge` in the generator's loss
    judge_gamma: float = 0.0
    backbone_digest: str = ""

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def judge(self, x: Tensor, c: Tensor | None, rng: Streams | None = None) -> Verdict:
        raise NotImplementedError

    def load_backbone(self, images: Tensor | None) -> None:
        raise NotImplementedError

    def logit_biases(self) -> list[Tensor]:
        """Return the parameters that are added to every logit of a grid."""
        return []


class Discriminator(DiscriminatorBase):
    """PatchGAN: images (N, C, H, W) in [-1, 1] and c (N, label_dim) -> logits (N, 1, h, w).

    Stages of residual blocks with antialiased downsampling from img_resolution to 4 px, mirrored to
    the generator: widths are the channels at 4, 8, 16, ... px. Fully convolutional: images of other
    sizes than img_resolution give a larger or smaller grid of logits.

    Each logit sees a patch of `receptive_field_px`. patch_px bounds it: 3x3 convolutions that would
    see further become 1x1 and downsampling stops, so smaller patches give a finer grid.
    logits_px=1 joins the coarsest grid, mostly 4x4, into one logit for the whole image.

    patch_size > 1 starts from squares of that many pixels as channels, at img_resolution /
    patch_size; None starts at 16 px. gradient_checkpointing: as in `Generator`.

    Sources: patches Isola et al. 2017 (pix2pix); projection conditioning, here for every patch,
    Miyato & Koyama 2018.
    """

    memory_format = torch.channels_last  # all layers follow it; changed in comparisons only

    def __init__(
        self,
        img_resolution: int | Sequence[int],
        widths: Sequence[int],
        img_channels: int = 3,
        label_dim: int = 0,
        blocks: int = 1,
        expansion: int = 2,
        conv: str = "separable",
        patch_px: int | None = None,
        logits_px: int = 4,
        embed_dim: int = 64,
        patch_size: int | None = 1,
        gradient_checkpointing: bool | None = False,
    ) -> None:
        super().__init__()
        patch_size = patch_size or default_patch_size(img_resolution)
        stages = count_stages(img_resolution, img_channels, widths, patch_size)
        resolution = parse_resolution(img_resolution)
        self.gradient_checkpointing = needs_checkpointing(gradient_checkpointing, resolution)
        side = min(height_width(resolution))
        if patch_px is not None and not 16 <= patch_px <= side:
            raise ValueError(
                f"patch_px={patch_px}: must be from 16 to the image's {side}, "
                "or null for the whole image"
            )
        if logits_px not in (1, 4) or (logits_px == 1 and patch_px is not None):
            raise ValueError(f"logits_px={logits_px}: must be 4, or 1 with patch_px=null")
        self.label_dim = label_dim
        limit = patch_px or math.inf
        # Of one feature, in image pixels: what it sees, and the distance to the next feature.
        field, jump = 3 * patch_size, patch_size

        def grow(pixels: int) -> bool:
            """Let the next filter reach `pixels` features further if that is within patch_px."""
            nonlocal field
            fits = field + pixels * jump <= limit
            field += pixels * jump * fits
            return fits

        self.to_blocks = nn.PixelUnshuffle(patch_size) if patch_size > 1 else nn.Identity()
        from_rgb = nn.Conv2d(
            img_channels * patch_size**2, widths[stages - 1], 3, padding=1, bias=False
        )
        self.from_rgb = init_conv(from_rgb, gain=1)
        self.stages, self.transitions, self.shrinks = nn.ModuleList(), nn.ModuleList(), []
        for i in reversed(range(stages)):
            stage = nn.ModuleList()
            for _ in range(blocks):
                kinds = [conv if grow(2) else "pointwise" for _ in range(2)]
                stage.append(
                    ResidualBlock(widths[i], kinds[0], expansion, stages * blocks, kinds[1])
                )
            self.stages.append(stage)
            if i:
                self.shrinks.append(grow(1))
                jump *= 2 if self.shrinks[-1] else 1
                mix = PointwiseConv2d(widths[i], widths[i - 1], bias=False)
                self.transitions.append(init_conv(mix, gain=1))
        width = widths[0]
        self.act = BiasLeakyReLU(width)
        self.pool = self.to_embed = self.embed = None
        if logits_px == 1:
            size = coarsest_size(img_resolution)
            self.pool = init_conv(nn.Conv2d(width, width, size, groups=width, bias=False), gain=1)
            field += (max(size) - 1) * jump
        self.receptive_field_px = field
        self.to_logit = init_conv(nn.Conv2d(width, 1, 1), gain=1)
        if label_dim:
            # <embed(c), W h_p> / sqrt(embed_dim) starts small: the unconditional logit dominates.
            self.to_embed = init_conv(nn.Conv2d(width, embed_dim, 1, bias=False), gain=1)
            self.embed = nn.Linear(label_dim, embed_dim, bias=False)
            init_normal(self.embed.weight, 1 / math.sqrt(embed_dim))

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        return self._run(x, c, pairs=False)

    def logit_biases(self) -> list[Tensor]:
        assert self.to_logit.bias is not None
        return [self.to_logit.bias]

    def jvp(self, x: Tensor, c: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (N, 1, h, w) at x and their derivative in direction v (shape of x).

        Forward-mode differentiation: values and tangents are stacked along the batch, so every
        convolution is one call on 2 N maps and only activations treat the halves differently. Equal
        to torch.func.jvp, which also convolves with the (zero) tangents of the weights. The result
        can be differentiated by ordinary backward.
        """
        logits = self._run(torch.cat([x, v]), c, pairs=True)
        value, tangent = logits.chunk(2)
        return value, tangent

    def logit_map(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Return the contribution of each place to the logit (N, h, w).

        For a patch discriminator these are the logits. With one logit for the whole image they are
        the sixteen terms of its sum, without the bias.
        """
        h = self._features(x, pairs=False)
        if self.pool is None:
            return self._logits(h, c, pairs=False)[:, 0]
        assert self.to_logit.bias is not None
        weighted = h * self.pool.weight[:, 0].to(h.dtype)
        return (self._logits(weighted, c, pairs=False) - self.to_logit.bias.float())[:, 0]

    def _run(self, x: Tensor, c: Tensor | None, pairs: bool) -> Tensor:
        x = self._features(x, pairs)
        if self.pool is not None and x.shape[2:] == self.pool.weight.shape[2:]:
            # One output pixel: as a sum, its backward takes 0.1 instead of 1 ms on a CPU.
            x = (x * self.pool.weight[:, 0].to(x.dtype)).sum((2, 3), keepdim=True)
        elif self.pool is not None:
            x = self.pool(x)
        return self._logits(x, c, pairs)

    def _features(self, x: Tensor, pairs: bool) -> Tensor:
        x = self.from_rgb(self.to_blocks(x).contiguous(memory_format=self.memory_format))
        for i, stage in enumerate(self.stages):
            for block in stage.children():
                x = run_layer(block, x, self.gradient_checkpointing, pairs)
            if i < len(self.transitions):
                x = self.transitions[i](downsample2x(x) if self.shrinks[i] else x)
        return self.act(x, pairs)

    def _logits(self, h: Tensor, c: Tensor | None, pairs: bool) -> Tensor:
        """Features (N or 2 N, width, h, w) -> logits. Values get the bias, tangents do not."""
        assert self.to_logit.bias is not None
        bias = self.to_logit.bias.float()
        logits = nn.functional.conv2d(h, self.to_logit.weight.to(h.dtype)).float()
        if self.embed is not None and self.to_embed is not None:
            if c is None:
                raise ValueError(
                    f"c=None: this discriminator needs c (N, {self.label_dim}); "
                    "give one-hot classes or standardized conditions"
                )
            e = self.embed(c.repeat(2, 1) if pairs else c).float()
            logits = logits + (self.to_embed(h).float() * e[:, :, None, None]).sum(1, keepdim=True)
        if not pairs:
            return logits + bias
        value, tangent = logits.chunk(2)
        return torch.cat([value + bias, tangent])
