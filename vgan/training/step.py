"""One training step of each network: the algorithm, on one page."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vgan.data.augment import Augment
from vgan.runtime.device import autocast
from vgan.runtime.distributed import mean_, print0, world_size
from vgan.runtime.errors import is_out_of_memory
from vgan.runtime.rng import Streams
from vgan.training.controls import AdaptiveStrength
from vgan.training.losses import PENALTIES, Loss

Scalars = dict[str, Tensor]


@dataclass
class State:
    """Everything that a checkpoint carries besides cur_nimg."""

    G: nn.Module
    D: nn.Module
    G_ema: nn.Module
    opt_G: torch.optim.Optimizer
    opt_D: torch.optim.Optimizer
    scaler_G: torch.amp.GradScaler  # disabled, and then a no-op, but for fp16
    scaler_D: torch.amp.GradScaler
    controls: AdaptiveStrength = field(default_factory=AdaptiveStrength)

    def parts(self) -> dict[str, Any]:
        """Whole tensors, also where each process holds a part; every process must come here then."""
        return {
            name: _whole(getattr(self, name).state_dict()) for name in self.__dataclass_fields__
        }

    def load_parts(self, parts: dict[str, Any]) -> None:
        """What `parts` gave, on any number of processes."""
        for name in self.__dataclass_fields__:
            if not parts.get(
                name
            ):  # empty for a scaler of a run that was not in fp16; older checkpoints have no controls
                continue
            mine, given = getattr(self, name), parts[name]
            if isinstance(mine, torch.optim.Optimizer):
                weights = [p for g in mine.param_groups for p in g["params"]]
                moments = {
                    i: {k: _as_held(v, weights[i]) for k, v in s.items()}
                    for i, s in given["state"].items()
                }
                given = {**given, "state": moments}
            elif isinstance(mine, nn.Module):
                held = mine.state_dict()
                given = {k: _as_held(v, held.get(k)) for k, v in given.items()}
            mine.load_state_dict(given)


def _whole(node: Any) -> Any:
    """Nested containers with every tensor that is spread over processes put together, in the host's memory."""
    if isinstance(node, dict):
        return {k: _whole(v) for k, v in node.items()}
    return node.full_tensor().cpu() if hasattr(node, "full_tensor") else node


def _as_held(value: Any, held: Any) -> Any:
    """A whole tensor as this process holds one of its shape: its part, where that is spread over processes."""
    if (
        held is None
        or not hasattr(held, "placements")
        or not isinstance(value, Tensor)
        or value.shape != held.shape
    ):
        return value
    from torch.distributed.tensor import distribute_tensor  # imports slowly

    return distribute_tensor(value.to(held.device), held.device_mesh, held.placements)


@dataclass(frozen=True)
class HyperParameters:
    """The scheduled quantities at one cur_nimg."""

    lr_G: float
    lr_D: float
    beta2: float
    gamma: float
    augment_p: float


class Knobs(NamedTuple):
    """What a compiled loss reads of a moment: tensors, since a graph would be compiled anew for every other number."""

    gamma: Tensor
    augment_p: Tensor


