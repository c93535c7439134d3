"""Runs that are killed, starved of disk or given a wrong clock end like undisturbed ones."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import seams
from runs import TINY, assert_same_run, lines_of, start

from vgan.runs import checkpoint

# The clock of the day jumps by days, backwards too; a clock that only counts on stays.
JUMPING_CLOCK = (
    seams.IMPORT
    + """
import random, time
day = time.time
time.time = lambda: day() + random.Random(int(day() * 100)).choice([-1e6, 0, 1e6])
seams.train_main()
"""
)
SLOW_DISK = (
    seams.IMPORT
    + """
import os, time
sync = os.fsync
os.fsync = lambda f: (time.sleep(0.4), sync(f))[1]
seams.slow_steps()
seams.train_main()
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.soak)])
def test_kills_at_random_moments(tmp_path: Path, kills: int) -> None:
    """From the first line of the program to its last, checkpoints being written included."""
    length = ["total_kimg=0.4"]
    if kills == 100:
        length = [
            "total_kimg=60",
            "snapshot_kimg=2",
            "tick_kimg=0.2",
            "checkpoint_kimg=0.2",
            "threads=1",
        ]
    begun = time.monotonic()
    assert "Done" in start(tmp_path / "whole", *length).communicate()[0]
    took = min(time.monotonic() - begun, 12.0)  # of which some seconds pass before the first step
    rng, before = random.Random(kills), 0
    for _ in range(kills):
        process = start(tmp_path / "killed", *length)
        try:
            process.communicate(timeout=rng.uniform(0, took))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        newest = checkpoint.all_checkpoints(tmp_path / "killed")
        reached = checkpoint.nimg_of(newest[-1]) if newest else 0
        assert reached >= before  # nothing that was there is gone
        before = reached
    out = start(tmp_path / "killed", *length).communicate(timeout=600)[0]
    assert "Done" in out or "is complete" in out  # where a kill came too late
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("damaged-*"))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a small file system of its own")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A small file system in memory, where it may be mounted; else a limit on file sizes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    mounted = (
        mounted
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2600k", "tmpfs", str(disk)]
        ).returncode
        == 0
    )
    small = ["keep_checkpoints=2", "snapshot_kimg=0.01", "size.g_widths=[16,16,16]"]
    try:
        if mounted:
            done = start(disk / "r", *small)
        else:
            code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
            code += "from vgan.cli import train_main; train_main()"
            done = start(disk / "r", *small, code=code)
        out = done.communicate(timeout=300)[0]
        assert "Traceback" not in out
        assert "training continues" in out, out
        assert done.returncode in (0, 1)
        readable = [
            checkpoint.load(path) for path in checkpoint.all_checkpoints(disk / "r")
        ]  # none is half
        assert readable or not mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_slow_disk_does_not_hold_up_the_steps(tmp_path: Path) -> None:
    process = start(tmp_path / "r", "checkpoint_kimg=0.2", "threads=1", code=SLOW_DISK)
    assert "Done" in process.communicate(timeout=300)[0]
    waited = [
        line["speed/waiting_for_checkpoints"] for line in lines_of(tmp_path / "r" / "stats.jsonl")
    ]
    assert max(waited) < 0.2  # 0.8 s of syncing in two checkpoints, on a run of about a second


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    jumping, steady = start(tmp_path / "jumping", code=JUMPING_CLOCK), start(tmp_path / "steady")
    for process in (jumping, steady):
        assert "Done" in process.communicate(timeout=300)[0]
    assert_same_run(tmp_path / "steady", tmp_path / "jumping")


@pytest.mark.slow
def test_checkpoint_minutes_bound_what_a_kill_costs(tmp_path: Path) -> None:
    process = start(
        tmp_path / "r", "checkpoint_kimg=100", "checkpoint_minutes=0.005", "total_kimg=4"
    )
    deadline = time.monotonic() + 120
    while len(checkpoint.all_checkpoints(tmp_path / "r")) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert checkpoint.load(checkpoint.find(tmp_path / "r"))["cur_nimg"] < 4000


@pytest.mark.slow
def test_the_same_command_from_another_folder_and_python_hash(tmp_path: Path) -> None:
    """Nothing of a run depends on where it is started, or on the order of sets."""
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        code = "from vgan.cli import train_main; train_main()"
        command = [
            sys.executable,
            "-c",
            code,
            *TINY,
            "total_kimg=0.08",
            f"run_dir={tmp_path / seed / 'r'}",
        ]
        subprocess.run(
            command,
            cwd=tmp_path / seed,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
    assert_same_run(tmp_path / "1" / "r", tmp_path / "2" / "r")
