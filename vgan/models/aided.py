"""A patch discriminator aided by a judge on the features of a frozen, pretrained classifier."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgan.models.backbone import Backbone
from vgan.models.discriminator import Discriminator, Verdict
from vgan.models.layers import (
    BiasLeakyReLU,
    ResidualBlock,
    downsample2x,
    init_conv,
    init_normal,
)
from vgan.runtime.images import to_rgb
from vgan.runtime.rng import Streams


class AidedDiscriminator(Discriminator):
    """The PatchGAN `Discriminator` and, beside it, a judge that sees features instead of pixels.

    The judge's features come from an ImageNet classifier of torchvision, which stays frozen. Maps
    of four scales are standardised, mixed by fixed random convolutions from coarse to fine (Sauer
    et al. 2021, "Projected GANs Converge Faster"), and each goes through a small trained head.
    `judge` returns the heads' logits. Its gradient penalty is R1 and R2 with respect to the mixed
    features, which takes the place of spectral normalisation.

    The frozen weights are loaded by `load_backbone`, which training calls. They are in no
    checkpoint, so that a checkpoint without them still shows its patch logits.

    Args:
        backbone: mobilenet_v2, efficientnet_b0 or convnext_tiny.
        weights: auto downloads torchvision's weights once into torch's cache; else a file of them
            (.pth or .safetensors), for machines without a network.
        judge_px: side of the square to which images, oblong ones too, are resized for the backbone.
        judge_weight: share of the judge in the generator's loss, from 0 to 1.
        judge_gamma: weight of the judge's gradient penalty.
        judge_width: channels of the mixed features.

    All others as in `Discriminator`. Sources: Sauer et al. 2021; Kumari et al. 2022, "Ensembling
    Off-the-shelf Models for GAN Training" (a frozen judge beside a discriminator of pixels).
    """

    def __init__(
        self,
        img_resolution: int | Sequence[int],
        widths: list[int],
        img_channels: int = 3,
        label_dim: int = 0,
        embed_dim: int = 64,
        backbone: str = "mobilenet_v2",
        weights: str = "auto",
        judge_px: int = 64,
        judge_weight: float = 0.3,
        judge_gamma: float = 10.0,
        judge_width: int = 64,
        blocks: int = 1,
        expansion: int = 2,
        conv: str = "separable",
        patch_px: int | None = None,
        logits_px: int = 4,
        patch_size: int | None = 1,
        gradient_checkpointing: bool | None = False,
    ) -> None:
        super().__init__(
            img_resolution, widths, img_channels, label_dim, blocks, expansion, conv, patch_px,
            logits_px, embed_dim, patch_size, gradient_checkpointing,
        )  # fmt: skip
        if judge_px % 32 or not 32 <= judge_px <= 512:
            raise ValueError(f"judge_px={judge_px}: must be a multiple of 32 from 32 to 512")
        if not 0 < judge_weight <= 1:
            raise ValueError(f"judge_weight={judge_weight}: must be above 0 and at most 1")
        self.backbone_name, self.weights, self.judge_px = backbone, weights, judge_px
        self.judge_weight, self.judge_gamma = judge_weight, judge_gamma
        self.backbone_digest = ""
        self._backbone: Backbone | None = None
        with torch.device("meta"):
            channels = Backbone(backbone).channels
        self.mixer = FeatureMixer(channels, judge_width)
        self.heads = nn.ModuleList(Head(judge_width, label_dim, embed_dim) for _ in channels)

    def load_backbone(self, images: Tensor | None) -> None:
        """Load the frozen classifier, and standardise its features over `images`.

        None keeps the statistics, such as those of a checkpoint. Raises UserError if the weights
        cannot be had or do not fit.
        """
        backbone = Backbone(self.backbone_name)
        self.backbone_digest = backbone.load(self.weights, "model.discriminator.weights")
        backbone = backbone.fold().to(self.from_rgb.weight.device)
        self._backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if images is None:
            return
        with torch.no_grad():
            maps = [self._maps(part) for part in images.split(32)]
        self.mixer.standardise([torch.cat(scale) for scale in zip(*maps)])

    def logit_biases(self) -> list[Tensor]:
        heads = [head.bias for head in self.heads if isinstance(head, Head)]
        return [*super().logit_biases(), *heads]

    def judge(self, x: Tensor, c: Tensor | None, rng: Streams | None = None) -> Verdict:
        """Return the judge's logits on images (N, C, H, W) in [-1, 1] and one-hot c.

        With `rng`, of N / 2 images, also an unbiased estimate of the squared gradient norm, as
        `vgan.training.losses.jvp` does for pixels.
        """
        features = self.mixer(self._maps(x))
        logits, norms = [], []
        for i, (head, f) in enumerate(zip(self.heads, features)):
            if rng is None:
                logits.append(head(f, c))
                continue
            v = rng.signs(f"judge_{i}", 2 * f[0].numel())
            v = torch.cat(v.chunk(2, dim=1)).view_as(f).to(f.dtype)
            stacked = torch.cat([f, v]).contiguous(memory_format=torch.channels_last)
            value, tangent = head(stacked, c, pairs=True).chunk(2)
            logits.append(value)
            norms.append(tangent.square().mean(dim=(1, 2, 3)))
        return Verdict(logits, torch.stack(norms).mean(dim=0) if norms else None)

    def _maps(self, x: Tensor) -> list[Tensor]:
        assert self._backbone is not None, "load_backbone comes first"
        x = to_rgb(x)
        while min(x.shape[2:]) >= 4 * self.judge_px:  # bilinear alone would skip pixels
            x = downsample2x(x)
        size = (self.judge_px, self.judge_px)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=False)
        # On a CPU the backward pass through such a network is 4 times slower in bf16.
        slow = x.device.type == "cpu" and x.requires_grad
        with torch.autocast("cpu", enabled=False) if slow else nullcontext():
            return self._backbone(x)


class FeatureMixer(nn.Module):
    """Standardise feature maps and mix them over channels and scales by fixed random convolutions.

    Without mixing, a generator can satisfy the judge on a few channels and ignore the others (Sauer
    et al. 2021). All weights are buffers of the checkpoint, drawn once.
    """

    def __init__(self, channels: list[int], width: int) -> None:
        super().__init__()
        self.count = len(channels)
        for i, n in enumerate(channels):
            self.register_buffer(f"mean_{i}", torch.zeros(n))
            self.register_buffer(f"std_{i}", torch.ones(n))
            self.register_buffer(f"across_{i}", torch.randn(width, n, 1, 1) / math.sqrt(n))
            scale = math.sqrt(width * 9)
            self.register_buffer(f"down_{i}", torch.randn(width, width, 3, 3) / scale)

    def standardise(self, maps: list[Tensor]) -> None:
        """Take mean and deviation of every channel from maps of real images."""
        for i, x in enumerate(maps):
            getattr(self, f"mean_{i}").copy_(x.float().mean((0, 2, 3)))
            getattr(self, f"std_{i}").copy_(x.float().std((0, 2, 3)).clamp_min(1e-3))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return maps (N, width, H, W), of the same scales, from the finest to the coarsest."""
        mixed: list[Tensor] = []
        for i in reversed(range(self.count)):
            weight = getattr(self, f"across_{i}") / getattr(self, f"std_{i}")[:, None, None]
            bias = -(weight[:, :, 0, 0] @ getattr(self, f"mean_{i}"))
            x = F.conv2d(maps[i], weight.to(maps[i].dtype), bias.to(maps[i].dtype))
            if mixed:
                coarse = F.interpolate(mixed[0], x.shape[2:], mode="nearest")
                x = (x + coarse) / math.sqrt(2)
            x = F.conv2d(x, getattr(self, f"down_{i}").to(x.dtype), padding=1)
            mixed.insert(0, x)
        return mixed


