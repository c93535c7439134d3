"""TrainState: everything that a run changes, and what a checkpoint holds."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vgan.models.discriminator import DiscriminatorBase
from vgan.models.generator import GeneratorBase
from vgan.runtime.distributed import mean_
from vgan.training.schedules import AdaptiveStrength


class Stats:
    """Sums of scalar tensors, kept on the device until `means` is called, so that no step waits."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the scalars of one step. A name may be missing in some steps."""
        for name in sorted(values.keys() - self._sums.keys()):  # the same order on all processes
            self._sums[name] = torch.zeros_like(values[name], dtype=torch.float32)
        sums = [self._sums[name] for name in values]
        torch._foreach_add_(sums, [value.detach().float() for value in values.values()])
        for name in values:
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the mean of each name since the last reset, over all processes.

        Waits for the device once. Every process must call it.
        """
        if not self._sums:
            return {}
        sums = mean_(torch.stack(list(self._sums.values()))).tolist()
        return {name: s / self._counts[name] for name, s in zip(self._sums, sums)}

    def reset(self) -> None:
        """Forget all sums."""
        self._sums, self._counts = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, averaged over all processes. Every process must call it."""
        if not self._sums:
            return {"sums": {}, "counts": {}}
        sums = mean_(torch.stack(list(self._sums.values()))).unbind()
        return {"sums": dict(zip(self._sums, sums)), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._sums = {name: s.to(device) for name, s in state.get("sums", {}).items()}
        self._counts = dict(state.get("counts", {}))


@dataclass
class RecoveryState:
    """What roll-backs have changed so far."""

    stream: int = 0  # selects other random numbers; the order of the data stays
    lr: float = 1.0  # factor on both learning rates
    gamma: float = 1.0  # factor on gamma
    rollbacks: int = 0  # since the run last got past a failure
    failure_nimg: int = 0  # where the latest failure was noticed

    def seed(self, seed: int) -> int:
        """Return the seed of the run's random numbers."""
        return seed + (self.stream << 40)

    def passed(self, cur_nimg: int, margin_nimg: int) -> None:
        """Count a failure that lies more than margin_nimg behind as overcome; keep what helped."""
        if cur_nimg > self.failure_nimg + margin_nimg:
            self.rollbacks = 0


@dataclass
class DiversityHistory:
    """How diverse the fakes have been, by which a mode collapse is noticed."""

    best: float = 0.0
    last: float = math.inf


@dataclass
class TrainState:
    """The networks, their optimizers and averages, and how far the run has come."""

    G: GeneratorBase
    D: DiscriminatorBase
    G_ema: GeneratorBase
    opt_G: torch.optim.Optimizer
    opt_D: torch.optim.Optimizer
    scaler_G: torch.amp.GradScaler  # disabled, and then a no-op, except in fp16
    scaler_D: torch.amp.GradScaler
    strength: AdaptiveStrength = field(default_factory=AdaptiveStrength)
    recovery: RecoveryState = field(default_factory=RecoveryState)
    diversity: DiversityHistory = field(default_factory=DiversityHistory)
    stats: Stats = field(default_factory=Stats)
    cur_nimg: int = 0  # real images shown so far

    def state_dict(self) -> dict[str, Any]:
        """Return nested plain containers and whole tensors, also of networks under FSDP.

        Every process must call it.
        """
        names = ("G", "D", "G_ema", "opt_G", "opt_D", "scaler_G", "scaler_D", "strength")
        state = {name: _gather(getattr(self, name).state_dict()) for name in names}
        state["recovery"] = asdict(self.recovery)
        state["diversity"] = asdict(self.diversity)
        state["stats"] = self.stats.state_dict()
        state["cur_nimg"] = self.cur_nimg
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, on any number of processes.

        Checkpoints of earlier versions lack some entries, which start afresh.
        """
        for network, name in ((self.G, "G"), (self.D, "D"), (self.G_ema, "G_ema")):
            network.load_state_dict(_scatter_like(network, state[name]))
        for optimizer, name in ((self.opt_G, "opt_G"), (self.opt_D, "opt_D")):
            optimizer.load_state_dict(_scatter_moments(optimizer, state[name]))
        if state.get("strength"):
            self.strength.load_state_dict(state["strength"])
        for scaler, name in ((self.scaler_G, "scaler_G"), (self.scaler_D, "scaler_D")):
            if state[name]:  # empty unless the run was in fp16
                scaler.load_state_dict(state[name])
        self.recovery = RecoveryState(**state.get("recovery", {}))
        self.diversity = DiversityHistory(**state.get("diversity", {}))
        self.stats.load_state_dict(state.get("stats", {}), self.strength.augment_p.device)
        self.cur_nimg = int(state["cur_nimg"])


def ema_copy(G: GeneratorBase) -> GeneratorBase:
    """Return a copy of G in evaluation mode whose parameters take no gradient."""
    return copy.deepcopy(G).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(G_ema: nn.Module, G: nn.Module, decay: float) -> None:
    """Set G_ema to decay * G_ema + (1 - decay) * G; buffers are copied."""
    averages = [_local(p) for p in G_ema.parameters()]
    torch._foreach_lerp_(averages, [_local(p) for p in G.parameters()], 1 - decay)
    for average, buffer in zip(G_ema.buffers(), G.buffers()):
        average.copy_(buffer)


@contextmanager
def without_gradients(network: nn.Module) -> Iterator[None]:
    """Compute no gradients of a network's parameters inside the block."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _local(p: Any) -> Tensor:
    """Return this process's shard of a parameter; both networks are sharded alike."""
    return p.to_local() if hasattr(p, "to_local") else p


def _gather(node: Any) -> Any:
    """Return nested containers with every sharded tensor put together in host memory."""
    if isinstance(node, dict):
        return {k: _gather(v) for k, v in node.items()}
    return node.full_tensor().cpu() if hasattr(node, "full_tensor") else node


def _scatter(value: Any, like: Any) -> Any:
    """Return this process's shard of a whole tensor where `like`, of the same shape, is sharded."""
    if not isinstance(value, Tensor) or not hasattr(like, "placements"):
        return value
    if value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor  # imports slowly

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _scatter_like(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    shards = network.state_dict()
    return {name: _scatter(value, shards.get(name)) for name, value in weights.items()}


def _scatter_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state whose moments are sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for i, entries in state["state"].items():
        moments[i] = {name: _scatter(value, parameters[i]) for name, value in entries.items()}
    return {**state, "state": moments}
