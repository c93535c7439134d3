"""Failures are injected into real runs: the run rolls back, changes one thing and ends well."""

import errno
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import seams
import torch
from runs import TINY, assert_same_run, lines_of, train_in_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vgan.runs.log_writer
from vgan.data.loader import Batch
from vgan.runs import checkpoint
from vgan.runs.checkpoint_writer import CheckpointWriter
from vgan.runtime.errors import UserError
from vgan.runtime.files import append_line, own_folder
from vgan.runtime.signals import TrainingFailed
from vgan.training.monitor import diversity
from vgan.training.recovery import find_failure, next_recovery
from vgan.training.schedules import HyperParameters
from vgan.training.soap import SOAP
from vgan.training.state import DiversityHistory, RecoveryState, TrainState

Harm = Callable[[TrainState, dict[str, torch.Tensor]], None]


def spoil_weights(state: TrainState, scalars: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        next(state.G.parameters()).fill_(float("nan"))
    scalars["broken/G"] = torch.ones(())


def spoil_loss(state: TrainState, scalars: dict[str, torch.Tensor]) -> None:
    scalars["loss/D"] = torch.tensor(float("nan"))


def explode(state: TrainState, scalars: dict[str, torch.Tensor]) -> None:
    if "loss/penalty" in scalars:
        scalars["loss/penalty"] = torch.tensor(1e6)


def collapse(state: TrainState, scalars: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for p in state.G.to_rgb.parameters():  # type: ignore[union-attr]
            p.zero_()


def kill(half: str) -> Harm:
    def dead(state: TrainState, scalars: dict[str, torch.Tensor]) -> None:
        scalars[f"grad_norm/{half}"] = torch.zeros(())

    return dead


def inject(
    monkeypatch: pytest.MonkeyPatch, harm: Harm, when: Callable[[int, int], bool]
) -> list[Any]:
    """Apply `harm` after each step for which when(cur_nimg, stream of random numbers) holds.

    Returns a list that collects (cur_nimg, stream, hyperparameters) of all steps.
    """
    steps: list[Any] = []

    def around(step: Any, state: TrainState, how: Any, batch: Batch, hp: HyperParameters) -> Any:
        cur_nimg, stream = int(batch.rng.index[0]), batch.rng.seed >> 40
        scalars = step(state, how, batch, hp)
        steps.append((cur_nimg, stream, hp))
        if when(cur_nimg, stream):
            harm(state, scalars)
        return scalars

    seams.wrap_step(around, monkeypatch)
    return steps


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (spoil_weights, "was not finite"),
        (spoil_loss, "a loss was NaN"),
        (explode, r"gamma / 2 (r1 + r2) = "),
        (collapse, "mode collapse"),
        (kill("D"), "the discriminator is dead"),
        (kill("G"), "the generator is dead"),
    ],
)
def test_a_fault_leads_back_to_the_last_good_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    harm: Harm,
    says: str,
) -> None:
    inject(monkeypatch, harm, lambda nimg, stream: nimg >= 200 and stream == 0)
    train_in_process(tmp_path / "r", "optimizer=adam")  # zeroed weights recover within a tick
    out = capsys.readouterr().out
    assert out.count("(roll-back 1 of 3)") == 1
    assert says in out
    told = [line for line in lines_of(tmp_path / "r" / "stats.jsonl") if "watchdog" in line]
    assert len(told) == 1
    assert says in told[0]["watchdog"]
    assert (
        120 <= told[0]["cur_nimg"] <= 240
    )  # within one interval, two for a collapse, which must be seen twice
    final = checkpoint.load(checkpoint.find(tmp_path / "r"))
    assert final["cur_nimg"] == 400
    assert final["recovery"]["stream"] == 1
    assert final["recovery"]["rollbacks"] == 0  # overcome
    assert all(torch.isfinite(w).all() for w in final["G_ema"].values())
    ticks = [
        line["cur_nimg"] for line in lines_of(tmp_path / "r" / "stats.jsonl") if "loss/D" in line
    ]
    assert ticks == list(range(40, 401, 40))  # none twice
    board = EventAccumulator(str(tmp_path / "r"))
    board.Reload()
    (event,) = board.Tensors("watchdog/text_summary")
    assert event.tensor_proto.string_val[0].decode() == told[0]["watchdog"]


