"""vgan-train's room: set up, resume, loop."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

from vgan import build, checkpoint
from vgan.config import validate
from vgan.controls import Controls, usual_gamma
from vgan.data.feed import Feed
from vgan.data.source import Dataset
from vgan.data.store import default_cache_dir
from vgan.device import autocast, keep_compiled, pick_compile, pick_depthwise, pick_device, pick_precision, prepare_process
from vgan.distributed import print0
from vgan.drawing import drawing_precision
from vgan.ema import ema_copy, update_ema
from vgan.errors import UserError
from vgan.evaluate import SMALLER_IS_BETTER, Evaluator, format_values, make_evaluator, read_records, record, write_nearest
from vgan.files import write_atomically, write_png
from vgan.images import enlarge, grid, to_float, to_uint8, zoom_for
from vgan.losses import RELATIVISTIC
from vgan.models.cost import count_multiply_adds, count_parameters
from vgan.models.layers import fuse_depthwise
from vgan.randomness import Streams
from vgan.schedules import cosine, ema_decay
from vgan.stats import Journal, Stats
from vgan.steps import Moment, Recipe, State, compiled, train_step
from vgan.stopping import Stopped, StopRequest

GRID_PICTURES = 64
BEST = "best.pt"  # the checkpoint with the best metric so far
# Settings that say where, how long and how often, not what is learned: they change on resume without a word.
_FREE = (
    "run_dir", "device", "precision", "compile", "cuda_graphs", "depthwise", "threads", "total_kimg", "tick_kimg",
    "snapshot_kimg", "checkpoint_kimg", "keep_checkpoints", "schedule_kimg", "data", "eval_kimg", "eval", "features",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What the loop works on."""

    config: dict[str, Any]  # the resolved TrainConfig
    run_dir: Path
    dataset: Dataset
    state: State
    recipe: Recipe
    moment_at: Callable[[int], Moment]  # cur_nimg -> the scheduled quantities
    identity: dict[str, Any]  # goes into every checkpoint: config, sizes, data


def train(cfg: DictConfig) -> Path:
    """Train as `cfg` (a TrainConfig) says, from the newest checkpoint of its run_dir if there is one.

    Returns the run folder. Raises UserError, before anything is written, for what cannot work.
    """
    validate(cfg)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    device = pick_device(config["device"])
    precision = pick_precision(config["precision"], device)
    prepare_process(device, precision, config["threads"])
    run = set_up(config, device, precision)
    cur_nimg = resume(run)
    if cur_nimg >= _total_nimg(config):
        longer = f"To train longer: total_kimg={2 * config['total_kimg']:g}"
        print0(f"{run.run_dir} is complete: {cur_nimg:,} images. {longer}\n{_next_commands(run.run_dir)}")
        return run.run_dir
    print0(_summary(run, cur_nimg))
    if pick_compile(config["compile"], device):
        keep_compiled(default_cache_dir() / "compiled")
        run = replace(run, recipe=compiled(run.recipe, config["cuda_graphs"]))
    _start_folder(run.run_dir, config)
    with StopRequest() as stop:
        loop(run, cur_nimg, stop)
    return run.run_dir


def set_up(config: dict[str, Any], device: torch.device, precision: str) -> Run:
    """Data, networks, optimizers, losses and schedules: everything that can be wrong, before the first step."""
    optim, loss, augment = config["optim"], config["loss"], config["augment"]
    d_loss, g_loss = build.build_loss(loss["name"])
    transforms = build.build_augment(augment["transforms"])
    recipe = Recipe(d_loss, g_loss, loss["name"] in RELATIVISTIC, transforms, device, precision, config["penalty"])
    dataset = build.build_dataset(config["data"])
    ramps = {"gamma": loss["gamma"], "augment_p": augment["p"]} | {k: optim[k] for k in ("lr_G", "lr_D", "beta2")}
    if config["gamma"] == "auto":
        ramps["gamma"] = dict(zip(("start", "end"), usual_gamma(dataset.img_resolution, config["batch_size"])))
    schedules = {name: cosine(ramp["start"], ramp["end"], config["schedule_kimg"]) for name, ramp in ramps.items()}

    def moment_at(cur_nimg: int) -> Moment:
        return Moment(**{name: schedule(cur_nimg) for name, schedule in schedules.items()})

    sizes = {k: getattr(dataset, k) for k in ("img_resolution", "img_channels", "label_dim")}
    G, D = (network.to(device) for network in build.build_networks(config["model"], sizes, config["seed"]))
    if pick_depthwise(config["depthwise"], device) == "triton":
        for network in (G, D):
            fuse_depthwise(network)
    betas = (optim["beta1"], optim["beta2"]["start"])
    opt_G = build.build_optimizer(optim["optimizer"], G, optim["lr_G"]["start"], betas)
    opt_D = build.build_optimizer(optim["optimizer"], D, optim["lr_D"]["start"], betas)
    scaler_G, scaler_D = (torch.amp.GradScaler(device.type, enabled=precision == "fp16") for _ in range(2))
    controls = Controls(augment["target"], augment["adapt_kimg"], correct_gamma=config["gamma"] == "auto").to(device)
    state = State(G, D, ema_copy(G), opt_G, opt_D, scaler_G, scaler_D, controls)
    data = {"name": dataset.name, "digest": dataset.digest, "labels": list(dataset.label_names)}
    identity = {"config": config, "sizes": sizes, "data": data}
    return Run(config, Path(config["run_dir"]).expanduser(), dataset, state, recipe, moment_at, identity)


