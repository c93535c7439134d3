"""vgan-doctor: what it says of machine, data, disk and speed, and when it warns."""

import contextlib
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from test_cli import TINY, Cli

import vgan.apps.benchmark
import vgan.apps.doctor
from vgan import cli
from vgan.apps import speed
from vgan.apps.doctor import command, duration
from vgan.apps.speed import Bench, Trial, candidates, host_memory_gb, try_speeds
from vgan.runtime.errors import UserError

SMALL = [a for a in TINY if a != "total_kimg=0.032"] + ["total_kimg=1", "model=conv"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    return Cli(monkeypatch, capsys)


def rates(monkeypatch: pytest.MonkeyPatch, rate_of: Callable[[dict[str, Any]], float]) -> None:
    """Let trials take no time and come out as told; the few steps before them are taken."""
    monkeypatch.setattr(
        Bench, "take", lambda self, settings: Trial(settings, rate_of(settings), 0.5, 0.1)
    )


def problems(out: str) -> list[str]:
    joined = re.sub(r"\n  (?=\S)", " ", out)
    return [line for line in joined.splitlines() if line.startswith("problem: ")]


def test_the_default_is_examined_without_leaving_anything(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        speed, "usable_cores", torch.get_num_threads
    )  # others may be at work on the rest
    threads = torch.get_num_threads()
    code, out, _ = run(cli.doctor_main, *SMALL, "run_dir=outputs/mine")
    assert code == 0, out
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads
    assert all(len(line) <= 80 for line in out.splitlines() if "/" not in line)
    assert f"torch {torch.__version__.partition('+')[0]}" in out
    assert "not used on cpu" in out
    assert re.search(r"classes +8, from \d", out)
    assert re.search(r"writes +[\d.]+ [kM]B at most: 4 checkpoints of", out)
    batches = [
        int(row.split()[3])
        for row in out.splitlines()
        if re.match(r"(bf16|fp32) +\d+ +no +\d+ +[\d,]+ ", row)
    ]
    assert {8, 4, 16, 32} <= set(batches)
    rate = float(re.findall(r"as chosen +([\d,]+) img/s: 1 kimg in ", out)[0].replace(",", ""))
    assert rate > 0
    assert "vgan-train data=shapes" in out
    assert [p for p in problems(out) if "only 64 pictures" not in p] == []


def test_what_it_says_of_a_checkpoint_is_what_training_writes(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates(monkeypatch, lambda s: 100)
    code, out, _ = run(cli.doctor_main, *SMALL, "run_dir=r")
    assert code == 0
    told = float(re.findall(r"checkpoints of ([\d.]+) kB", out)[0]) * 1e3
    run.train(*SMALL, "run_dir=r", "total_kimg=0.016")
    assert told == pytest.approx(Path("r/checkpoint-000000016.safetensors").stat().st_size, rel=0.25)


def test_faster_settings_are_recommended_and_other_batches_only_mentioned(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = {"precision": {"bf16": 1.5}, "threads": {3: 2.0}}
    rates(
        monkeypatch,
        lambda s: (
            12.5 * s["batch_size"] * math.prod(f.get(s[name], 1) for name, f in factors.items())
        ),
    )
    monkeypatch.setattr(speed, "usable_cores", lambda: 3)
    code, out, _ = run(
        cli.doctor_main, *SMALL, "precision=fp32", "threads=1", "run_dir=r", "total_kimg=600"
    )
    assert code == 0
    assert "100 img/s: 600 kimg in 100 min" in out
    assert "300 img/s: 600 kimg in 33 min" in out
    assert "precision=bf16: +50% img/s" in out
    assert "threads=3: +100% img/s" in out
    assert "batch_size=32: +300% img/s, but other steps" in out
    words = shlex.split(out[out.index("\nvgan-train") :].replace("\\\n", ""))
    assert words[-2:] == ["precision=bf16", "threads=3"]
    assert "precision=fp32" not in words
    assert "threads=1" not in words
    assert "batch_size=8" in words
    assert words[1 : len(SMALL) - 1] == SMALL[: len(SMALL) - 2]  # the rest as given


def test_noise_is_no_reason_to_change(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    rates(monkeypatch, lambda s: 104 if s["precision"] == "bf16" else 100)
    out = run(cli.doctor_main, *SMALL, "precision=fp32", "run_dir=r")[1]
    assert "gain" not in out
    assert "fastest" not in out


def test_a_run_that_is_there_is_resumed_or_refused(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.train(*SMALL, "run_dir=r", "total_kimg=0.032")
    before = {p: p.read_bytes() for p in Path("r").iterdir()}
    rates(monkeypatch, lambda s: 100)
    code, out, _ = run(cli.doctor_main, *SMALL, "run_dir=r", "optim.lr_G.start=0.001")
    assert code == 0
    assert "holds a run at 32 images; the same command resumes it" in out
    changed = re.findall("changed since the checkpoint: (.*) was", out)
    assert changed == ["optim.lr_G.start", "schedule_kimg", "total_kimg"]
    assert "0.968 kimg in" in out
    out = run(cli.doctor_main, *SMALL, "run_dir=r", "total_kimg=0.032")[1]
    assert "that run is complete; to train longer: total_kimg=0.064" in out
    with FileLock("r/.lock"):
        code, out, _ = run(cli.doctor_main, *SMALL, "run_dir=r", "data.seed=4")
    assert code == 1
    assert "2 problems would stop training" in out
    for text in ("was trained on other data", "another vgan-train is at work here"):
        assert any(text in p and p.endswith("[training would stop]") for p in problems(out))
    assert {p: p.read_bytes() for p in Path("r").iterdir()} == before


def test_a_folder_that_cannot_be_written_and_a_full_disk(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates(monkeypatch, lambda s: 100)
    Path("file").write_text("mine")
    code, out, _ = run(cli.doctor_main, *SMALL, "run_dir=file/r")
    assert code == 1
    assert any("run_dir=file/r: cannot be written" in p for p in problems(out))
    for free, stops, says in (
        (1000, 1, "no room for two checkpoints"),
        (1_000_000, 0, "full before the end"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                vgan.apps.doctor.shutil,
                "disk_usage",
                lambda _, free=free: SimpleNamespace(free=free),
            )
            code, out, _ = run(cli.doctor_main, *SMALL, "run_dir=r", "keep_checkpoints=50")
        assert code == stops
        assert any(says in p for p in problems(out)), out


def test_problems_of_the_data(run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates(monkeypatch, lambda s: 100)
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "p" / ("many" if i else "one") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (12, 40) if i % 4 == 0 else (20, 20)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).convert(
            "L" if i % 3 else "RGB"
        ).save(path)
    for name in "xy":
        Image.new("RGB", (20, 20)).save(tmp_path / "p" / "many" / f"{name}.png")
    argv = [a for a in SMALL if not a.startswith("data")]
    argv += ["data=folder", "data.path=p", "data.labels=folders", "data.resolution=16", "run_dir=r"]
    code, out, _ = run(cli.doctor_main, *argv)
    assert code == 0  # none of them stops training
    told = " ".join(problems(out))
    for text in (
        "below 16 px",
        "many has 25 times the pictures of one",
        "exact duplicates",
        "only 26 pictures",
    ):
        assert text in told
    assert "62% of the pictures are grey" in out.replace("\n  ", " ")
    assert "lose over half" in out.replace("\n  ", " ")
    (tmp_path / "p" / "many" / "bad.png").write_text("no picture")
    code, out, _ = run(cli.doctor_main, *argv)
    assert code == 1
    assert any("1 unreadable image(s): many/bad.png" in p for p in problems(out))
    assert "img/s" not in out


@pytest.mark.parametrize("works", [True, False])
def test_a_compiler_that_fails_is_left_out(
    run: Cli, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    def compiled(f: Callable[..., Any], **_: object) -> Callable[..., Any]:
        if works:
            return f
        raise RuntimeError("\ng++ is broken\nlong story")

    rates(monkeypatch, lambda s: 100)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(vgan.apps.doctor, "missing_compiler", lambda device: None)
    monkeypatch.setattr(vgan.apps.doctor, "keep_compiled", lambda folder: None)
    monkeypatch.setattr(vgan.apps.doctor, "pick_compile", lambda *_: False)
    code, out, _ = run(cli.doctor_main, *SMALL, "run_dir=r", "compile=true")
    if works:
        assert code == 0
        assert "compiler    works" in out
    else:
        assert code == 1
        assert any(
            "torch.compile fails (g++ is broken); set compile=false" in p for p in problems(out)
        )
        assert shlex.split(out[out.index("\nvgan-train") :].replace("\\\n", ""))[-2:] == [
            "run_dir=r",
            "compile=false",
        ]


def test_steps_that_fail_are_a_problem(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: object) -> None:
        raise RuntimeError("no kernel for this\nlong story")

    monkeypatch.setattr(vgan.apps.benchmark, "train_step", step)
    code, out, _ = run(cli.doctor_main, *SMALL, "run_dir=r")
    assert code == 1
    assert any("the first step fails (no kernel for this)" in p for p in problems(out))


def test_larger_batches_stop_where_memory_or_time_would_not_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trial(settings: dict[str, Any]) -> Trial:
        return Trial(settings, 100.0, 1 + settings["batch_size"] / 8, 0.1)

    monkeypatch.setattr(
        Bench,
        "begin",
        lambda self, chosen, show: self._taken.append(trial({**chosen, "batch_size": 2})),
    )
    monkeypatch.setattr(Bench, "_subject", lambda self, settings: contextlib.nullcontext())
    monkeypatch.setattr(Bench, "_measure", lambda self, subject, settings, steps: trial(settings))
    monkeypatch.setattr(Bench, "_room_gb", lambda self: 3.5)  # 2 GB at 8, 3 GB at 16, 5 GB at 32
    config = {
        "precision": "fp32",
        "threads": 1,
        "compile": "false",
        "parallel": "ddp",
        "batch_size": 8,
    }

    def batches() -> list[int]:
        plan = try_speeds(config, torch.device("cpu"), lambda run, size: None)
        assert plan.chosen.img_per_s == 100
        return [t.settings["batch_size"] for t in plan.batches]

    assert batches() == [4, 16]
    assert "left out: about 5.0 of 3.5 GB" in capsys.readouterr().out
    monkeypatch.setitem(speed.BUDGET_S, "cpu", 0.0)
    assert batches() == []  # the chosen settings are tried all the same
    assert "left out for lack of time" in capsys.readouterr().out
    monkeypatch.setattr(Bench, "_room_gb", lambda self: 0.5)
    with pytest.raises(
        UserError, match=r"batch_size=8: left out: about .* of 0.5 GB; try batch_gpu"
    ):
        batches()


def test_candidates_differ_from_what_is_chosen() -> None:
    config = {"precision": "fp32", "threads": 1, "compile": "false", "parallel": "ddp"}
    found = candidates(config, torch.device("cpu"))
    assert found["precision"] == ["bf16"]
    assert 1 not in found["threads"]
    assert found["compile"] == []  # takes minutes on a CPU


def test_memory_of_the_host_is_known_on_linux() -> None:
    total, free = host_memory_gb()
    if Path("/proc/meminfo").exists():
        assert total is not None
        assert free is not None
        assert 0 < free <= total


def test_peak_memory_is_that_of_what_came_last() -> None:
    if not Path("/proc/self/clear_refs").exists():
        return
    vgan.apps.benchmark.release(torch.device("cpu"))
    before = vgan.apps.benchmark.host_peak_gb()
    block = np.ones(60_000_000, np.uint8)
    assert before is not None
    assert vgan.apps.benchmark.host_peak_gb() > before + 0.05  # type: ignore[operator]
    del block
    vgan.apps.benchmark.release(torch.device("cpu"))
    assert vgan.apps.benchmark.host_peak_gb() < before + 0.03  # type: ignore[operator]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(40, "40 s"), (600, "10 min"), (3 * 3600 + 300, "3 h 05 min"), (52 * 3600, "2 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_command_can_be_given_to_a_shell() -> None:
    overrides = [
        "size.g_widths=[8,8]",
        "run_dir=my run",
        "precision=fp32",
        *(f"data.path=/a/long/way/{i}" for i in range(6)),
    ]
    text = command(overrides, ["precision=bf16"])
    assert all(len(line) <= 80 for line in text.splitlines())
    words = shlex.split(text.replace("\\\n", ""))
    assert words == [
        "vgan-train",
        *(o for o in overrides if o != "precision=fp32"),
        "precision=bf16",
    ]


def test_bad_keys_are_one_line(run: Cli) -> None:
    code, out, err = run(cli.doctor_main, "total_king=1")
    assert (code, out) == (2, "")
    assert err.startswith(
        "vgan-doctor: total_king=1: unknown key total_king; did you mean total_kimg"
    )
    code, _, err = run(cli.doctor_main, *SMALL, "batch_size=0")
    assert (code, err) == (1, "vgan-doctor: batch_size=0: must be above 0\n")
