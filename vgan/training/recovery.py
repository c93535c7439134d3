"""Resume from a checkpoint, notice a failed run, and roll it back."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from vgan.runs import checkpoint
from vgan.runs.checkpoint import DAMAGED, REJECTED
from vgan.runtime.distributed import barrier, broadcast_from_rank0, print0
from vgan.runtime.errors import UserError, first_line
from vgan.runtime.nested import flatten
from vgan.runtime.signals import TrainingFailed
from vgan.schema import require
from vgan.training.setup import Run, setup
from vgan.training.state import DiversityHistory, RecoveryState

CHANGES = ("new random numbers", "half the learning rates", "twice the gamma")
# Settings that say where, how fast and how often, not what is learned: they change on resume
# without a message.
_FREE = {
    "run_dir", "device", "precision", "compile", "cuda_graphs", "depthwise", "pointwise", "threads",
    "deterministic", "tick_kimg", "snapshot_kimg", "checkpoint_kimg", "checkpoint_minutes",
    "keep_checkpoints", "data", "eval_kimg", "eval", "features", "watchdog", "batch_gpu",
    "parallel", "tracker",
}  # fmt: skip
# How to ask for an optimizer of configs/optimizer by name.
_OPTIMIZERS = {"torch.optim.Adam": "optimizer=adam", "vgan.training.soap.SOAP": "optimizer=soap"}


def newest_nimg(run_dir: Path) -> int:
    """Return the image count in the name of the newest checkpoint; 0 without one."""
    found = broadcast_from_rank0(lambda: checkpoint.all_checkpoints(run_dir))
    return checkpoint.nimg_of(found[-1]) if found else 0


def resume(run: Run) -> None:
    """Load the newest readable checkpoint of the run folder, if there is one.

    Damaged ones are renamed, with a warning. Raises UserError where none can be read, where the
    checkpoint is of another model or other data, or where a change of settings would spoil the
    run. Other changes are printed.
    """
    state = broadcast_from_rank0(lambda: _load_newest(run.run_dir))
    if state is None:
        return
    check_settings(run, state)
    if "init" in state:
        run.identity["init"] = state["init"]
    try:
        run.state.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as e:
        message = f"its newest checkpoint does not fit this run ({first_line(e)})"
        raise UserError(f"run_dir={run.run_dir}: {message}; use another run_dir") from e


def _load_newest(run_dir: Path) -> dict[str, Any] | None:
    found = checkpoint.all_checkpoints(run_dir)
    damaged: list[tuple[Path, checkpoint.Damaged]] = []
    for path in reversed(found):
        try:
            state = checkpoint.load(path)
        except checkpoint.Damaged as e:
            damaged.append((path, e))
            continue
        # Renamed only now: a run without a sound checkpoint must not look like one not begun.
        for other, reason in damaged:
            print0(f"Skipped: {reason}. It is now called {DAMAGED}{other.name}.")
            other.replace(other.with_name(DAMAGED + other.name))
        return state
    if damaged:
        message = f"none of its {len(found)} checkpoints can be read ({damaged[0][1]})"
        fix = "restore one, or use another run_dir to start again"
        raise UserError(f"run_dir={run_dir}: {message}; {fix}")
    return None


def check_settings(run: Run, state: dict[str, Any]) -> None:
    """Refuse changes since the checkpoint that would spoil the run, and print the others."""
    before, now = flatten(state["config"]), flatten(run.identity["config"])
    where = f"run_dir={run.run_dir}"
    if state["data"]["digest"] != run.dataset.digest:
        names = [k for k in now if k.startswith("data.") and now[k] != before.get(k)]
        changes = "; ".join(f"{k} was {before.get(k)}, is {now.get(k)}" for k in names)
        changes = changes or f"the images of {state['data']['name']} were others"
        raise UserError(f"{where}: was trained on other data ({changes}); use another run_dir")
    digest, known = run.identity.get("backbone"), state.get("backbone")
    if digest != known and digest and known:
        problem = f"was trained with other frozen weights (digest {known}, these have {digest})"
        fix = "give the same file as model.discriminator.weights, or use another run_dir"
        raise UserError(f"{where}: {problem}; {fix}")
    for config in (before, now):  # how it is computed, not what
        config.pop("model.discriminator.weights", None)  # the digest counts, not the path
        config.pop("model.generator.gradient_checkpointing", None)
        config.pop("model.discriminator.gradient_checkpointing", None)
    for k in [k for k in now if k.endswith("widths") and k in before]:
        if isinstance(before[k], list) and isinstance(now[k], list):
            n = min(len(before[k]), len(now[k]))  # those of higher resolutions have no effect
            before[k], now[k] = before[k][:n], now[k][:n]
    before = {"init": None, "freeze_d": 0, **before}
    if "model.generator.modulation" in now:  # not in the first versions
        before.setdefault("model.generator.modulation", False)
    # A setting that an earlier version did not know had no effect then, except in these.
    added = {k for k in now.keys() ^ before.keys() if k.startswith(("model.", "optim.optimizer"))}
    common = now.keys() & before.keys()
    changed = {k for k in common if before[k] != now[k] and k.split(".")[0] not in _FREE}
    for k in sorted(changed | added):
        change = f"{k} was {before.get(k)}, is now {now.get(k)}"
        if k.startswith(("model.", "optim.optimizer._target_")) and k != "model.name":
            message = f"holds another model or optimizer ({change})"
            fix = "use"
            if k in before:
                was = str(before[k]).replace("None", "null").replace(" ", "")
                fix = f"give {_OPTIMIZERS.get(was, f'{k}={was}')}, or use"
            raise UserError(f"{where}: {message}; {fix} another run_dir")
        rule = f"was {before.get(k)}, and the run has begun with it; keep it or use another run_dir"
        require(k != "init" or now[k] is None, k, now[k], rule)
        require(k != "freeze_d", k, now.get(k), rule)
        rule = f"was {before.get(k)}, and held-out images would change; keep it or use another"
        require(k != "holdout", k, now.get(k), f"{rule} run_dir")
    for k in sorted(changed | added):
        print0(f"Changed since the checkpoint: {k} was {before.get(k)}, is now {now.get(k)}.")


def find_failure(
    means: dict[str, float], history: DiversityHistory, max_penalty: float, min_diversity: float
) -> str | None:
    """Return what is wrong with a run, or None; updates the history of diversity.

    means: of the scalars since the last tick. max_penalty: of gamma / 2 (r1 + r2), which is near
    0.1 in runs that go well. min_diversity: of the fakes of one class relative to the reals (see
    monitor.diversity), twice in succession, in a run that had four times as much before.
    """
    for network in "DG":
        if means.get(f"broken/{network}", 0) != 0:
            return f"a loss or gradient of {network} was not finite"
        if means.get(f"scale/{network}", 1.0) < 2**-10:
            return f"fp16: every gradient of {network} overflows, at any scale"
    if any(math.isnan(means.get(f"loss/{network}", 0.0)) for network in "DG"):
        return "a loss was NaN"
    penalty = means.get("loss/penalty", 0.0)
    if not penalty <= max_penalty:
        return f"gamma / 2 (r1 + r2) = {penalty:.3g} > watchdog.max_penalty={max_penalty:g}"
    for network, name in (("D", "discriminator"), ("G", "generator")):
        if means.get(f"grad_norm/{network}", 1.0) < 1e-9:
            return f"the {name} is dead: its gradient is 0"
    if "diversity" in means:
        value = means["diversity"]
        before, history.last = history.last, value
        history.best = max(history.best, value)
        threshold = min(min_diversity, history.best / 4)
        if not max(before, value) >= threshold:
            return f"mode collapse: diversity {value:.3g} < {threshold:.3g}"
    return None


def roll_back(run: Run, failure: str) -> str:
    """Load a checkpoint from before a failure, with one thing changed; return a message.

    The first roll-back loads the newest checkpoint, each further one the one before: a failure may
    begin before it is noticed. Raises TrainingFailed after watchdog.max_rollbacks of them.
    """
    failed_at, limit = run.state.cur_nimg, run.cfg.watchdog.max_rollbacks
    earlier = run.state.recovery
    recovery, change = next_recovery(earlier, failed_at)
    if recovery.rollbacks > limit:
        tried = "(watchdog.max_rollbacks=0)"
        if limit:
            tried = f"after {limit} roll-backs ({', '.join(CHANGES[:limit])})"
        fix = "earlier checkpoints are kept; lower optim.lr_G and optim.lr_D, raise loss.gamma "
        fix += "with gamma=schedule, or use precision=fp32"
        message = f"training failed at {failed_at:,} images {tried}: {failure}"
        raise TrainingFailed(f"run_dir={run.run_dir}: {message}; {fix}")
    state = broadcast_from_rank0(lambda: _load_earlier(run.run_dir, earlier.rollbacks))
    if state is None:
        fresh = setup(run.cfg, run.device, run.precision)
        run.identity, state = fresh.identity, fresh.state_dict()
    run.state.load_state_dict(state)
    run.state.recovery = recovery
    run.state.diversity.last = math.inf  # a collapse must be seen twice again
    barrier()
    message = f"At {failed_at:,} images: {failure}. Rolled back to {run.state.cur_nimg:,} images"
    return f"{message}, with {change} (roll-back {recovery.rollbacks} of {limit})."


def next_recovery(recovery: RecoveryState, failure_nimg: int) -> tuple[RecoveryState, str]:
    """Return the recovery state after one more roll-back, and what it changes."""
    change = recovery.rollbacks % len(CHANGES)
    # Every roll-back takes new random numbers: with the old ones the failure would only repeat.
    recovery = replace(
        recovery,
        rollbacks=recovery.rollbacks + 1,
        stream=recovery.stream + 1,
        failure_nimg=max(failure_nimg, recovery.failure_nimg),
    )
    if change == 1:
        recovery.lr /= 2
    elif change == 2:
        recovery.gamma *= 2
    return recovery, CHANGES[change]


def _load_earlier(run_dir: Path, skip: int) -> dict[str, Any] | None:
    """Load the newest checkpoint except `skip`, or the oldest; reject those after it."""
    found = checkpoint.all_checkpoints(run_dir)
    for path in found[max(1, len(found) - skip) :]:
        path.replace(path.with_name(REJECTED + path.name))
    return _load_newest(run_dir)