def test_each_try_changes_one_thing_more_and_then_the_run_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = inject(monkeypatch, spoil_weights, lambda nimg, stream: nimg >= 200)
    with pytest.raises(
        TrainingFailed,
        match=r"failed at 240 images after 3 roll-backs .*not finite; earlier checkpoints are kept",
    ):
        train_in_process(tmp_path / "r")
    first = {
        stream: next(now for n, s, now in moments if s == stream and n == 200)
        for stream in range(4)
    }
    assert [first[s].lr_D / first[0].lr_D for s in range(4)] == pytest.approx([1, 1, 0.5, 0.5])
    assert [first[s].gamma / first[0].gamma for s in range(4)] == pytest.approx([1, 1, 1, 2])
    back = [next(n for n, s, _ in moments if s == stream) for stream in range(4)]
    assert back == [
        0,
        200,
        160,
        120,
    ]  # one checkpoint further each time, in case the harm was done earlier
    assert all(
        torch.isfinite(w).all()
        for w in checkpoint.load(checkpoint.find(tmp_path / "r"))["G"].values()
    )
    put_aside = sorted(p.name for p in (tmp_path / "r").glob("rejected-*"))
    assert put_aside == [
        "rejected-checkpoint-000000160.safetensors",
        "rejected-checkpoint-000000200.safetensors",
    ]


def test_a_fault_before_the_first_checkpoint_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, spoil_weights, lambda nimg, stream: nimg >= 16 and stream == 0)
    train_in_process(tmp_path / "r")
    assert checkpoint.load(checkpoint.find(tmp_path / "r"))["cur_nimg"] == 400


def test_weights_that_are_not_finite_are_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unnoticed(
        state: TrainState, scalars: dict[str, torch.Tensor]
    ) -> None:  # no scalar tells before the next step
        with torch.no_grad():
            next(state.G.parameters()).fill_(float("nan"))

    inject(monkeypatch, unnoticed, lambda nimg, stream: nimg == 232 and stream == 0)
    train_in_process(tmp_path / "r", "keep_checkpoints=99")
    for path in (tmp_path / "r").glob("*.safetensors"):
        assert all(torch.isfinite(w).all() for w in checkpoint.load(path)["G"].values())
    assert checkpoint.load(checkpoint.find(tmp_path / "r"))["recovery"]["stream"] == 1


def test_moments_that_are_not_finite_are_never_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gradient of 1e20 is finite, its square is not, and that weight would never move again."""
    train_in_process(tmp_path / "r", "total_kimg=0.008")
    parts = checkpoint.load(checkpoint.find(tmp_path / "r"))
    next(x for name, x in checkpoint.walk(parts["opt_D"]) if "square" in name)[0] = torch.inf
    writer = CheckpointWriter(9, print)
    writer.begin(checkpoint.path_at(tmp_path / "r", 99), parts)
    writer.close()
    assert "not written, as its weights or moments are not finite" in capsys.readouterr().out
    assert not checkpoint.path_at(tmp_path / "r", 99).exists()


def failure(history: DiversityHistory, **means: float) -> str | None:
    named = {name.replace("_", "/"): value for name, value in means.items()}
    return find_failure(named, history, max_penalty=50, min_diversity=0.02)


def test_fp16_that_overflows_at_every_scale_is_a_failure() -> None:
    assert failure(DiversityHistory(), scale_D=65536.0) is None
    found = failure(DiversityHistory(), scale_D=2.0**-11)
    assert "fp16: every gradient of D overflows" in str(found)


def test_a_run_that_was_never_diverse_has_not_collapsed() -> None:
    history = DiversityHistory()
    for value in (0.005, 0.006, 0.3, 0.01, 0.3, 0.01):
        assert failure(history, diversity=value) is None
    assert "mode collapse: diversity 0.01 < 0.02" in str(failure(history, diversity=0.01))


def test_a_stop_in_the_midst_of_a_rescue_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once after a first sight of a collapse, which must be seen twice; once after a roll-back."""
    inject(monkeypatch, collapse, lambda nimg, stream: nimg >= 200 and stream == 0)
    settings = ("optimizer=adam", "schedule_kimg=0.4", "snapshot_kimg=0.4")
    for reached in (0.24, 0.32, 0.4):
        train_in_process(tmp_path / "cut", f"total_kimg={reached}", *settings)
    train_in_process(tmp_path / "whole", *settings)
    for picture in (tmp_path / "cut").glob("fakes-*.png"):  # each of the three ended with one
        if picture.name != "fakes-000000400.png":
            picture.unlink()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert checkpoint.load(checkpoint.find(tmp_path / "cut"))["recovery"]["stream"] == 1


def test_a_fault_between_two_ticks_is_noticed_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inject(monkeypatch, spoil_loss, lambda nimg, stream: nimg >= 200 and stream == 0)
    train_in_process(tmp_path / "r", "tick_kimg=0.4")
    assert "At 240 images: a loss was NaN. Rolled back to 200" in capsys.readouterr().out


