import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from vgan.runs import checkpoint
from vgan.runtime.errors import UserError

STATE: dict[str, Any] = {name: {"w": torch.arange(3.0)} for name in checkpoint.REQUIRED_KEYS}
STATE["cur_nimg"] = 5
OLD_STATE = {
    **STATE,
    "config": {"watchdog": {"tries": 3}, "penalty": "forward"},
    "controls": {"penalty": torch.tensor(0.5)},
    "rescue": {"stream": 2, "lr": 0.5, "gamma": 1.0, "tries": 1, "fault_nimg": 640},
    "varied": {"best": 1.0, "last": float("inf")},
    "metrics": {"fid": 9.0, "copies": 0.25},
}


def save_old(path: Path, state: dict[str, Any], version: int) -> None:
    """Write a checkpoint as earlier versions did."""
    stated = {"digest": checkpoint.digest(state)} if version == 2 else {}
    torch.save({**state, "format": version, **stated}, path)


def assert_identical(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        assert [type(key) for key in a] == [type(key) for key in b]
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for i in range(len(a)):
            assert_identical(a[i], b[i])
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert checkpoint.digest({"x": a}) == checkpoint.digest({"x": b})
    else:
        assert repr(a) == repr(b)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for nimg in (100, 200, 300):
        checkpoint.save(checkpoint.path_at(tmp_path, nimg), STATE, keep=2)
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == [
        "checkpoint-000000200.safetensors",
        "checkpoint-000000300.safetensors",
    ]
    assert checkpoint.find(tmp_path).name == "checkpoint-000000300.safetensors"
    assert torch.equal(checkpoint.load(checkpoint.find(tmp_path))["G"]["w"], torch.arange(3.0))
    assert len(list(tmp_path.iterdir())) == 2  # no temporary file is left


def test_any_state_is_loaded_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    @settings(
        max_examples=60, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(tree=fuzz.TREES)
    def check(tree: Any) -> None:
        checkpoint.save(path, {**STATE, "G": tree}, keep=1)
        assert_identical(checkpoint.load(path)["G"], tree)

    check()


def test_special_cases_are_loaded_as_they_were(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5)
    tree = {
        "a": {"b": torch.tensor(True)},
        "a/b": torch.tensor(2.5, dtype=torch.bfloat16),
        "__metadata__": torch.zeros(0, 3),
        "layouts": [
            image.to(memory_format=torch.channels_last),
            image.permute(3, 1, 0, 2),
            image[:, :1].clone().to(memory_format=torch.channels_last),
            torch.randn(4, 1, 3, 3).to(memory_format=torch.channels_last),
        ],
        "optimizer": {"state": {0: {}, 1: {"step": torch.tensor(3.0)}}, "betas": (0.0, 0.99)},
        "$tensor": {"$items": float("nan"), "": float("-inf")},
        "last": [float("inf"), -0.0, 10**30, None, (), [], {}, "\x00 ü"],
    }
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {**STATE, "__metadata__": torch.ones(1), "G": tree}, keep=1)
    loaded = checkpoint.load(path)
    assert_identical(loaded["G"], tree)
    assert torch.equal(loaded["__metadata__"], torch.ones(1))
    assert load_file(path)["G/layouts/0"].shape == (2, 3, 4, 5)  # other tools read it too


def test_a_view_is_loaded_with_its_values_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole = torch.arange(12.0).reshape(3, 4)
    checkpoint.save(path, {**STATE, "G": {"a": whole[:, 1], "b": whole[:1].expand(5, 4)}}, keep=1)
    loaded = checkpoint.load(path)["G"]
    assert torch.equal(loaded["a"], whole[:, 1])
    assert torch.equal(loaded["b"], whole[:1].expand(5, 4))


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, STATE, keep=1)
    loaded = checkpoint.load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(loaded["G"]["w"], torch.arange(3.0))


