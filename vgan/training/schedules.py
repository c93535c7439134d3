"""Quantities that change during a run, as functions of cur_nimg, the number of real images shown so far."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def cosine(start: float, end: float, over_kimg: float) -> Schedule:
    """From `start` at 0 to `end` at over_kimg along half a cosine, constant after it."""

    def value(cur_nimg: int) -> float:
        t = min(cur_nimg / (over_kimg * 1000), 1.0) if over_kimg > 0 else 1.0
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * t))

    return value


def ema_decay(halflife_kimg: float, ramp: float, cur_nimg: int, batch_size: int) -> float:
    """The share of the old average that one step keeps.

    The half-life is halflife_kimg, and no more than `ramp` times the images so far, so that the first, bad weights are
    forgotten quickly (Karras et al. 2020, StyleGAN2-ADA).
    """
    halflife_nimg = min(halflife_kimg * 1000, ramp * cur_nimg) if ramp > 0 else halflife_kimg * 1000
    return 0.5 ** (batch_size / max(halflife_nimg, 1e-8))
