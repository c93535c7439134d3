"""Adversarial losses as pairs of functions of logits.

Every function takes logits_real and logits_fake, grids (N, 1, h, w) of the same shape, and returns a scalar: the mean over
pictures and patches, to be minimised. In the pairs, d_... trains the discriminator and g_... the generator.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

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
