"""Any input gives a result or one clear line: no traceback, no hang, under 1 GB of memory.

The default tests feed a few of each kind; `pytest -m soak` feeds 5,000 in all.
"""

import os
import random
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
import seams
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import TINY, train_in_process

from vgan import cli, load_generator
from vgan.config import TrainConfig
from vgan.data.folder import Folder
from vgan.data.packed import pack
from vgan.data.preprocess import MOST_BYTES
from vgan.runs import checkpoint
from vgan.runtime.errors import UserError
from vgan.schema import explained_keys

MOST_S, MOST_GB = 5.0, 1.0
few_and_many = pytest.mark.parametrize("cases", [60, pytest.param(1700, marks=pytest.mark.soak)])


class Limits:
    """Fails a test if a case takes too much CPU time or memory.

    CPU time does not depend on the load of the machine.
    """

    def __init__(self) -> None:
        self._start, self._before = time.process_time(), self._peak_gb()

    @staticmethod
    def _peak_gb() -> float:
        if os.name == "nt":
            return 0.0
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            1e9 if sys.platform == "darwin" else 1e6
        )

    def check(self, case: int) -> None:
        now = time.process_time()
        assert now - self._start < MOST_S, f"case {case} took {now - self._start:.1f} s of CPU time"
        assert self._peak_gb() - self._before < MOST_GB, f"case {case}"
        self._start = now


def one_line(e: UserError) -> bool:
    return "\n" not in str(e) and len(str(e)) > 20


@few_and_many
def test_checkpoints(tmp_path: Path, cases: int) -> None:
    train_in_process(tmp_path / "r", "total_kimg=0.04")
    path = checkpoint.find(tmp_path / "r")
    valid, parts = path.read_bytes(), checkpoint.load(path)
    limits, refused = Limits(), 0
    for case in range(cases):
        rng = random.Random(case)
        hostile = tmp_path / "hostile.pt"
        fuzz.hostile_checkpoint(hostile, valid, parts, rng)
        try:
            G = load_generator(hostile, device="cpu")
            G(torch.zeros(1, G.z_dim), torch.zeros(1, G.label_dim))  # type: ignore[call-overload]
        except UserError as e:
            refused += one_line(e)
        limits.check(case)
    assert cases // 2 < refused < cases  # some changes do no harm


