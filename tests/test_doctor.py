"""vgan-doctor: what it reports of machine, data, disk and speed, and when it warns."""

import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import seams
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from PIL import Image
from test_cli import TINY, Cli

from vgan import cli
from vgan.apps.benchmark import (
    Benchmark,
    BenchmarkRun,
    Settings,
    Trial,
    candidates,
    open_benchmark_run,
)
from vgan.apps.doctor import doctor, train_command
from vgan.config import TrainConfig
from vgan.runs import checkpoint
from vgan.runtime.console import duration
from vgan.runtime.device import pick_precision
from vgan.runtime.errors import UserError
from vgan.runtime.hardware import host_memory_gb, host_peak_gb, reset_peak, usable_cores
from vgan.schema import CONFIG_DIR, typed

SMALL = [a for a in TINY if a != "total_kimg=0.032"] + ["total_kimg=1", "model=conv"]
SMALL += ["loss.penalty_every=2"]
CPU = torch.device("cpu")


def train_config(*overrides: str) -> TrainConfig:
    cli.register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return typed(compose("train", overrides=list(overrides)))


class FakeBenchmark(Benchmark):
    """A benchmark whose trials take no time, except the first one, which is real."""

    def __init__(self, rate_of: Callable[[Settings], float] = lambda s: 100, **limits: Any) -> None:
        super().__init__(**limits)
        self._rate_of = rate_of

    def measure(self, cfg: TrainConfig, device: torch.device, settings: Settings) -> Trial:
        memory_gb = 1 + settings["batch_size"] / 8
        return Trial(settings, self._rate_of(settings), memory_gb, 0.1)


class Doctor:
    """Runs vgan-doctor in this process; `run` is the console scripts' runner."""

    def __init__(self, run: Cli, capsys: pytest.CaptureFixture[str]) -> None:
        self.run, self._capsys = run, capsys

    def __call__(self, *overrides: str, benchmark: Benchmark | None = None) -> tuple[int, str]:
        cfg = train_config(*overrides)
        code = doctor(cfg, overrides, benchmark or FakeBenchmark(memory_gb=100))
        return code, self._capsys.readouterr().out


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(monkeypatch, capsys)


@pytest.fixture
def examine(run: Cli, capsys: pytest.CaptureFixture[str]) -> Doctor:
    return Doctor(run, capsys)


def unwrapped(out: str) -> str:
    return re.sub(r"\n  (?=\S)", " ", out)


def problems(out: str) -> list[str]:
    return [line for line in unwrapped(out).splitlines() if line.startswith("problem: ")]


def command_words(out: str) -> list[str]:
    return shlex.split(out[out.index("\nvgan-train") :].replace("\\\n", ""))


