"""A run's parts: data, networks, optimizers, losses and schedules, built from the config before the first step."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vgan.config import require
from vgan.data.augment import Augment
from vgan.data.loader import Loader
from vgan.data.open import build_dataset
from vgan.data.packed import default_cache_dir
from vgan.data.source import Dataset
from vgan.data.webdataset import ShardLoader
from vgan.models.layers import fuse_depthwise
from vgan.training.state import Stats
from vgan.runtime.device import pick_depthwise
from vgan.runtime.distributed import (
    all_gather,
    broadcast_from_rank0,
    local_rank0_first,
    rank,
    world_size,
)
from vgan.runtime.errors import UserError
from vgan.runtime.instantiate import construct, locate
from vgan.training.controls import AdaptiveStrength, default_gamma
from vgan.training.ema import ema_copy
from vgan.training.losses import LOSSES, RELATIVISTIC, Loss
from vgan.training.parallel import shard
from vgan.training.schedules import cosine
from vgan.training.step import HyperParameters, Objective, Split, State
from vgan.training.watchdog import DiversityHistory, RecoveryState

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
    recipe: Objective
    moment_at: Callable[[int], HyperParameters]  # cur_nimg -> the scheduled quantities
    identity: dict[str, Any]  # goes into every checkpoint: config, sizes, data


@dataclass
class Progress:
    """How far a run has come: what a checkpoint carries besides `State`."""

    cur_nimg: int = 0
    rescue: RecoveryState = field(default_factory=RecoveryState)
    varied: DiversityHistory = field(default_factory=DiversityHistory)
    stats: Stats = field(default_factory=Stats)

    def moment(self, run: Run) -> HyperParameters:
        """The scheduled quantities, as the watchdog has changed them."""
        now = run.moment_at(self.cur_nimg)
        change = self.rescue
        return replace(
            now,
            lr_G=now.lr_G * change.lr,
            lr_D=now.lr_D * change.lr,
            gamma=now.gamma * change.gamma,
        )

    def parts(self, run: Run) -> dict[str, Any]:
        """Everything that a checkpoint holds. Every process must come here."""
        mine = {
            "cur_nimg": self.cur_nimg,
            "rescue": self.rescue.parts(),
            "stats": self.stats.state_dict(),
        }
        mine["varied"] = asdict(self.varied)
        return {**run.identity, **run.state.parts(), **mine}

    def load_parts(self, run: Run, parts: dict[str, Any]) -> None:
        """Take run and progress back to where the parts were written; checkpoints of earlier versions lack some."""
        run.state.load_parts(parts)
        self.cur_nimg = int(parts["cur_nimg"])
        self.rescue = RecoveryState(**parts["rescue"]) if "rescue" in parts else RecoveryState()
        self.varied = DiversityHistory(**parts.get("varied", {}))
        self.stats = Stats()
        if "stats" in parts:
            self.stats.load_state_dict(parts["stats"], run.recipe.device)


def set_up(config: dict[str, Any], device: torch.device, precision: str) -> Run:
    """Data, networks, optimizers, losses and schedules: everything that can be wrong, before the first step.

    Raises UserError on all processes where one of them was given other settings or data than the first.
    """
    settings = {k: v for k, v in flat(config).items() if k.split(".")[0] not in _OWN} | {
        "precision": precision
    }
    _require_alike(settings, settings)
    optim, loss, augment = config["optim"], config["loss"], config["augment"]
    d_loss, g_loss = build_loss(loss["name"])
    transforms = build_augment(augment["transforms"])
    rows = _rows_of_each_process(config["batch_size"])
    split = Split(-(-rows // config["batch_gpu"]) if config["batch_gpu"] else 1)
    recipe = Objective(
        d_loss,
        g_loss,
        loss["name"] in RELATIVISTIC,
        transforms,
        device,
        precision,
        config["penalty"],
        split,
    )
    with local_rank0_first():
        dataset = build_dataset(config["data"])
    shards = [url.rpartition("/")[2] for url in dataset.stream.urls] if dataset.stream else []
    _require_alike((dataset.digest, shards), flat(config["data"], "data"))
    rule = "pictures of a stream cannot be kept out of training; leave it at 0"
    require(dataset.stream is None or config["holdout"] == 0, "holdout", config["holdout"], rule)
    ramps = {"gamma": loss["gamma"], "augment_p": augment["p"]} | {
        k: optim[k] for k in ("lr_G", "lr_D", "beta2")
    }
    if config["gamma"] == "auto":
        ramps["gamma"] = dict(
            zip(("start", "end"), default_gamma(dataset.img_resolution, config["batch_size"]))
        )
    schedules = {
        name: cosine(ramp["start"], ramp["end"], config["schedule_kimg"])
        for name, ramp in ramps.items()
    }

    def moment_at(cur_nimg: int) -> HyperParameters:
        return HyperParameters(**{name: schedule(cur_nimg) for name, schedule in schedules.items()})

    sizes = {k: getattr(dataset, k) for k in ("img_resolution", "img_channels", "label_dim")}
    G, D = (
        network.to(device) for network in build_networks(config["model"], sizes, config["seed"])
    )
    if pick_depthwise(config["depthwise"], device) == "triton":
        for network in (G, D):
            fuse_depthwise(network)
    G_ema = ema_copy(G)
    if config["parallel"] == "fsdp" and world_size() > 1:
        for network in (G, D, G_ema):
            shard(network)
    betas = (optim["beta1"], optim["beta2"]["start"])
    opt_G = build_optimizer(optim["optimizer"], G, optim["lr_G"]["start"], betas)
    opt_D = build_optimizer(optim["optimizer"], D, optim["lr_D"]["start"], betas)
    scaler_G, scaler_D = (
        torch.amp.GradScaler(device.type, enabled=precision == "fp16") for _ in range(2)
    )
    controls = AdaptiveStrength(
        augment["target"], augment["adapt_kimg"], correct_gamma=config["gamma"] == "auto"
    ).to(device)
    state = State(G, D, G_ema, opt_G, opt_D, scaler_G, scaler_D, controls)
    data = {"name": dataset.name, "digest": dataset.digest, "labels": list(dataset.label_names)}
    identity = {"config": config, "sizes": sizes, "data": data}
    return Run(
        config, Path(config["run_dir"]).expanduser(), dataset, state, recipe, moment_at, identity
    )


def _require_alike(what: Any, told: dict[str, Any]) -> None:
    """Raise UserError on all processes unless `what` is the same on them; of `told` it names what differs."""
    first, theirs = broadcast_from_rank0(lambda: (what, told))
    keys = (
        [k for k in {**theirs, **told} if told.get(k) != theirs.get(k)][:3] if what != first else []
    )
    mine = "; ".join(
        f"{k} is {told.get(k)} on process {rank()}, {theirs.get(k)} on process 0" for k in keys
    )
    if what != first and not mine:
        mine = f"data: the pictures on process {rank()} are others than those on process 0"
    for differing in all_gather(mine):
        if differing:
            raise UserError(f"{differing}; give all processes the same settings and data")


def flat(node: Any, name: str = "") -> dict[str, Any]:
    """{'a.b': value} of nested dicts."""
    if not isinstance(node, dict):
        return {name: node}
    return {
        k: v
        for key, child in node.items()
        for k, v in flat(child, f"{name}.{key}" if name else str(key)).items()
    }


def open_loader(run: Run, end_wait: Callable[[], bool] = lambda: False) -> Loader | ShardLoader:
    """The batches of a run, or this process's share of them; `end_wait` as for ShardLoader."""
    config, share = run.config, (rank(), world_size())
    if run.dataset.stream is None:
        return Loader(
            run.dataset,
            config["batch_size"],
            config["seed"],
            run.recipe.device,
            holdout=config["holdout"],
            share=share,
        )
    cache = config["data"].get("cache_dir")
    cache_dir = Path(cache).expanduser() if cache else default_cache_dir()
    return ShardLoader(
        run.dataset,
        config["batch_size"],
        config["seed"],
        run.recipe.device,
        share,
        cache_dir,
        end_wait,
    )


