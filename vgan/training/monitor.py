"""What is looked at while a run goes on: quality, over-fitting, speed and memory, the pictures."""

import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, TypeVar

import torch

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

import vgan
from vgan.data.packed import default_cache_dir
from vgan.evaluation.evaluate import (
    SMALLER_IS_BETTER,
    Evaluator,
    make_evaluator,
    read_records,
    record,
    shown_values,
    write_nearest,
)
from vgan.inference.attention_maps import (
    attention_sheet,
    has_attention,
    look,
    verdict_sheet,
    verdicts,
)
from vgan.inference.load import drawing_precision, restore_generator
from vgan.models.cost import count_multiply_adds, count_parameters
from vgan.runs import checkpoint
from vgan.runs.checkpoint_writer import CheckpointWriter
from vgan.runtime.console import in_lines, report_line
from vgan.runtime.device import autocast
from vgan.runtime.hardware import describe
from vgan.runtime.distributed import barrier, print0, rank, world_size
from vgan.runtime.errors import UserError, is_out_of_memory
from vgan.runtime.images import enlarge, grid, to_float, to_uint8, zoom_for
from vgan.runtime.rng import Streams
from vgan.training.setup import Progress, Run
from vgan.training.watchdog import diversity

T = TypeVar("T")
GRID_PICTURES = 64
MAPPED = 6  # of them, with maps of attention and verdicts
COMPARED = 32  # fakes of one class that the watchdog compares
BEST = "best.pt"  # the checkpoint with the best metric so far


class PeriodicEvaluation:
    """Evaluates the averaged generator during a run and keeps the best checkpoint as best.pt.

    Results go into metrics.jsonl with their protocol; which is best is decided among those of the same protocol only, a
    resumed run's earlier ones included.
    """

    def __init__(self, run: Run, writer: CheckpointWriter) -> None:
        settings, self._writer = run.config["eval"], writer
        config = {
            **settings,
            "batch_size": 128,
            **{k: run.config[k] for k in ("features", "seed", "holdout")},
        }
        self._run, self._by, self._device = run, settings["best_by"], run.recipe.device
        self._precision = drawing_precision("auto", self._device)
        self._evaluator: Evaluator = make_evaluator(config, run.dataset, self._device)
        protocol = self._evaluator.protocol(self._precision)
        records = [
            r for r in read_records(run.run_dir) if "best" in r and r.get("protocol") == protocol
        ]
        self._best: float | None = (
            records[-1]["best"] if records and (run.run_dir / BEST).is_file() else None
        )

    def __call__(self, progress: Progress) -> dict[str, float]:
        """Values as metrics/fid and so on; none where the disk refuses. Rank 0 works, the others wait."""
        parts, values = progress.parts(self._run), {}
        if rank() == 0:
            try:
                values = self._evaluate(progress.cur_nimg, parts)
            except (UserError, OSError, MemoryError, RuntimeError) as e:
                if isinstance(e, (MemoryError, RuntimeError)) and not is_out_of_memory(e):
                    raise
                reason = "out of memory" if is_out_of_memory(e) else str(e)
                print0(
                    f"\nno evaluation at {progress.cur_nimg:,} images, training goes on ({reason})"
                )
        barrier()
        return values

    def _evaluate(self, cur_nimg: int, parts: dict[str, Any]) -> dict[str, float]:
        run = self._run
        sharded = any(hasattr(p, "placements") for p in run.state.G_ema.parameters())
        G = restore_generator(parts, self._device) if sharded else run.state.G_ema
        result = self._evaluator(G, self._precision, default_cache_dir())
        print0("\n" + in_lines(shown_values(result.values), f"at {cur_nimg:,} images: "))
        write_nearest(run.run_dir / f"nearest-{cur_nimg:09d}.png", result)
        value = result.values[self._by]
        better = self._best is None or (
            (value < self._best) == SMALLER_IS_BETTER[self._by] and value != self._best
        )
        # on the disk before it is on record: what metrics.jsonl calls the best is there
        if better and self._writer.write(run.run_dir / BEST, {**parts, "metrics": result.values}):
            self._best = value
        record(
            run.run_dir,
            checkpoint.path_at(run.run_dir, cur_nimg).name,
            cur_nimg,
            result,
            {"best": self._best},
        )
        return {f"metrics/{name}": v for name, v in result.values.items()}


