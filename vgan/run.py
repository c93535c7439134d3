"""A run's parts: data, networks, optimizers, losses and schedules, built from the config before the first step."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vgan import build
from vgan.config import require
from vgan.controls import Controls, usual_gamma
from vgan.data.feed import Feed
from vgan.data.source import Dataset
from vgan.data.store import default_cache_dir
from vgan.data.stream import StreamFeed
from vgan.device import pick_depthwise
from vgan.distributed import everywhere, first_on_machine, from_first, rank, world_size
from vgan.ema import ema_copy
from vgan.errors import UserError
from vgan.losses import RELATIVISTIC
from vgan.models.layers import fuse_depthwise
from vgan.parallel import shard
from vgan.schedules import cosine
from vgan.stats import Stats
from vgan.steps import Moment, Recipe, Split, State
from vgan.watchdog import Rescue, Varied

# Settings that may differ between the processes of a run: where things lie on a machine, and what rank 0 alone makes use of.
# Data sets are compared by their digest.
_OWN = ("run_dir", "device", "threads", "precision", "data", "features")


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


@dataclass
class Progress:
    """How far a run has come: what a checkpoint carries besides `State`."""

    cur_nimg: int = 0
    rescue: Rescue = field(default_factory=Rescue)
    varied: Varied = field(default_factory=Varied)
    stats: Stats = field(default_factory=Stats)

    def moment(self, run: Run) -> Moment:
        """The scheduled quantities, as the watchdog has changed them."""
        now = run.moment_at(self.cur_nimg)
        change = self.rescue
        return replace(now, lr_G=now.lr_G * change.lr, lr_D=now.lr_D * change.lr, gamma=now.gamma * change.gamma)

    def parts(self, run: Run) -> dict[str, Any]:
        """Everything that a checkpoint holds. Every process must come here."""
        mine = {"cur_nimg": self.cur_nimg, "rescue": self.rescue.parts(), "stats": self.stats.state_dict()}
        mine["varied"] = asdict(self.varied)
        return {**run.identity, **run.state.parts(), **mine}

    def load_parts(self, run: Run, parts: dict[str, Any]) -> None:
        """Take run and progress back to where the parts were written; checkpoints of earlier versions lack some."""
        run.state.load_parts(parts)
        self.cur_nimg = int(parts["cur_nimg"])
        self.rescue = Rescue(**parts["rescue"]) if "rescue" in parts else Rescue()
        self.varied = Varied(**parts.get("varied", {}))
        self.stats = Stats()
        if "stats" in parts:
            self.stats.load_state_dict(parts["stats"], run.recipe.device)


def set_up(config: dict[str, Any], device: torch.device, precision: str) -> Run:
    """Data, networks, optimizers, losses and schedules: everything that can be wrong, before the first step.

    Raises UserError on all processes where one of them was given other settings or data than the first.
    """
    settings = {k: v for k, v in flat(config).items() if k.split(".")[0] not in _OWN} | {"precision": precision}
    _require_alike(settings, settings)
    optim, loss, augment = config["optim"], config["loss"], config["augment"]
    d_loss, g_loss = build.build_loss(loss["name"])
    transforms = build.build_augment(augment["transforms"])
    rows = _rows_of_each_process(config["batch_size"])
    split = Split(-(-rows // config["batch_gpu"]) if config["batch_gpu"] else 1)
    recipe = Recipe(d_loss, g_loss, loss["name"] in RELATIVISTIC, transforms, device, precision, config["penalty"], split)
    with first_on_machine():
        dataset = build.build_dataset(config["data"])
    shards = [url.rpartition("/")[2] for url in dataset.stream.urls] if dataset.stream else []
    _require_alike((dataset.digest, shards), flat(config["data"], "data"))
    rule = "pictures of a stream cannot be kept out of training; leave it at 0"
    require(dataset.stream is None or config["holdout"] == 0, "holdout", config["holdout"], rule)
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
    G_ema = ema_copy(G)
    if config["parallel"] == "fsdp" and world_size() > 1:
        for network in (G, D, G_ema):
            shard(network)
    betas = (optim["beta1"], optim["beta2"]["start"])
    opt_G = build.build_optimizer(optim["optimizer"], G, optim["lr_G"]["start"], betas)
    opt_D = build.build_optimizer(optim["optimizer"], D, optim["lr_D"]["start"], betas)
    scaler_G, scaler_D = (torch.amp.GradScaler(device.type, enabled=precision == "fp16") for _ in range(2))
    controls = Controls(augment["target"], augment["adapt_kimg"], correct_gamma=config["gamma"] == "auto").to(device)
    state = State(G, D, G_ema, opt_G, opt_D, scaler_G, scaler_D, controls)
    data = {"name": dataset.name, "digest": dataset.digest, "labels": list(dataset.label_names)}
    identity = {"config": config, "sizes": sizes, "data": data}
    return Run(config, Path(config["run_dir"]).expanduser(), dataset, state, recipe, moment_at, identity)


def _require_alike(what: Any, told: dict[str, Any]) -> None:
    """Raise UserError on all processes unless `what` is the same on them; of `told` it names what differs."""
    first, theirs = from_first(lambda: (what, told))
    keys = [k for k in {**theirs, **told} if told.get(k) != theirs.get(k)][:3] if what != first else []
    mine = "; ".join(f"{k} is {told.get(k)} on process {rank()}, {theirs.get(k)} on process 0" for k in keys)
    if what != first and not mine:
        mine = f"data: the pictures on process {rank()} are others than those on process 0"
    for differing in everywhere(mine):
        if differing:
            raise UserError(f"{differing}; give all processes the same settings and data")


def flat(node: Any, name: str = "") -> dict[str, Any]:
    """{'a.b': value} of nested dicts."""
    if not isinstance(node, dict):
        return {name: node}
    return {k: v for key, child in node.items() for k, v in flat(child, f"{name}.{key}" if name else str(key)).items()}


def open_feed(run: Run, end_wait: Callable[[], bool] = lambda: False) -> Feed | StreamFeed:
    """The batches of a run, or this process's share of them; `end_wait` as for StreamFeed."""
    config, share = run.config, (rank(), world_size())
    if run.dataset.stream is None:
        return Feed(run.dataset, config["batch_size"], config["seed"], run.recipe.device, holdout=config["holdout"], share=share)
    cache = config["data"].get("cache_dir")
    cache_dir = Path(cache).expanduser() if cache else default_cache_dir()
    return StreamFeed(run.dataset, config["batch_size"], config["seed"], run.recipe.device, share, cache_dir, end_wait)


def _rows_of_each_process(batch_size: int) -> int:
    n = world_size()
    require(
        batch_size % n == 0, "batch_size", batch_size, f"must be a multiple of the {n} processes; try {batch_size // n * n or n}"
    )
    return batch_size // n