class Batch(NamedTuple):
    """Reals (N, C, H, W) in [-1, 1], their one-hot classes (N, label_dim) and the batch's random numbers."""

    real: Tensor
    c: Tensor
    streams: Streams

    def parts(self, count: int) -> list["Batch"]:
        """The batch cut into `count` or fewer parts of equal size, but for the last."""
        if count == 1:
            return [self]
        size = -(-len(self.real) // count)
        starts = range(0, len(self.real), size)
        return [
            Batch(self.real[i : i + size], self.c[i : i + size], self.streams[i : i + size])
            for i in starts
        ]


def knobs_at(
    now: HyperParameters, controls: AdaptiveStrength, device: torch.device, penalty_weight: float
) -> Knobs:
    # filled by a kernel rather than copied from the host, which would wait for the device
    gamma = torch.full((), now.gamma * penalty_weight, device=device) * controls.gamma_factor()
    return Knobs(
        gamma,
        controls.augment_p
        if controls.target is not None
        else torch.full((), now.augment_p, device=device),
    )


def d_forward(
    G: nn.Module, D: nn.Module, recipe: "Objective", knobs: Knobs, batch: Batch, penalize: bool
) -> tuple[Tensor, Scalars]:
    """What D minimises on a batch, and the step's statistics. One graph without breaks under torch.compile.

    The penalties are taken where D looks, after augmentation.
    """
    real, c, streams = batch
    with autocast(recipe.device, recipe.precision):
        with torch.no_grad():
            fake = G(streams.normal("z_d", G.z_dim), c).float()  # type: ignore[arg-type]
        real = recipe.augment(real, knobs.augment_p, streams, "real")
        fake = recipe.augment(fake, knobs.augment_p, streams, "fake_d")
        images, cc = torch.cat([real, fake]), torch.cat([c, c])
        if penalize:
            v = streams.signs("tangent", 2 * real[0].numel())
            v = torch.cat(v.chunk(2, dim=1)).view_as(images)
            logits, slopes = PENALTIES[recipe.penalty](D, images, cc, v)
        else:
            logits, slopes = D(images, cc), None
    logits_real, logits_fake = logits.float().chunk(2)
    loss = recipe.d_loss(logits_real, logits_fake)
    compared = (logits_real - logits_fake if recipe.relativistic else logits_real).detach()
    scalars = {
        "loss/D": loss.detach(),
        "logits/real": logits_real.detach().mean(),
        "logits/fake": logits_fake.detach().mean(),
    }
    scalars["logits/real_sign"] = compared.sign().mean()
    if slopes is not None:
        r1, r2 = (s.mean() for s in slopes.chunk(2))
        loss = loss + knobs.gamma / 2 * (r1 + r2)
        scalars |= {"penalty/r1": r1.detach(), "penalty/r2": r2.detach()}
    return loss, scalars


def g_forward(
    G: nn.Module, D: nn.Module, recipe: "Objective", knobs: Knobs, batch: Batch
) -> tuple[Tensor, Scalars]:
    """What G minimises on a batch, and the step's statistics. One graph without breaks under torch.compile."""
    real, c, streams = batch
    with autocast(recipe.device, recipe.precision):
        fake = G(streams.normal("z_g", G.z_dim), c).float()  # type: ignore[arg-type]
        logits_fake = D(recipe.augment(fake, knobs.augment_p, streams, "fake_g"), c).float()
        logits_real = logits_fake.detach()
        if recipe.relativistic:
            with torch.no_grad():
                logits_real = D(recipe.augment(real, knobs.augment_p, streams, "real"), c).float()
    loss = recipe.g_loss(logits_real, logits_fake)
    return loss, {"loss/G": loss.detach()}


@dataclass(frozen=True)
class Objective:
    """What stays the same throughout a run."""

    d_loss: Loss
    g_loss: Loss
    relativistic: bool  # whether the losses compare reals with fakes
    augment: Augment
    device: torch.device
    precision: str
    penalty: str = "jvp"
    split: "Split" = field(default_factory=lambda: Split())
    d_forward: Callable[..., tuple[Tensor, Scalars]] = d_forward
    g_forward: Callable[..., tuple[Tensor, Scalars]] = g_forward


def train_step(
    state: State,
    recipe: Objective,
    now: HyperParameters,
    real: Tensor,
    c: Tensor,
    streams: Streams,
    penalty_weight: float,
) -> Scalars:
    """One step of D, then one of G, on real (N, C, H, W) in [-1, 1] of classes c (N, label_dim) and fakes of the same.

    G draws fakes of its own and has the reals judged anew: doing without both was 15 % quicker, and the pictures looked no
    better for it in equal time (docs/performance.md).

    penalty_weight: 0 leaves R1 and R2 out; k where they are applied every k-th step, so that their mean strength stays the same.
    """
    batch = Batch(real, c, streams)
    return d_step(state, recipe, now, batch, penalty_weight) | g_step(state, recipe, now, batch)


def d_step(
    state: State, recipe: Objective, now: HyperParameters, batch: Batch, penalty_weight: float
) -> Scalars:
    """Train D on a batch against fakes of its classes."""
    set_hyperparameters(state.opt_D, now.lr_D, now.beta2)
    knobs = knobs_at(now, state.controls, recipe.device, penalty_weight)

    def forward(part: Batch) -> tuple[Tensor, Scalars]:
        return recipe.d_forward(state.G, state.D, recipe, knobs, part, penalty_weight > 0)

    scalars = _descend(
        Half(state.D, state.opt_D, state.scaler_D, forward, recipe.d_forward), batch, recipe.split
    )
    nimg = len(batch.real) * world_size()
    if state.controls.follow:
        state.controls.update_sign(mean_(scalars["logits/real_sign"].clone()), nimg)
        if penalty_weight > 0:
            slopes = mean_(scalars["penalty/r1"] + scalars["penalty/r2"])
            state.controls.update_penalty(
                knobs.gamma / penalty_weight / 2 * slopes, round(nimg * penalty_weight)
            )
    return scalars | {f"{name}/D": scalars.pop(name) for name in ("grad_norm", "broken")}


def g_step(state: State, recipe: Objective, now: HyperParameters, batch: Batch) -> Scalars:
    """Train G to make fakes of the batch's classes that D takes for the reals."""
    set_hyperparameters(state.opt_G, now.lr_G, now.beta2)
    knobs = knobs_at(now, state.controls, recipe.device, 0)

    def forward(part: Batch) -> tuple[Tensor, Scalars]:
        return recipe.g_forward(state.G, state.D, recipe, knobs, part)

    state.D.requires_grad_(False)
    scalars = _descend(
        Half(state.G, state.opt_G, state.scaler_G, forward, recipe.g_forward), batch, recipe.split
    )
    state.D.requires_grad_(True)
    return scalars | {f"{name}/G": scalars.pop(name) for name in ("grad_norm", "broken")}


class Half(NamedTuple):
    """One network with what moves its weights."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    forward: Callable[
        [Batch], tuple[Tensor, Scalars]
    ]  # what it minimises, and the step's statistics
    shared: Any  # the recipe's forward; has `no_sync` where processes average their gradients after a backward pass


def _descend(half: Half, batch: Batch, split: "Split") -> Scalars:
    """Backward and one optimizer step. Adds to the scalars the gradient's norm, and whether loss or gradient is broken."""
    optimizer, scaler = half.optimizer, half.scaler
    while True:
        try:
            scalars = _accumulate(half, batch, split.count)
            break
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e) or not split.can_grow(len(batch.real)):
                raise
        split.grow(
            len(batch.real), batch.real.device
        )  # here the failed pass has let go of its memory
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in half.network.parameters() if p.grad is not None]
    )
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded network
    # in fp16 gradients overflow now and then; the scaler leaves the step out and scales less
    whole = (
        scalars["minimised"].isfinite()
        if scaler.is_enabled()
        else scalars["minimised"].isfinite() & norm.isfinite()
    )
    _step(half, batch, split)
    scaler.update()
    del scalars["minimised"]
    return scalars | {"grad_norm": norm, "broken": (~whole).float()}


