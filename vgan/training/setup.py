"""Run: everything that training needs, built from the config before the first step."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vgan.config import TrainConfig
from vgan.data.augment import Augment
from vgan.data.loader import Batch, Loader
from vgan.data.open import build_dataset, cache_dir_of
from vgan.data.packed import default_cache_dir
from vgan.data.source import Dataset
from vgan.data.webdataset import ShardLoader
from vgan.models.discriminator import DiscriminatorBase
from vgan.models.generator import GeneratorBase
from vgan.models.layers import fuse_depthwise, select_pointwise
from vgan.runs import checkpoint
from vgan.runtime.device import keep_compiled, pick_compile, pick_depthwise
from vgan.runtime.distributed import (
    all_gather,
    broadcast_from_rank0,
    local_rank0_first,
    print0,
    rank,
    world_size,
)
from vgan.runtime.errors import UserError
from vgan.runtime.images import Resolution, to_float
from vgan.runtime.instantiate import construct, locate
from vgan.runtime.nested import flatten
from vgan.runtime.rng import Streams
from vgan.schema import Ramp, require
from vgan.training.initialize import Source, freeze_stages, initialize, read_source
from vgan.training.losses import LOSSES, RELATIVISTIC, SHIFT_INVARIANT
from vgan.training.optimize import DDPObjective, MicroBatches, apply_fsdp
from vgan.training.schedules import (
    AdaptiveStrength,
    HyperParameters,
    Schedule,
    cosine,
    default_gamma,
    ema_decay,
)
from vgan.training.state import TrainState, ema_copy
from vgan.training.step import Objective

BACKBONE_SAMPLE = 256  # images over which the features of a frozen backbone are standardised
# Settings that may differ between the processes of a run: places on a machine, and what only
# rank 0 uses. Data sets are compared by their digest.
_PER_PROCESS = ("run_dir", "device", "threads", "precision", "data", "features")


class DataError(UserError):
    """Images that cannot be read during a run."""


@dataclass
class Run:
    """What the loop works on."""

    cfg: TrainConfig
    run_dir: Path
    dataset: Dataset
    state: TrainState
    objective: Objective
    schedules: dict[str, Schedule]  # of lr_G, lr_D, beta2, gamma and augment_p
    identity: dict[str, Any]  # goes into every checkpoint: config, sizes, data

    @property
    def device(self) -> torch.device:
        return self.objective.device

    @property
    def precision(self) -> str:
        return self.objective.precision

    @property
    def total_nimg(self) -> int:
        return round(self.cfg.total_kimg * 1000)

    def hyperparameters(self) -> HyperParameters:
        """Return the scheduled quantities of the next step, as roll-backs have changed them."""
        cfg, cur_nimg, recovery = self.cfg, self.state.cur_nimg, self.state.recovery
        values = {name: schedule(cur_nimg) for name, schedule in self.schedules.items()}
        values["lr_G"] *= recovery.lr
        values["lr_D"] *= recovery.lr
        values["gamma"] *= recovery.gamma
        every, size = cfg.loss.penalty_every, cfg.batch_size
        is_penalized = (cur_nimg // size) % every == 0
        decay = ema_decay(cfg.ema.halflife_kimg, cfg.ema.ramp, cur_nimg + size, size)
        return HyperParameters(
            **values, penalty_weight=every if is_penalized else 0, ema_decay=decay
        )

    def open_loader(self, stop_waiting: Callable[[], bool] = lambda: False) -> Loader | ShardLoader:
        """Open this process's share of the batches; `stop_waiting` as for ShardLoader."""
        cfg, share = self.cfg, (rank(), world_size())
        common = (self.dataset, cfg.batch_size, cfg.seed, self.device)
        if self.dataset.stream is None:
            return Loader(*common, holdout=cfg.holdout, share=share)
        return ShardLoader(*common, share, cache_dir_of(cfg.data), stop_waiting)

    def batch(self, loader: Loader | ShardLoader) -> Batch:
        """Return images cur_nimg .. cur_nimg + batch_size - 1 with their random numbers.

        Raises DataError where the images cannot be read.
        """
        cur_nimg = self.state.cur_nimg
        try:
            real, c = loader.batch(cur_nimg)
        except UserError as e:
            raise DataError(str(e)) from e
        seed, first = self.state.recovery.seed(self.cfg.seed), cur_nimg + rank() * len(real)
        return Batch(real, c, Streams(seed, first, len(real), self.device))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a checkpoint holds. Every process must call it."""
        return {**self.identity, **self.state.state_dict()}


def setup(cfg: TrainConfig, device: torch.device, precision: str) -> Run:
    """Build data, networks, optimizers, losses and schedules, so that every mistake shows first.

    Raises UserError, on all processes, where one has other settings or data than rank 0.
    """
    config = asdict(cfg)
    settings = {k: v for k, v in flatten(config).items() if k.split(".")[0] not in _PER_PROCESS}
    settings["precision"] = precision
    settings.pop("model.discriminator.weights", None)  # the digest counts, not the path
    _require_same_on_all_ranks(settings, settings)
    objective = build_objective(cfg, device, precision)
    with local_rank0_first():
        dataset = build_dataset(cfg.data)
    shards = [url.rpartition("/")[2] for url in dataset.stream.urls] if dataset.stream else []
    _require_same_on_all_ranks((dataset.digest, shards), flatten(config["data"], "data"))
    rule = "a stream has no held-out images; leave it at 0"
    require(dataset.stream is None or cfg.holdout == 0, "holdout", cfg.holdout, rule)
    sizes = {k: getattr(dataset, k) for k in ("img_resolution", "img_channels", "label_dim")}
    data: dict[str, Any] = {"name": dataset.name, "digest": dataset.digest}
    data["labels"] = list(dataset.label_names)
    if dataset.conditions:
        data["conditions"] = dataset.conditions.state_dict()
    identity: dict[str, Any] = {"config": config, "sizes": sizes, "data": data}
    run_dir = Path(cfg.run_dir).expanduser()
    init = None
    if cfg.init and not broadcast_from_rank0(lambda: checkpoint.all_checkpoints(run_dir)):
        init = read_source(cfg.init)
        identity["init"] = init.digest
    state = build_state(cfg, sizes, device, precision, init, dataset.c_names)
    if state.D.judge_weight > 0:
        count = min(BACKBONE_SAMPLE, len(dataset))
        items = [i * len(dataset) // count for i in range(count)]  # of all classes
        pixels = torch.tensor(dataset.images[items]).permute(0, 3, 1, 2)
        with local_rank0_first():
            state.D.load_backbone(to_float(pixels.to(device)))
        identity["backbone"] = state.D.backbone_digest
    found = {key: identity.get(key) for key in ("backbone", "init")}
    _require_same_on_all_ranks(found, found)
    schedules = build_schedules(cfg, dataset.img_resolution)
    return Run(cfg, run_dir, dataset, state, objective, schedules, identity)


def build_objective(cfg: TrainConfig, device: torch.device, precision: str) -> Objective:
    """Build the losses, penalty and augmentation. Raises UserError for an unknown name."""
    name, n = cfg.loss.name, world_size()
    if name not in LOSSES:
        raise UserError(f"loss.name={name}: unknown; use one of {', '.join(LOSSES)}")
    rule = f"must be a multiple of the {n} processes; try {cfg.batch_size // n * n or n}"
    require(cfg.batch_size % n == 0, "batch_size", cfg.batch_size, rule)
    try:
        augment = Augment(cfg.augment.transforms)
    except ValueError as e:
        raise UserError(f"augment.{e}") from e
    micro_batches = MicroBatches()
    if cfg.batch_gpu:
        micro_batches.count = -(-cfg.batch_size // n // cfg.batch_gpu)
    is_relativistic = name in RELATIVISTIC
    return Objective(
        *LOSSES[name], is_relativistic, augment, device, precision, cfg.penalty, micro_batches
    )


def build_schedules(cfg: TrainConfig, img_resolution: Resolution) -> dict[str, Schedule]:
    """Build the schedules of lr_G, lr_D, beta2, gamma and augment_p."""
    ramps = {"lr_G": cfg.optim.lr_G, "lr_D": cfg.optim.lr_D, "beta2": cfg.optim.beta2}
    ramps |= {"gamma": cfg.loss.gamma, "augment_p": cfg.augment.p}
    if cfg.gamma == "auto":
        ramps["gamma"] = Ramp(*default_gamma(img_resolution, cfg.batch_size))
    kimg = cfg.schedule_kimg
    return {name: cosine(ramp.start, ramp.end, kimg) for name, ramp in ramps.items()}


def build_state(
    cfg: TrainConfig,
    sizes: Mapping[str, Any],
    device: torch.device,
    precision: str,
    init: Source | None = None,
    labels: Sequence[str] = (),
) -> TrainState:
    """Build the networks and their optimizers for data of `sizes`, on the device.

    With `init`, the networks of another run are copied as far as they fit; `labels` are the names
    of the columns of c.
    """
    G, D = build_networks(cfg, sizes)
    if init is not None:
        print0(initialize(G, D, init, tuple(labels), cfg.freeze_d))
    if cfg.freeze_d > 0:
        freeze_stages(D, cfg.freeze_d)
    G, D = G.to(device), D.to(device)
    if pick_depthwise(cfg.depthwise, device) == "triton":
        fuse_depthwise(G)
        fuse_depthwise(D)
    for network in (G, D):  # auto: convolutions, as nothing else was timed on a GPU
        select_pointwise(network, cfg.pointwise == "matmul")
    if cfg.loss.name in SHIFT_INVARIANT:
        # Rounding alone would move the bias of the logits, at Adam's full rate. Its gradient is not
        # cut off in the network because DDP expects one of each weight.
        for bias in D.logit_biases():
            bias.register_hook(torch.zeros_like)
    G_ema = ema_copy(G)
    if cfg.parallel == "fsdp" and world_size() > 1:
        for network in (G, D, G_ema):
            apply_fsdp(network)
    is_fp16 = precision == "fp16"
    strength = AdaptiveStrength(
        cfg.augment.target, cfg.augment.adapt_kimg, correct_gamma=cfg.gamma == "auto"
    )
    return TrainState(
        G,
        D,
        G_ema,
        build_optimizer(cfg, G, cfg.optim.lr_G.start),
        build_optimizer(cfg, D, cfg.optim.lr_D.start),
        torch.amp.GradScaler(device.type, enabled=is_fp16),
        torch.amp.GradScaler(device.type, enabled=is_fp16),
        strength.to(device),
    )


def build_networks(
    cfg: TrainConfig, sizes: Mapping[str, Any]
) -> tuple[GeneratorBase, DiscriminatorBase]:
    """Build G and D for data of `sizes` (img_resolution, img_channels, label_dim), on the CPU.

    The initial weights follow from cfg.seed; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        G = construct(cfg.model.generator, "model.generator", **sizes)
        D = construct(cfg.model.discriminator, "model.discriminator", **sizes)
    return G.to(memory_format=torch.channels_last), D.to(memory_format=torch.channels_last)


