"""A fully convolutional discriminator that judges patches, with its directional derivative written out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vgan.models.layers import (
    BiasLeakyReLU,
    ResidualBlock,
    count_stages,
    downsample2x,
    init_conv,
    run_layer,
)


class DiscriminatorBase(nn.Module):
    """The base class of all discriminators: a network from images and classes to logits.

    forward(x, c): x (N, C, H, W) in [-1, 1]; c (N, label_dim) one-hot, or None where label_dim is 0.
    Returns (N, 1, h, w). Optional: `jvp` (for penalty=jvp), `logit_map` and `receptive_field_px`.
    """

    label_dim: int

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class Discriminator(DiscriminatorBase):
    """PatchGAN: picture (N, C, H, W) in [-1, 1] and one-hot c (N, label_dim) -> a grid of logits (N, 1, h, w).

    Stages of residual blocks with antialiased downsampling from img_resolution towards 4 px, mirrored to the
    generator: widths are the channels at 4, 8, 16, ... px. Each logit sees a patch of `receptive_field_px`; where
    `patch_px` bounds it, 3x3 convolutions that would see further become 1x1 and downsampling stops, so that small patches give a
    finer grid. `logits_px` = 1 joins the 4x4 grid into one logit for the whole picture.

    patch_size > 1 starts from squares of that many pixels as channels, at img_resolution / patch_size.

    gradient_checkpointing: as in `Generator`.

    Fully convolutional: other sizes than img_resolution are judged too, with a larger or smaller grid.

    Sources: patches Isola et al. 2017 (pix2pix); projection conditioning, here for every patch, Miyato & Koyama 2018.
    """

    memory_format = torch.channels_last  # all layers follow; another is for comparisons

    def __init__(
        self,
        img_resolution: int,
        widths: Sequence[int],
        img_channels: int = 3,
        label_dim: int = 0,
        blocks: int = 1,
        expansion: int = 2,
        conv: str = "separable",
        patch_px: int | None = None,
        logits_px: int = 4,
        embed_dim: int = 64,
        patch_size: int = 1,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        stages = count_stages(img_resolution, img_channels, widths, patch_size)
        if patch_px is not None and not 16 <= patch_px <= img_resolution:
            raise ValueError(
                f"patch_px={patch_px}: must be from 16 to the image's {img_resolution}, or null for the whole image"
            )
        if logits_px not in (1, 4) or (logits_px == 1 and patch_px is not None):
            raise ValueError(f"logits_px={logits_px}: must be 4, or 1 with patch_px=null")
        self.label_dim = label_dim
        limit = patch_px or math.inf
        field, jump = (
            3 * patch_size,
            patch_size,
        )  # of one feature in image pixels: what it sees, and the distance to the next

        def grow(pixels: int) -> bool:  # may the next filter reach `pixels` features further?
            nonlocal field
            fits = field + pixels * jump <= limit
            field += pixels * jump * fits
            return fits

        self.to_blocks = nn.PixelUnshuffle(patch_size) if patch_size > 1 else nn.Identity()
        pixels = img_channels * patch_size**2
        self.from_rgb = init_conv(
            nn.Conv2d(pixels, widths[stages - 1], 3, padding=1, bias=False), gain=1
        )
        self.stages, self.transitions, self.shrinks = nn.ModuleList(), nn.ModuleList(), []
        for i in reversed(range(stages)):
            layers = []
            for _ in range(blocks):
                kinds = [conv if grow(2) else "pointwise" for _ in range(2)]
                layers.append(
                    ResidualBlock(
                        widths[i], kinds[0], expansion, stages * blocks, second_conv=kinds[1]
                    )
                )
            self.stages.append(nn.ModuleList(layers))
            if i:
                self.shrinks.append(grow(1))
                jump *= 2 if self.shrinks[-1] else 1
                self.transitions.append(
                    init_conv(nn.Conv2d(widths[i], widths[i - 1], 1, bias=False), gain=1)
                )
        width = widths[0]
        self.act = BiasLeakyReLU(width)
        self.pool = (
            init_conv(nn.Conv2d(width, width, 4, groups=width, bias=False), gain=1)
            if logits_px == 1
            else None
        )
        field += 3 * jump * (logits_px == 1)
        self.receptive_field_px = field
        self.to_logit = init_conv(nn.Conv2d(width, 1, 1), gain=1)
        # <embed(c), W h_p> / sqrt(embed_dim): small at first, so that the unconditional part leads
        self.to_embed = (
            init_conv(nn.Conv2d(width, embed_dim, 1, bias=False), gain=1) if label_dim else None
        )
        self.embed = nn.Linear(label_dim, embed_dim, bias=False) if label_dim else None
        if self.embed is not None:
            nn.init.normal_(self.embed.weight, std=1 / math.sqrt(embed_dim))

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        return self._run(x, c, pairs=False)

    def jvp(self, x: Tensor, c: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, 1, h, w) at x and, for each of them, its derivative in the direction v (shape of x).

        Forward-mode differentiation by hand: values and tangents travel stacked along the batch, so every convolution
        is one call on 2 N maps and only the activations treat the halves apart. Equal to torch.func.jvp, which also
        convolves with the (zero) tangents of the weights, and differentiable once more by ordinary backward.
        """
        logits = self._run(torch.cat([x, v]), c, pairs=True)
        value, tangent = logits.chunk(2)
        return value, tangent

    def logit_map(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """What each place adds to the verdict: (N, h, w). For a patch its logit; of one logit for the whole picture the sixteen
        terms that it is the sum of, without the bias."""
        h = self._features(x, pairs=False)
        if self.pool is None:
            return self._logits(h, c, pairs=False)[:, 0]
        assert self.to_logit.bias is not None
        return (
            self._logits(h * self.pool.weight[:, 0].to(h.dtype), c, pairs=False)
            - self.to_logit.bias.float()
        )[:, 0]

    def _run(self, x: Tensor, c: Tensor | None, pairs: bool) -> Tensor:
        x = self._features(x, pairs)
        if self.pool is not None and x.shape[2:] == self.pool.weight.shape[2:]:
            # the convolution has a single output pixel: as a sum its backward took 0.1 instead of 1 ms on a CPU
            x = (x * self.pool.weight[:, 0].to(x.dtype)).sum((2, 3), keepdim=True)
        elif self.pool is not None:
            x = self.pool(x)
        return self._logits(x, c, pairs)

    def _features(self, x: Tensor, pairs: bool) -> Tensor:
        x = self.from_rgb(self.to_blocks(x).contiguous(memory_format=self.memory_format))
        for i, stage in enumerate(self.stages):
            for block in stage:  # type: ignore[attr-defined]
                x = run_layer(block, x, self.gradient_checkpointing, pairs)
            if i < len(self.transitions):
                x = self.transitions[i](downsample2x(x) if self.shrinks[i] else x)
        return self.act(x, pairs)

    def _logits(self, h: Tensor, c: Tensor | None, pairs: bool) -> Tensor:
        """Features (N or 2 N, width, h, w) -> logits; the bias belongs to values, not to tangents."""
        assert self.to_logit.bias is not None
        bias = self.to_logit.bias.float()
        logits = nn.functional.conv2d(h, self.to_logit.weight.to(h.dtype)).float()
        if self.embed is not None and self.to_embed is not None:
            if c is None:
                raise ValueError(
                    f"c=None: this discriminator knows {self.label_dim} classes; give one-hot c (N, {self.label_dim})"
                )
            e = self.embed(c.repeat(2, 1) if pairs else c).float()
            logits = logits + (self.to_embed(h).float() * e[:, :, None, None]).sum(1, keepdim=True)
        if not pairs:
            return logits + bias
        value, tangent = logits.chunk(2)
        return torch.cat([value + bias, tangent])
