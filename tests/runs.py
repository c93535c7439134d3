"""Small runs for the tests, in this process and in others."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import seams
import torch

from vgan import cli
from vgan.runs import checkpoint
from vgan.training.train import train

TINY = [
    "data=shapes", "data.resolution=16", "data.size=64", "size.g_widths=[8,8,8]",
    "size.d_widths=[8,8,8]", "batch_size=8", "total_kimg=0.4", "tick_kimg=0.04",
    "snapshot_kimg=0.1", "checkpoint_kimg=0.04", "loss.penalty_every=3", "augment=scheduled",
    "device=cpu",
]  # fmt: skip
# Every step takes at least 10 ms, so that a kill lands inside the run and not after it.
SLOW = seams.IMPORT + "seams.slow_steps(); seams.train_main()"


def start(run_dir: Path, *overrides: str, code: str = SLOW) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *TINY, *overrides, f"run_dir={run_dir}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train_in_process(run_dir: Path, *overrides: str, tiny: list[str] = TINY) -> None:
    train(cli.compose("vgan-train", [*tiny, f"run_dir={run_dir}", *overrides]))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flatten(parts: dict[str, Any]) -> dict[str, Any]:
    return dict(checkpoint.walk(parts))


def assert_same_run(a: Path, b: Path) -> None:
    """Final checkpoints equal to the last bit, and so are the statistics and the grids."""
    final = [flatten(checkpoint.load(checkpoint.find(folder))) for folder in (a, b)]
    assert final[0].keys() == final[1].keys()
    for name, value in final[0].items():
        if isinstance(value, torch.Tensor):
            other = final[1][name]
            assert isinstance(other, torch.Tensor)
            assert torch.equal(value.nan_to_num(), other.nan_to_num()), name
        elif name != "/'config'/'run_dir'":
            assert value == final[1][name], name
    for ours, theirs in zip(*(lines_of(f / "stats.jsonl") for f in (a, b)), strict=True):
        ours, theirs = (
            {k: v for k, v in tick.items() if not k.startswith(("speed/", "memory/"))}
            for tick in (ours, theirs)
        )
        assert ours == theirs
    names = sorted(p.name for p in a.glob("*.png"))
    assert names == sorted(p.name for p in b.glob("*.png"))
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
