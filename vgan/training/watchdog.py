"""What can go wrong while a GAN trains, how it is noticed, and what is changed before the run tries again."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

NEXT = ("a new random stream", "half the learning rates", "twice the gamma")


@dataclass(frozen=True)
class RecoveryState:
    """What the watchdog has changed so far. Part of every checkpoint."""

    stream: int = (
        0  # another one gives other z, augmentations and tangents; the order of the data stays
    )
    lr: float = 1.0  # factor on both learning rates
    gamma: float = 1.0  # factor on gamma
    tries: int = 0  # since the run last got past a fault
    fault_nimg: int = 0  # where that was

    def next(self, cur_nimg: int) -> tuple["RecoveryState", str]:
        """The next try, for a fault noticed at cur_nimg, and what is different in it."""
        what = self.tries % len(NEXT)
        # a new stream comes with every try: with the old one the run would only meet the same numbers again
        changed = replace(
            self,
            tries=self.tries + 1,
            stream=self.stream + 1,
            fault_nimg=max(cur_nimg, self.fault_nimg),
        )
        if what == 1:
            changed = replace(changed, lr=self.lr / 2)
        elif what == 2:
            changed = replace(changed, gamma=self.gamma * 2)
        return changed, NEXT[what]

    def past(self, cur_nimg: int, margin_nimg: int) -> "RecoveryState":
        """At cur_nimg; a fault that lies more than margin_nimg behind counts as overcome, and what helped stays."""
        return (
            replace(self, tries=0)
            if self.tries and cur_nimg > self.fault_nimg + margin_nimg
            else self
        )

    def seed(self, seed: int) -> int:
        """The seed of the random streams."""
        return seed + (self.stream << 40)

    def parts(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class DiversityHistory:
    """How varied the fakes have been: what a collapse is told by. Part of every checkpoint."""

    best: float = 0.0
    last: float = math.inf


class Watchdog:
    """Looks at the means of a tick; what it reads was summed on the device, so that no step waits.

    max_penalty: of gamma / 2 (r1 + r2), which lies near 0.1 in runs that go well. min_diversity: of the fakes of one class
    against the reals (see `diversity`), twice in a row, in a run that had four times as much before.
    """

    def __init__(self, max_penalty: float, min_diversity: float) -> None:
        self._most_penalty, self._least_diversity = max_penalty, min_diversity

    def fault(self, means: dict[str, float], gamma: float, varied: DiversityHistory) -> str | None:
        """What is wrong, in words, or None. Keeps `varied` up to date."""
        for half in "DG":
            if means.get(f"broken/{half}", 0) != 0:
                return f"a loss or gradient of {half} was not finite"
            scale = means.get(f"scale/{half}")
            if scale is not None and scale < 2**-10:
                return f"fp16: every gradient of {half} overflows, however little it is scaled"
        if any(math.isnan(means.get(f"loss/{half}", 0.0)) for half in "DG"):
            return "a loss was not a number"
        penalty = gamma / 2 * (means.get("penalty/r1", 0.0) + means.get("penalty/r2", 0.0))
        if not penalty <= self._most_penalty:
            return f"gamma / 2 (r1 + r2) was {penalty:.3g}, over watchdog.max_penalty={self._most_penalty:g}"
        for half, name in (("D", "discriminator"), ("G", "generator")):
            if means.get(f"grad_norm/{half}", 1.0) < 1e-9:
                return f"the {name} is dead: its gradient was 0"
        if "diversity" in means:
            before, varied.last = varied.last, means["diversity"]
            varied.best = max(varied.best, means["diversity"])
            low = min(self._least_diversity, varied.best / 4)
            if not max(before, means["diversity"]) >= low:
                return (
                    f"the fakes have collapsed: diversity {means['diversity']:.3g}, under {low:.3g}"
                )
        return None


@torch.no_grad()
def diversity(fakes: Tensor, reals: Tensor) -> Tensor:
    """() How far fakes of one class (N, C, H, W) lie apart, as a share of the reals' (M, C, H, W) own distance.

    Mean squared distance of two pictures at 8 x 8 pixels, which noise on single pixels does not count in.
    """
    spread = [
        torch.nn.functional.adaptive_avg_pool2d(x.float(), 8).var(dim=0).mean().cpu()
        for x in (fakes, reals)
    ]
    return spread[0] / spread[1].clamp_min(1e-8)
