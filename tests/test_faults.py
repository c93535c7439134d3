"""Each fault is injected into a real run; the run goes back, changes one thing, says so and ends well, or gives up clearly."""

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, lines_of, train_in_process

import vgan.train
from vgan import checkpoint
from vgan.errors import UserError
from vgan.files import own_folder
from vgan.steps import State
from vgan.stopping import GaveUp
from vgan.watchdog import Rescue, Watchdog, diversity

Harm = Callable[[State, dict[str, torch.Tensor]], None]


def spoil_weights(state: State, scalars: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        next(state.G.parameters()).fill_(float("nan"))
    scalars["broken/G"] = torch.ones(())


def spoil_loss(state: State, scalars: dict[str, torch.Tensor]) -> None:
    scalars["loss/D"] = torch.tensor(float("nan"))


def explode(state: State, scalars: dict[str, torch.Tensor]) -> None:
    if "penalty/r1" in scalars:
        scalars["penalty/r1"] = torch.tensor(1e6)


def collapse(state: State, scalars: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for p in state.G.to_rgb.parameters():  # type: ignore[union-attr]
            p.zero_()


def kill(half: str) -> Harm:
    def dead(state: State, scalars: dict[str, torch.Tensor]) -> None:
        scalars[f"grad_norm/{half}"] = torch.zeros(())

    return dead


def inject(monkeypatch: pytest.MonkeyPatch, harm: Harm, when: Callable[[int, int], bool]) -> list[Any]:
    """Let `harm` work on each step for which when(cur_nimg, stream of random numbers) holds; returns the moments of all steps."""
    step, moments = vgan.train.train_step, []

    def harmed(state: State, recipe: Any, now: Any, real: Any, c: Any, streams: Any, weight: float) -> Any:
        scalars = step(state, recipe, now, real, c, streams, weight)
        moments.append((int(streams.index[0]), streams.seed >> 40, now))
        if when(int(streams.index[0]), streams.seed >> 40):
            harm(state, scalars)
        return scalars

    monkeypatch.setattr(vgan.train, "train_step", harmed)
    return moments


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (spoil_weights, "was not finite"),
        (spoil_loss, "a loss was not a number"),
        (explode, r"gamma / 2 (r1 + r2) was"),
        (collapse, "the fakes have collapsed"),
        (kill("D"), "the discriminator is dead"),
        (kill("G"), "the generator is dead"),
    ],
)
def test_a_fault_leads_back_to_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], harm: Harm, says: str
) -> None:
    inject(monkeypatch, harm, lambda nimg, stream: nimg >= 200 and stream == 0)
    train_in_process(tmp_path / "r")
    out = capsys.readouterr().out
    assert out.count("(try 1 of 3)") == 1
    assert says in out
    told = [line for line in lines_of(tmp_path / "r" / "stats.jsonl") if "watchdog" in line]
    assert len(told) == 1
    assert says in told[0]["watchdog"]
    assert 120 <= told[0]["cur_nimg"] <= 240  # within one interval, two for a collapse, which must be seen twice
    final = checkpoint.load(checkpoint.find(tmp_path / "r"))
    assert final["cur_nimg"] == 400
    assert final["rescue"]["stream"] == 1
    assert final["rescue"]["tries"] == 0  # overcome
    assert all(torch.isfinite(w).all() for w in final["G_ema"].values())
    ticks = [line["cur_nimg"] for line in lines_of(tmp_path / "r" / "stats.jsonl") if "loss/D" in line]
    assert ticks == list(range(40, 401, 40))  # none twice


