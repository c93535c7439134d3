"""Tests run offline, on a CPU, and leave nothing outside their own folders."""

import os
import signal
from pathlib import Path

# One thread a process: several spin while they wait for cores that other processes keep busy.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

from vgan import cli

cli.register_schemas()

# What nohup and background jobs ignore would be ignored by the commands under test too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache of packed data for the session, apart from the user's."""
    monkeypatch.setenv("VGAN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def pictures_npy(tmp_path: Path) -> Path:
    """40 images of 16 px in 4 classes, as data.path of data=folder."""
    rng = np.random.default_rng(0)
    path = tmp_path / "tiny_images.npy"
    np.save(path, rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8))
    np.save(tmp_path / "tiny_labels.npy", np.arange(40) % 4)
    return path
