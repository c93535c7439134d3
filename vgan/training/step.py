"""One training step: what D and G minimise, their steps, and the moving average of G."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vgan.data.augment import Augment
from vgan.data.loader import Batch
from vgan.models.discriminator import DiscriminatorBase
from vgan.models.generator import GeneratorBase
from vgan.runtime.device import autocast
from vgan.runtime.distributed import world_size
from vgan.training.judge import add_d_judge_loss, add_g_judge_loss
from vgan.training.losses import PENALTIES, Loss
from vgan.training.optimize import MicroBatches, Scalars, optimize, set_hyperparameters
from vgan.training.schedules import HyperParameters
from vgan.training.state import TrainState, update_ema, without_gradients


def d_objective(
    G: GeneratorBase, D: DiscriminatorBase, how: "Objective",
    gamma: Tensor, augment_p: Tensor, penalty_weight: int, batch: Batch,
) -> tuple[Tensor, Scalars]:  # fmt: skip
    """Return D's loss () on a batch and its scalars; gamma () includes penalty_weight."""
    real, c, rng = batch
    with autocast(how.device, how.precision):
        with torch.no_grad():
            fake = G(rng.normal("z_d", G.z_dim), c).float()
        real = how.augment(real, augment_p, rng, "real")
        fake = how.augment(fake, augment_p, rng, "fake_d")
        images, cc = torch.cat([real, fake]), torch.cat([c, c])
        if penalty_weight > 0:
            v = rng.signs("tangent", 2 * real[0].numel())
            v = torch.cat(v.chunk(2, dim=1)).view_as(images)
            logits, grad_norm_sq = PENALTIES[how.penalty](D, images, cc, v)  # at D's input
        else:
            logits, grad_norm_sq = D(images, cc), None
        logits_real, logits_fake = logits.float().chunk(2)
        patch_loss = how.d_loss(logits_real, logits_fake)
        loss, judge_scalars = add_d_judge_loss(
            D, how.d_loss, patch_loss, images, cc, rng, penalty_weight
        )
    margin = (logits_real - logits_fake if how.relativistic else logits_real).detach()
    scalars = {"loss/D": patch_loss.detach(), "logits/real_sign": margin.sign().mean()}
    scalars["logits/real"] = logits_real.detach().mean()
    scalars["logits/fake"] = logits_fake.detach().mean()
    if grad_norm_sq is not None:
        r1, r2 = (x.mean() for x in grad_norm_sq.chunk(2))
        loss = loss + gamma / 2 * (r1 + r2)
        scalars["loss/penalty"] = (gamma / penalty_weight / 2 * (r1 + r2)).detach()
        scalars |= {"penalty/r1": r1.detach(), "penalty/r2": r2.detach()}
    return loss, scalars | judge_scalars


def g_objective(
    G: GeneratorBase, D: DiscriminatorBase, how: "Objective", augment_p: Tensor, batch: Batch
) -> tuple[Tensor, Scalars]:
    """Return G's loss () on a batch and its scalars. One graph without breaks in torch.compile."""
    real, c, rng = batch
    with autocast(how.device, how.precision):
        fake = G(rng.normal("z_g", G.z_dim), c).float()  # new: reusing D's step was no better
        fake = how.augment(fake, augment_p, rng, "fake_g")
        logits_fake = D(fake, c).float()
        logits_real, seen = logits_fake.detach(), None
        if how.relativistic:
            seen = how.augment(real, augment_p, rng, "real")
            with torch.no_grad():
                logits_real = D(seen, c).float()
        loss = how.g_loss(logits_real, logits_fake)
        loss = add_g_judge_loss(D, how.g_loss, loss, fake, seen, c)
    return loss, {"loss/G": loss.detach()}


@dataclass(frozen=True)
class Objective:
    """Losses, penalty, augmentation and precision: what stays the same during a run."""

    d_loss: Loss
    g_loss: Loss
    relativistic: bool  # whether the losses compare reals with fakes
    augment: Augment
    device: torch.device
    precision: str
    penalty: str = "jvp"
    micro_batches: MicroBatches = field(default_factory=MicroBatches)
    d: Callable[..., tuple[Tensor, Scalars]] = d_objective  # or compiled, or wrapped for DDP
    g: Callable[..., tuple[Tensor, Scalars]] = g_objective


def train_step(state: TrainState, how: Objective, batch: Batch, hp: HyperParameters) -> Scalars:
    """Take a step of D, a step of G and one of the moving average; advance cur_nimg."""
    scalars = d_step(state, how, batch, hp)
    scalars |= g_step(state, how, batch, hp)
    update_ema(state.G_ema, state.G, hp.ema_decay)
    state.cur_nimg += len(batch.real) * world_size()
    return scalars


def d_step(state: TrainState, how: Objective, batch: Batch, hp: HyperParameters) -> Scalars:
    """Train D to tell a batch's reals from fakes of the same classes."""
    set_hyperparameters(state.opt_D, hp.lr_D, hp.beta2)
    gamma, augment_p = state.strength.tensors(hp, how.device)
    loss = partial(how.d, state.G, state.D, how, gamma, augment_p, hp.penalty_weight)
    scalars = optimize(state.D, state.opt_D, state.scaler_D, loss, batch, how.micro_batches)
    state.strength.update(scalars, len(batch.real) * world_size(), hp.penalty_weight)
    return scalars | {f"{name}/D": scalars.pop(name) for name in ("grad_norm", "broken")}


def g_step(state: TrainState, how: Objective, batch: Batch, hp: HyperParameters) -> Scalars:
    """Train G to make fakes of the batch's classes that D takes for reals."""
    set_hyperparameters(state.opt_G, hp.lr_G, hp.beta2)
    _, augment_p = state.strength.tensors(hp, how.device)
    loss = partial(how.g, state.G, state.D, how, augment_p)
    with without_gradients(state.D):
        scalars = optimize(state.G, state.opt_G, state.scaler_G, loss, batch, how.micro_batches)
    return scalars | {f"{name}/G": scalars.pop(name) for name in ("grad_norm", "broken")}