def resume(run: Run) -> int:
    """Load the newest checkpoint of the run folder, if there is one, and return its cur_nimg (else 0).

    Raises UserError where the checkpoint is of another model or of other data; other changes are printed.
    """
    found = checkpoint.all_checkpoints(run.run_dir) if run.run_dir.is_dir() else []
    if not found:
        return 0
    parts = checkpoint.load(found[-1])
    before, now = _flat(parts["config"]), _flat(run.config)
    changed = [k for k in now.keys() | before.keys() if before.get(k) != now.get(k) and k.split(".")[0] not in _FREE]
    other = [k for k in sorted(changed) if k.startswith(("model.", "optim.optimizer._target_")) and k != "model.name"]
    if other:
        k, where = other[0], f"run_dir={run.run_dir}"
        what = f"{k} was {before.get(k)}, is now {now.get(k)}"
        raise UserError(f"{where}: holds another model or optimizer ({what}); use another run_dir")
    if parts["data"]["digest"] != run.dataset.digest:
        raise UserError(f"run_dir={run.run_dir}: was trained on other data ({parts['data']['name']}); use another run_dir")
    for k in sorted(changed):
        print0(f"changed since the checkpoint: {k} was {before.get(k)}, is now {now.get(k)}")
    run.state.load_parts(parts)
    return int(parts["cur_nimg"])


