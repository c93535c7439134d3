"""Several real processes over gloo: the same run as one, to rounding; clean ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import seams
import torch
from runs import SLOW, TINY, lines_of, train_in_process

from vgan import load_generator
from vgan.runs import checkpoint
from vgan.runtime.distributed import rendezvous
from vgan.runtime.signals import RESTART

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or os.name == "nt", reason="needs torch.distributed"
)
FOLLOWING = ("augment=adaptive", "augment.adapt_kimg=0.1", "gamma=auto")
RUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
CHEAP = [
    "precision=fp32",
    "threads=1",
    "total_kimg=0.064",
    "tick_kimg=0.032",
    "checkpoint_kimg=0.032",
    "batch_size=16",
]


def command(processes: int, run_dir: Path, *overrides: str) -> list[str]:
    return [
        *RUN,
        str(processes),
        "-m",
        "vgan.train",
        *TINY,
        *CHEAP,
        *overrides,
        f"run_dir={run_dir}",
    ]


def launch(*arguments: object) -> str:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=600)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    return done.stdout


def alone(run_dir: Path, *overrides: str) -> None:
    train_in_process(run_dir, *CHEAP, *overrides)


def close(a: Path, b: Path, rel: float) -> None:
    """Compare to rounding: statistics closely, weights as far as Adam's steps allow."""
    for ours, theirs in zip(lines_of(a / "stats.jsonl"), lines_of(b / "stats.jsonl"), strict=True):
        assert ours.keys() == theirs.keys()
        for tick in (
            ours,
            theirs,
        ):  # under a relativistic loss D's last bias has no gradient: only differences count
            tick["logits/real"] -= tick.pop("logits/fake")
            for one in ("logits/trained_on", "logits/held_out"):
                tick.pop(one, None)
        for name, value in ours.items():
            if not name.startswith(("speed/", "memory/")):
                assert theirs[name] == pytest.approx(value, rel=rel, abs=rel), (
                    name,
                    ours["cur_nimg"],
                )
    first, second = (checkpoint.load(checkpoint.find(folder)) for folder in (a, b))
    for name, weight in first["G_ema"].items():
        assert torch.allclose(second["G_ema"][name], weight, rtol=10 * rel, atol=10 * rel), name


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param((), marks=pytest.mark.slow),
        FOLLOWING,
        pytest.param(("batch_gpu=3", "holdout=8"), marks=pytest.mark.soak),
    ],
)
def test_the_number_of_processes_does_not_change_the_run(
    tmp_path: Path, extra: tuple[str, ...]
) -> None:
    alone(tmp_path / "1", *extra)
    for processes in (2,) if extra else (2, 4):
        out = launch(processes, tmp_path / str(processes), *extra)
        assert out.count("Done: 64 images.") == 1  # rank 0 speaks alone
        close(tmp_path / "1", tmp_path / str(processes), rel=2e-3)


@pytest.mark.slow
def test_compiled_steps_of_two_processes_are_those_of_one_without_compilation(
    tmp_path: Path,
) -> None:
    # A step with a penalty and one without.
    short = ("augment=none", "loss.penalty_every=2", "total_kimg=0.032")
    alone(tmp_path / "eager", *short)
    launch(2, tmp_path / "compiled", *short, "compile=true")
    close(tmp_path / "eager", tmp_path / "compiled", rel=2e-3)


@pytest.mark.slow
def test_networks_spread_over_processes_train_alike_and_their_checkpoints_load_on_one(
    tmp_path: Path,
) -> None:
    alone(tmp_path / "whole", "optimizer=adam")
    launch(2, tmp_path / "spread", "parallel=fsdp", "optimizer=adam")
    close(tmp_path / "whole", tmp_path / "spread", rel=2e-3)
    assert load_generator(tmp_path / "spread", device="cpu")(
        torch.zeros(1, 64), torch.eye(8)[:1]
    ).shape == (1, 3, 16, 16)
    alone(tmp_path / "moved", "total_kimg=0.032", "schedule_kimg=0.064", "optimizer=adam")
    out = launch(
        2,
        tmp_path / "moved",
        "optimizer=adam",
        "schedule_kimg=0.064",
        "parallel=fsdp",
        "size.gradient_checkpointing=true",
    )  # moments spread as well
    assert "resumed at 32 images" in out
    close(tmp_path / "whole", tmp_path / "moved", rel=2e-3)