def test_each_try_changes_one_thing_more_and_then_the_run_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = inject(monkeypatch, spoil_weights, lambda nimg, stream: nimg >= 200)
    with pytest.raises(GaveUp, match=r"gave up at 240 images after 3 tries .*not finite; the checkpoints of before are kept"):
        train_in_process(tmp_path / "r")
    first = {stream: next(now for n, s, now in moments if s == stream and n == 200) for stream in range(4)}
    assert [first[s].lr_D / first[0].lr_D for s in range(4)] == pytest.approx([1, 1, 0.5, 0.5])
    assert [first[s].gamma / first[0].gamma for s in range(4)] == pytest.approx([1, 1, 1, 2])
    back = [next(n for n, s, _ in moments if s == stream) for stream in range(4)]
    assert back == [0, 200, 160, 120]  # one checkpoint further each time, in case the harm was done earlier
    assert all(torch.isfinite(w).all() for w in checkpoint.load(checkpoint.find(tmp_path / "r"))["G"].values())


def test_a_fault_before_the_first_checkpoint_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, spoil_weights, lambda nimg, stream: nimg >= 16 and stream == 0)
    train_in_process(tmp_path / "r")
    assert checkpoint.load(checkpoint.find(tmp_path / "r"))["cur_nimg"] == 400


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unnoticed(state: State, scalars: dict[str, torch.Tensor]) -> None:  # no scalar tells before the next step
        with torch.no_grad():
            next(state.G.parameters()).fill_(float("nan"))

    inject(monkeypatch, unnoticed, lambda nimg, stream: nimg == 232 and stream == 0)
    train_in_process(tmp_path / "r", "keep_checkpoints=99")
    for path in (tmp_path / "r").glob("*.pt"):
        assert all(torch.isfinite(w).all() for w in checkpoint.load(path)["G"].values())
    assert checkpoint.load(checkpoint.find(tmp_path / "r"))["rescue"]["stream"] == 1


def test_fp16_that_overflows_at_every_scale_is_a_fault() -> None:
    watchdog = Watchdog(50, 0.01)
    assert watchdog.fault({"scale/D": 65536.0}, 1.0) is None
    assert "fp16: every gradient of D overflows" in str(watchdog.fault({"scale/D": 2.0**-11}, 1.0))


def test_a_run_that_was_never_varied_has_not_collapsed() -> None:
    watchdog = Watchdog(50, 0.02)
    assert [watchdog.fault({"diversity": d}, 1.0) for d in (0.005, 0.006, 0.3, 0.01, 0.3)] == [None] * 5
    assert watchdog.fault({"diversity": 0.01}, 1.0) is None
    assert "collapsed" in str(watchdog.fault({"diversity": 0.01}, 1.0))


def test_diversity_is_a_share_of_the_reals(generator: torch.Generator) -> None:
    x = torch.randn(4000, 3, 8, 8, generator=generator)
    assert diversity(0.5 * x, x).item() == pytest.approx(0.25, rel=1e-5)
    assert diversity(x[:1].expand(10, -1, -1, -1), x).item() == 0


def test_rescues_take_turns_and_what_helped_stays() -> None:
    change, words = Rescue(), []
    for _ in range(4):
        change, what = change.next(100)
        words.append(what)
    assert words == ["a new random stream", "half the learning rates", "twice the gamma", "a new random stream"]
    assert change.past(150, 60).tries == 4
    past = change.past(161, 60)
    assert (past.tries, past.lr, past.gamma, past.stream) == (0, 0.5, 2.0, 4)


