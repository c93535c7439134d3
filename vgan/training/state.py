"""Running statistics of a training run."""

from typing import Any

import torch
from torch import Tensor

from vgan.runtime.distributed import mean_


class Stats:
    """Running means of scalar tensors.

    The sums stay on the device until `means` is called, so that a training step never waits for it.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the scalars of one step. A name may be absent from some steps."""
        for name in sorted(values.keys() - self._sums.keys()):  # in one order on all processes
            self._sums[name] = torch.zeros_like(values[name], dtype=torch.float32)
        torch._foreach_add_(
            [self._sums[name] for name in values],
            [value.detach().float() for value in values.values()],
        )
        for name in values:
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the mean of each name over all processes and reset the sums.

        Waits for the device once.
        """
        means = self.peek()
        self._sums, self._counts = {}, {}
        return means

    def peek(self) -> dict[str, float]:
        """Return the means without a reset."""
        names = list(self._sums)
        sums = mean_(torch.stack([self._sums[n] for n in names])).tolist() if names else []
        return {n: s / self._counts[n] for n, s in zip(names, sums)}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last `means`, averaged over all processes."""
        sums = mean_(torch.stack(list(self._sums.values()))).unbind() if self._sums else ()
        return {"sums": dict(zip(self._sums, sums)), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._sums = {n: s.to(device) for n, s in state["sums"].items()}
        self._counts = dict(state["counts"])