class Luxuries:
    """What a run can do without when memory is short: grids, maps and comparisons. What is left out is said once each."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, what: str, make: Callable[[], dict[str, T]]) -> dict[str, T]:
        """What `make` makes, or nothing."""
        try:
            return make()
        except (RuntimeError, MemoryError) as e:
            if (
                not is_out_of_memory(e) or world_size() > 1
            ):  # several processes would lose step with one another
                raise
        if what not in self._told:
            print0(f"\nout of memory: no {what} for now, training goes on")
            self._told.add(what)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {}


class HoldoutLogits:
    """What D thinks of pictures it was not trained on, beside as many that it was: a gap that grows is over-fitting."""

    def __init__(self, run: Run) -> None:
        self._run, data = run, run.dataset
        items = [split[:256] for split in data.split(run.config["holdout"])]
        eye = torch.eye(data.label_dim, device=run.recipe.device)
        self._batches = []
        for chosen in items:
            pixels = torch.from_numpy(data.images[chosen]).to(run.recipe.device).permute(0, 3, 1, 2)
            labels = torch.from_numpy(data.labels[chosen]).to(run.recipe.device)
            self._batches.append(
                (
                    to_float(pixels),
                    eye[labels] if data.label_dim else pixels.new_zeros(len(pixels), 0),
                )
            )

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        run = self._run
        with autocast(run.recipe.device, run.recipe.precision):
            parts = (
                [run.state.D(*part).float() for part in zip(x.split(64), c.split(64))]
                for x, c in self._batches
            )
            seen, unseen = (torch.cat(logits).mean() for logits in parts)
        return {
            "logits/trained_on": float(seen),
            "logits/held_out": float(unseen),
            "logits/gap": float(seen - unseen),
        }


class ThroughputMeter:
    """Images a second, seconds, the shares of them spent waiting for data and for checkpoints, and memory at each tick."""

    def __init__(self, cur_nimg: int) -> None:
        self._start = self._then = time.perf_counter()
        self._nimg, self._waited_s, self._stalled_s = cur_nimg, 0.0, 0.0

    def lap(
        self, cur_nimg: int, waited_s: float, stalled_s: float, device: torch.device
    ) -> dict[str, float]:
        now = time.perf_counter()
        elapsed = max(now - self._then, 1e-9)
        values = {
            "speed/img_per_s": (cur_nimg - self._nimg) / elapsed,
            "speed/session_s": now - self._start,
        }
        values["speed/waiting_for_data"] = (waited_s - self._waited_s) / elapsed
        values["speed/waiting_for_checkpoints"] = (stalled_s - self._stalled_s) / elapsed
        self._then, self._nimg, self._waited_s, self._stalled_s = now, cur_nimg, waited_s, stalled_s
        if device.type == "cuda":
            values["memory/peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        elif resource is not None:
            unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
            values["memory/peak_gb"] = (
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
            )
        return values


class SampleGrid:
    """The grid of fakes from one fixed z each, and the fakes of one class by which a collapse is noticed."""

    def __init__(self, run: Run) -> None:
        device, G, label_dim = run.recipe.device, run.state.G, run.dataset.label_dim
        self._run = run
        self.reals, labels = run.dataset.reals(GRID_PICTURES)
        # with the classes of the reals, so that the two grids compare place by place
        self._c = (
            torch.eye(label_dim)[torch.as_tensor(labels)].to(device)
            if label_dim
            else torch.zeros(len(labels), 0).to(device)
        )
        streams = Streams(run.config["seed"], 0, max(len(labels), COMPARED))
        z = streams.normal("grid", G.z_dim).to(device)  # type: ignore[arg-type]
        self._z, self._z_compared = z[: len(labels)], z[:COMPARED]
        self._one_class = self._c[:1].expand(COMPARED, -1)

    @torch.no_grad()
    def fakes(self) -> torch.Tensor:
        """uint8 (N, C, H, W) of the averaged generator."""
        with autocast(self._run.recipe.device, self._run.recipe.precision):
            return torch.cat(
                [
                    to_uint8(self._run.state.G_ema(z, c))
                    for z, c in zip(self._z.split(16), self._c.split(16))
                ]
            )

    def sheets(self) -> dict[str, Any]:
        """The grid of fakes and the maps of its first, as (H, W) or (H, W, 3) uint8."""
        fakes = self.fakes()
        return {"fakes": sheet_of(fakes), **self.maps(fakes)}

    def maps(self, fakes: torch.Tensor) -> dict[str, Any]:
        """Of the first `fakes`: sheets of where the generator looks, and of what looks fake to the discriminator."""
        G, D, precision = self._run.state.G_ema, self._run.state.D, self._run.recipe.precision
        if any(
            hasattr(p, "placements") for p in G.parameters()
        ):  # spread over processes: no layer can be asked alone
            return {}
        z, c = self._z[:MAPPED], self._c[:MAPPED]
        sheets = {}
        if has_attention(G):
            sheets["attention"] = attention_sheet(*look(G, z, c, precision))
        if hasattr(D, "logit_map"):
            images = fakes[:MAPPED]
            sheets["looks_fake"] = verdict_sheet(images, verdicts(D, images, c, precision))
        return sheets

    @torch.no_grad()
    def diversity(self) -> float:
        """How varied the fakes of one class are, against the reals of the grid; see `watchdog.diversity`."""
        with autocast(self._run.recipe.device, self._run.recipe.precision):
            fakes = self._run.state.G(self._z_compared, self._one_class)
        return float(diversity(fakes, to_float(self.reals)))


def sheet_of(images: torch.Tensor) -> Any:
    """A grid of pictures as (H, W) or (H, W, 3) uint8, small ones enlarged."""
    return enlarge(grid(images), zoom_for(images.shape[-1]))


def start_record(run: Run, cur_nimg: int) -> dict[str, Any]:
    """What a run was started with, each time: versions, device, sizes. config.yaml says what it was told, this what it found."""
    state, data, world = run.state, run.dataset, world_size()
    return {
        "cur_nimg": cur_nimg,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "vgan": vgan.__version__,
        "torch": str(torch.__version__),
        "device": (f"{world} x " if world > 1 else "") + describe(run.recipe.device),
        "precision": run.recipe.precision,
        "parameters": {"G": count_parameters(state.G), "D": count_parameters(state.D)},
        "data": {"images": len(data), "digest": data.digest, **run.identity["sizes"]},
    }


def summary(run: Run, cur_nimg: int) -> str:
    """What is about to happen, in a few lines of at most 80 columns."""
    return "\n".join(report_line(name, text) for name, text in facts(run, cur_nimg).items())


def facts(run: Run, cur_nimg: int) -> dict[str, str]:
    """Data, networks, device and length of a run, in words."""
    config, G, D, data = run.config, run.state.G, run.state.D, run.dataset
    device = run.recipe.device
    c = torch.zeros(1, data.label_dim, device=device)
    g_cost = count_multiply_adds(G, torch.zeros(1, G.z_dim, device=device), c)  # type: ignore[call-overload]
    x = torch.zeros(1, data.img_channels, data.img_resolution, data.img_resolution, device=device)
    d_cost = count_multiply_adds(D, x, c)
    classes = f", {data.label_dim} classes" if data.label_dim else ""
    count = f"{'a stream, of which ' if data.stream else ''}{len(data):,} images{' are packed,' if data.stream else ''}"
    field = getattr(D, "receptive_field_px", None)
    patch = (
        f", each logit sees {min(field, data.img_resolution)} of {data.img_resolution} px"
        if field
        else ""
    )
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device} ({torch.get_num_threads()} threads)"
    )
    return {
        "data": f"{data.name}: {count} of {data.img_resolution} px, {data.img_channels} channels{classes}",
        "G": f"{count_parameters(G):,} parameters, {g_cost / 1e6:,.1f} M multiply-adds an image",
        "D": f"{count_parameters(D):,} parameters, {d_cost / 1e6:,.1f} M multiply-adds an image{patch}",
        "device": f"{name}, {run.recipe.precision}",
        "run": f"{run.run_dir}, {config['total_kimg']:g} kimg"
        + (f", from {cur_nimg:,} images on" if cur_nimg else ""),
    }