class Head(nn.Module):
    """Features (N, width, H, W) -> logits (N, 1, h, w): a residual block and a projection."""

    def __init__(self, width: int, label_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.block = ResidualBlock(width, "separable", 2, 1)
        self.act = BiasLeakyReLU(width)
        self.to_logit = init_conv(nn.Conv2d(width, 1, 1, bias=False), gain=1)
        self.bias = nn.Parameter(torch.zeros(1))  # FSDP shards no scalars
        self.embed: nn.Linear | None = None
        if label_dim:
            self.to_embed = init_conv(nn.Conv2d(width, embed_dim, 1, bias=False), gain=1)
            self.embed = nn.Linear(label_dim, embed_dim, bias=False)
            init_normal(self.embed.weight, 1 / math.sqrt(embed_dim))

    def forward(self, x: Tensor, c: Tensor | None, pairs: bool = False) -> Tensor:
        x = self.block(x, pairs)
        if x.shape[-1] > 4:
            x = downsample2x(x)
        x = self.act(x, pairs)
        logits = self.to_logit(x).float()
        if self.embed is not None and c is not None:
            e = self.embed(c.repeat(2, 1) if pairs else c).float()
            logits = logits + (self.to_embed(x).float() * e[:, :, None, None]).sum(1, keepdim=True)
        if not pairs:
            return logits + self.bias
        value, tangent = logits.chunk(2)
        return torch.cat([value + self.bias, tangent])