def test_diversity_is_a_share_of_the_reals(generator: torch.Generator) -> None:
    x = torch.randn(4000, 3, 8, 8, generator=generator)
    assert diversity(0.5 * x, x).item() == pytest.approx(0.25, rel=1e-5)
    assert diversity(x[:1].expand(10, -1, -1, -1), x).item() == 0


def test_roll_backs_change_one_thing_each_and_what_helped_stays() -> None:
    recovery, changes = RecoveryState(), []
    for _ in range(4):
        recovery, change = next_recovery(recovery, 100)
        changes.append(change)
    assert changes == [
        "new random numbers",
        "half the learning rates",
        "twice the gamma",
        "new random numbers",
    ]
    recovery.passed(150, 60)
    assert recovery.rollbacks == 4
    recovery.passed(161, 60)
    assert recovery == RecoveryState(stream=4, lr=0.5, gamma=2.0, rollbacks=0, failure_nimg=100)


# --- disks ---


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From 120 to 280 images no write succeeds; training continues and later ones do."""

    def around(step: Any, state: TrainState, *arguments: Any) -> Any:
        is_full = 120 <= state.cur_nimg < 280
        monkeypatch.setattr(os, "fsync", full if is_full else fsync)
        return step(state, *arguments)

    fsync = os.fsync
    step = seams.wrap_step(around, monkeypatch)
    train_in_process(tmp_path / "r", "keep_checkpoints=99")
    out = capsys.readouterr().out
    assert out.count("cannot be written (No space left on device)") >= 3
    written = [checkpoint.nimg_of(p) for p in checkpoint.all_checkpoints(tmp_path / "r")]
    assert set(written) >= {40, 80, 320, 360, 400}
    assert not set(written) & {160, 200, 240}
    assert not list((tmp_path / "r").glob(".*tmp"))
    seams.wrap_step(lambda _, *arguments: step(*arguments), monkeypatch)
    train_in_process(tmp_path / "good", "keep_checkpoints=99")
    assert_same_run(tmp_path / "r", tmp_path / "good")


def test_a_final_checkpoint_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError,
        match=r"checkpoint-000000400.safetensors: cannot be written \(No space left on device\)",
    ):
        train_in_process(tmp_path / "r")


def test_the_oldest_checkpoints_make_room_but_never_the_newest_and_never_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_in_process(tmp_path / "r", "total_kimg=0.12")
    parts = checkpoint.load(checkpoint.find(tmp_path / "r"))
    size = checkpoint.find(tmp_path / "r").stat().st_size
    needed = checkpoint_bytes(parts)
    rejected = tmp_path / "r" / "rejected-checkpoint-000000130.safetensors"
    rejected.write_bytes(checkpoint.find(tmp_path / "r").read_bytes())

    def with_free(free: int) -> list[int]:
        def usage(_: object) -> Any:
            removed = 4 - len(list((tmp_path / "r").glob("*checkpoint-*.safetensors")))
            return type("Usage", (), {"free": free + removed * size})

        seams.replace_disk_usage(usage, monkeypatch)
        checkpoint.save(checkpoint.path_at(tmp_path / "r", 160), parts, keep=9)
        return [checkpoint.nimg_of(p) for p in checkpoint.all_checkpoints(tmp_path / "r")]

    with pytest.raises(UserError, match="needs 1 MB"):
        with_free(needed - 4 * size)  # the three that may go are not enough
    assert [checkpoint.nimg_of(p) for p in checkpoint.all_checkpoints(tmp_path / "r")] == [
        40,
        80,
        120,
    ]
    assert rejected.is_file()
    assert with_free(needed - 2 * size) == [80, 120, 160]
    assert not rejected.is_file()


def checkpoint_bytes(parts: dict[str, Any]) -> int:
    """What `save` wants to be free: the tensors, 2 % and 1 MB."""
    tensors = sum(x.nbytes for _, x in checkpoint.walk(parts) if isinstance(x, torch.Tensor))
    return tensors + tensors // 50 + 1_000_000


def test_statistics_wait_for_a_disk_that_takes_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, tries = open, []

    def refusing(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path).endswith("stats.jsonl"):
            tries.append(path)
            if 3 <= len(tries) <= 6:
                raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *arguments, **named)

    seams.replace_open(refusing, monkeypatch)
    train_in_process(tmp_path / "r")
    assert len(tries) > 6
    assert [line["cur_nimg"] for line in lines_of(tmp_path / "r" / "stats.jsonl")] == list(
        range(40, 401, 40)
    )


def test_lines_are_added_whole_or_not_at_all(tmp_path: Path) -> None:
    """A full disk takes part of a write, and so does a limit on the size of files."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "lines.jsonl"
    append_line(path, '{"a": 1}')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 4, before[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            append_line(path, '{"b": 2}\n{"c": 3}')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert lines_of(path) == [{"a": 1}]
    append_line(path, '{"b": 2}\n{"c": 3}')
    assert lines_of(path) == [{"a": 1}, {"b": 2}, {"c": 3}]


@pytest.mark.parametrize("refused", ["flush", "add"])
def test_curves_are_whole_after_a_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """TensorBoard stops at half an event, so later curves come in a new file."""
    writer = vgan.runs.log_writer.TensorBoardFile
    real = getattr(writer, refused)

    def half(board: Any, *_: object) -> None:
        board._file.write(b"half an event")
        full()

    def around(step: Any, state: TrainState, *arguments: Any) -> Any:
        monkeypatch.setattr(writer, refused, half if 120 <= state.cur_nimg < 280 else real)
        return step(state, *arguments)

    seams.wrap_step(around, monkeypatch)
    train_in_process(tmp_path / "r")
    found = EventAccumulator(str(tmp_path / "r"), {"scalars": 0})
    found.Reload()
    assert [event.step for event in found.Scalars("loss/D")] == list(range(40, 401, 40))
    assert len(list((tmp_path / "r").glob("events*"))) == 2


def test_what_a_kill_left_of_a_checkpoint_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    left = [
        tmp_path / "r" / name
        for name in (".checkpoint-000000050.safetensors.tmp", ".best.safetensors.tmp")
    ]
    for path in left:
        path.write_bytes(b"half")
    train_in_process(tmp_path / "r", "total_kimg=0.008")
    assert not any(path.exists() for path in left)


EVALUATED = [
    "eval_kimg=0.032",
    "eval.n=20",
    "eval.metrics=[fid]",
    "features.train_kimg=0.1",
    "total_kimg=0.064",
]


def test_a_kill_before_an_evaluation_does_not_lose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one too: its checkpoint is there already, and the run looks complete."""
    train_in_process(tmp_path / "whole", *EVALUATED)
    kills = [32, 64]

    def around(evaluate: Any, evaluation: Any, state: dict[str, Any], writer: Any) -> Any:
        if state["cur_nimg"] in kills:
            kills.remove(state["cur_nimg"])
            raise KeyboardInterrupt
        return evaluate(evaluation, state, writer)

    seams.wrap_evaluation(around, monkeypatch)
    while kills:
        with pytest.raises(KeyboardInterrupt):
            train_in_process(tmp_path / "r", *EVALUATED)
    train_in_process(tmp_path / "r", *EVALUATED)
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    train_in_process(tmp_path / "r", *EVALUATED)  # and once is enough
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before
    assert lines_of(tmp_path / "r" / "metrics.jsonl") == lines_of(
        tmp_path / "whole" / "metrics.jsonl"
    )
    assert_same_run(tmp_path / "whole", tmp_path / "r")
    assert (tmp_path / "r" / "best.safetensors").is_file()


def test_an_evaluation_that_finds_no_memory_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cramped(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    seams.wrap_evaluation(cramped, monkeypatch)
    train_in_process(tmp_path / "r", *EVALUATED)
    assert (
        "No evaluation at 32 images, training continues (out of memory)" in capsys.readouterr().out
    )
    assert checkpoint.load(checkpoint.find(tmp_path / "r"))["cur_nimg"] == 64


def test_the_end_is_judged_by_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by best.safetensors, which comes after it."""
    real = checkpoint.save
    refused = "checkpoint-000000064.safetensors"

    def save(path: Path, parts: dict[str, Any], keep: int) -> None:
        if path.name == refused:
            raise UserError(f"{path}: cannot be written (Disk quota exceeded)")
        real(path, parts, keep)

    seams.replace_save(save, monkeypatch)
    with pytest.raises(UserError, match=r"checkpoint-000000064.safetensors: cannot be written"):
        train_in_process(tmp_path / "final", *EVALUATED)
    assert (tmp_path / "final" / "best.safetensors").is_file()
    refused = "best.safetensors"
    train_in_process(tmp_path / "best", *EVALUATED)
    assert [line["best"] for line in lines_of(tmp_path / "best" / "metrics.jsonl")] == [
        None,
        None,
    ]  # none is on the disk
    assert checkpoint.find(tmp_path / "best").name == "checkpoint-000000064.safetensors"


def test_the_best_checkpoint_does_not_put_off_the_next(tmp_path: Path) -> None:
    train_in_process(tmp_path / "r", "total_kimg=0.008")
    writer = CheckpointWriter(9, print)
    before = writer.last_s
    assert writer.write(
        tmp_path / "r" / "best.safetensors", checkpoint.load(checkpoint.find(tmp_path / "r"))
    )
    assert writer.last_s == before
    assert (tmp_path / "r" / "best.safetensors").is_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_on_a_full_disk_costs_no_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from vgan.cli import train_main; train_main()",
        *TINY,
        "total_kimg=0.08",
    ]
    with open("/dev/full", "w") as log:
        assert (
            subprocess.run(
                [*command, f"run_dir={tmp_path / 'r'}"], stdout=log, stderr=log, timeout=120
            ).returncode
            == 0
        )
    assert checkpoint.load(checkpoint.find(tmp_path / "r"))["cur_nimg"] == 80