def _rows_of_each_process(batch_size: int) -> int:
    n = world_size()
    require(
        batch_size % n == 0,
        "batch_size",
        batch_size,
        f"must be a multiple of the {n} processes; try {batch_size // n * n or n}",
    )
    return batch_size // n


def build_networks(
    model: Mapping[str, Any], sizes: Mapping[str, int], seed: int
) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator for data of `sizes` (img_resolution, img_channels, label_dim), on the CPU.

    The first weights follow from the seed; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        G = construct(model["generator"], "model.generator", **sizes)
        D = construct(model["discriminator"], "model.discriminator", **sizes)
    return G.to(memory_format=torch.channels_last), D.to(memory_format=torch.channels_last)


def build_optimizer(
    node: Mapping[str, Any], network: nn.Module, lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """An optimizer over the network's parameters; lr and betas change during the run where it knows them."""
    target = locate(node["_target_"], "optim.optimizer")
    known = inspect.signature(target).parameters
    moving = {"lr": lr, "betas": betas}
    return construct(
        node,
        "optim.optimizer",
        params=list(network.parameters()),
        **{k: v for k, v in moving.items() if k in known},
    )


def build_loss(name: str) -> tuple[Loss, Loss]:
    """The pair (d_loss, g_loss)."""
    if name not in LOSSES:
        raise UserError(f"loss.name={name}: unknown; use one of {', '.join(LOSSES)}")
    return LOSSES[name]


def build_augment(transforms: Sequence[str]) -> Augment:
    try:
        return Augment(transforms)
    except ValueError as e:
        raise UserError(f"augment.{e}") from e
