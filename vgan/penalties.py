"""Zero-centred gradient penalties on the discriminator, R1 at reals and R2 at fakes, for every patch.

The penalty is gamma / 2 * mean over pictures and patches of ||d logit_p / d image||^2, so that gamma means the same for
a 1x1 and for a 4x4 grid of logits. Source: Mescheder et al. 2018, "Which training methods for GANs do actually converge?".
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

DIFFERENCE_STEP = 0.01  # of `difference`, in pixel values of [-1, 1]


def forward(D: nn.Module, images: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, 1, h, w) and an unbiased estimate (N,) of the mean over patches of ||d logit_p / d image||^2.

    v: random directions of the images' shape with independent components of mean 0 and variance 1; then E[(J_p v)^2] =
    ||grad logit_p||^2 for all patches at once. One forward-mode pass takes the place of a double backward for each patch. v of
    +1 and -1 has the least variance of all such v (Hutchinson 1990): 2 (||g||^4 - sum_i g_i^4) instead of 2 ||g||^4 for normal v.

    Networks without a `jvp` method of their own are differentiated by torch.func.jvp.
    """
    if hasattr(D, "jvp"):
        logits, slope = D.jvp(images, c, v)  # type: ignore[operator]
    else:
        logits, slope = torch.func.jvp(lambda x: D(x, c), (images,), (v,))[:2]
    return logits, _mean_square(slope)


def difference(D: nn.Module, images: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `forward`, with a finite difference for the derivative: for networks that forward mode cannot differentiate.

    In float32 whatever the run's precision: in bf16 the two logits cancel, and the penalty came out up to 4.6 times too large.
    """
    with torch.autocast(images.device.type, enabled=False):
        both = D(torch.cat([images, images + DIFFERENCE_STEP * v]), torch.cat([c, c]))
    logits, moved = both.chunk(2)
    return logits, _mean_square((moved - logits) / DIFFERENCE_STEP)


def exact(D: nn.Module, images: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `forward`, without an estimate: a backward pass for every patch, each differentiated once more; v is not used."""
    logits, pull_back = torch.func.vjp(lambda x: D(x, c), images)[:2]
    squares = []
    for patch in range(logits[0].numel()):
        chosen = torch.zeros_like(logits).flatten(1)
        chosen[:, patch] = 1
        squares.append(pull_back(chosen.view_as(logits))[0].float().square().sum(dim=(1, 2, 3)))
    return logits, torch.stack(squares).mean(dim=0)


def _mean_square(slope: Tensor) -> Tensor:
    return slope.float().square().mean(dim=(1, 2, 3))


Penalty = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
PENALTIES: dict[str, Penalty] = {"forward": forward, "exact": exact, "difference": difference}