# --- disks ----------------------------------------------------------------------------------------------------------


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From 120 to 280 images nothing can be made durable; training goes on, and later checkpoints are there."""
    step = vgan.train.train_step

    def on_a_full_disk(*arguments: Any) -> Any:
        nimg = int(arguments[5].index[0])
        monkeypatch.setattr(os, "fsync", full if 120 <= nimg < 280 else fsync)
        return step(*arguments)

    fsync = os.fsync
    monkeypatch.setattr(vgan.train, "train_step", on_a_full_disk)
    train_in_process(tmp_path / "r", "keep_checkpoints=99")
    out = capsys.readouterr().out
    assert out.count("cannot be written (No space left on device)") >= 3
    written = [checkpoint.nimg_of(p) for p in checkpoint.all_checkpoints(tmp_path / "r")]
    assert set(written) >= {40, 80, 320, 360, 400}
    assert not set(written) & {160, 200, 240}
    assert not list((tmp_path / "r").glob(".*tmp"))
    monkeypatch.setattr(vgan.train, "train_step", step)
    train_in_process(tmp_path / "good", "keep_checkpoints=99")
    assert_same_run(tmp_path / "r", tmp_path / "good")


def test_a_final_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"checkpoint-000000400.pt: cannot be written \(No space left on device\)"):
        train_in_process(tmp_path / "r")


def test_the_oldest_checkpoints_make_room_but_never_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_in_process(tmp_path / "r", "total_kimg=0.12")
    parts = checkpoint.load(checkpoint.find(tmp_path / "r"))
    free = [0]

    def usage(_: object) -> Any:
        removed = 3 - len(checkpoint.all_checkpoints(tmp_path / "r"))
        return type("Usage", (), {"free": free[0] + removed * 1_200_000})

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)
    free[0] = -2_000_000
    with pytest.raises(UserError, match="needs 1 MB"):
        checkpoint.save(checkpoint.path_at(tmp_path / "r", 160), parts, keep=9)
    assert [checkpoint.nimg_of(p) for p in checkpoint.all_checkpoints(tmp_path / "r")] == [120]
    free[0] = 0
    checkpoint.save(checkpoint.path_at(tmp_path / "r", 160), parts, keep=9)
    assert [checkpoint.nimg_of(p) for p in checkpoint.all_checkpoints(tmp_path / "r")] == [120, 160]


def test_statistics_wait_for_a_disk_that_takes_them_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = vgan.stats.open if hasattr(vgan.stats, "open") else open
    tries = []

    def refusing(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path).endswith("stats.jsonl"):
            tries.append(path)
            if 3 <= len(tries) <= 6:
                raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *arguments, **named)

    monkeypatch.setattr(vgan.stats, "open", refusing, raising=False)
    train_in_process(tmp_path / "r")
    assert [line["cur_nimg"] for line in lines_of(tmp_path / "r" / "stats.jsonl")] == list(range(40, 401, 40))


# --- two runs in one folder -----------------------------------------------------------------------------------------


def hold(folder: Path, held: Any, let_go: Any) -> None:
    with own_folder(folder):
        held.set()
        let_go.wait(60)


def test_a_second_run_in_a_folder_is_refused_and_a_dead_ones_lock_is_not_in_the_way(tmp_path: Path) -> None:
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


# --- memory ---------------------------------------------------------------------------------------------------------


def test_a_batch_in_parts_is_the_same_batch(tmp_path: Path) -> None:
    train_in_process(tmp_path / "whole", "precision=fp32", "total_kimg=0.04")
    train_in_process(tmp_path / "parts", "precision=fp32", "total_kimg=0.04", "batch_gpu=3")
    (a,), (b,) = (lines_of(tmp_path / name / "stats.jsonl") for name in ("whole", "parts"))
    for name in ("loss/D", "loss/G", "penalty/r1", "grad_norm/D", "grad_norm/G"):
        assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("half", ["d_forward", "g_forward"])
def test_out_of_memory_splits_the_batch_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], half: str
) -> None:
    import vgan.run

    def cramped(forward: Any) -> Any:
        def limited(*arguments: Any) -> Any:
            if len(arguments[4].real) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(*arguments)

        return limited

    recipe = vgan.run.Recipe
    train_in_process(tmp_path / "whole", "precision=fp32", "total_kimg=0.04")
    monkeypatch.setattr(vgan.run, "Recipe", lambda *a: recipe(*a, **{half: cramped(getattr(vgan.steps, half))}))
    train_in_process(tmp_path / "r", "precision=fp32", "total_kimg=0.04")
    out = capsys.readouterr().out
    assert "out of memory: batches of 8 now go through in parts of 4" in out
    assert out.count("in parts of 2,") == 1
    assert "in parts of 1," not in out
    a, b = (lines_of(tmp_path / name / "stats.jsonl")[0] for name in ("whole", "r"))
    for name in ("loss/D", "loss/G", "penalty/r1", "grad_norm/G"):
        assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-3)
