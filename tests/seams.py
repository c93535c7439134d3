"""The only place that knows which attributes of vgan the tests replace."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vgan.apps.examine
import vgan.runtime.device
import vgan.runtime.files
import vgan.training.setup
import vgan.training.train
from vgan.data.shards import Retries
from vgan.runs import checkpoint
from vgan.training.monitor import HoldoutLogits, PeriodicEvaluation, SampleGrid

# In front of code that runs in a process of its own, so that it finds this file.
IMPORT = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import seams\n"


def replace(owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch | None) -> None:
    """Set an attribute, until the end of the test if there is a monkeypatch."""
    if monkeypatch is None:
        setattr(owner, name, value)
    else:
        monkeypatch.setattr(owner, name, value)


def wrap_step(
    around: Callable[..., Any], monkeypatch: pytest.MonkeyPatch | None = None
) -> Callable[..., Any]:
    """Let the loop call around(train_step, state, objective, batch, hp); return train_step."""
    step = vgan.training.train.train_step

    def wrapped(*arguments: Any) -> Any:
        return around(step, *arguments)

    replace(vgan.training.train, "train_step", wrapped, monkeypatch)
    return step


def slow_steps(seconds: float = 0.01) -> None:
    """Let every step take longer, so that a kill lands inside the run."""

    def around(step: Any, *arguments: Any) -> Any:
        time.sleep(seconds)
        return step(*arguments)

    wrap_step(around)


def train_main() -> None:
    """Run vgan-train with the words of this process."""
    from vgan.cli import train_main

    sys.argv[0] = "vgan-train"
    train_main()


def replace_setup(setup: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let train call another `setup`."""
    monkeypatch.setattr(vgan.training.train, "setup", setup)


def replace_loop(loop: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let train call another `loop`."""
    monkeypatch.setattr(vgan.training.train, "loop", loop)


def wrap_objective(name: str, wrap: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrap `d` or `g` of the Objective that a run builds."""
    build = vgan.training.setup.build_objective

    def wrapped(*arguments: Any) -> Any:
        objective = build(*arguments)
        object.__setattr__(objective, name, wrap(getattr(objective, name)))
        return objective

    monkeypatch.setattr(vgan.training.setup, "build_objective", wrapped)


def wrap_evaluation(around: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run's evaluation be around(evaluate, evaluation, state, writer)."""
    evaluate = PeriodicEvaluation._evaluate

    def wrapped(*arguments: Any) -> Any:
        return around(evaluate, *arguments)

    monkeypatch.setattr(PeriodicEvaluation, "_evaluate", wrapped)


def wrap_diversity(around: Callable[..., Any]) -> None:
    """Let the diversity of the fakes be around(diversity, grid)."""
    diversity = SampleGrid.diversity
    replace(SampleGrid, "diversity", lambda grid: around(diversity, grid), None)


def replace_optional_work(work: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what a run skips when memory is short."""
    monkeypatch.setattr(SampleGrid, "fakes", work)
    monkeypatch.setattr(SampleGrid, "diversity", work)
    monkeypatch.setattr(HoldoutLogits, "__call__", work)


def replace_save(save: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the function that writes a checkpoint."""
    monkeypatch.setattr(checkpoint, "save", save)


def replace_open(opener: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace `open` of vgan.runtime.files."""
    monkeypatch.setattr(vgan.runtime.files, "open", opener, raising=False)


def replace_disk_usage(usage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what checkpoints ask for the free space."""
    monkeypatch.setattr("shutil.disk_usage", usage)


def set_export_tolerance(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set how much the images of an export may differ from torch's."""
    monkeypatch.setattr("vgan.inference.export.TOLERANCE", value)


def replace_exported_forward(forward: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exports from latents compute forward(self, z, c)."""
    monkeypatch.setattr("vgan.inference.export.FromLatent.forward", forward)


def accept_inception_weights(digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Inception take the weights with these first 8 digits of their SHA-256."""
    monkeypatch.setattr("vgan.evaluation.features.INCEPTION_SHA256", digest)


def fake_compiler(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.compile return its function, or fail; vgan-doctor then compiles no run."""

    def compile_function(f: Callable[..., Any], **options: object) -> Callable[..., Any]:
        if works:
            return f
        raise RuntimeError("\ng++ is broken\nlong story")

    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(vgan.apps.examine, "missing_compiler", lambda device: None)
    monkeypatch.setattr(vgan.apps.examine, "keep_compiled", lambda folder: None)
    monkeypatch.setattr(vgan.runtime.device, "pick_compile", lambda name, device: False)


def replace_pause(pause: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pause(closed, seconds) wait before shards are read again; it returns closed.is_set()."""
    monkeypatch.setattr(Retries, "pause", staticmethod(pause))
