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
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Conditions:
    """The k numbers of each of N images. Networks see them with a mean of 0 and a deviation of 1.

    A model keeps the numbers of some of its training images as examples to draw from.
    """

    names: tuple[str, ...]  # (k,)
    values: Tensor  # float32 (N, k), in the units of the data
    mean: Tensor  # (k,)
    std: Tensor  # (k,)

    @classmethod
    def of(cls, values: np.ndarray, names: Sequence[str]) -> "Conditions":
        """Return the conditions of a data set (N, k), whose columns must vary."""
        exact = torch.from_numpy(values).double()
        std, mean = torch.std_mean(exact, dim=0, correction=0)
        # Without an unreadable image that was skipped, a column may be constant.
        std = std.where(std > 0, 1.0)
        return cls(tuple(names), exact.float(), mean.float(), std.float())

    def standardize(self, values: Tensor) -> Tensor:
        """Return c (N, k), the input of the networks, for values (N, k) in the data's units."""
        return (values - self.mean.to(values)) / self.std.to(values)

    def state_dict(self) -> dict[str, Any]:
        """Return what a model keeps: EXAMPLES rows at most, evenly chosen."""
        items = torch.linspace(0, len(self.values) - 1, min(EXAMPLES, len(self.values)))
        values = self.values[items.round().long()].clone()
        return {"names": list(self.names), "values": values, "mean": self.mean, "std": self.std}

    @classmethod
    def from_state_dict(cls, state: Any) -> "Conditions":
        """Return the conditions of a model, from tensors or lists. Raises ValueError if damaged."""
        names = tuple(map(str, state["names"]))
        parts = [torch.as_tensor(state[key]).float() for key in ("values", "mean", "std")]
        shapes = [tuple(part.shape) for part in parts]
        k = len(names)
        if not shapes[0] or shapes != [(shapes[0][0], k), (k,), (k,)] or not shapes[0][0]:
            raise ValueError(f"conditions of shapes {shapes}")
        if not all(bool(part.isfinite().all()) for part in parts) or not bool((parts[2] > 0).all()):
            raise ValueError("conditions that are not finite")
        return cls(names, *parts)

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
        return torch.stack([self._row(row) for row in rows])

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
        if len(numbers) != len(self.names):
            raise UserError(f"condition={row}: must have {self._needs()}")
        return torch.tensor([self._number(value, row) for value in numbers])

    def _number(self, value: Any, row: Any) -> float:
        if not _is_number(value) or not abs(value) <= _LARGEST:
            raise UserError(f"condition={row}: {value} is no number; it must have {self._needs()}")
        return float(value)

    def _needs(self) -> str:
        count, first = len(self.names), self.names[0]
        return f"{count} number(s), or be some of them by name, such as {{{first}: 1}}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_conditions(values: np.ndarray, names: Sequence[str], shown: str) -> np.ndarray:
    """Return values (N, k) as float32. Raises UserError, named `shown`, unless all are usable."""
    if not 0 < values.shape[1] <= MAX_CONDITIONS:
        rule = f"must be from 1 to {MAX_CONDITIONS:,} numbers for each image"
        raise UserError(f"{shown}: has {values.shape[1]:,} columns; {rule}")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        where = f"row {row}, column {column}" if len(names) > 1 else f"row {row}"
        raise UserError(f"{shown}: {where} is not finite in float32; replace it")
    constant = np.flatnonzero(values.max(0) == values.min(0))
    if len(constant):
        name = names[constant[0]]
        raise UserError(f"{shown}: column {name} is the same for all images; leave it out")
    return values