# --- two runs in one folder ---


def hold(folder: Path, held: Any, let_go: Any) -> None:
    with own_folder(folder):
        held.set()
        let_go.wait(60)


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_and_a_dead_ones_lock_is_not_in_the_way(
    tmp_path: Path,
) -> None:
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "r", held, let_go))
    other.start()
    assert held.wait(60)
    with pytest.raises(UserError, match="another vgan-train is at work here"):
        train_in_process(tmp_path / "r", "total_kimg=0.008")
    assert [p.name for p in (tmp_path / "r").iterdir()] == [".lock"]
    other.kill()
    other.join()
    train_in_process(tmp_path / "r", "total_kimg=0.008")


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with (
            own_folder(tmp_path / "r"),
            own_folder(tmp_path / "r"),
        ):  # the second is one that a kill left behind
            assert "its file system has no locks" in capsys.readouterr().out


# --- memory ---


def test_a_batch_in_parts_is_the_same_batch(tmp_path: Path) -> None:
    train_in_process(tmp_path / "whole", "precision=fp32", "total_kimg=0.04")
    train_in_process(tmp_path / "parts", "precision=fp32", "total_kimg=0.04", "batch_gpu=3")
    (a,), (b,) = (lines_of(tmp_path / name / "stats.jsonl") for name in ("whole", "parts"))
    for name in ("loss/D", "loss/G", "penalty/r1", "grad_norm/D", "grad_norm/G"):
        assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("half", ["d", "g"])
