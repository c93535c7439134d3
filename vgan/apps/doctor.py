"""vgan-doctor: examine machine, data, run folder and speed before a run."""

import io
import math
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image

from vgan.apps.benchmark import MIN_GAIN, Benchmark, Plan
from vgan.apps.examine import (
    Report,
    examine_compiler,
    examine_data,
    examine_machine,
    format_bytes,
)
from vgan.config import TrainConfig
from vgan.runs import checkpoint
from vgan.runs.trackers import require_tracker
from vgan.runtime import device as devices
from vgan.runtime.console import duration
from vgan.runtime.distributed import world_size
from vgan.runtime.errors import UserError
from vgan.runtime.files import own_folder
from vgan.schema import require
from vgan.training.monitor import GRID_IMAGES, small_grid
from vgan.training.recovery import check_settings, newest_nimg
from vgan.training.setup import Run
from vgan.training.summary import facts


def doctor(cfg: TrainConfig, overrides: Sequence[str], benchmark: Benchmark | None = None) -> int:
    """Examine a run before it starts and print a report; return 1 if training would stop, else 0.

    cfg: a valid config, made from `overrides`. Writes nothing into run_dir, but packs the data
    into the cache, as training does. Raises UserError where device, precision or tracker cannot be
    used.
    """
    fix = "vgan-doctor examines one device; start it without torchrun"
    require(world_size() == 1, "WORLD_SIZE", world_size(), fix)
    device = devices.pick_device(cfg.device)
    precision = devices.pick_precision(cfg.precision, device)
    threads_before = torch.get_num_threads()
    require_tracker(cfg.tracker)
    devices.prepare_process(device, precision, cfg.threads, cfg.deterministic)
    report, plan = Report(), None
    try:
        examine_machine(report, device)
        has_compiler = examine_compiler(report, cfg.compile.lower(), device)
        dataset = examine_data(report, cfg)
        if dataset is not None:
            compiles = has_compiler and devices.pick_compile(cfg.compile, device)
            cfg = replace(cfg, precision=precision, threads=torch.get_num_threads())
            cfg = replace(cfg, compile=str(compiles).lower())
            plan = examine_run(report, cfg, device, benchmark or Benchmark())
    finally:
        torch.set_num_threads(threads_before)
    advised = [] if has_compiler else ["compile=false"]
    print_result(report, cfg, plan)
    if plan is not None:
        advised += [override for override, _ in plan.gains]
    print(f"\n{train_command(overrides, advised)}")
    return 1 if report.blocking else 0


def examine_run(
    report: Report, cfg: TrainConfig, device: torch.device, benchmark: Benchmark
) -> Plan | None:
    """Examine networks and run folder, then time the steps; return None where they fail."""
    try:
        with benchmark.first_trial(cfg, device) as run:
            # The trial has other settings than the run that is examined.
            run = replace(run, cfg=cfg, identity={**run.identity, "config": asdict(cfg)})
            examine_networks(report, run)
            examine_folder(report, run)
        del run  # the trials need its memory
        report.title(f"speed: trials of up to {benchmark.steps} steps")
        return benchmark.search(cfg, device)
    except UserError as e:
        report.problem(str(e), blocking=True)
        return None


def examine_networks(report: Report, run: Run) -> None:
    """Report parameters and cost of both networks."""
    report.title("networks")
    networks = facts(run)
    for name in ("G", "D"):
        report.line(name, networks[name])


def examine_folder(report: Report, run: Run) -> None:
    """Report whether run_dir can be written, what it holds, and the disk space."""
    report.title("run folder")
    folder, cfg = run.run_dir, run.cfg
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as e:
        reason = f"cannot be written ({e.strerror})"
        report.problem(f"run_dir={folder}: {reason}; choose another folder", blocking=True)
        return
    if nimg := newest_nimg(folder):
        found = f"holds a run at {nimg:,} images; the same command resumes it"
        report.line("run_dir", f"{folder}: {found}")
        if nimg >= run.total_nimg:
            longer = f"total_kimg={2 * cfg.total_kimg:g}"
            report.note(f"that run is complete; to train longer: {longer}")
        examine_checkpoint(report, run)
    else:
        found = "has no checkpoint yet" if folder.is_dir() else "will be created"
        report.line("run_dir", f"{folder}: {found}")
    if (folder / ".lock").is_file():
        try:
            with own_folder(folder):
                pass
        except UserError as e:
            report.problem(str(e), blocking=True)
    examine_disk(report, run, shutil.disk_usage(existing).free)