@pytest.mark.slow
def test_a_run_moves_between_numbers_of_processes(tmp_path: Path) -> None:
    alone(tmp_path / "whole")
    launch(2, tmp_path / "moved", "total_kimg=0.032", "schedule_kimg=0.064")
    alone(tmp_path / "moved", "schedule_kimg=0.064")
    assert [line["cur_nimg"] for line in lines_of(tmp_path / "moved" / "stats.jsonl")] == [32, 64]
    close(tmp_path / "whole", tmp_path / "moved", rel=2e-3)


def slow(processes: int, run_dir: Path, restarts: int = 0) -> "subprocess.Popen[str]":
    script = run_dir.parent / "slow.py"
    script.write_text(SLOW)
    overrides = [*TINY, *CHEAP, "total_kimg=1.6", f"run_dir={run_dir}"]
    call = [*RUN, str(processes), f"--max-restarts={restarts}", str(script), *overrides]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_checkpoint(run_dir: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while not checkpoint.all_checkpoints(run_dir):
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            raise AssertionError(f"no checkpoint: {process.communicate(timeout=60)[0]}")
        time.sleep(0.01)


def workers(process: "subprocess.Popen[str]") -> list[int]:
    return [
        int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.soak)])
def test_a_killed_rank_ends_the_group_and_torchrun_resumes_it(tmp_path: Path, rank: int) -> None:
    process = slow(2, tmp_path / "r", restarts=1)
    wait_for_checkpoint(tmp_path / "r", process)
    os.kill(workers(process)[rank], signal.SIGKILL)
    out = outputs([process])[0]
    assert process.returncode == 0, out
    assert out.count("resumed at") == 1  # resumed once
    assert out.count("Done: 1,600 images.") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
