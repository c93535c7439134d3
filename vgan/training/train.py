"""The vgan-train command: set up, resume, and the training loop."""

import contextlib
import json
import time
from contextlib import closing
from pathlib import Path

from omegaconf import OmegaConf

from vgan.config import TrainConfig
from vgan.data.webdataset import LoadingCancelled
from vgan.evaluation.evaluator import SMALLER_IS_BETTER
from vgan.runs import checkpoint
from vgan.runs.checkpoint_writer import CheckpointWriter
from vgan.runs.log_reader import number, read_metrics
from vgan.runs.trackers import Reporter, require_tracker, start_tracker
from vgan.runtime.device import pick_device, pick_precision, prepare_process
from vgan.runtime.distributed import SharedFlags, barrier, print0, process_group, rank, world_size
from vgan.runtime.errors import UserError
from vgan.runtime.files import append_line, own_folder, write_atomically
from vgan.runtime.signals import EARLY, Stopped, StopRequest
from vgan.training.monitor import Monitor, PeriodicEvaluation, due, lacks_evaluation
from vgan.training.recovery import newest_nimg, resume, roll_back
from vgan.training.setup import DataError, Run, prepare_step, setup
from vgan.training.step import train_step
from vgan.training.summary import start_record, summary


def train(cfg: TrainConfig) -> float | None:
    """Train as `cfg` says, from the newest checkpoint of its run_dir if there is one.

    Returns the `best_value` of the run. Raises UserError, before anything is written, for what
    cannot work; Stopped after a signal; TrainingFailed, a UserError, where the run fails too often.
    """
    device = pick_device(cfg.device)
    precision = pick_precision(cfg.precision, device)
    prepare_process(device, precision, cfg.threads, cfg.deterministic)
    with process_group(device):
        require_tracker(cfg.tracker)
        run = setup(cfg, device, precision)
        if is_complete(run):
            hint = f"To train longer: total_kimg={2 * cfg.total_kimg:g}"
            print0(f"{run.run_dir} is complete: {run.total_nimg:,} images. {hint}")
            print0(next_commands(run.run_dir))
            return best_value(run)
        evaluation = PeriodicEvaluation(run) if cfg.eval_kimg > 0 else None
        with own_folder(run.run_dir), StopRequest() as stop:
            resume(run)
            print0(summary(run))
            prepare_step(run)
            config = run.identity["config"]
            reporter = start_tracker(cfg.tracker, run.run_dir, config, run.state.cur_nimg)
            begin_folder(run)
            with closing(reporter):  # last of all, as it may wait for a network
                loop(run, evaluation, reporter, stop)
        return best_value(run)


def loop(
    run: Run, evaluation: PeriodicEvaluation | None, reporter: Reporter, stop: StopRequest
) -> None:
    """Train until total_kimg, a stop, or a failure that no roll-back helps; count in images."""
    state, flags, stopping = run.state, SharedFlags(2), False
    with (
        # Of several processes none may leave a step that the others are in.
        closing(run.open_loader(lambda: stop.requested and world_size() == 1)) as loader,
        closing(CheckpointWriter(run.cfg.keep_checkpoints, report_failed_write)) as writer,
        closing(Monitor(run, loader, writer, evaluation, reporter)) as monitor,
    ):
        monitor.start()
        try:
            while state.cur_nimg < run.total_nimg and not stopping:
                # Learning rates, gamma, ...; images from cur_nimg on and their random numbers.
                hp = run.hyperparameters()
                batch = run.batch(loader)

                # Discriminator, generator, moving average.
                before = state.cur_nimg
                scalars = train_step(state, run.objective, batch, hp)
                state.stats.add(scalars)
                monitor.advance()

                # What is due; the same on all processes, which learn of a stop one step late.
                stopping, overdue = flags(stop.requested, is_overdue(run, writer))
                now_due = due(run, before, stopping, overdue)
                if now_due.log or now_due.checkpoint:  # the only place that waits for the device
                    failure = monitor.check(now_due.log)
                    if failure:
                        writer.wait()
                        monitor.rolled_back(roll_back(run, failure))
                        continue
                if now_due.log:
                    monitor.log(hp)
                if now_due.snapshot:
                    monitor.write_grids()
                if now_due.checkpoint:
                    save(run, writer)
                if now_due.evaluation:
                    monitor.evaluate()
                writer.poll()
        except (
            LoadingCancelled,
            DataError,
        ) as e:  # raised between two steps, where the state is sound
            if world_size() == 1 and state.cur_nimg > 0:  # saving takes all processes
                save(run, writer)
            if isinstance(e, DataError):
                raise
    conclude(run, writer, flags)


def conclude(run: Run, writer: CheckpointWriter, flags: SharedFlags) -> None:
    """Wait for the other processes and print how the run ended; raise Stopped before its end."""
    flags.close()
    barrier()  # torchrun ends all processes when one has left, and rank 0 may still be writing
    if writer.failure:
        raise UserError(writer.failure)
    cur_nimg = run.state.cur_nimg
    if cur_nimg < run.total_nimg:
        saved = f"Stopped at {cur_nimg:,} images, checkpoint saved. Run the same command to resume."
        raise Stopped(saved if cur_nimg else EARLY)
    print0(f"Done: {cur_nimg:,} images.\n{next_commands(run.run_dir)}")


def best_value(run: Run) -> float | None:
    """Return the best value of eval.best_by, as measured; None where nothing was evaluated.

    Lower is better for fid and kid, higher for the others. Values of another protocol than the last
    evaluation's do not count.
    """
    lines = [line for line in read_metrics(run.run_dir) if "best" in line]
    name = run.cfg.eval.best_by
    comparable = [line for line in lines if line.get("protocol") == lines[-1].get("protocol")]
    values = [value for line in comparable if (value := number(line, name)) is not None]
    best = min if SMALLER_IS_BETTER[name] else max
    return best(values, default=None)


def is_complete(run: Run) -> bool:
    """Return whether the run folder holds a finished run; loads its checkpoint then."""
    if newest_nimg(run.run_dir) < run.total_nimg:
        return False
    resume(run)
    return run.state.cur_nimg >= run.total_nimg and not lacks_evaluation(run)


def is_overdue(run: Run, writer: CheckpointWriter) -> bool:
    """Return whether checkpoint_minutes have passed since the last checkpoint."""
    return time.monotonic() - writer.last_s > 60 * run.cfg.checkpoint_minutes


def save(run: Run, writer: CheckpointWriter) -> None:
    """Begin to write a checkpoint."""
    writer.begin(checkpoint.path_at(run.run_dir, run.state.cur_nimg), run.state_dict())


def report_failed_write(failure: str) -> None:
    print0(f"\n{failure}; training continues")


def begin_folder(run: Run) -> None:
    """Write config.yaml, unless it is the same already, and add a line to starts.jsonl."""
    if rank() != 0:
        return
    for leftover in run.run_dir.glob(".*.tmp"):  # of a kill while a checkpoint was written
        leftover.unlink(missing_ok=True)
    path = run.run_dir / "config.yaml"
    text = OmegaConf.to_yaml(OmegaConf.create(run.identity["config"])).encode()
    if not path.is_file() or path.read_bytes() != text:
        write_atomically(path, text)
    with contextlib.suppress(UserError):  # a full disk does not stop a run from resuming
        append_line(run.run_dir / "starts.jsonl", json.dumps(start_record(run)))


def next_commands(run_dir: Path) -> str:
    return f"Next:  vgan-sample ckpt={run_dir} out=grid.png\n       tensorboard --logdir {run_dir}"
