"""Zero-centred gradient penalties on the discriminator, R1 at reals and R2 at fakes, for every patch.

The penalty is gamma / 2 * mean over pictures and patches of ||d logit_p / d image||^2, so that gamma means the same for
a 1x1 and for a 4x4 grid of logits. Source: Mescheder et al. 2018, "Which training methods for GANs do actually converge?".
"""

import torch
from torch import Tensor, nn


def logits_and_penalty(D: nn.Module, images: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
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
    return logits, slope.float().square().mean(dim=(1, 2, 3))
