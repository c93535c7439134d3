"""Replacements of vgan's internals: only this file knows their attribute paths."""

import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vgan.apps.examine
import vgan.runtime.device


def set_free_disk_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Let every disk have `free` bytes of space left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def fake_compiler(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    """Let torch.compile return its function, or fail; vgan-doctor then compiles no run."""

    def compile_function(f: Callable[..., Any], **options: object) -> Callable[..., Any]:
        if works:
            return f
        raise RuntimeError("\ng++ is broken\nlong story")

    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(vgan.apps.examine, "missing_compiler", lambda device: None)
    monkeypatch.setattr(vgan.apps.examine, "keep_compiled", lambda folder: None)
    monkeypatch.setattr(vgan.runtime.device, "pick_compile", lambda name, device: False)
