"""Running means on the device, read once a tick into stats.jsonl and TensorBoard."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgan.files import write_atomically


class Stats:
    """Sums of scalar tensors that stay on the device until `means` is asked for, so that a step never waits."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Take one step's scalars. A name need not come in every step."""
        for name in values.keys() - self._sums.keys():
            self._sums[name] = torch.zeros_like(values[name], dtype=torch.float32)
        torch._foreach_add_([self._sums[name] for name in values], [value.detach().float() for value in values.values()])
        for name in values:
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean of each name since the last call; empties the sums. Waits for the device once."""
        names = list(self._sums)
        sums = torch.stack([self._sums[n] for n in names]).tolist() if names else []
        means = {n: s / self._counts[n] for n, s in zip(names, sums)}
        self._sums, self._counts = {}, {}
        return means


class Journal:
    """stats.jsonl and the TensorBoard events of a run folder, cut back to cur_nimg where a run goes on from there."""

    def __init__(self, run_dir: Path, cur_nimg: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports slowly

        self._path = run_dir / "stats.jsonl"
        self._cut_back(cur_nimg)
        self._board = SummaryWriter(str(run_dir), purge_step=cur_nimg + 1, max_queue=100)

    def _cut_back(self, cur_nimg: int) -> None:
        """Drop what a killed process wrote after its last checkpoint; it is about to be written again."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                tick = json.loads(line)
            except json.JSONDecodeError:  # a line that a kill cut short
                continue
            if tick["cur_nimg"] <= cur_nimg:
                kept.append(line + "\n")
        write_atomically(self._path, "".join(kept).encode())

    def write(self, cur_nimg: int, values: dict[str, Any]) -> None:
        """One object a tick, and a curve for every number."""
        with open(self._path, "a") as f:
            f.write(json.dumps({"cur_nimg": cur_nimg, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, cur_nimg)
        self._board.flush()

    def image(self, cur_nimg: int, name: str, sheet: np.ndarray) -> None:
        """A grid (H, W) or (H, W, 3) uint8."""
        self._board.add_image(name, sheet, cur_nimg, dataformats="HW" if sheet.ndim == 2 else "HWC")

    def close(self) -> None:
        self._board.close()
