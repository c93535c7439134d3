"""What is measured while a run goes on: statistics, grids, diversity, over-fitting, evaluation."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vgan.data.loader import Loader
from vgan.data.packed import default_cache_dir
from vgan.data.webdataset import ShardLoader
from vgan.evaluation.evaluator import SMALLER_IS_BETTER, make_evaluator, shown_values, write_nearest
from vgan.inference.attention_maps import (
    attention_grid,
    attention_maps,
    has_attention,
    patch_logits,
    patch_logits_grid,
)
from vgan.inference.load import drawing_precision, restore_generator
from vgan.models.generator import GeneratorBase
from vgan.runs import checkpoint
from vgan.runs.checkpoint_writer import CheckpointWriter
from vgan.runs.log_reader import read_metrics
from vgan.runs.log_writer import RunLogger, append_metrics
from vgan.runs.trackers import Reporter
from vgan.runtime.console import TrainingBar, in_lines
from vgan.runtime.device import autocast
from vgan.runtime.distributed import barrier, broadcast_from_rank0, print0, rank, world_size
from vgan.runtime.errors import UserError, is_out_of_memory
from vgan.runtime.hardware import host_peak_gb, peak_gb
from vgan.runtime.images import enlarge, grid, to_float, to_uint8, zoom_for
from vgan.runtime.rng import Streams
from vgan.training.recovery import find_failure
from vgan.training.schedules import HyperParameters
from vgan.training.setup import Run

T = TypeVar("T")
GRID_IMAGES = 64
MAPPED_IMAGES = 6  # of them, with maps of attention and patch logits
DIVERSITY_IMAGES = 32  # fakes of one class whose diversity is measured


@dataclass(frozen=True)
class Due:
    """What is due after a step."""

    log: bool
    snapshot: bool
    checkpoint: bool
    evaluation: bool


def due(run: Run, before: int, stop: bool, overdue: bool) -> Due:
    """Return what is due after a step from image count `before`; everything, after the last step.

    stop: the run was asked to stop. overdue: checkpoint_minutes have passed.
    """
    cfg, now = run.cfg, run.state.cur_nimg
    last = now >= run.total_nimg
    return Due(
        log=last or passed(cfg.tick_kimg, before, now),
        snapshot=last or passed(cfg.snapshot_kimg, before, now),
        checkpoint=last or stop or overdue or passed(cfg.checkpoint_kimg, before, now),
        evaluation=cfg.eval_kimg > 0 and (last or passed(cfg.eval_kimg, before, now)),
    )


def passed(every_kimg: float, before: int, now: int) -> bool:
    """Return whether a multiple of every_kimg lies between two image counts, the later included."""
    every_nimg = max(1, round(every_kimg * 1000))
    return before // every_nimg < now // every_nimg


class Monitor:
    """The log, the grids and the evaluation of a run, and the check that it goes well."""

    def __init__(
        self,
        run: Run,
        loader: Loader | ShardLoader,
        writer: CheckpointWriter,
        evaluation: "PeriodicEvaluation | None",
        reporter: Reporter,
    ) -> None:
        self._run, self._loader, self._writer, self._evaluation = run, loader, writer, evaluation
        self._grid = SampleGrid(run)
        self._holdout = HoldoutLogits(run) if run.cfg.holdout else None
        self._throughput = ThroughputMeter(run.state.cur_nimg)
        self._skip_on_oom = SkipOnOutOfMemory()
        self._means: dict[str, float] = {}
        self._logger = RunLogger(run.run_dir, run.state.cur_nimg, reporter)
        self._shown_nimg = run.state.cur_nimg
        self._bar = TrainingBar(run.total_nimg, self._shown_nimg, silent=rank() != 0)

    def start(self) -> None:
        """Write the grid of reals, and make up for an evaluation that a kill prevented."""
        run = self._run
        if run.state.cur_nimg == 0:
            self._logger.image(0, "reals", run.run_dir / "reals.png", small_grid(self._grid.reals))
        if lacks_evaluation(run):
            self.evaluate()

    def advance(self) -> None:
        """Move the progress bar to cur_nimg."""
        cur_nimg = self._run.state.cur_nimg
        self._bar.update(cur_nimg - self._shown_nimg)
        self._shown_nimg = cur_nimg

    def check(self, is_tick: bool) -> str | None:
        """Return what is wrong with the run, or None. Waits for the device.

        Rank 0 decides for all processes.
        """
        run, state = self._run, self._run.state
        self._means = state.stats.means()
        if is_tick:
            state.stats.reset()
        for name, scaler in (("scale/G", state.scaler_G), ("scale/D", state.scaler_D)):
            if scaler.is_enabled():
                self._means[name] = scaler.get_scale()
        if is_tick:
            self._means |= self._skip_on_oom("diversity", self._grid.diversity)
        limits = run.cfg.watchdog.max_penalty, run.cfg.watchdog.min_diversity
        failure = broadcast_from_rank0(lambda: find_failure(self._means, state.diversity, *limits))
        if failure is None:
            state.recovery.passed(state.cur_nimg, round(1000 * run.cfg.checkpoint_kimg))
        return failure

    def rolled_back(self, message: str) -> None:
        """Print and log a roll-back; drop what was logged after the checkpoint."""
        cur_nimg = self._run.state.cur_nimg
        print0(f"\n{message}")
        self._logger.truncate(cur_nimg)
        self._logger.write(cur_nimg, {"watchdog": message})
        self.advance()

    def log(self, hp: HyperParameters) -> None:
        """Write the means since the last tick; call `check` first."""
        run, values = self._run, dict(self._means)
        if self._holdout:
            values |= self._skip_on_oom("logits of held-out images", self._holdout)
        values |= {"lr_G": hp.lr_G, "lr_D": hp.lr_D, "beta2": hp.beta2}
        values |= run.state.strength.scalars(hp)
        waited_s, stalled_s = self._loader.waited_s, self._writer.stalled_s
        values |= self._throughput.tick(run.state.cur_nimg, waited_s, stalled_s, run.device)
        self._logger.write(run.state.cur_nimg, values)
        self._bar.tick({"D": values["loss/D"], "G": values["loss/G"]})

    def write_grids(self) -> None:
        """Write the grid of fakes, and the maps of some of them to TensorBoard."""
        run, cur_nimg = self._run, self._run.state.cur_nimg
        for name, image in self._skip_on_oom("grids", self._grid.grids).items():
            path = run.run_dir / f"fakes-{cur_nimg:09d}.png" if name == "fakes" else None
            self._logger.image(cur_nimg, name, path, image)

    def evaluate(self) -> None:
        """Evaluate the averaged generator and log its metrics."""
        if self._evaluation:
            values = self._evaluation(self._writer)
            if values:
                self._logger.write(self._run.state.cur_nimg, values)

    def close(self) -> None:
        """Close the log and the progress bar."""
        self._bar.close()
        self._logger.close()


class PeriodicEvaluation:
    """Evaluation of the averaged generator during a run; keeps the best checkpoint.

    Results go to metrics.jsonl with their protocol. The best is chosen among those of the same
    protocol, including earlier ones of a resumed run.
    """

    def __init__(self, run: Run) -> None:
        cfg = run.cfg.eval
        self._run, self._by = run, cfg.best_by
        self._precision = drawing_precision("auto", run.device)
        sizes = {"n": cfg.n, "repeats": cfg.repeats, "seed": run.cfg.seed, "batch_size": 128}
        self._evaluator = make_evaluator(
            run.dataset,
            run.device,
            run.cfg.features,
            cfg.metrics,
            **sizes,
            holdout=run.cfg.holdout,
        )
        protocol = self._evaluator.protocol(self._precision)
        lines = [line for line in read_metrics(run.run_dir) if line.get("protocol") == protocol]
        best = [line["best"] for line in lines if "best" in line]
        self._best: float | None = best[-1] if best and checkpoint.find_best(run.run_dir) else None

    def __call__(self, writer: CheckpointWriter) -> dict[str, float]:
        """Return the metrics as metrics/fid and so on; none where memory or disk do not suffice.

        Rank 0 evaluates; the others wait.
        """
        run, values = self._run, {}
        state = run.state_dict()
        if rank() == 0:
            try:
                values = self._evaluate(state, writer)
            except (UserError, OSError, MemoryError, RuntimeError) as e:
                if isinstance(e, (MemoryError, RuntimeError)) and not is_out_of_memory(e):
                    raise
                reason = "out of memory" if is_out_of_memory(e) else str(e)
                cur_nimg = run.state.cur_nimg
                print0(f"\nNo evaluation at {cur_nimg:,} images, training continues ({reason}).")
        barrier()
        return values

    def _evaluate(self, state: dict[str, object], writer: CheckpointWriter) -> dict[str, float]:
        run, cur_nimg = self._run, self._run.state.cur_nimg
        G = run.state.G_ema
        if _is_sharded(G):
            G = restore_generator(state, run.device)
        result = self._evaluator(G, self._precision, default_cache_dir())
        print0("\n" + in_lines(shown_values(result.values), f"at {cur_nimg:,} images: "))
        write_nearest(run.run_dir / f"nearest-{cur_nimg:09d}.png", result)
        value, best = result.values[self._by], self._best
        is_smaller_better = SMALLER_IS_BETTER[self._by]
        is_best = best is None or (value != best and (value < best) == is_smaller_better)
        # Written before it is recorded: what metrics.jsonl calls the best is on the disk.
        path = checkpoint.best_path(run.run_dir)
        if is_best and writer.write(path, {**state, "metrics": result.values}):
            self._best = value
        name = checkpoint.path_at(run.run_dir, cur_nimg).name
        extra = {"best": self._best}
        append_metrics(run.run_dir, name, cur_nimg, result.values, result.protocol, extra)
        return {f"metrics/{name}": v for name, v in result.values.items()}


def lacks_evaluation(run: Run) -> bool:
    """Return whether a run was killed between a checkpoint and the evaluation that was due."""
    cur_nimg, every_kimg = run.state.cur_nimg, run.cfg.eval_kimg
    if cur_nimg == 0 or every_kimg == 0:
        return False
    last = cur_nimg >= run.total_nimg
    if not last and not passed(every_kimg, cur_nimg - run.cfg.batch_size, cur_nimg):
        return False

    def is_missing() -> bool:
        lines = read_metrics(run.run_dir)
        return not any(line.get("cur_nimg") == cur_nimg and "best" in line for line in lines)

    return broadcast_from_rank0(is_missing)


class SkipOnOutOfMemory:
    """A call of optional work; skips it, with one warning per kind, when memory runs out."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def __call__(self, what: str, work: Callable[[], dict[str, T]]) -> dict[str, T]:
        """Return the result of `work`, or an empty dict."""
        try:
            return work()
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e) or world_size() > 1:  # processes would lose step
                raise
        if what not in self._warned:
            print0(f"\nOut of memory: no {what} for now, training continues.")
            self._warned.add(what)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {}


