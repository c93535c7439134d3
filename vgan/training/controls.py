"""Quantities that follow the run itself instead of a schedule. Their state lives on the device and in the checkpoint."""

import torch
from torch import Tensor, nn

# gamma / 2 (r1 + r2) settled within 0.08 to 0.11 in every run that went well, on shapes and on photographs, whatever gamma was
TYPICAL_PENALTY = 0.09
_PENALTY_HALFLIFE_NIMG = 5_000
_SIGN_HALFLIFE_NIMG = 1_000
_MOST = 4.0  # times gamma may be raised


class AdaptiveStrength(nn.Module):
    """The strength of augmentation under `augment=adaptive`, and the correction of gamma under `gamma=auto`.

    augment_p () in [0, 1] rises while the discriminator tells too many training pictures from fakes, which it does when it learns
    them by heart (Karras et al. 2020, ADA): with `real_sign` the mean sign of D(real), or of D(real) - D(fake) where the loss
    compares them, p moves towards 1 above `target` and towards 0 below it, at 1 in adapt_kimg thousand images.

    gamma_factor () corrects a gamma that was guessed for other pictures: the gradient norm that a gamma leads to is about
    0.09 / gamma, since the penalty settles at TYPICAL_PENALTY; where pictures make it settle higher, at c, gamma times c / 0.09
    leads to the gradient norm that was meant. A lower c is left alone: a discriminator that is small, or young, has one too, and
    lowering gamma for it cost a sixth of the distance on CIFAR-10 (docs/quality.md).

    Nothing here waits for the device.
    """

    augment_p: Tensor
    real_sign: Tensor
    penalty: Tensor

    def __init__(
        self, target: float | None = None, adapt_kimg: float = 500, correct_gamma: bool = False
    ) -> None:
        super().__init__()
        self.target, self.adapt_nimg, self.correct_gamma = target, adapt_kimg * 1000, correct_gamma
        for name, value in (("augment_p", 0.0), ("real_sign", 0.0), ("penalty", TYPICAL_PENALTY)):
            self.register_buffer(name, torch.tensor(value))

    @property
    def follow(self) -> bool:
        """Whether there is anything to watch."""
        return self.target is not None or self.correct_gamma

    @torch.no_grad()
    def update_sign(self, real_sign: Tensor, batch_size: int) -> None:
        """After a step of D with batch_size reals, whose mean sign () was real_sign."""
        if self.target is not None:
            self.real_sign.lerp_(real_sign.float(), _share(batch_size, _SIGN_HALFLIFE_NIMG))
            self.augment_p.add_(
                torch.sign(self.real_sign - self.target), alpha=batch_size / self.adapt_nimg
            ).clamp_(0, 1)

    @torch.no_grad()
    def update_penalty(self, penalty: Tensor, nimg: int) -> None:
        """After a step with penalties gamma / 2 (r1 + r2) = penalty (), the first for `nimg` images."""
        if self.correct_gamma:
            self.penalty.lerp_(penalty.float(), _share(nimg, _PENALTY_HALFLIFE_NIMG))

    def gamma_factor(self) -> Tensor | float:
        return (self.penalty / TYPICAL_PENALTY).clamp(1, _MOST) if self.correct_gamma else 1.0


def _share(nimg: int, halflife_nimg: int) -> float:
    """What one step of nimg images contributes to an average of that half-life."""
    return 1 - 0.5 ** (nimg / halflife_nimg)


def default_gamma(img_resolution: int, batch_size: int) -> tuple[float, float]:
    """Where gamma starts and ends for photographs of a resolution.

    0.2 falling to 0.1 was measured to keep CIFAR-10 (32 px, batches of 256) varied. The squared gradient norm that belongs to
    the same visible change falls with the number of pixels, so gamma rises with it; smaller batches are noisier and want more
    (Karras et al. 2020 take resolution^2 / batch; the square root of the batch agrees better with the embedded shapes).
    """
    gamma = 0.2 * (img_resolution / 32) ** 2 * (256 / batch_size) ** 0.5
    return gamma, gamma / 2