def examine_disk(report: Report, run: Run, free: int) -> None:
    """Compare what the run will write with the free bytes of the disk."""
    cfg = run.cfg
    leaves = [leaf for _, leaf in checkpoint.walk(run.state.state_dict())]
    checkpoint_bytes = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
    count = cfg.keep_checkpoints + 1  # the newest is written before the oldest is deleted
    if cfg.eval_kimg > 0:
        count += 1  # the best
    png = io.BytesIO()
    reals = run.dataset.reals(GRID_IMAGES)[0]
    Image.fromarray(small_grid(reals)).save(png, format="PNG")
    grid_bytes = 2 * len(png.getvalue())  # as a file and in TensorBoard
    grids = math.ceil(cfg.total_kimg / cfg.snapshot_kimg) + 1
    needed = count * checkpoint_bytes + grids * grid_bytes
    parts = f"{count} checkpoints of {format_bytes(checkpoint_bytes)}"
    parts += f", {grids:,} grids of {format_bytes(grid_bytes)}"
    report.line("writes", f"{format_bytes(needed)} at most: {parts}")
    report.line("disk", f"{format_bytes(free)} free")
    where = f"run_dir={run.run_dir}: the disk"
    if free < 2 * checkpoint_bytes:
        report.problem(f"{where} cannot hold two checkpoints; free some space", blocking=True)
    elif free < needed:
        fix = "free some space, or set keep_checkpoints=1"
        report.problem(f"{where} will be full before the end; {fix}")


def examine_checkpoint(report: Report, run: Run) -> None:
    """Report whether the newest readable checkpoint fits the config, and what has changed."""
    for path in reversed(checkpoint.all_checkpoints(run.run_dir)):
        try:
            check_settings(run, checkpoint.load(path))
            return
        except checkpoint.Damaged as e:
            report.problem(f"{e}; training skips it")
        except UserError as e:
            report.problem(str(e), blocking=True)
            return


def print_result(report: Report, cfg: TrainConfig, plan: Plan | None) -> None:
    """Report how long the run takes, and which settings would be faster."""
    report.title("result")
    if plan is not None:
        done = newest_nimg(Path(cfg.run_dir).expanduser())
        left = max(0, round(cfg.total_kimg * 1000) - done)
        rows = [("as chosen", plan.chosen)]
        if plan.gains:
            rows.append(("fastest", plan.best))
        for name, trial in rows:
            time_left = f"{left / 1000:g} kimg in {duration(left / trial.img_per_s)}"
            report.line(name, f"{trial.img_per_s:,.0f} img/s: {time_left}")
        for override, speedup in plan.gains:
            report.line("gain", f"{override}: {speedup - 1:+.0%} img/s")
        for trial in plan.batch_sizes:
            speedup = trial.img_per_s / plan.best.img_per_s
            if speedup > MIN_GAIN:
                override = f"batch_size={trial.settings['batch_size']}"
                report.line(
                    "option", f"{override}: {speedup - 1:+.0%} img/s, but the result will differ"
                )
        print("Evaluations, grids and checkpoints come on top. Up to 5 % is noise.")
    if report.blocking:
        problems = "1 problem" if report.blocking == 1 else f"{report.blocking} problems"
        print(f"{problems} would stop training; first fix what is marked above. Then run:")


def train_command(overrides: Sequence[str], advised: Sequence[str]) -> str:
    """Return the vgan-train command with `overrides`, replaced or followed by those advised.

    It is broken into lines of at most 80 columns, as a shell accepts them.
    """
    replaced = {word.partition("=")[0] for word in advised}
    kept = [word for word in overrides if word.partition("=")[0].lstrip("+") not in replaced]
    lines = ["vgan-train"]
    for word in [*map(shlex.quote, kept), *advised]:
        if len(lines[-1]) + len(word) > 76:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}"
    return "\n".join(lines)
