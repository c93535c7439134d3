"""vgan-train's room: set up, resume, loop."""

import contextlib
import json
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vgan.config import validate
from vgan.data.packed import default_cache_dir
from vgan.data.webdataset import Interrupted
from vgan.runs.log_reader import read_metrics
from vgan.runs import checkpoint
from vgan.runs.checkpoint_writer import CheckpointWriter
from vgan.runs.log_writer import RunLogger
from vgan.runtime.console import TrainingBar
from vgan.runtime.device import (
    keep_compiled,
    pick_compile,
    pick_device,
    pick_precision,
    prepare_process,
)
from vgan.runtime.distributed import (
    SharedFlags,
    barrier,
    broadcast_from_rank0,
    group,
    print0,
    rank,
    world_size,
)
from vgan.runtime.errors import UserError
from vgan.runtime.files import append_line, own_folder, write_atomically
from vgan.runtime.rng import Streams
from vgan.runtime.signals import EARLY, Stopped, StopRequest
from vgan.training.ema import update_ema
from vgan.training.monitor import (
    HoldoutLogits,
    Luxuries,
    PeriodicEvaluation,
    SampleGrid,
    ThroughputMeter,
    sheet_of,
    start_record,
    summary,
)
from vgan.training.parallel import averaged
from vgan.training.resume import newest_nimg, resume, roll_back
from vgan.training.schedules import ema_decay
from vgan.training.setup import Progress, Run, open_loader, set_up
from vgan.training.step import compiled, train_step
from vgan.training.watchdog import Watchdog


def train(cfg: DictConfig) -> Path:
    """Train as `cfg` (a TrainConfig) says, from the newest checkpoint of its run_dir if there is one.

    Returns the run folder. Raises UserError, before anything is written, for what cannot work; Stopped after a signal;
    TrainingFailed, a UserError, where the run went wrong too often.
    """
    validate(cfg)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    device = pick_device(config["device"])
    precision = pick_precision(config["precision"], device)
    prepare_process(device, precision, config["threads"], config["deterministic"])
    with group(device):
        run = set_up(config, device, precision)
        total_nimg = _total_nimg(config)
        if (
            newest_nimg(run.run_dir) >= total_nimg
            and (at := resume(run).cur_nimg) >= total_nimg
            and not _owes_evaluation(run, at)
        ):
            longer = f"To train longer: total_kimg={2 * config['total_kimg']:g}"
            print0(
                f"{run.run_dir} is complete: {total_nimg:,} images. {longer}\n{_next_commands(run.run_dir)}"
            )
            return run.run_dir
        with own_folder(run.run_dir), StopRequest() as stop:
            progress = resume(run)
            print0(summary(run, progress.cur_nimg))
            _start_folder(run, progress.cur_nimg)
            loop(_ready(run), progress, stop)
    return run.run_dir


def _ready(run: Run) -> Run:
    """The run with its step compiled, and shared with the other processes if there are any."""
    config, recipe = run.config, run.recipe
    if pick_compile(config["compile"], recipe.device):
        keep_compiled(default_cache_dir() / "compiled")
        recipe = compiled(recipe, config["cuda_graphs"])
    if world_size() > 1 and config["parallel"] == "ddp":
        recipe = averaged(recipe, run.state.G, run.state.D)
    return replace(run, recipe=recipe)