def build_optimizer(cfg: TrainConfig, network: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    """Build an optimizer over a network's parameters; lr and betas are given where it has them."""
    node, betas = cfg.optim.optimizer, (cfg.optim.beta1, cfg.optim.beta2.start)
    known = inspect.signature(locate(node["_target_"], "optim.optimizer")).parameters
    scheduled = {k: v for k, v in (("lr", lr), ("betas", betas)) if k in known}
    parameters = [p for p in network.parameters() if p.requires_grad]
    return construct(node, "optim.optimizer", params=parameters, **scheduled)


def prepare_step(run: Run) -> None:
    """Compile the run's objective, and wrap it for DDP, where the config asks for it."""
    cfg, state, objective = run.cfg, run.state, run.objective
    if pick_compile(cfg.compile, run.device):
        keep_compiled(default_cache_dir() / "compiled")
        objective = compile_objective(objective, cfg.cuda_graphs)
    if world_size() > 1 and cfg.parallel == "ddp":
        d, g = DDPObjective(state.D, objective.d), DDPObjective(state.G, objective.g)
        objective = replace(objective, d=d, g=g)
    run.objective = objective


def compile_objective(how: Objective, cuda_graphs: bool = False) -> Objective:
    """Return the objective compiled: a graph for G, one for D, one more where penalties skip steps.

    Later steps reuse them, since whatever changes by schedule enters as a tensor. cuda_graphs
    replays the kernels of a graph in one launch, and keeps its memory.
    """
    mode = "reduce-overhead" if cuda_graphs else None
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "mode": mode}
    return replace(how, d=torch.compile(how.d, **options), g=torch.compile(how.g, **options))


def _require_same_on_all_ranks(value: Any, details: dict[str, Any]) -> None:
    """Raise UserError on all processes unless `value` is the same; `details` name what differs."""
    value0, details0 = broadcast_from_rank0(lambda: (value, details))
    message = ""
    if value != value0:
        keys = [k for k in {**details0, **details} if details.get(k) != details0.get(k)]
        pairs = [f"{k} is {details.get(k)} on process {rank()}, {details0.get(k)}" for k in keys]
        message = "; ".join(f"{pair} on process 0" for pair in pairs[:3])
        message = message or f"data: the images on process {rank()} differ from those on process 0"
    messages = [m for m in all_gather(message) if m]
    if messages:
        raise UserError(f"{messages[0]}; give all processes the same settings and data")