@pytest.mark.parametrize("cases", [40, pytest.param(400, marks=pytest.mark.soak)])
def test_whatever_a_run_may_hold_comes_back_and_one_wrong_bit_is_seen(
    tmp_path: Path, cases: int
) -> None:
    base: dict[str, Any] = {name: {} for name in checkpoint.REQUIRED_KEYS}

    @settings(
        max_examples=cases,
        deadline=1000 * MOST_S,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(tree=fuzz.TREES, where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def holds(tree: Any, where: float, bit: int) -> None:
        path = checkpoint.path_at(tmp_path, 1)
        checkpoint.save(path, {**base, "G": tree}, keep=1)
        assert checkpoint.digest({"G": checkpoint.load(path)["G"]}) == checkpoint.digest(
            {"G": tree}
        )
        content = bytearray(path.read_bytes())
        content[int(where * len(content))] ^= 1 << bit
        path.write_bytes(content)
        try:  # a bit that no reader looks at (padding, a time) may be wrong; what is read may not
            assert checkpoint.digest({"G": checkpoint.load(path)["G"]}) == checkpoint.digest(
                {"G": tree}
            )
        except checkpoint.Damaged:
            return

    holds()


@few_and_many
def test_pictures(tmp_path: Path, cases: int) -> None:
    limits, refused = Limits(), 0
    for first in range(0, cases, 20):
        folder = tmp_path / f"f{first}"
        folder.mkdir()
        for case in range(first, first + 20):
            rng = random.Random(case)
            content = fuzz.picture(rng)
            (folder / f"{case}.png").write_bytes(
                fuzz.damaged(content, rng) if case % 5 else content
            )
        for skip_bad in (False, True):
            try:
                data = pack(Folder(str(folder), 16, skip_bad=skip_bad), tmp_path / "cache")
            except UserError as e:
                refused += one_line(e)
                continue
            assert data.images.shape[1:] == (16, 16, 3)
            assert len(data) >= 4  # every fifth is sound
        limits.check(first)
    assert refused == cases // 20  # without skip_bad every folder, with it none


@few_and_many
def test_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cases: int
) -> None:
    """Everything before the first step, for random overrides of random keys."""
    monkeypatch.chdir(tmp_path)
    seams.replace_loop(lambda *_: None, monkeypatch)
    keys = [k for k, _ in explained_keys(TrainConfig)] + [
        "data.resolution",
        "data.size",
        "loss.gamma.start",
        "optim.lr_G.end",
    ]
    keys += [
        "size",
        "model",
        "augment",
        "model.generator._target_",
        "model.discriminator.logits_px",
        "optim.optimizer.eps",
        "",
    ]
    values = ["0", "1", "-1", "2", "3", "8", "0.5", "17", "1e9", "1e-9", "nan", "inf", "null"]
    values += ["true", "[]", "[1,2]", "{}", "{a:1}", "abc", "''", "${seed}", "${oc.env:HOME}"]
    values += ["${loss}", "os.system", "\x00", "ü", "=", "fp16", "auto", "??"]
    limits, accepted = Limits(), 0
    for case in range(cases):
        rng = random.Random(case)
        chosen = [
            f"{rng.choice([''] * 9 + ['+', '~', '++'])}{rng.choice(keys)}={rng.choice(values)}"
            for _ in range(rng.randint(1, 2))
        ]
        if any(c.startswith(("device=", "threads=", "data.size=1e9", "size=l")) for c in chosen):
            continue
        monkeypatch.setattr(sys, "argv", ["vgan-train", *TINY, *chosen])
        try:
            cli.train_main()
            accepted += 1
        except SystemExit as e:
            if e.code:
                lines = capsys.readouterr().err.strip().splitlines()
                assert len([line for line in lines if line.startswith("vgan-train: ")]) == 1, (
                    chosen,
                    lines,
                )
        capsys.readouterr()
        limits.check(case)
    assert accepted > 0


# --- single inputs that did harm ---


def test_a_link_to_nothing_and_a_link_in_a_circle(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / "sub" / f"{i}.png")
    (folder / "gone.png").symlink_to(tmp_path / "nothing.png")
    (folder / "sub" / "again").symlink_to(folder)
    with pytest.raises(UserError, match=r"1 unreadable image\(s\): gone.png"):
        pack(Folder(str(folder), 16), tmp_path / "cache")
    assert len(pack(Folder(str(folder), 16, skip_bad=True), tmp_path / "cache")) == 3


@pytest.mark.parametrize("kind", ["bomb", "encrypted", "torn", "postscript", "huge"])
def test_single_bad_pictures_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pictures.zip"
    good = fuzz.picture(random.Random(0))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", good)
        if kind == "bomb":
            archive.writestr("bad.png", b"\x00" * (MOST_BYTES + 1))
        elif kind == "postscript":  # Pillow would hand it to Ghostscript
            archive.writestr(
                "bad.png",
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
            )
        elif kind == "huge":
            archive.writestr("bad.png", b"P6 30000 30000 255\n")
        else:
            archive.writestr("bad.png", good)
    content = path.read_bytes()
    if kind == "encrypted":  # the flag in the directory of the zip
        at = content.rindex(b"PK\x01\x02")
        path.write_bytes(content[: at + 8] + b"\x01" + content[at + 9 :])
    if kind == "torn":
        at = content.rindex(b"bad.png", 0, content.rindex(b"PK\x01\x02")) + 20
        path.write_bytes(content[:at] + b"\xff\xff\xff" + content[at + 3 :])
    with pytest.raises(UserError, match=r"1 unreadable image\(s\): bad.png"):
        pack(Folder(str(path), 16), tmp_path / "cache")


def test_several_arrays_in_one_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(UserError, match=r"not a readable .npy \(several arrays"):
        Folder(str(tmp_path / "x.npy"), 16)


@pytest.mark.parametrize("name", ["meta.json", "images.npy", "labels.npy"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\x93NUMPY"])
def test_a_damaged_cache_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 16, 16, 3), dtype=np.uint8))
    source = Folder(str(tmp_path / "x.npy"), 16)
    pack(source, tmp_path / "cache")
    (damaged,) = (tmp_path / "cache").iterdir()
    (damaged / name).write_bytes(content)
    with pytest.raises(UserError, match="damaged cache; delete this folder"):
        pack(source, tmp_path / "cache")


def test_a_checkpoint_that_describes_a_giant_takes_no_memory(tmp_path: Path) -> None:
    train_in_process(tmp_path / "r", "total_kimg=0.04")
    parts = checkpoint.load(checkpoint.find(tmp_path / "r"))
    giants: list[tuple[str, Any]] = [
        ("blocks", 10**9),
        ("widths", [80_000] * 3),
        ("z_dim", 10**6),
        ("embed_dim", 10**6),
    ]
    limits = Limits()
    for i, (name, number) in enumerate(giants):
        generator = {**parts["config"]["model"]["generator"], name: number}
        config = {**parts["config"], "model": {**parts["config"]["model"], "generator": generator}}
        checkpoint.save(tmp_path / "giant.pt", {**parts, "config": config}, keep=1)
        with pytest.raises(UserError, match="do not fit the network it describes"):
            load_generator(tmp_path / "giant.pt", device="cpu")
        limits.check(i)
    nested: Any = []
    for _ in range(40):
        nested = [nested, nested]  # 2^40 leaves in a few bytes
    torch.save({**parts, "format": 1, "more": nested}, tmp_path / "deep.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_generator(tmp_path / "deep.pt", device="cpu")
    limits.check(99)