# --- damaged, foreign and hostile files


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "foreign", "newer", "export"])
@pytest.mark.parametrize("version", [2, 3])
def test_damaged_and_foreign_files_are_named_and_left_alone(
    tmp_path: Path, damage: str, version: int
) -> None:
    path = checkpoint.path_at(tmp_path, 1)
    if version == 2:
        save_old(path, STATE, 2)
    else:
        checkpoint.save(path, STATE, keep=1)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        at = content.index(torch.arange(3.0).numpy().tobytes())
        path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    elif damage in ("empty", "text"):
        path.write_bytes(b"" if damage == "empty" else b"hello")
    elif version == 2:
        newer = {**STATE, "format": 99}
        torch.save(newer if damage == "newer" else {"weights": torch.zeros(1)}, path)
    else:
        told = {"foreign": "pt", "newer": "vgan checkpoint 99", "export": "vgan generator"}[damage]
        metadata = {"format": told, "sha256": "", "state": json.dumps({"cur_nimg": 1})}
        save_file({"weights": torch.zeros(1)}, path, metadata)
    before = path.read_bytes()
    with pytest.raises(UserError, match=path.name) as e:
        checkpoint.load(path)
    assert isinstance(e.value, checkpoint.Damaged) == (damage != "newer")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('["G/w", 1]', '["G/w", 2]'),
        ('["G/w", 1]', '["G/w", 1, 1]'),
        ('["G/w", 1]', '["D/w", 1]'),
        ('["G/w", 1]', "[]"),
        ('"cur_nimg": 5', '"cur_nimg": 6'),
        ('"cur_nimg": 5', '"cur_nimg": ' + "[" * 5000 + "]" * 5000),
        ('"cur_nimg": 5', '"cur_nimg": ' + "9" * 5000),
        ('"cur_nimg": 5', '"cur_nimg": {"$items": [[[], 1]]}'),
    ],
)
def test_a_changed_header_is_noticed(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, STATE, keep=1)
    with checkpoint.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert old in metadata["state"]
    metadata["state"] = metadata["state"].replace(old, new)
    save_file(load_file(path), tmp_path / "y.safetensors", metadata)
    with pytest.raises(checkpoint.Damaged):
        checkpoint.load(tmp_path / "y.safetensors")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({**STATE, "format": 1, "G": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(checkpoint.Damaged, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = 0) -> Path:
    """Write the archive with changed entries and matching checksums."""
    other = path.with_name("rewritten.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return other


def test_an_old_archive_is_checked(tmp_path: Path) -> None:
    """The digest covers the values, the checksums of the archive cover everything."""
    path = tmp_path / "good.pt"
    save_old(path, STATE, 2)
    assert checkpoint.load(rewritten(path, lambda _, content: content))["cur_nimg"] == 5
    values = torch.arange(3.0).numpy().tobytes()

    def reverse(_: str, content: bytes) -> bytes:
        return content.replace(values, values[::-1])

    def inflate(name: str, content: bytes) -> bytes:
        return content + bytes(10_000_000) if name.endswith(".pkl") else content

    changes = [(reverse, 0, "digest"), (inflate, 0, "too large"), (inflate, 8, "compressed")]
    for change, compression, reason in changes:
        with pytest.raises(checkpoint.Damaged) as e:
            checkpoint.load(rewritten(path, change, compression))
        assert reason in str(e.value.__cause__)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        (version,) = (entry for entry in archive.infolist() if entry.filename.endswith("/version"))
        stated = archive.read(version)
    at = content.index(stated, version.header_offset + 30 + len(version.filename))
    path.write_bytes(content[:at] + b"9" + content[at + 1 :])
    with pytest.raises(checkpoint.Damaged) as e:
        checkpoint.load(path)
    assert "checksum" in str(e.value.__cause__)


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    save_old(tmp_path / "x.pt", {**STATE, "G": {"w": torch.zeros(1).expand(2**40)}}, 1)
    with pytest.raises(checkpoint.Damaged):
        checkpoint.load(tmp_path / "x.pt")


# --- earlier formats


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_formats_are_read_with_the_names_of_today(tmp_path: Path, version: int) -> None:
    path = tmp_path / "checkpoint-000000005.pt"
    save_old(path, OLD_STATE, version)
    found, state = checkpoint.load_newest(tmp_path)
    assert found == path
    assert state["config"] == {"watchdog": {"max_rollbacks": 3}, "penalty": "jvp"}
    assert state["strength"] == OLD_STATE["controls"]
    assert state["recovery"] == {
        "stream": 2,
        "lr": 0.5,
        "gamma": 1.0,
        "rollbacks": 1,
        "failure_nimg": 640,
    }
    assert state["diversity"] == OLD_STATE["varied"]
    assert state["metrics"] == {"fid": 9.0, "copy_rate": 0.25}
    assert not {"format", "digest", "controls", "rescue", "varied"} & state.keys()


def test_a_run_folder_may_hold_both_formats(tmp_path: Path) -> None:
    for nimg in (100, 200, 300):
        save_old(tmp_path / f"checkpoint-{nimg:09d}.pt", STATE, 2)
    checkpoint.convert(checkpoint.find(tmp_path), checkpoint.path_at(tmp_path, 300))
    assert checkpoint.find(tmp_path).name == "checkpoint-000000300.safetensors"
    checkpoint.save(checkpoint.path_at(tmp_path, 300), STATE, keep=4)
    checkpoint.save(checkpoint.path_at(tmp_path, 400), STATE, keep=3)
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == [
        "checkpoint-000000200.pt",
        "checkpoint-000000300.safetensors",
        "checkpoint-000000400.safetensors",
    ]


def test_the_best_checkpoint_of_an_earlier_version_is_found_and_replaced(tmp_path: Path) -> None:
    assert checkpoint.find_best(tmp_path) is None
    save_old(tmp_path / "best.pt", STATE, 2)
    assert checkpoint.find_best(tmp_path) == tmp_path / "best.pt"
    checkpoint.save(checkpoint.best_path(tmp_path), STATE, keep=1)
    assert checkpoint.find_best(tmp_path) == tmp_path / "best.safetensors"
    assert not (tmp_path / "best.pt").exists()


def test_conversion_keeps_the_original_and_every_value(tmp_path: Path) -> None:
    old, new = tmp_path / "best.pt", tmp_path / "best.safetensors"
    save_old(old, OLD_STATE, 2)
    checkpoint.convert(old, new)
    assert_identical(checkpoint.load(new), checkpoint.load(old))
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.convert(old, tmp_path / "nowhere" / "best.safetensors")


def test_a_checkpoint_is_told_from_an_exported_generator(tmp_path: Path) -> None:
    path, export = tmp_path / "mine.safetensors", tmp_path / "generator.safetensors"
    checkpoint.save(path, STATE, keep=1)
    save_file({"w": torch.zeros(1)}, export, {"format": "vgan generator"})
    assert checkpoint.is_checkpoint(path)
    assert not checkpoint.is_checkpoint(export)
    assert checkpoint.is_checkpoint(tmp_path / "any.pt")
    for name, expected in (("best", True), ("checkpoint-000000005", True), ("other", False)):
        damaged = tmp_path / f"{name}.safetensors"
        damaged.write_bytes(b"damaged")
        assert checkpoint.is_checkpoint(damaged) == expected


# --- disks and folders


def test_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(checkpoint.path_at(tmp_path, 1), STATE, keep=1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(checkpoint.path_at(tmp_path, 2), STATE, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000000001.safetensors"]


def test_a_file_that_cannot_grow_is_one_line(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    state = {**STATE, "G": {"w": torch.zeros(100_000)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be written") as e:
            checkpoint.save(checkpoint.path_at(tmp_path, 1), state, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_find_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no checkpoint-\*\.safetensors"):
        checkpoint.find(tmp_path)
