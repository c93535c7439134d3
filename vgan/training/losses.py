"""Adversarial losses as pairs of functions of logits, and the gradient penalties R1 and R2.

A loss takes logits_real and logits_fake, grids (N, 1, h, w) of the same shape, and returns a
scalar to be minimised: the mean over images and patches. d_... trains D and g_... trains G.

R1 and R2 are zero-centred gradient penalties on D, at reals and at fakes, for every patch:
gamma / 2 * mean over images and patches of ||d logit_p / d image||^2, so that gamma means the same
for any grid of logits (Mescheder et al. 2018, "Which training methods for GANs do actually
converge?").
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def d_rpgan(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the relativistic pairing loss: a real patch should score above a fake one.

    Jolicoeur-Martineau 2019; Sun et al. 2020.
    """
    return F.softplus(logits_fake - logits_real).mean()


def g_rpgan(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return F.softplus(logits_real - logits_fake).mean()


def d_nonsaturating(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the binary cross-entropy (Goodfellow et al. 2014)."""
    return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()


def g_nonsaturating(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return F.softplus(-logits_fake).mean()


def d_hinge(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the hinge loss, margins of 1 around 0 (Lim & Ye 2017; Miyato et al. 2018)."""
    return F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()


def g_hinge(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return -logits_fake.mean()


def d_lsgan(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return least squares to the targets 1 and 0 (Mao et al. 2017)."""
    return 0.5 * ((logits_real - 1).square().mean() + logits_fake.square().mean())


def g_lsgan(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return 0.5 * (logits_fake - 1).square().mean()


def d_wgan(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the Wasserstein critic's loss (Arjovsky et al. 2017).

    R1 and R2 take the place of its Lipschitz constraint.
    """
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
# A constant added to all logits changes nothing.
SHIFT_INVARIANT = frozenset({"rpgan", "wgan"})
RELATIVISTIC = frozenset({"rpgan"})  # the generator's loss looks at the reals too


DIFFERENCE_STEP = 0.01  # of finite_difference, in pixel values of [-1, 1]


def jvp(D: nn.Module, images: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (N, 1, h, w) and an unbiased estimate (N,) of the squared gradient norm.

    The norm is the mean over patches p of ||d logit_p / d image||^2. v: random directions of the
    images' shape with independent components of mean 0 and variance 1; then E[(J_p v)^2] =
    ||grad logit_p||^2 for all patches at once, and one forward-mode pass replaces a double backward
    pass per patch. v of +1 and -1 has the least variance of all such v (Hutchinson 1990):
    2 (||g||^4 - sum_i g_i^4) instead of 2 ||g||^4 for normal v.

    Networks without a `jvp` method are differentiated by torch.func.jvp.
    """
    own_jvp = getattr(D, "jvp", None)
    if own_jvp is not None:
        logits, tangent = own_jvp(images, c, v)
    else:
        logits, tangent = torch.func.jvp(lambda x: D(x, c), (images,), (v,))[:2]
    return logits, _mean_square(tangent)


def finite_difference(D: nn.Module, images: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as `jvp` by a finite difference, for networks without forward mode.

    In float32 in any case: in bf16 the two logits cancel, and the penalty came out up to 4.6 times
    too large.
    """
    with torch.autocast(images.device.type, enabled=False):
        both = D(torch.cat([images, images + DIFFERENCE_STEP * v]), torch.cat([c, c]))
    logits, moved = both.chunk(2)
    return logits, _mean_square((moved - logits) / DIFFERENCE_STEP)


def double_backward(D: nn.Module, images: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as `jvp`, exactly: a backward pass per patch, differentiated once more.

    v is not used.
    """
    logits, backward = torch.func.vjp(lambda x: D(x, c), images)[:2]
    norms = []
    for patch in range(logits[0].numel()):
        selected = torch.zeros_like(logits).flatten(1)
        selected[:, patch] = 1
        gradient = backward(selected.view_as(logits))[0]
        norms.append(gradient.float().square().sum(dim=(1, 2, 3)))
    return logits, torch.stack(norms).mean(dim=0)


def _mean_square(tangent: Tensor) -> Tensor:
    return tangent.float().square().mean(dim=(1, 2, 3))


Penalty = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
PENALTIES: dict[str, Penalty] = {
    "jvp": jvp,
    "double_backward": double_backward,
    "finite_difference": finite_difference,
}