def loop(run: Run, cur_nimg: int, stop: StopRequest) -> None:
    """The training loop. Time is counted in images; intervals need not divide by the batch size."""
    config, state, recipe = run.config, run.state, run.recipe
    batch_size, total_nimg, ema = config["batch_size"], _total_nimg(config), config["ema"]
    penalty_every = config["loss"]["penalty_every"]
    feed = Feed(run.dataset, batch_size, config["seed"], recipe.device, holdout=config["holdout"])
    unseen = Unseen(run) if config["holdout"] else None
    stats, journal, watch = Stats(), Journal(run.run_dir, cur_nimg), Watch(cur_nimg)
    judge = Judge(run) if config["eval_kimg"] > 0 else None
    z, c = _grid_inputs(run, feed)
    if cur_nimg == 0:
        journal.image(0, "reals", _save_grid(run.run_dir / "reals.png", feed.reals(GRID_PICTURES)[0]))
    bar = tqdm(total=total_nimg, initial=cur_nimg, unit="img", unit_scale=True, dynamic_ncols=True, smoothing=0.05)
    try:
        while cur_nimg < total_nimg and not stop.requested:
            streams = Streams(config["seed"], cur_nimg, batch_size, recipe.device)
            now = run.moment_at(cur_nimg)
            penalize = (cur_nimg // batch_size) % penalty_every == 0
            real, label = feed.batch(cur_nimg)
            stats.add(train_step(state, recipe, now, real, label, streams, penalty_every if penalize else 0))
            before, cur_nimg = cur_nimg, cur_nimg + batch_size
            update_ema(state.G_ema, state.G, ema_decay(ema["halflife_kimg"], ema["ramp"], cur_nimg, batch_size))
            bar.update(batch_size)

            last = cur_nimg >= total_nimg or stop.requested
            if last or due(config["tick_kimg"], before, cur_nimg):
                means = stats.means()
                means |= unseen() if unseen else {}
                journal.write(cur_nimg, means | _knobs(now, state.controls) | watch.lap(cur_nimg, feed.waited_s, recipe.device))
                bar.set_postfix_str(" ".join(f"{k} {means[f'loss/{k}']:.3f}" for k in "DG"))
            if last or due(config["snapshot_kimg"], before, cur_nimg):
                fakes = _save_grid(run.run_dir / f"fakes-{cur_nimg:09d}.png", _draw(run, z, c))
                journal.image(cur_nimg, "fakes", fakes)
            if last or due(config["checkpoint_kimg"], before, cur_nimg):
                parts = {**run.identity, **state.parts(), "cur_nimg": cur_nimg}
                checkpoint.save(checkpoint.path_at(run.run_dir, cur_nimg), parts, config["keep_checkpoints"])
            if judge and (cur_nimg >= total_nimg or due(config["eval_kimg"], before, cur_nimg)):
                journal.write(cur_nimg, judge(cur_nimg))
    finally:
        bar.close()
        journal.close()
        feed.close()
    if cur_nimg < total_nimg:
        raise Stopped(f"stopped at {cur_nimg:,} images and saved; the same command goes on")
    print0(f"Done: {cur_nimg:,} images.\n{_next_commands(run.run_dir)}")


def due(every_kimg: float, before: int, now: int) -> bool:
    """Whether a multiple of every_kimg was passed between two image counts."""
    every_nimg = max(1, round(every_kimg * 1000))
    return before // every_nimg < now // every_nimg


class Judge:
    """Evaluates the averaged generator during a run and keeps the best checkpoint as best.pt.

    Results go into metrics.jsonl with their protocol; which is best is decided among those of the same protocol only, a
    resumed run's earlier ones included.
    """

    def __init__(self, run: Run) -> None:
        settings = run.config["eval"]
        config = {**settings, "batch_size": 128, **{k: run.config[k] for k in ("features", "seed", "holdout")}}
        self._run, self._by, self._device = run, settings["best_by"], run.recipe.device
        self._precision = drawing_precision("auto", self._device)
        self._evaluator: Evaluator = make_evaluator(config, run.dataset, self._device)
        protocol = self._evaluator.protocol(self._precision)
        records = [r for r in read_records(run.run_dir) if "best" in r and r["protocol"] == protocol]
        self._best: float | None = records[-1]["best"] if records and (run.run_dir / BEST).is_file() else None

    def __call__(self, cur_nimg: int) -> dict[str, float]:
        """Values as metrics/fid and so on."""
        run = self._run
        result = self._evaluator(run.state.G_ema, self._precision, default_cache_dir())
        print0(f"\nat {cur_nimg:,} images: {format_values(result.values)}")
        write_nearest(run.run_dir / f"nearest-{cur_nimg:09d}.png", result)
        value = result.values[self._by]
        if self._best is None or ((value < self._best) == SMALLER_IS_BETTER[self._by] and value != self._best):
            self._best = value
            parts = {**run.identity, **run.state.parts(), "cur_nimg": cur_nimg, "metrics": result.values}
            checkpoint.save(run.run_dir / BEST, parts, run.config["keep_checkpoints"])
        record(run.run_dir, checkpoint.path_at(run.run_dir, cur_nimg).name, cur_nimg, result, {"best": self._best})
        return {f"metrics/{name}": v for name, v in result.values.items()}


class Unseen:
    """What D thinks of pictures it was not trained on, beside as many that it was: a gap that grows is over-fitting."""

    def __init__(self, run: Run) -> None:
        self._run, data = run, run.dataset
        items = [split[:256] for split in data.split(run.config["holdout"])]
        eye = torch.eye(data.label_dim, device=run.recipe.device)
        self._batches = []
        for chosen in items:
            pixels = torch.from_numpy(data.images[chosen]).to(run.recipe.device).permute(0, 3, 1, 2)
            labels = torch.from_numpy(data.labels[chosen]).to(run.recipe.device)
            self._batches.append((to_float(pixels), eye[labels] if data.label_dim else pixels.new_zeros(len(pixels), 0)))

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        run = self._run
        with autocast(run.recipe.device, run.recipe.precision):
            seen, unseen = (run.state.D(*batch).float().mean() for batch in self._batches)
        return {"logits/trained_on": float(seen), "logits/held_out": float(unseen), "logits/gap": float(seen - unseen)}


class Watch:
    """Images a second, seconds, the share of them spent waiting for data, and memory at each tick."""

    def __init__(self, cur_nimg: int) -> None:
        self._start = self._then = time.perf_counter()
        self._nimg, self._waited_s = cur_nimg, 0.0

    def lap(self, cur_nimg: int, waited_s: float, device: torch.device) -> dict[str, float]:
        now = time.perf_counter()
        elapsed = max(now - self._then, 1e-9)
        values = {"speed/img_per_s": (cur_nimg - self._nimg) / elapsed, "speed/session_s": now - self._start}
        values["speed/waiting_for_data"] = (waited_s - self._waited_s) / elapsed
        self._then, self._nimg, self._waited_s = now, cur_nimg, waited_s
        if device.type == "cuda":
            values["memory/peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        elif resource is not None:
            unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
            values["memory/peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        return values


def _knobs(now: Moment, controls: Controls) -> dict[str, float]:
    """The scheduled quantities, as corrected by the run."""
    values = asdict(now)
    values["gamma"] *= float(controls.gamma_factor())
    return values if controls.target is None else values | {"augment_p": float(controls.augment_p)}


def _total_nimg(config: dict[str, Any]) -> int:
    return round(config["total_kimg"] * 1000)


def _flat(node: Any, name: str = "") -> dict[str, Any]:
    """{'a.b': value} of nested dicts."""
    if not isinstance(node, dict):
        return {name: node}
    return {k: v for key, child in node.items() for k, v in _flat(child, f"{name}.{key}" if name else str(key)).items()}


def _grid_inputs(run: Run, feed: Feed) -> tuple[torch.Tensor, torch.Tensor]:
    """The fixed z of the fakes grid, with the classes of the reals grid, so that the two compare place by place."""
    device, G = run.recipe.device, run.state.G
    labels = feed.reals(GRID_PICTURES)[1]
    c = torch.zeros(len(labels), run.dataset.label_dim)
    if run.dataset.label_dim:
        c[torch.arange(len(labels)), torch.as_tensor(labels)] = 1
    z = Streams(run.config["seed"], 0, len(labels)).normal("grid", G.z_dim)  # type: ignore[arg-type]
    return z.to(device), c.to(device)


@torch.no_grad()
def _draw(run: Run, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    with autocast(run.recipe.device, run.recipe.precision):
        return torch.cat([to_uint8(run.state.G_ema(zz, cc)) for zz, cc in zip(z.split(16), c.split(16))])


def _save_grid(path: Path, images: torch.Tensor) -> np.ndarray:
    sheet = enlarge(grid(images), zoom_for(images.shape[-1]))
    write_png(path, sheet)
    return sheet


def _start_folder(run_dir: Path, config: dict[str, Any]) -> None:
    """Make the folder and write config.yaml, unless it says the same already."""
    text = OmegaConf.to_yaml(OmegaConf.create(config)).encode()
    path = run_dir / "config.yaml"
    if not path.is_file() or path.read_bytes() != text:
        write_atomically(path, text)


def _summary(run: Run, cur_nimg: int) -> str:
    """What is about to happen, in a few lines."""
    config, G, D, data = run.config, run.state.G, run.state.D, run.dataset
    device = run.recipe.device
    c = torch.zeros(1, data.label_dim, device=device)
    g_cost = count_multiply_adds(G, torch.zeros(1, G.z_dim, device=device), c)  # type: ignore[call-overload]
    x = torch.zeros(1, data.img_channels, data.img_resolution, data.img_resolution, device=device)
    d_cost = count_multiply_adds(D, x, c)
    classes = f", {data.label_dim} classes" if data.label_dim else ""
    field = getattr(D, "receptive_field_px", None)
    patch = f", each logit sees {min(field, data.img_resolution)} of {data.img_resolution} px" if field else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({torch.get_num_threads()} threads)"
    lines = [
        ("data", f"{data.name}: {len(data):,} images of {data.img_resolution} px, {data.img_channels} channels{classes}"),
        ("G", f"{count_parameters(G):,} parameters, {g_cost / 1e6:,.1f} M multiply-adds an image"),
        ("D", f"{count_parameters(D):,} parameters, {d_cost / 1e6:,.1f} M multiply-adds an image{patch}"),
        ("device", f"{name}, {run.recipe.precision}"),
        ("run", f"{run.run_dir}, {config['total_kimg']:g} kimg" + (f", from {cur_nimg:,} images on" if cur_nimg else "")),
    ]
    return "\n".join(f"{name:<7} {text}" for name, text in lines)


def _next_commands(run_dir: Path) -> str:
    return f"Next:  vgan-sample ckpt={run_dir} out=grid.png\n       tensorboard --logdir {run_dir}"