class HoldoutLogits:
    """D's mean logit on held-out images and on as many training images; a gap is over-fitting."""

    def __init__(self, run: Run) -> None:
        self._run, data = run, run.dataset
        c_table = data.c_table()
        self._sets = []
        for items in data.split(run.cfg.holdout):
            pixels = torch.from_numpy(data.images[items[:256]]).to(run.device).permute(0, 3, 1, 2)
            c = c_table[torch.from_numpy(data.labels[items[:256]])]
            self._sets.append((to_float(pixels), c.to(run.device)))

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return logits/trained_on, logits/held_out and their difference logits/gap."""
        seen, unseen = (self._mean_logit(*images) for images in self._sets)
        values = {"trained_on": seen, "held_out": unseen, "gap": seen - unseen}
        return {f"logits/{name}": float(value) for name, value in values.items()}

    def _mean_logit(self, images: Tensor, c: Tensor) -> Tensor:
        D = self._run.state.D
        with autocast(self._run.device, self._run.precision):
            logits = [D(*part).float() for part in zip(images.split(64), c.split(64))]
        return torch.cat(logits).mean()


class ThroughputMeter:
    """Images per second, time spent waiting for data and checkpoints, and peak memory."""

    def __init__(self, cur_nimg: int) -> None:
        self._start = self._last = time.perf_counter()
        self._nimg, self._waited_s, self._stalled_s = cur_nimg, 0.0, 0.0

    def tick(
        self, cur_nimg: int, waited_s: float, stalled_s: float, device: torch.device
    ) -> dict[str, float]:
        """Return the values since the last tick. waited_s and stalled_s are running totals."""
        now = time.perf_counter()
        elapsed = max(now - self._last, 1e-9)
        values = {
            "speed/img_per_s": (cur_nimg - self._nimg) / elapsed,
            "speed/session_s": now - self._start,
            "speed/waiting_for_data": (waited_s - self._waited_s) / elapsed,
            "speed/waiting_for_checkpoints": (stalled_s - self._stalled_s) / elapsed,
        }
        self._last, self._nimg = now, cur_nimg
        self._waited_s, self._stalled_s = waited_s, stalled_s
        memory = peak_gb(device) if device.type == "cuda" else host_peak_gb()
        return values if memory is None else values | {"memory/peak_gb": memory}


class SampleGrid:
    """The grid of fakes from fixed z, and the fakes of one class that measure diversity."""

    def __init__(self, run: Run) -> None:
        G, device = run.state.G, run.device
        self._run = run
        self.reals, labels = run.dataset.reals(GRID_IMAGES)
        # Classes or conditions of the reals, so that the two grids compare image by image.
        self._c = run.dataset.c_table()[labels].to(device)
        rng = Streams(run.cfg.seed, 0, max(len(labels), DIVERSITY_IMAGES))
        z = rng.normal("grid", G.z_dim).to(device)
        self._z, self._z_diversity = z[: len(labels)], z[:DIVERSITY_IMAGES]

    @torch.no_grad()
    def fakes(self) -> Tensor:
        """Return images uint8 (N, C, H, W) of the averaged generator."""
        G_ema = self._run.state.G_ema
        with autocast(self._run.device, self._run.precision):
            parts = [to_uint8(G_ema(z, c)) for z, c in zip(self._z.split(16), self._c.split(16))]
        return torch.cat(parts)

    def grids(self) -> dict[str, np.ndarray]:
        """Return the grid of fakes and the maps of its first images, (H, W[, 3]) uint8."""
        fakes = self.fakes()
        return {"fakes": small_grid(fakes), **self._maps(fakes)}

    def _maps(self, fakes: Tensor) -> dict[str, np.ndarray]:
        state, precision = self._run.state, self._run.precision
        if _is_sharded(state.G_ema):  # no layer can be called alone
            return {}
        z, c = self._z[:MAPPED_IMAGES], self._c[:MAPPED_IMAGES]
        maps = {}
        if has_attention(state.G_ema):
            maps["attention"] = attention_grid(*attention_maps(state.G_ema, z, c, precision))
        if hasattr(state.D, "logit_map"):
            images = fakes[:MAPPED_IMAGES]
            logits = patch_logits(state.D, images, c, precision)
            maps["patch_logits"] = patch_logits_grid(images, logits)
        return maps

    @torch.no_grad()
    def diversity(self) -> dict[str, float]:
        """Return the diversity of the fakes of one class, relative to the reals of the grid."""
        c = self._c[:1].expand(DIVERSITY_IMAGES, -1)
        with autocast(self._run.device, self._run.precision):
            fakes = self._run.state.G(self._z_diversity, c)
        return {"diversity": float(diversity(fakes, to_float(self.reals)))}


@torch.no_grad()
def diversity(fakes: Tensor, reals: Tensor) -> Tensor:
    """Return () the variance of fakes (N, C, H, W) of one class relative to the reals' (M, ...).

    Taken over images at 8 x 8 pixels, where noise on single pixels does not count.
    """
    spread = []
    for x in (fakes, reals):
        small = torch.nn.functional.adaptive_avg_pool2d(x.float(), 8)
        spread.append(small.var(dim=0).mean().cpu())
    return spread[0] / spread[1].clamp_min(1e-8)


def small_grid(images: Tensor) -> np.ndarray:
    """Return a grid of images as (H, W) or (H, W, 3 or 4) uint8, small ones enlarged."""
    return enlarge(grid(images), zoom_for(min(images.shape[2:])))


def _is_sharded(G: GeneratorBase) -> bool:
    return any(hasattr(p, "placements") for p in G.parameters())