def test_the_default_is_examined_without_leaving_anything(examine: Doctor, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    # Other programs may use the other cores.
    code, out = examine(*SMALL, "run_dir=outputs/mine", benchmark=Benchmark(0, 20, cores=threads))
    assert code == 0, out
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads
    assert all(len(line) <= 80 for line in out.splitlines() if "/" not in line)
    assert f"torch {torch.__version__.partition('+')[0]}" in out
    assert "not used on cpu" in out
    assert re.search(r"classes +8, from \d", out)
    assert re.search(r"writes +[\d.]+ [kM]B at most: 4 checkpoints of", out)
    rows = re.findall(r"^(?:bf16|fp32) +\d+ +no +(\d+) +[\d,]+ ", out, re.M)
    assert {8, 4, 16, 32} <= {int(batch_size) for batch_size in rows}
    rate = float(re.findall(r"as chosen +([\d,]+) img/s: 1 kimg in ", out)[0].replace(",", ""))
    assert rate > 0
    assert "vgan-train data=shapes" in out
    assert [p for p in problems(out) if "only 64 images" not in p] == []


def test_the_size_of_a_checkpoint_is_that_of_training(examine: Doctor) -> None:
    code, out = examine(*SMALL, "run_dir=r")
    assert code == 0
    size = float(re.findall(r"checkpoints of ([\d.]+) kB", out)[0]) * 1e3
    examine.run.train(*SMALL, "run_dir=r", "total_kimg=0.016")
    written = next(Path("r").glob("checkpoint-000000016.*")).stat().st_size
    assert size == pytest.approx(written, rel=0.25)


def test_faster_settings_are_recommended_and_other_batches_only_mentioned(examine: Doctor) -> None:
    factors = {"precision": {"bf16": 1.5}, "threads": {3: 2.0}}

    def rate_of(s: Settings) -> float:
        speedups = [factor.get(s[name], 1) for name, factor in factors.items()]
        return 12.5 * s["batch_size"] * math.prod(speedups)

    argv = [*SMALL, "precision=fp32", "threads=1", "run_dir=r", "total_kimg=600"]
    code, out = examine(*argv, benchmark=FakeBenchmark(rate_of, cores=3, memory_gb=100))
    assert code == 0
    assert "100 img/s: 600 kimg in 1 h 40 min" in out
    assert "300 img/s: 600 kimg in 33 min 20 s" in out
    assert "precision=bf16: +50% img/s" in out
    assert "threads=3: +100% img/s" in out
    assert "batch_size=32: +300% img/s, but the result will differ" in out
    words = command_words(out)
    assert words[-2:] == ["precision=bf16", "threads=3"]
    assert "precision=fp32" not in words
    assert "threads=1" not in words
    assert "batch_size=8" in words
    assert words[1 : len(SMALL) - 1] == SMALL[: len(SMALL) - 2]  # the rest as given


def test_noise_is_no_reason_to_change(examine: Doctor) -> None:
    bench = FakeBenchmark(lambda s: 104 if s["precision"] == "bf16" else 100, memory_gb=100)
    out = examine(*SMALL, "precision=fp32", "run_dir=r", benchmark=bench)[1]
    assert "gain" not in out
    assert "fastest" not in out


def test_an_existing_run_is_resumed_or_refused(examine: Doctor) -> None:
    examine.run.train(*SMALL, "run_dir=r", "total_kimg=0.032")
    before = {p: p.read_bytes() for p in Path("r").iterdir()}
    code, out = examine(*SMALL, "run_dir=r", "optim.lr_G.start=0.001")
    assert code == 0
    assert "holds a run at 32 images; the same command resumes it" in out
    changed = re.findall("[Cc]hanged since the checkpoint: (.*) was", out)
    assert changed == ["optim.lr_G.start", "schedule_kimg", "total_kimg"]
    assert "0.968 kimg in" in out
    out = examine(*SMALL, "run_dir=r", "total_kimg=0.032")[1]
    assert "that run is complete; to train longer: total_kimg=0.064" in out
    with FileLock("r/.lock"):
        code, out = examine(*SMALL, "run_dir=r", "data.seed=4")
    assert code == 1
    assert "2 problems would stop training" in out
    for text in ("was trained on other data", "run_dir=r: another"):
        assert any(text in p and p.endswith("[training would stop]") for p in problems(out))
    assert {p: p.read_bytes() for p in Path("r").iterdir()} == before


def test_a_folder_that_cannot_be_written_and_a_full_disk(
    examine: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("mine")
    code, out = examine(*SMALL, "run_dir=file/r")
    assert code == 1
    assert any("run_dir=file/r: cannot be written" in p for p in problems(out))
    for free, stops, text in (
        (1000, 1, "cannot hold two checkpoints"),
        (3_000_000, 0, "full before the end"),
    ):
        disk = SimpleNamespace(free=free)
        seams.replace_disk_usage(lambda path, disk=disk: disk, monkeypatch)
        code, out = examine(*SMALL, "run_dir=r", "keep_checkpoints=50")
        assert code == stops
        assert any(text in p for p in problems(out)), out


def test_problems_of_the_data(examine: Doctor, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "p" / ("many" if i else "one") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (12, 40) if i % 4 == 0 else (20, 20)
        pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
        Image.fromarray(pixels).convert("L" if i % 3 else "RGB").save(path)
    for name in "xy":
        Image.new("RGB", (20, 20)).save(tmp_path / "p" / "many" / f"{name}.png")
    argv = [a for a in SMALL if not a.startswith("data")]
    argv += ["data=folder", "data.path=p", "data.labels=folders", "data.resolution=16", "run_dir=r"]
    code, out = examine(*argv)
    assert code == 0  # none of them stops training
    found = " ".join(problems(out))
    for text in (
        "below 16 px",
        "many has 25 times the images of one",
        "exact duplicates",
        "only 26 images",
    ):
        assert text in found
    assert "62% of the images are grey" in unwrapped(out)
    assert "lose over half" in unwrapped(out)
    (tmp_path / "p" / "many" / "bad.png").write_text("no picture")
    code, out = examine(*argv)
    assert code == 1
    assert any("1 unreadable image(s): many/bad.png" in p for p in problems(out))
    assert "img/s" not in out


@pytest.mark.parametrize("works", [True, False])
def test_a_compiler_that_fails_is_left_out(
    examine: Doctor, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    seams.fake_compiler(works, monkeypatch)
    code, out = examine(*SMALL, "run_dir=r", "compile=true")
    if works:
        assert code == 0
        assert "compiler    works" in out
    else:
        assert code == 1
        text = "torch.compile fails (g++ is broken); set compile=false"
        assert any(text in p for p in problems(out))
        assert command_words(out)[-2:] == ["run_dir=r", "compile=false"]


def test_steps_that_fail_are_a_problem(examine: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: BenchmarkRun) -> None:
        raise RuntimeError("no kernel for this\nlong story")

    monkeypatch.setattr(BenchmarkRun, "step", fail)
    code, out = examine(*SMALL, "run_dir=r")
    assert code == 1
    assert any("the first step fails (no kernel for this)" in p for p in problems(out))


def test_larger_batches_stop_where_memory_or_time_are_short(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = TrainConfig(precision="fp32", threads=1, compile="false", parallel="ddp", batch_size=8)

    def batch_sizes(**limits: float) -> list[int]:
        bench = FakeBenchmark(**limits)  # 2 GB at 8, 3 GB at 16, 5 GB at 32
        small = {"precision": "fp32", "threads": 1, "compile": "false", "batch_size": 2}
        bench.trials.append(bench.measure(cfg, CPU, small))
        plan = bench.search(cfg, CPU)
        assert plan.chosen.img_per_s == 100
        return [t.settings["batch_size"] for t in plan.batch_sizes]

    assert batch_sizes(memory_gb=3.5) == [4, 16]
    assert "skipped: needs about 5.0 of 3.5 GB" in capsys.readouterr().out
    assert batch_sizes(memory_gb=3.5, budget_s=0) == []  # but the chosen settings are tried
    assert "skipped: out of time" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"batch_size=8: skipped: needs about .* of 0.5 GB; try batch_gpu"
    ):
        batch_sizes(memory_gb=0.5, budget_s=0)


def test_a_benchmark_step_is_a_step_of_the_loop(examine: Doctor) -> None:
    examine.run.train(*SMALL, "run_dir=r", "total_kimg=0.032")
    cfg = train_config(*SMALL, "run_dir=s", "total_kimg=0.032")
    with open_benchmark_run(cfg, CPU, pick_precision(cfg.precision, CPU)) as subject:
        for _ in range(4):
            subject.step()
        state = subject.run.state.state_dict()
    trained = checkpoint.load(checkpoint.find(Path("r")))
    assert state["cur_nimg"] == trained["cur_nimg"] == 32
    for network in ("G", "D", "G_ema"):
        for name, weight in trained[network].items():
            assert torch.equal(state[network][name], weight), (network, name)


def test_candidates_differ_from_what_is_chosen() -> None:
    cfg = TrainConfig(precision="fp32", threads=1, compile="false", parallel="ddp")
    found = candidates(cfg, CPU, cores=2)
    assert found["precision"] == ["bf16"]
    assert found["threads"] == [2]
    assert found["compile"] == []  # takes minutes on a CPU


def test_cores_and_memory_of_the_host_are_known() -> None:
    total, free = host_memory_gb()
    assert 0 < free <= total
    assert usable_cores() >= 1


def test_peak_memory_is_that_of_what_came_last() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks cannot be reset here")
    reset_peak(CPU)
    before = host_peak_gb()
    block = np.ones(60_000_000, np.uint8)
    assert host_peak_gb() > before + 0.05
    del block
    reset_peak(CPU)
    assert host_peak_gb() < before + 0.03


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(40, "40 s"), (600, "10 min"), (3 * 3600 + 300, "3 h 5 min"), (52 * 3600, "2 d 4 h")],
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
    text = train_command(overrides, ["precision=bf16"])
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
