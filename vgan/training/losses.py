"""Adversarial losses as pairs of functions of logits, and the gradient penalties R1 and R2.

Every function takes logits_real and logits_fake, grids (N, 1, h, w) of the same shape, and returns a scalar: the mean over
pictures and patches, to be minimised. In the pairs, d_... trains the discriminator and g_... the generator.

R1 and R2 are zero-centred gradient penalties on the discriminator, R1 at reals and R2 at fakes, for every patch: gamma / 2 * mean
over images and patches of ||d logit_p / d image||^2, so that gamma means the same for a 1x1 and for a 4x4 grid of logits. Source:
Mescheder et al. 2018, "Which training methods for GANs do actually converge?".
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def d_rpgan(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Relativistic pairing: a real patch should score above a fake one (Jolicoeur-Martineau 2019; Sun et al. 2020)."""
    return F.softplus(logits_fake - logits_real).mean()


def g_rpgan(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return F.softplus(logits_real - logits_fake).mean()


def d_nonsaturating(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Binary cross-entropy (Goodfellow et al. 2014)."""
    return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()


def g_nonsaturating(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return F.softplus(-logits_fake).mean()


def d_hinge(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Margins of 1 around 0 (Lim & Ye 2017; Miyato et al. 2018)."""
    return F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()


def g_hinge(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return -logits_fake.mean()


def d_lsgan(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Least squares to the targets 1 and 0 (Mao et al. 2017)."""
    return 0.5 * ((logits_real - 1).square().mean() + logits_fake.square().mean())


def g_lsgan(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return 0.5 * (logits_fake - 1).square().mean()


def d_wgan(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """The Wasserstein critic (Arjovsky et al. 2017); R1 and R2 take the place of its Lipschitz constraint."""
    return logits_fake.mean() - logits_real.mean()


def g_wgan(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return -logits_fake.mean()


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "rpgan": (d_rpgan, g_rpgan),
    "nonsaturating": (d_nonsaturating, g_nonsaturating),
    "hinge": (d_hinge, g_hinge),
    "lsgan": (d_lsgan, g_lsgan),
    "wgan": (d_wgan, g_wgan),
}
RELATIVISTIC = frozenset({"rpgan"})  # the generator's loss looks at the reals too


DIFFERENCE_STEP = 0.01  # of `finite_difference`, in pixel values of [-1, 1]


def jvp(D: nn.Module, images: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
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


def finite_difference(D: nn.Module, images: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `jvp`, with a finite difference for the derivative: for networks that forward mode cannot differentiate.

    In float32 whatever the run's precision: in bf16 the two logits cancel, and the penalty came out up to 4.6 times too large.
    """
    with torch.autocast(images.device.type, enabled=False):
        both = D(torch.cat([images, images + DIFFERENCE_STEP * v]), torch.cat([c, c]))
    logits, moved = both.chunk(2)
    return logits, _mean_square((moved - logits) / DIFFERENCE_STEP)


def double_backward(D: nn.Module, images: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `jvp`, without an estimate: a backward pass for every patch, each differentiated once more; v is not used."""
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
PENALTIES: dict[str, Penalty] = {
    "jvp": jvp,
    "double_backward": double_backward,
    "finite_difference": finite_difference,
}
