"""Going on from a checkpoint: after a stop, with changed settings, or back from a fault."""

import math
from pathlib import Path
from typing import Any

from vgan.config import require
from vgan.runs import checkpoint
from vgan.runs.checkpoint import DAMAGED, REJECTED
from vgan.runtime.distributed import barrier, broadcast_from_rank0, print0
from vgan.runtime.errors import UserError
from vgan.runtime.signals import TrainingFailed
from vgan.training.setup import Progress, Run, flat, set_up
from vgan.training.watchdog import NEXT

# Settings that say where and how often, not what is learned: they change on resume without a word.
_FREE = (
    "run_dir", "device", "precision", "compile", "cuda_graphs", "depthwise", "threads", "tick_kimg",
    "deterministic", "snapshot_kimg", "checkpoint_kimg", "checkpoint_minutes", "keep_checkpoints", "data",
    "eval_kimg", "eval", "features", "watchdog", "batch_gpu", "parallel",
)  # fmt: skip


def newest_nimg(run_dir: Path) -> int:
    """How far the newest checkpoint's name says that a run has come; 0 without one."""
    found = broadcast_from_rank0(
        lambda: checkpoint.all_checkpoints(run_dir) if run_dir.is_dir() else []
    )
    return checkpoint.nimg_of(found[-1]) if found else 0


def resume(run: Run) -> Progress:
    """Load the newest readable checkpoint of the run folder, if there is one.

    Damaged ones are renamed, with a warning. Raises UserError where none can be read, where the checkpoint is of another model or
    of other data, or where a setting was changed that would spoil the run; other changes are printed.
    """
    progress = Progress()
    parts = broadcast_from_rank0(lambda: _newest(run))
    if parts is None:
        return progress
    compare(run, parts)
    try:
        progress.load_parts(run, parts)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f"run_dir={run.run_dir}: its newest checkpoint does not fit this run ({reason}); use another run_dir"
        ) from e
    return progress


def _newest(run: Run) -> dict[str, Any] | None:
    found = checkpoint.all_checkpoints(run.run_dir) if run.run_dir.is_dir() else []
    damaged: list[tuple[Path, checkpoint.Damaged]] = []
    for path in reversed(found):
        try:
            parts = checkpoint.load(path)
        except checkpoint.Damaged as e:
            damaged.append((path, e))
            continue
        for (
            other,
            reason,
        ) in (
            damaged
        ):  # only now: a run without a sound one must not look like one that has not begun
            print0(f"passed over: {reason}; it is now called {DAMAGED}{other.name}")
            other.replace(other.with_name(DAMAGED + other.name))
        return parts
    if damaged:
        text = f"run_dir={run.run_dir}: none of its {len(found)} checkpoints can be read, the newest says: {damaged[0][1]}"
        raise UserError(f"{text}; restore one, or use another run_dir to begin anew")
    return None


def compare(run: Run, parts: dict[str, Any]) -> None:
    """Refuse what would spoil the run, and print what else has changed."""
    before, now, where = flat(parts["config"]), flat(run.config), f"run_dir={run.run_dir}"
    if parts["data"]["digest"] != run.dataset.digest:
        told = [
            f"{k} was {before.get(k)}, is {now.get(k)}"
            for k in now
            if k.startswith("data.") and now[k] != before.get(k)
        ]
        what = "; ".join(told) or f"the pictures of {parts['data']['name']} were others"
        raise UserError(f"{where}: was trained on other data ({what}); use another run_dir")
    # a setting that an earlier version did not know had no effect then
    for node in (before, now):  # how, not what
        (
            node.pop("model.generator.gradient_checkpointing", None),
            node.pop("model.discriminator.gradient_checkpointing", None),
        )
    changed = sorted(
        k
        for k in now.keys() & before.keys()
        if before[k] != now[k] and k.split(".")[0] not in _FREE
    )
    changed += sorted(
        k for k in now.keys() ^ before.keys() if k.startswith(("model.", "optim.optimizer"))
    )
    for k in changed:
        what = f"{k} was {before.get(k)}, is now {now.get(k)}"
        if k.startswith(("model.", "optim.optimizer._target_")) and k != "model.name":
            raise UserError(
                f"{where}: holds another model or optimizer ({what}); use another run_dir"
            )
        require(
            k != "holdout",
            k,
            now.get(k),
            f"was {before.get(k)}: pictures would change sides; keep it or use another run_dir",
        )
    for k in changed:
        print0(f"changed since the checkpoint: {k} was {before.get(k)}, is now {now.get(k)}")


def roll_back(run: Run, progress: Progress, fault: str) -> str:
    """Return run and progress to a checkpoint from before a fault, with one thing changed; returns that in words.

    The first try goes back to the newest checkpoint, each further one to the one before: a fault may have begun before it was
    noticed. Raises TrainingFailed after watchdog.max_rollbacks of them.
    """
    at, tries = progress.cur_nimg, run.config["watchdog"]["tries"]
    rescue, what = progress.rescue.next(at)
    if rescue.tries > tries:
        tried = (
            f"after {tries} tries ({', '.join(NEXT[: min(tries, len(NEXT))])})"
            if tries
            else "(watchdog.max_rollbacks=0)"
        )
        fix = "the checkpoints of before are kept; lower optim.lr_G and optim.lr_D, raise loss.gamma, or use precision=fp32"
        raise TrainingFailed(
            f"run_dir={run.run_dir}: gave up at {at:,} images {tried}: {fault}; {fix}"
        )
    parts = broadcast_from_rank0(lambda: _before(run, progress.rescue.tries))
    if parts is None:
        fresh = set_up(run.config, run.recipe.device, run.recipe.precision)
        parts = Progress().parts(fresh)
    progress.load_parts(run, parts)
    progress.rescue, progress.varied.last = rescue, math.inf  # a collapse is to be seen twice again
    barrier()
    return f"at {at:,} images: {fault}; back to {progress.cur_nimg:,}, with {what} (try {rescue.tries} of {tries})"


def _before(run: Run, further: int) -> dict[str, Any] | None:
    """The parts of the newest checkpoint but `further` many, or of the oldest; those after it are put aside."""
    found = checkpoint.all_checkpoints(run.run_dir)
    for path in found[max(1, len(found) - further) :]:
        path.replace(path.with_name(REJECTED + path.name))
    return _newest(run)
