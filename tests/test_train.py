"""The loop: resume after a kill is bit-exact, stopping saves, the step does what it says."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from vgan import checkpoint, cli  # noqa: F401  (cli registers the schemas)
from vgan.config import CONFIG_DIR
from vgan.controls import usual_gamma
from vgan.stopping import RESTART, StopRequest
from vgan.train import due, train

TINY = [
    "data=shapes", "data.resolution=16", "data.size=64", "size.g_widths=[8,8,8]", "size.d_widths=[8,8,8]", "batch_size=8",
    "total_kimg=0.4", "tick_kimg=0.04", "snapshot_kimg=0.1", "checkpoint_kimg=0.04", "loss.penalty_every=3",
    "augment=scheduled", "device=cpu",
]  # fmt: skip
# Every step takes at least 10 ms, so that a kill lands inside the run and not after it.
SLOW = """
import time, vgan.train
step = vgan.train.train_step
vgan.train.train_step = lambda *a: (time.sleep(0.01), step(*a))[1]
from vgan.cli import train_main
train_main()
"""


def start(run_dir: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SLOW, *TINY, f"run_dir={run_dir}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(run_dir: Path, cur_nimg: int, process: "subprocess.Popen[str]") -> None:
    """Until a checkpoint at or after cur_nimg is there."""
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        found = checkpoint.all_checkpoints(run_dir)
        if found and int(found[-1].stem.split("-")[1]) >= cur_nimg:
            return
        time.sleep(0.002)
    raise AssertionError(f"no checkpoint at {cur_nimg}: {process.communicate()[0]}")


def train_in_process(run_dir: Path, *overrides: str) -> None:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        train(compose("train", overrides=[*TINY, f"run_dir={run_dir}", *overrides]))


def flatten(node: object, name: str = "") -> dict[str, object]:
    if isinstance(node, dict):
        return {k: v for key, child in node.items() for k, v in flatten(child, f"{name}/{key}").items()}
    if isinstance(node, list):
        return {k: v for i, child in enumerate(node) for k, v in flatten(child, f"{name}/{i}").items()}
    return {name: node}


def assert_same_run(a: Path, b: Path) -> None:
    """Final checkpoints equal to the last bit, and so are the statistics and the grids."""
    final = [flatten(checkpoint.load(checkpoint.find(folder))) for folder in (a, b)]
    assert final[0].keys() == final[1].keys()
    for name, value in final[0].items():
        if isinstance(value, torch.Tensor):
            other = final[1][name]
            assert isinstance(other, torch.Tensor)
            assert torch.equal(value.nan_to_num(), other.nan_to_num()), name
        elif name != "/config/run_dir":
            assert value == final[1][name], name
    ticks = [[json.loads(line) for line in (f / "stats.jsonl").read_text().splitlines()] for f in (a, b)]
    for ours, theirs in zip(*ticks, strict=True):
        ours, theirs = ({k: v for k, v in tick.items() if not k.startswith(("speed/", "memory/"))} for tick in (ours, theirs))
        assert ours == theirs
    names = sorted(p.name for p in a.glob("*.png"))
    assert names == sorted(p.name for p in b.glob("*.png"))
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_killed_runs_end_bit_for_bit_like_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    assert "Done" in whole.communicate()[0]
    rng = random.Random(0)
    for cur_nimg in (40, 160, 320):
        process = start(tmp_path / "killed")
        wait_for(tmp_path / "killed", cur_nimg, process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()  # SIGKILL: no handler runs
        process.communicate()
        assert process.returncode != 0
    out = start(tmp_path / "killed").communicate()[0]
    assert "images on" in out
    assert "Done" in out
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT between processes")
def test_ctrl_c_saves_at_the_next_step_and_the_same_command_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path / "r")
    wait_for(tmp_path / "r", 40, process)
    process.send_signal(signal.SIGINT)
    out = process.communicate()[0]
    assert process.returncode == RESTART, out
    assert out.count("the same command goes on") == 1
    assert "Traceback" not in out
    assert checkpoint.load(checkpoint.find(tmp_path / "r"))["cur_nimg"] < 400
    assert "Done" in start(tmp_path / "r").communicate()[0]


def test_second_ctrl_c_is_not_held_back() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_due_does_not_need_intervals_to_divide() -> None:
    counts = range(64, 1000, 64)
    assert [n for n in counts if due(0.1, n - 64, n)] == [128, 256, 320, 448, 512, 640, 704, 832, 960]
    assert not due(1, 0, 999)
    assert due(1, 999, 1000)


def test_evaluation_in_a_run_keeps_the_best(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = ["eval_kimg=0.032", "eval.n=32", "eval.metrics=[fid,kid]", "features.train_kimg=0.1", "total_kimg=0.096"]
    train_in_process(run_dir, *overrides)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["cur_nimg"] for line in lines] == [32, 64, 96]
    assert [line["best"] for line in lines] == [min(line["fid"] for line in lines[: i + 1]) for i in range(3)]
    best = checkpoint.load(run_dir / "best.pt")
    assert best["cur_nimg"] == min(lines, key=lambda line: line["fid"])["cur_nimg"]
    assert best["metrics"]["fid"] == lines[-1]["best"]
    stats = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert [tick["metrics/fid"] for tick in stats if "metrics/fid" in tick] == [line["fid"] for line in lines]
    # the same command, longer, knows what was best before
    train_in_process(run_dir, *overrides[:-1], "total_kimg=0.128")
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["best"] <= lines[-1]["best"]


def test_augmentation_and_gamma_that_follow_the_run_are_written_and_resumed(tmp_path: Path) -> None:
    adaptive = [
        "augment=adaptive",
        "augment.target=-0.9",
        "augment.adapt_kimg=0.5",
        "gamma=auto",
        "loss.penalty_every=1",
        "schedule_kimg=0.4",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_in_process(whole, *adaptive)
    train_in_process(cut, *adaptive, "total_kimg=0.2")
    train_in_process(cut, *adaptive)
    assert_same_run(whole, cut)
    ticks = [json.loads(line) for line in (whole / "stats.jsonl").read_text().splitlines()]
    assert 0.5 < ticks[-1]["augment_p"] < 1
    assert ticks[0]["augment_p"] < ticks[-1]["augment_p"]
    scheduled = [usual_gamma(16, 8)[0] * (0.75 + 0.25 * math.cos(math.pi * t["cur_nimg"] / 400)) for t in ticks]
    ratios = [t["gamma"] / s for t, s in zip(ticks, scheduled)]
    assert ratios[0] == pytest.approx(1, abs=0.1)
    assert ratios[-1] != pytest.approx(1, abs=1e-3)  # corrected by what was seen


def test_held_out_logits_are_watched(tmp_path: Path) -> None:
    train_in_process(tmp_path / "run", "holdout=20", "total_kimg=0.08")
    ticks = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    for tick in ticks:
        assert tick["logits/gap"] == pytest.approx(tick["logits/trained_on"] - tick["logits/held_out"], abs=1e-6)
    assert ticks[-1]["logits/held_out"] != 0