def test_a_signal_to_any_rank_stops_all_in_the_same_step(tmp_path: Path) -> None:
    process = slow(2, tmp_path / "r")
    wait_for_checkpoint(tmp_path / "r", process)
    os.kill(workers(process)[1], signal.SIGUSR1)
    out = outputs([process])[0]
    assert f"exitcode  : {RESTART}" in out, out
    assert out.count("Run the same command") >= 1
    newest = checkpoint.load(checkpoint.find(tmp_path / "r"))
    assert newest["cur_nimg"] < 1600


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def without_torchrun(script: Path, *arguments: str) -> "list[subprocess.Popen[str]]":
    """Start two processes without a launcher; the first one holds the store."""
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    call = [sys.executable, str(script), *arguments]
    places = [{**os.environ, **told, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    return [
        subprocess.Popen(call, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for env in places
    ]


def outputs(processes: "list[subprocess.Popen[str]]") -> list[str]:
    """Wait for processes and return what each printed. Ends them all where one hangs."""
    try:
        return [process.communicate(timeout=300)[0] for process in processes]
    finally:
        hanging = [process for process in processes if process.poll() is None]
        for process in hanging:
            process.terminate()  # torchrun ends its workers then
        for process in hanging:
            process.communicate(timeout=60)


def test_what_a_dead_group_left_in_the_store_fools_nobody() -> None:
    store, names = torch.distributed.HashStore(), {}

    def come(rank: int) -> threading.Thread:
        thread = threading.Thread(
            target=lambda: names.update({rank: rendezvous(store, rank, 3)}), daemon=True
        )
        thread.start()
        return thread

    before = set()
    for _ in range(2):  # a whole group, and one that finds what the whole one left
        store.set("vgan/token/1", "of one that died before it was answered")
        first = come(0)
        time.sleep(0.2)
        assert first.is_alive()  # it answers the dead, and waits for the living
        for thread in (come(2), come(1), first):
            thread.join(20)
        assert len(names) == 3
        assert len(set(names.values())) == 1
        before |= set(names.values())
        names.clear()
    assert len(before) == 2


# The last process dies once, while rank 0 is inside a step: the agent of its machine restarts it
# without having seen it fail.
DIES_ON_ONE_MACHINE = (
    seams.IMPORT
    + """
import os, signal, time
from pathlib import Path
rank, died = int(os.environ["RANK"]), Path(sys.argv.pop(1)).with_suffix("." + os.environ["RANK"])
def dying(step, state, *arguments):
    if state.cur_nimg // 16 == 6 and not died.exists():
        died.touch()
        time.sleep(0.5 if rank else 4)
        if rank:
            os.kill(os.getpid(), signal.SIGKILL)
    return step(state, *arguments)
seams.wrap_step(dying)
print("restarts counted here:", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
seams.train_main()
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["c10d", pytest.param("static", marks=pytest.mark.soak)])
def test_a_killed_process_of_one_machine_restarts_those_of_all(
    tmp_path: Path, backend: str
) -> None:
    (tmp_path / "dies.py").write_text(DIES_ON_ONE_MACHINE)
    port, call = free_port(), [*RUN[:-2], "--nnodes=2", "--nproc-per-node=1", "--max-restarts=2"]
    script = [
        str(tmp_path / "dies.py"),
        str(tmp_path / "died"),
        *TINY,
        *CHEAP,
        "total_kimg=0.16",
        f"run_dir={tmp_path / 'r'}",
    ]
    processes = []
    for machine in range(2):
        place = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=r"]
        if backend == "static":  # where an agent hears of the other's only by the group's failing
            place = [f"--node-rank={machine}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        agent = subprocess.Popen(
            [*call, *place, *script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        processes.append(agent)
    told = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], told
    assert "".join(told).count("resumed at") == 1  # resumed once
    assert "".join(told).count("Done: 160 images.") == 1
    assert "".join(told).count("restarts counted here") == 4


SLOW_DISK = (
    seams.IMPORT
    + """
import os, time
sync = os.fsync
os.fsync = lambda f: (time.sleep(2), sync(f))[1]
seams.train_main()
"""
)


@pytest.mark.slow
def test_no_process_leaves_while_the_first_still_writes(tmp_path: Path) -> None:
    (tmp_path / "slow_disk.py").write_text(SLOW_DISK)
    processes = without_torchrun(
        tmp_path / "slow_disk.py", *TINY, *CHEAP, "total_kimg=16", f"run_dir={tmp_path / 'r'}"
    )
    try:
        wait_for_checkpoint(tmp_path / "r", processes[0])
        processes[1].send_signal(signal.SIGUSR1)
        out = outputs(processes[1:])[0]
        written = checkpoint.all_checkpoints(tmp_path / "r")  # at that moment
    finally:
        first = outputs(processes[:1])
    assert [process.returncode for process in processes] == [RESTART, RESTART], (out, first)
    stopped_at = re.search(r"Stopped at ([\d,]+) images, checkpoint saved", out)
    assert stopped_at
    assert checkpoint.nimg_of(written[-1]) == int(stopped_at[1].replace(",", ""))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
def test_sigterm_to_torchrun_ends_the_run_whatever_restarts_it_has(tmp_path: Path) -> None:
    process = slow(2, tmp_path / "r", restarts=3)
    wait_for_checkpoint(tmp_path / "r", process)
    process.terminate()
    out = outputs([process])[0]
    assert process.returncode != 0, out
    assert "resumed at" not in out  # begun once
    assert "Run the same command" in out
    assert checkpoint.load(checkpoint.find(tmp_path / "r"))["cur_nimg"] < 1600


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
def test_a_signal_to_one_process_that_torchrun_may_restart_saves_and_starts_it_again(
    tmp_path: Path,
) -> None:
    process = slow(2, tmp_path / "r", restarts=1)
    wait_for_checkpoint(tmp_path / "r", process)
    os.kill(workers(process)[1], signal.SIGUSR1)
    out = outputs([process])[0]
    assert process.returncode == 0, out
    stopped = re.findall(r"Stopped at ([\d,]+) images, checkpoint saved", out)
    assert f"resumed at {stopped[0]} images" in out  # nothing was trained twice
    assert out.count("Done: 1,600 images.") == 1


ALIKE = """
import os, sys, torch
from vgan.cli import compose
from vgan.runtime.distributed import process_group
from vgan.runtime.errors import UserError
from vgan.training.setup import setup
common, rank = [*sys.argv[1:], "optimizer=adam"], os.environ["RANK"]
others = [
    [], ["threads=2", "run_dir=elsewhere"], ["data.size=48"], ["optim.lr_G.start=0.5"],
    ["parallel=fsdp"], ["batch_size=7"],
]
with process_group(torch.device("cpu")):
    for other in others:
        cfg = compose("vgan-train", common + (other if rank == "1" else []))
        try:
            setup(cfg, torch.device("cpu"), "fp32")
            print("alike")
        except UserError as e:
            print(e)
"""


@pytest.mark.slow
def test_processes_with_other_settings_or_data_are_refused_by_all(tmp_path: Path) -> None:
    (tmp_path / "alike.py").write_text(ALIKE)
    told = outputs(
        without_torchrun(tmp_path / "alike.py", *TINY, *CHEAP, f"data.cache_dir={tmp_path}")
    )
    assert told[0] == told[1]
    fix = "; give all processes the same settings and data"
    assert told[0].splitlines() == [
        "alike",
        "alike",
        f"data.size is 48 on process 1, 64 on process 0{fix}",
        f"optim.lr_G.start is 0.5 on process 1, 0.006 on process 0{fix}",
        f"parallel is fsdp on process 1, ddp on process 0{fix}",
        f"batch_size is 7 on process 1, 16 on process 0{fix}",
    ]


# Weights spoiled on the second process alone, later a collapse that only one process sees.
ONE_RANK_GOES_WRONG = (
    seams.IMPORT
    + """
import os, torch
rank, reached = int(os.environ["RANK"]), [0, 0]
def harmed(step, state, how, batch, hp):
    reached[:] = int(batch.rng.index[0]), batch.rng.seed >> 40
    scalars = step(state, how, batch, hp)
    if rank == 1 and reached[0] >= 64 and reached[1] == 0:
        with torch.no_grad():
            next(state.G.parameters()).fill_(float("nan"))
    return scalars
def seen(diversity, grid):
    low = (rank == 1 and reached[1] == 0) or (rank == 0 and reached[0] >= 100 and reached[1] == 1)
    return {"diversity": 0.0} if low else diversity(grid)
seams.wrap_step(harmed)
seams.wrap_diversity(seen)
seams.train_main()
"""
)


@pytest.mark.slow
def test_the_first_process_decides_on_failures_for_all(tmp_path: Path) -> None:
    (tmp_path / "harm.py").write_text(ONE_RANK_GOES_WRONG)
    ticks = [
        "tick_kimg=0.016",
        "checkpoint_kimg=0.032",
        "total_kimg=0.256",
        f"run_dir={tmp_path / 'r'}",
    ]
    processes = without_torchrun(tmp_path / "harm.py", *TINY, *CHEAP, *ticks)
    told = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], told
    failures = [
        line["watchdog"] for line in lines_of(tmp_path / "r" / "stats.jsonl") if "watchdog" in line
    ]
    assert len(failures) == 2, told
    assert "was not finite" in failures[0]
    assert "mode collapse" in failures[1]
    assert "Done: 256 images." in told[0]
    final = checkpoint.load(checkpoint.find(tmp_path / "r"))
    assert all(torch.isfinite(w).all() for w in final["G_ema"].values())


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_equally_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        command(2, tmp_path / "r", "batch_size=7"), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "batch_size=7: must be a multiple of the 2 processes; try 6" in done.stderr
    assert not (tmp_path / "r").exists()


def test_the_script_for_slurm_leaves_the_processes_nearly_all_its_time_to_save() -> None:
    text = (Path(__file__).resolve().parent.parent / "scripts" / "train.slurm").read_text()
    told, waits = (
        re.search(r"signal=B:TERM@(\d+)", text),
        re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text),
    )
    assert told
    assert waits
    assert (
        30 < int(waits[1]) < int(told[1])
    )  # torchrun's own 30 s; and its end must come before SLURM's


@pytest.mark.soak
def test_the_script_for_slurm_saves_and_asks_for_its_place_again(tmp_path: Path) -> None:
    """The real script and torchrun, with stand-ins for the two commands of SLURM."""
    (tmp_path / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho localhost\n'
    )
    (tmp_path / "torchrun").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    )
    for name in ("srun", "scontrol", "torchrun"):
        (tmp_path / name).chmod(0o755)
    script = Path(__file__).resolve().parent.parent / "scripts" / "train.slurm"
    place = {
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": "77",
        "PORT": "29713",
    }
    long = [*TINY, *CHEAP, "total_kimg=500", f"run_dir={tmp_path / 'r'}"]
    environment = {**os.environ, **place, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", str(script), *long],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_checkpoint(tmp_path / "r", process)
    process.terminate()
    out = outputs([process])[0]
    assert process.returncode == 0, out
    assert "requeue 77" in (tmp_path / "asked").read_text()
    reached = lines_of(tmp_path / "r" / "stats.jsonl")[-1]["cur_nimg"]
    assert (
        checkpoint.load(checkpoint.find(tmp_path / "r"))["cur_nimg"] >= reached
    )  # saved on leaving
    assert "Run the same command" in out, out