def _step(half: Half, batch: Batch, split: "Split") -> None:
    """One step of the optimizer. The first makes its moments, for which a device may have no room left beside cached features."""
    first = not half.optimizer.state
    try:
        half.scaler.step(half.optimizer)
        return
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e) or not first or not split.can_grow(len(batch.real)):
            raise
    half.optimizer.state.clear()  # no weight has moved yet: that is the last thing a step does
    split.grow(len(batch.real), batch.real.device)
    half.scaler.step(half.optimizer)


def _accumulate(half: Half, batch: Batch, count: int) -> Scalars:
    """The gradient of the batch's mean loss, worked out in `count` parts; returns the batch's statistics."""
    half.optimizer.zero_grad(set_to_none=True)
    parts = batch.parts(count)
    totals: Scalars = {}
    for i, part in enumerate(parts):
        more_to_come = i + 1 < len(parts) and hasattr(half.shared, "no_sync")
        with half.shared.no_sync() if more_to_come else contextlib.nullcontext():
            loss, scalars = half.forward(part)
            scalars["minimised"] = loss.detach()
            if len(parts) == 1:
                half.scaler.scale(loss).backward()
                return scalars
            share = len(part.real) / len(batch.real)
            half.scaler.scale(loss * share).backward()
        for name, value in scalars.items():
            totals[name] = totals[name] + share * value if name in totals else share * value
    return totals


@dataclass
class Split:
    """In how many parts a batch goes through the networks; grows where the memory does not suffice."""

    count: int = 1

    def can_grow(self, batch: int) -> bool:
        return (
            self.count < batch and world_size() == 1
        )  # several processes would lose step with one another

    def grow(self, batch: int, device: torch.device) -> None:
        self.count = min(batch, 2 * self.count)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print0(
            f"\nout of memory: batches of {batch} now go through in parts of {-(-batch // self.count)}, with the same result"
        )


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, beta2: float) -> None:
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = lr
        if "betas" in group:
            group["betas"] = (group["betas"][0], beta2)


def compiled(recipe: Objective, cuda_graphs: bool = False) -> Objective:
    """The recipe with its forward passes compiled: one graph for G, one for D, one more for D where penalties skip steps.

    Later steps find them ready: whatever changes along the schedules enters as a tensor. cuda_graphs replays each
    graph's kernels in one launch, at the price of memory that is kept.
    """
    options: dict[str, Any] = {
        "fullgraph": True,
        "dynamic": False,
        "mode": "reduce-overhead" if cuda_graphs else None,
    }
    parts: dict[str, Any] = {
        f.__name__: torch.compile(f, **options) for f in (d_forward, g_forward)
    }
    return replace(recipe, **parts)
