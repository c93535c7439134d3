import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vgan.runs import checkpoint
from vgan.runtime.errors import UserError

PARTS = {name: {"w": torch.arange(3.0)} for name in checkpoint._PARTS - {"format", "cur_nimg"}} | {
    "cur_nimg": 5
}


def test_round_trip_and_the_newest_are_kept(tmp_path: Path) -> None:
    for nimg in (100, 200, 300):
        checkpoint.save(checkpoint.path_at(tmp_path, nimg), PARTS, keep=2)
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == [
        "checkpoint-000000200.pt",
        "checkpoint-000000300.pt",
    ]
    assert checkpoint.find(tmp_path).name == "checkpoint-000000300.pt"
    assert torch.equal(checkpoint.load(checkpoint.find(tmp_path))["G"]["w"], torch.arange(3.0))
    assert len(list(tmp_path.iterdir())) == 2  # no temporary file is left


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "foreign", "newer"])
def test_damaged_and_foreign_files_are_named_and_left_alone(tmp_path: Path, damage: str) -> None:
    path = checkpoint.path_at(tmp_path, 1)
    checkpoint.save(path, PARTS, keep=1)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        at = content.index(torch.arange(3.0).numpy().tobytes())
        path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    elif damage in ("empty", "text"):
        path.write_bytes(b"" if damage == "empty" else b"hello")
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(1)}, path)
    else:
        torch.save({"format": 99, **{k: {} for k in checkpoint._PARTS - {"format"}}}, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=path.name):
        checkpoint.load(path)
    assert path.read_bytes() == before


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({**PARTS, "format": 1, "G": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """The archive with changed entries, and the right sums over them."""
    other = path.with_name("rewritten.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return other


def test_each_of_the_two_sums_is_looked_at(tmp_path: Path) -> None:
    """The digest of what is in the parts, and the archive's of what surrounds them."""
    checkpoint.save(tmp_path / "good.pt", PARTS, keep=1)
    assert (
        checkpoint.load(rewritten(tmp_path / "good.pt", lambda _, content: content))["cur_nimg"]
        == 5
    )
    values = torch.arange(3.0).numpy().tobytes()
    with pytest.raises(checkpoint.Damaged) as e:
        checkpoint.load(
            rewritten(
                tmp_path / "good.pt", lambda _, content: content.replace(values, values[::-1])
            )
        )
    assert "digest" in str(e.value.__cause__)
    content = (tmp_path / "good.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        (version,) = (entry for entry in archive.infolist() if entry.filename.endswith("/version"))
        stated = archive.read(version)
    at = content.index(stated, version.header_offset + 30 + len(version.filename))
    (tmp_path / "flipped.pt").write_bytes(content[:at] + b"9" + content[at + 1 :])
    with pytest.raises(checkpoint.Damaged) as e:
        checkpoint.load(tmp_path / "flipped.pt")
    assert "checksum" in str(e.value.__cause__)


def test_an_archive_behind_something_else_is_refused(tmp_path: Path) -> None:
    """torch goes by the first bytes and would read what stands there; a pickle of 244 bytes took 2 GB."""
    checkpoint.save(tmp_path / "good.pt", PARTS, keep=1)
    content = (tmp_path / "good.pt").read_bytes()
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "twice.pt", "w") as twice:
        warnings.simplefilter("ignore")  # of names that come twice, the first of which nobody reads
        for _ in range(2):
            twice.writestr("x/data.pkl", b"")
    legacy = b"\x80\x02.." + (tmp_path / "twice.pt").read_bytes()[4:]
    for hostile in (legacy, b"PK\x03\x04" + content, content[:-2] + b"\x03\x00abc"):
        (tmp_path / "hostile.pt").write_bytes(hostile)
        with pytest.raises(checkpoint.Damaged) as e:
            checkpoint.load(tmp_path / "hostile.pt")
        assert "not an archive alone" in str(e.value.__cause__)


def test_a_small_pickle_that_keeps_a_reader_busy_is_refused(tmp_path: Path) -> None:
    """8 MB of opcodes took 7 s to read."""
    checkpoint.save(tmp_path / "good.pt", PARTS, keep=1)
    busy = b"\x80\x02" + b"N0" * 600_000
    with pytest.raises(checkpoint.Damaged) as e:
        checkpoint.load(
            rewritten(
                tmp_path / "good.pt", lambda name, x: busy + x[2:] if name.endswith(".pkl") else x
            )
        )
    assert "takes too long" in str(e.value.__cause__)


def test_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(checkpoint.path_at(tmp_path, 1), PARTS, keep=1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(checkpoint.path_at(tmp_path, 2), PARTS, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000000001.pt"]


def test_find_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no checkpoint-\*\.pt"):
        checkpoint.find(tmp_path)