def test_out_of_memory_splits_the_batch_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], half: str
) -> None:
    def cramped(objective: Any) -> Any:
        def limited(*arguments: Any) -> Any:
            if len(arguments[-1].real) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return objective(*arguments)

        return limited

    train_in_process(tmp_path / "whole", "precision=fp32", "total_kimg=0.04")
    seams.wrap_objective(half, cramped, monkeypatch)
    train_in_process(tmp_path / "r", "precision=fp32", "total_kimg=0.04")
    out = capsys.readouterr().out
    assert "Out of memory: batches of 8 now run as micro-batches of 4" in out
    assert out.count("micro-batches of 2") == 1
    assert "micro-batches of 1" not in out
    a, b = (lines_of(tmp_path / name / "stats.jsonl")[0] for name in ("whole", "r"))
    for name in ("loss/D", "loss/G", "penalty/r1", "grad_norm/G"):
        assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-3)


def test_out_of_memory_for_the_moments_splits_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = SOAP.step, []

    def cramped(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(*arguments, **named)

    train_in_process(tmp_path / "whole", "precision=fp32", "total_kimg=0.04", "batch_gpu=4")
    monkeypatch.setattr(SOAP, "step", cramped)
    train_in_process(tmp_path / "r", "precision=fp32", "total_kimg=0.04")
    assert "Out of memory: batches of 8 now run as micro-batches of 4" in capsys.readouterr().out
    a, b = (lines_of(tmp_path / name / "stats.jsonl")[0] for name in ("whole", "r"))
    assert b["loss/D"] == pytest.approx(a["loss/D"], rel=1e-3)


def test_grids_and_comparisons_that_find_no_memory_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cramped(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    seams.replace_optional_work(cramped, monkeypatch)
    train_in_process(tmp_path / "r", "holdout=16")
    out = capsys.readouterr().out
    for what in ("grids", "diversity", "logits of held-out images"):
        assert out.count(f"Out of memory: no {what} for now, training continues") == 1
    assert checkpoint.load(checkpoint.find(tmp_path / "r"))["cur_nimg"] == 400
