"""The loop: resume after a kill is bit-exact, stopping saves, the step does what it says."""

import json
import math
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, start, train_in_process

from vgan.runs import checkpoint
from vgan.runtime.signals import RESTART, StopRequest
from vgan.training.monitor import passed
from vgan.training.schedules import default_gamma


def wait_for(run_dir: Path, cur_nimg: int, process: "subprocess.Popen[str]") -> None:
    """Until a checkpoint at or after cur_nimg is there."""
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        found = checkpoint.all_checkpoints(run_dir)
        if found and int(found[-1].stem.split("-")[1]) >= cur_nimg:
            return
        time.sleep(0.002)
    raise AssertionError(f"no checkpoint at {cur_nimg}: {process.communicate()[0]}")


@pytest.mark.slow
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
    assert "resumed at" in out
    assert "Done" in out
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals between processes")
def test_a_signal_saves_at_the_next_step_and_the_same_command_ends_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    whole = start(tmp_path / "whole")
    for number, after in (
        ("SIGINT", 40),
        ("SIGTERM", 120),
        ("SIGUSR1", 200),
    ):  # each later than where the one before stopped
        process = start(tmp_path / "r")
        wait_for(tmp_path / "r", after, process)
        process.send_signal(getattr(signal, number))
        out = process.communicate()[0]
        assert process.returncode == RESTART, out
        assert out.count("Run the same command") == 1
        assert "Traceback" not in out
        assert checkpoint.load(checkpoint.find(tmp_path / "r"))["cur_nimg"] < after + 80
    assert "Done" in start(tmp_path / "r").communicate()[0]
    assert "Done" in whole.communicate()[0]
    assert_same_run(tmp_path / "whole", tmp_path / "r")


def test_second_ctrl_c_is_not_held_back() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_end_of_a_terminal_saves_unless_nohup_says_otherwise() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
    assert stop.requested
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_due_does_not_need_intervals_to_divide() -> None:
    counts = range(64, 1000, 64)
    assert [n for n in counts if passed(0.1, n - 64, n)] == [
        128,
        256,
        320,
        448,
        512,
        640,
        704,
        832,
        960,
    ]
    assert not passed(1, 0, 999)
    assert passed(1, 999, 1000)


def test_evaluation_in_a_run_keeps_the_best(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [
        "eval_kimg=0.032",
        "eval.n=32",
        "eval.metrics=[fid,kid]",
        "features.train_kimg=0.1",
        "total_kimg=0.096",
    ]
    train_in_process(run_dir, *overrides)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["cur_nimg"] for line in lines] == [32, 64, 96]
    assert [line["best"] for line in lines] == [
        min(line["fid"] for line in lines[: i + 1]) for i in range(3)
    ]
    best = checkpoint.load(run_dir / "best.safetensors")
    assert best["cur_nimg"] == min(lines, key=lambda line: line["fid"])["cur_nimg"]
    assert best["metrics"]["fid"] == lines[-1]["best"]
    stats = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert [tick["metrics/fid"] for tick in stats if "metrics/fid" in tick] == [
        line["fid"] for line in lines
    ]
    # the same command, longer, knows what was best before
    train_in_process(run_dir, *overrides[:-1], "total_kimg=0.128")
    assert (
        json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["best"]
        <= lines[-1]["best"]
    )


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
    scheduled = [
        default_gamma(16, 8)[0] * (0.75 + 0.25 * math.cos(math.pi * t["cur_nimg"] / 400))
        for t in ticks
    ]
    ratios = [t["gamma"] / s for t, s in zip(ticks, scheduled)]
    assert ratios[0] == pytest.approx(1, abs=0.1)
    assert max(ratios) > 1.001  # corrected by what was seen
    assert min(ratios) > 1 - 1e-6


def test_held_out_logits_are_watched(tmp_path: Path) -> None:
    train_in_process(tmp_path / "run", "holdout=20", "total_kimg=0.08")
    ticks = [
        json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()
    ]
    for tick in ticks:
        assert tick["logits/gap"] == pytest.approx(
            tick["logits/trained_on"] - tick["logits/held_out"], abs=1e-6
        )
    assert ticks[-1]["logits/held_out"] != 0


def test_deterministic_kernels_are_asked_for_and_suffice(tmp_path: Path) -> None:
    try:
        train_in_process(tmp_path / "a", "deterministic=true", "total_kimg=0.08")
        assert torch.are_deterministic_algorithms_enabled()
        train_in_process(tmp_path / "b", "deterministic=true", "total_kimg=0.08")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / "a", tmp_path / "b")
