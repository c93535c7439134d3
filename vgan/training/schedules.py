"""Quantities that change during a run: by schedule, or by what the run itself shows.

Time is counted in cur_nimg, the number of real images shown so far.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vgan.runtime.distributed import mean_
from vgan.runtime.images import Resolution, height_width

Schedule = Callable[[int], float]

# gamma / 2 (r1 + r2) settled at 0.08 to 0.11 in every run that went well, whatever gamma was.
TYPICAL_PENALTY = 0.09
_PENALTY_HALFLIFE_NIMG = 5_000
_SIGN_HALFLIFE_NIMG = 1_000
_MAX_GAMMA_FACTOR = 4.0


@dataclass(frozen=True)
class HyperParameters:
    """The scheduled quantities of one step."""

    lr_G: float
    lr_D: float
    beta2: float
    gamma: float  # as scheduled; see AdaptiveStrength.tensors
    augment_p: float  # likewise
    penalty_weight: int = 1  # 0: no penalty in this step; k: penalties are taken every k-th step
    ema_decay: float = 0.999  # share of the old average that the step keeps


def cosine(start: float, end: float, over_kimg: float) -> Schedule:
    """Return a schedule from `start` at 0 to `end` at over_kimg along half a cosine, then flat."""

    def value(cur_nimg: int) -> float:
        t = min(cur_nimg / (over_kimg * 1000), 1.0) if over_kimg > 0 else 1.0
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * t))

    return value


def ema_decay(halflife_kimg: float, ramp: float, cur_nimg: int, batch_size: int) -> float:
    """Return the share of the old average that one step keeps.

    The half-life is halflife_kimg, but at most `ramp` times the images so far, so that the first,
    bad weights are forgotten quickly (Karras et al. 2020, StyleGAN2-ADA).
    """
    halflife_nimg = halflife_kimg * 1000
    if ramp > 0:
        halflife_nimg = min(halflife_nimg, ramp * cur_nimg)
    return 0.5 ** (batch_size / max(halflife_nimg, 1e-8))


def default_gamma(resolution: Resolution, batch_size: int) -> tuple[float, float]:
    """Return where gamma starts and ends for photographs of a resolution.

    0.2 falling to 0.1 was measured to keep CIFAR-10 (32 px, batches of 256) diverse. The squared
    gradient norm of the same visible change falls with the number of pixels, so gamma rises with
    it. Smaller batches are noisier and need more: Karras et al. 2020 take resolution^2 / batch. The
    power 3/4 of the batch meets what was best in half an hour on a CPU: 1 for CIFAR-10 in batches
    of 32, 6.4 for emoji of 64 px in batches of 16 (docs/log/settings.md).
    """
    height, width = height_width(resolution)
    gamma = 0.2 * (height / 32) * (width / 32) * (256 / batch_size) ** 0.75
    return gamma, gamma / 2


class AdaptiveStrength(nn.Module):
    """The strengths that follow the run: augment_p (augment=adaptive) and gamma (gamma=auto).

    augment_p () in [0, 1] is ADA's controller (Karras et al. 2020): it rises while the
    discriminator tells too many training images from fakes, which is over-fitting. With
    `real_sign` the mean sign of D(real), or of D(real) - D(fake) for a relativistic loss, p moves
    up while real_sign > target and down below it, by 1 in adapt_kimg thousand images.

    gamma=auto corrects a gamma that was chosen for other images. The squared gradient norm that a
    gamma leads to is about TYPICAL_PENALTY / gamma. Where the penalty settles higher, at c, gamma
    is multiplied by c / TYPICAL_PENALTY. A lower c is ignored: a small or young discriminator has
    one too, and lowering gamma for it cost a sixth of the distance on CIFAR-10.

    Buffers live on the device and in the checkpoint; nothing here waits for the device.
    """

    augment_p: Tensor
    real_sign: Tensor
    penalty: Tensor

    def __init__(
        self, target: float | None = None, adapt_kimg: float = 500, correct_gamma: bool = False
    ) -> None:
        super().__init__()
        self.target, self.adapt_nimg, self.correct_gamma = target, adapt_kimg * 1000, correct_gamma
        self.register_buffer("augment_p", torch.tensor(0.0))
        self.register_buffer("real_sign", torch.tensor(0.0))
        self.register_buffer("penalty", torch.tensor(TYPICAL_PENALTY))

    def tensors(self, hp: HyperParameters, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return gamma () and augment_p () as a step applies them.

        gamma includes the penalty weight. Tensors, since a compiled graph would be compiled again
        for every new number; filled by a kernel, since a copy from the host would wait.
        """
        gamma = torch.full((), hp.gamma * hp.penalty_weight, device=device) * self._gamma_factor()
        if self.target is not None:
            return gamma, self.augment_p
        return gamma, torch.full((), hp.augment_p, device=device)

    def scalars(self, hp: HyperParameters) -> dict[str, float]:
        """Return gamma and augment_p for the log. Waits for the device."""
        augment_p = hp.augment_p if self.target is None else float(self.augment_p)
        return {"gamma": hp.gamma * float(self._gamma_factor()), "augment_p": augment_p}

    def _gamma_factor(self) -> Tensor | float:
        if not self.correct_gamma:
            return 1.0
        return (self.penalty / TYPICAL_PENALTY).clamp(1, _MAX_GAMMA_FACTOR)

    @torch.no_grad()
    def update(self, scalars: dict[str, Tensor], nimg: int, penalty_weight: int) -> None:
        """Update both strengths after a step of D on nimg reals, from its scalars.

        Every process must call it.
        """
        if self.target is not None:
            real_sign = mean_(scalars["logits/real_sign"].clone()).float()
            self.real_sign.lerp_(real_sign, _share(nimg, _SIGN_HALFLIFE_NIMG))
            direction = torch.sign(self.real_sign - self.target)
            self.augment_p.add_(direction, alpha=nimg / self.adapt_nimg).clamp_(0, 1)
        if self.correct_gamma and penalty_weight > 0:
            penalty = mean_(scalars["loss/penalty"].clone()).float()
            self.penalty.lerp_(penalty, _share(nimg * penalty_weight, _PENALTY_HALFLIFE_NIMG))


def _share(nimg: int, halflife_nimg: int) -> float:
    """Return the weight of one step of nimg images in an average of that half-life."""
    return 1 - 0.5 ** (nimg / halflife_nimg)
