"""The losses of a judge on frozen features, beside those of the patches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vgan.models.discriminator import DiscriminatorBase
from vgan.runtime.rng import Streams
from vgan.training.losses import Loss


def add_d_judge_loss(
    D: DiscriminatorBase,
    d_loss: Loss,
    patch_loss: Tensor,
    images: Tensor,
    c: Tensor,
    rng: Streams,
    penalty_weight: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return D's loss (), that of the patches and the judge's, and the judge's scalars.

    images: reals and fakes, stacked along the batch. penalty_weight: 0 in steps without a gradient
    penalty. The judge and the patches share no weights, so their losses are added without a factor.
    """
    if D.judge_weight == 0:  # adding 0 would lose the gradient when compiled (torch 2.15)
        return patch_loss, {}
    verdict = D.judge(images, c, rng if penalty_weight > 0 else None)
    pairs = [logits.chunk(2) for logits in verdict.logits]
    loss = _mean([d_loss(real, fake) for real, fake in pairs])
    sign = _mean([(real - fake).sign().mean() for real, fake in pairs])
    scalars = {"judge/loss_D": loss.detach(), "judge/real_sign": sign.detach()}
    if verdict.grad_norm_sq is not None:
        norm = 2 * verdict.grad_norm_sq.mean()  # of reals and of fakes
        loss = loss + D.judge_gamma * penalty_weight / 2 * norm
        scalars["judge/penalty"] = (D.judge_gamma / 2 * norm).detach()
    return patch_loss + loss, scalars


def add_g_judge_loss(
    D: DiscriminatorBase,
    g_loss: Loss,
    patch_loss: Tensor,
    fake: Tensor,
    real: Tensor | None,
    c: Tensor,
) -> Tensor:
    """Return the generator's loss (): that of the patches and the judge's, by D.judge_weight.

    real: None for losses that do not look at reals.
    """
    if D.judge_weight == 0:
        return patch_loss
    fakes = reals = D.judge(fake, c).logits
    if real is not None:
        with torch.no_grad():
            reals = D.judge(real, c).logits
    judged = _mean([g_loss(r, f) for r, f in zip(reals, fakes)])
    return torch.lerp(patch_loss, judged, D.judge_weight)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()