def loop(run: Run, progress: Progress, stop: StopRequest) -> None:
    """The training loop. Time is counted in images; intervals need not divide by the batch size."""
    config, state, recipe = run.config, run.state, run.recipe
    batch_size, total_nimg, ema = config["batch_size"], _total_nimg(config), config["ema"]
    penalty_every, rows = config["loss"]["penalty_every"], batch_size // world_size()
    # of several processes none may leave a step that the others are in; theirs ends when the data comes or is given up
    feed = open_loader(run, (lambda: stop.requested) if world_size() == 1 else (lambda: False))
    journal, watch, pictures = (
        RunLogger(run.run_dir, progress.cur_nimg),
        ThroughputMeter(progress.cur_nimg),
        SampleGrid(run),
    )
    unseen, spare = HoldoutLogits(run) if config["holdout"] else None, Luxuries()
    writer = CheckpointWriter(
        config["keep_checkpoints"], lambda failure: print0(f"\n{failure}; training goes on")
    )
    judge = PeriodicEvaluation(run, writer) if config["eval_kimg"] > 0 else None
    watchdog, agree = (
        Watchdog(config["watchdog"]["max_penalty"], config["watchdog"]["min_diversity"]),
        SharedFlags(2),
    )
    if progress.cur_nimg == 0:
        journal.image(0, "reals", run.run_dir / "reals.png", sheet_of(pictures.reals))
    bar = TrainingBar(total_nimg, progress.cur_nimg, silent=rank() != 0)
    stopping = False
    try:
        if judge and _owes_evaluation(run, progress.cur_nimg) and (values := judge(progress)):
            journal.write(progress.cur_nimg, values)
        while progress.cur_nimg < total_nimg and not stopping:
            now, before = progress.moment(run), progress.cur_nimg
            streams = Streams(
                progress.rescue.seed(config["seed"]), before + rank() * rows, rows, recipe.device
            )
            penalize = (before // batch_size) % penalty_every == 0
            try:
                real, label = feed.batch(before)
            except (Interrupted, UserError) as e:
                if (
                    world_size() == 1 and before > 0
                ):  # between two steps the state is sound; saving takes all processes
                    writer.begin(checkpoint.path_at(run.run_dir, before), progress.parts(run))
                if isinstance(e, UserError):
                    raise
                break
            progress.stats.add(
                train_step(
                    state, recipe, now, real, label, streams, penalty_every if penalize else 0
                )
            )
            progress.cur_nimg = cur_nimg = before + batch_size
            update_ema(
                state.G_ema,
                state.G,
                ema_decay(ema["halflife_kimg"], ema["ramp"], cur_nimg, batch_size),
            )
            bar.update(batch_size)

            late = time.monotonic() - writer.last_s > 60 * config["checkpoint_minutes"]
            stopping, late = agree(stop.requested, late)
            last = cur_nimg >= total_nimg
            tick = last or due(config["tick_kimg"], before, cur_nimg)
            save = last or stopping or late or due(config["checkpoint_kimg"], before, cur_nimg)
            if tick or save:
                means = progress.stats.means() if tick else progress.stats.peek()
                means |= _scales(run) | (
                    spare("diversity", lambda: {"diversity": pictures.diversity()}) if tick else {}
                )
                gamma = now.gamma * float(state.controls.gamma_factor())
                if fault := broadcast_from_rank0(
                    partial(watchdog.fault, means, gamma, progress.varied)
                ):
                    writer.wait()
                    told = roll_back(run, progress, fault)
                    print0(f"\n{told}")
                    journal.truncate(progress.cur_nimg)
                    journal.write(progress.cur_nimg, {"watchdog": told})
                    bar.update(progress.cur_nimg - cur_nimg)
                    continue
                progress.rescue = progress.rescue.past(
                    cur_nimg, round(1000 * config["checkpoint_kimg"])
                )
            if tick:
                means |= spare("logits of held-out pictures", unseen) if unseen else {}
                knobs = asdict(now) | {"gamma": now.gamma * float(state.controls.gamma_factor())}
                knobs |= (
                    {"augment_p": float(state.controls.augment_p)}
                    if state.controls.target is not None
                    else {}
                )
                journal.write(
                    cur_nimg,
                    means
                    | knobs
                    | watch.lap(cur_nimg, feed.waited_s, writer.stalled_s, recipe.device),
                )
                bar.tick({k: means[f"loss/{k}"] for k in "DG"})
            if last or due(config["snapshot_kimg"], before, cur_nimg):
                for name, sheet in spare("grids", pictures.sheets).items():
                    path = run.run_dir / f"fakes-{cur_nimg:09d}.png" if name == "fakes" else None
                    journal.image(cur_nimg, name, path, sheet)
            if save:
                writer.begin(checkpoint.path_at(run.run_dir, cur_nimg), progress.parts(run))
            if (
                judge
                and (last or due(config["eval_kimg"], before, cur_nimg))
                and (values := judge(progress))
            ):
                journal.write(cur_nimg, values)
            writer.poll()
    finally:
        bar.close()
        writer.close()
        journal.close()
        feed.close()
    agree.close()
    barrier()  # torchrun ends all when one has left, and rank 0 may still have been writing
    if writer.failure:
        raise UserError(writer.failure)
    if progress.cur_nimg < total_nimg:
        saved = f"stopped at {progress.cur_nimg:,} images and saved; the same command goes on"
        raise Stopped(saved if progress.cur_nimg else EARLY)
    print0(f"Done: {progress.cur_nimg:,} images.\n{_next_commands(run.run_dir)}")


def due(every_kimg: float, before: int, now: int) -> bool:
    """Whether a multiple of every_kimg was passed between two image counts."""
    every_nimg = max(1, round(every_kimg * 1000))
    return before // every_nimg < now // every_nimg


def _owes_evaluation(run: Run, cur_nimg: int) -> bool:
    """Whether a kill came between the checkpoint at cur_nimg and the evaluation there."""
    every_kimg, batch_size = run.config["eval_kimg"], run.config["batch_size"]
    if cur_nimg == 0 or every_kimg == 0:
        return False
    wanted = cur_nimg >= _total_nimg(run.config) or due(every_kimg, cur_nimg - batch_size, cur_nimg)
    return wanted and broadcast_from_rank0(
        lambda: (
            not any(
                r.get("cur_nimg") == cur_nimg and "best" in r for r in read_metrics(run.run_dir)
            )
        )
    )


def _scales(run: Run) -> dict[str, float]:
    """What gradients are multiplied by in fp16."""
    scalers = {"scale/G": run.state.scaler_G, "scale/D": run.state.scaler_D}
    return {name: scaler.get_scale() for name, scaler in scalers.items() if scaler.is_enabled()}


def _total_nimg(config: dict[str, Any]) -> int:
    return round(config["total_kimg"] * 1000)


def _start_folder(run: Run, cur_nimg: int) -> None:
    """Make the folder, write config.yaml unless it says the same already, and add a line to starts.jsonl."""
    text = OmegaConf.to_yaml(OmegaConf.create(run.config)).encode()
    path = run.run_dir / "config.yaml"
    if rank() != 0:
        return
    for left in run.run_dir.glob(
        ".*.tmp"
    ):  # by a kill in the midst of writing; the folder is ours
        left.unlink(missing_ok=True)
    if not path.is_file() or path.read_bytes() != text:
        write_atomically(path, text)
    with contextlib.suppress(UserError):  # a full disk keeps no run from going on
        append_line(run.run_dir / "starts.jsonl", json.dumps(start_record(run, cur_nimg)))


def _next_commands(run_dir: Path) -> str:
    return f"Next:  vgan-sample ckpt={run_dir} out=grid.png\n       tensorboard --logdir {run_dir}"
