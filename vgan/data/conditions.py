"""Conditions: numbers that come with every image, such as attributes or measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgan.runtime.errors import UserError

MAX_CONDITIONS = 1024  # numbers of an image
EXAMPLES = 1024  # rows kept with a model
SHOWN = 20  # names in a line
MAX_DEVIATIONS = 10_000  # from the mean; a network gives nothing useful there


@dataclass(frozen=True)
class Conditions:
    """The k numbers of each of N images. Networks see them with a mean of 0 and a deviation of 1.

    A model keeps the numbers of some of its training images as examples to draw from. All numbers
    are float64: timestamps, say, differ by less than float32 resolves.
    """

    names: tuple[str, ...]  # (k,)
    values: Tensor  # (N, k), in the units of the data
    mean: Tensor  # (k,)
    std: Tensor  # (k,)

    @classmethod
    def of(cls, values: np.ndarray, names: Sequence[str]) -> "Conditions":
        """Return the conditions of a data set (N, k)."""
        exact = torch.from_numpy(values).double()
        std, mean = torch.std_mean(exact, dim=0, correction=0)
        # Without an unreadable image that was skipped, a column may be constant.
        return cls(tuple(names), exact, mean, std.where(std > 0, 1.0))

    def standardize(self, values: Tensor) -> Tensor:
        """Return c float32 (N, k), the input of the networks, for values (N, k) of the data."""
        device = values.device  # float64 on the CPU, as some devices lack it
        return ((values.cpu().double() - self.mean) / self.std).float().to(device)

    @property
    def key(self) -> tuple[str, ...]:
        """The names, marked so that they differ from names of classes."""
        return tuple(f"condition {name}" for name in self.names)

    def state_dict(self) -> dict[str, Any]:
        """Return what a model keeps: EXAMPLES rows at most, evenly chosen."""
        items = torch.linspace(0, len(self.values) - 1, min(EXAMPLES, len(self.values)))
        values = self.values[items.round().long()].clone()
        return {"names": list(self.names), "values": values, "mean": self.mean, "std": self.std}

    @classmethod
    def from_state_dict(cls, state: Any) -> "Conditions":
        """Return the conditions of a model, from tensors or lists. Raises ValueError if damaged."""
        names = tuple(map(str, state["names"]))
        parts = [
            torch.as_tensor(state[key], dtype=torch.double) for key in ("values", "mean", "std")
        ]
        shapes = [tuple(part.shape) for part in parts]
        k = len(names)
        if not shapes[0] or shapes != [(shapes[0][0], k), (k,), (k,)] or not shapes[0][0]:
            raise ValueError(f"conditions of shapes {shapes}")
        conditions = cls(names, *parts)
        if not bool((parts[2] > 0).all()) or conditions.is_far(parts[0]):
            raise ValueError("conditions out of range")
        return conditions

    def is_far(self, values: Tensor) -> bool:
        """Return whether values (N, k) are too far from those of training, or not finite."""
        return not bool((self.standardize(values).abs() <= MAX_DEVIATIONS).all())

    def describe(self) -> str:
        """Return the number of conditions, and their names and values in one line."""
        lowest, highest = self.values.amin(0).tolist(), self.values.amax(0).tolist()
        spans = [f"{n} {a:.4g} to {b:.4g}" for n, a, b in zip(self.names, lowest, highest)]
        more = ", ..." if len(spans) > SHOWN else ""
        return f"{len(spans)}: {', '.join(spans[:SHOWN])}{more}"

    def parse(self, condition: Any) -> Tensor:
        """Return values (N, k) from k numbers, {name: number} with means for the rest, or a list.

        Raises UserError, named condition=, for anything else.
        """
        rows = [condition]
        if isinstance(condition, (list, tuple)) and condition:
            nested = all(isinstance(row, (list, tuple, Mapping)) for row in condition)
            if nested or len(self.names) == 1:
                rows = list(condition)
        values = torch.stack([self._row(row) for row in rows])
        if self.is_far(values):
            rule = f"is over {MAX_DEVIATIONS:,} standard deviations from the training data"
            raise UserError(f"condition={condition}: {rule} ({self.describe()}); stay near those")
        return values

    def _row(self, row: Any) -> Tensor:
        if isinstance(row, Mapping):
            values = self.mean.clone()
            for name, value in row.items():
                if str(name) not in self.names:
                    more = " ..." if len(self.names) > SHOWN else ""
                    known = ", ".join(self.names[:SHOWN]) + more
                    raise UserError(f"condition={row}: {name} is unknown; use some of {known}")
                values[self.names.index(str(name))] = self._number(value, row)
            return values
        numbers = row if isinstance(row, (list, tuple)) else [row]
        values = torch.tensor([self._number(value, row) for value in numbers], dtype=torch.double)
        if len(values) != len(self.names):
            raise UserError(f"condition={row}: has {len(values)} numbers; {self._fix()}")
        return values

    def _number(self, value: Any, row: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"condition={row}: {value} is not a number; {self._fix()}")
        if not abs(value) <= np.finfo(np.float64).max:
            raise UserError(f"condition={row}: must be finite; {self._fix()}")
        return float(value)

    def _fix(self) -> str:
        return f"give {len(self.names)} in order, or some by name, such as {{{self.names[0]}: 1}}"


def check_conditions(values: np.ndarray, names: Sequence[str], shown: str) -> np.ndarray:
    """Return values (N, k) as float64. Raises UserError, named `shown`, unless all are usable."""
    if not 0 < values.shape[1] <= MAX_CONDITIONS:
        rule = f"must be from 1 to {MAX_CONDITIONS:,} numbers for each image"
        raise UserError(f"{shown}: has {values.shape[1]:,} columns; {rule}")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise UserError(f"{shown}: row {row}, column {names[column]} is not finite; replace it")
    constant = np.flatnonzero(values.max(0) == values.min(0))
    if len(constant):
        problem = f"column {names[constant[0]]} is the same for all images"
        fix = "leave it out" if len(names) > 1 else "use data.labels=none"
        raise UserError(f"{shown}: {problem}; {fix}")
    conditions = Conditions.of(values, names)
    if not bool(conditions.std.isfinite().all()) or conditions.is_far(conditions.values):
        rule = f"has values over {MAX_DEVIATIONS:,} standard deviations from their mean"
        raise UserError(f"{shown}: {rule}; rescale the columns, or leave out what is rare")
    return values
