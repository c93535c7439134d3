"""Backward pass and optimizer step: micro-batches, out of memory, mixed precision, DDP and FSDP.

DDP keeps whole networks on every process. FSDP2 (Zhao et al. 2023) shards parameters, averages and
moments, for networks that do not fit one GPU; a checkpoint is the same either way.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vgan.data.loader import Batch
from vgan.models.layers import ResidualBlock
from vgan.runtime.distributed import print0, world_size
from vgan.runtime.errors import is_out_of_memory

Scalars = dict[str, Tensor]
LossFunction = partial[tuple[Tensor, Scalars]]  # of an objective; called with a batch
NoSync = Callable[[], AbstractContextManager[Any]]


@dataclass
class MicroBatches:
    """The number of micro-batches a batch is split into; grows when memory runs out."""

    count: int = 1

    def can_grow(self, batch_size: int) -> bool:
        """Return whether a batch can be split further; several processes would lose step."""
        return self.count < batch_size and world_size() == 1

    def grow(self, batch_size: int, device: torch.device) -> None:
        """Double the number of micro-batches and free cached memory."""
        self.count = min(batch_size, 2 * self.count)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        size = -(-batch_size // self.count)
        print0(f"\nOut of memory: batches of {batch_size} now run as micro-batches of {size}.")


def optimize(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loss_function: LossFunction,
    batch: Batch,
    micro_batches: MicroBatches,
) -> Scalars:
    """Take one optimizer step on a batch's mean loss.

    Returns the scalars of loss_function, `grad_norm` (), and `broken` (): 1 where the loss or the
    gradient was not finite. Under DDP only the last micro-batch exchanges gradients.
    """
    n, device = len(batch.real), batch.real.device
    no_sync = getattr(loss_function.func, "no_sync", nullcontext)
    while True:
        try:
            parts = batch.split(micro_batches.count)
            scalars = _backward(optimizer, scaler, loss_function, parts, no_sync)
            break
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e) or not micro_batches.can_grow(n):
                raise
        micro_batches.grow(n, device)  # outside the handler, which holds the failed pass's memory
    scaler.unscale_(optimizer)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # of a sharded network
        norm = norm.full_tensor()
    finite = scalars.pop("total_loss").isfinite()
    if not scaler.is_enabled():  # fp16 gradients overflow at times; the scaler skips that step
        finite = finite & norm.isfinite()
    _optimizer_step(optimizer, scaler, micro_batches, n, device)
    scaler.update()
    return scalars | {"grad_norm": norm, "broken": (~finite).float()}


def _backward(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loss_function: LossFunction,
    micro_batches: list[Batch],
    no_sync: NoSync,
) -> Scalars:
    """Accumulate the gradient of the batch's mean loss; return the batch's mean scalars."""
    optimizer.zero_grad(set_to_none=True)
    batch_size = sum(len(micro_batch.real) for micro_batch in micro_batches)
    totals: Scalars = {}
    for micro_batch in micro_batches:
        is_last = micro_batch is micro_batches[-1]
        with nullcontext() if is_last else no_sync():
            loss, scalars = loss_function(micro_batch)
            scalars["total_loss"] = loss.detach()
            if len(micro_batches) == 1:
                scaler.scale(loss).backward()
                return scalars
            share = len(micro_batch.real) / batch_size
            scaler.scale(loss * share).backward()
        for name, value in scalars.items():
            part = share * value
            totals[name] = totals[name] + part if name in totals else part
    return totals


def _optimizer_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: MicroBatches,
    batch_size: int,
    device: torch.device,
) -> None:
    """Step; the first one allocates moments, for which cached features may leave no room."""
    is_first = not optimizer.state
    try:
        scaler.step(optimizer)
        return
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e) or not is_first or not micro_batches.can_grow(batch_size):
            raise
    optimizer.state.clear()  # weights are updated last, so none has changed yet
    micro_batches.grow(batch_size, device)
    scaler.step(optimizer)


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, beta2: float) -> None:
    """Set the learning rate and Adam's second decay, where the optimizer has them."""
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = lr
        if "betas" in group:
            group["betas"] = (group["betas"][0], beta2)


class _ObjectiveModule(nn.Module):
    """An objective as a module around its network, which is what DDP hooks into."""

    def __init__(self, network: nn.Module, objective: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self._objective = network, objective

    def forward(self, *arguments: Any) -> Any:
        return self._objective(*arguments)


class DDPObjective:
    """An objective whose backward pass averages the network's gradients over all processes.

    Buckets of gradients are exchanged while the backward pass computes the next ones (Li et al.
    2020, "PyTorch Distributed"). Equal shares of a batch give the gradient of the whole batch,
    since losses are means.
    """

    def __init__(self, network: nn.Module, objective: Callable[..., Any]) -> None:
        # Filters of one channel have two equal strides in memory; torch warns of the other one.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        # No device_ids: inputs are on the right device already. Buffers are frozen weights.
        module = _ObjectiveModule(network, objective)
        self._ddp = DistributedDataParallel(
            module, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    def __call__(self, *arguments: Any) -> Any:
        return self._ddp(*arguments)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Return a context in which backward passes keep their gradients to this process."""
        return self._ddp.no_sync()


def apply_fsdp(network: nn.Module) -> None:
    """Shard the parameters over all processes, in place; each residual block is gathered alone."""
    # Imports for seconds.
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    network.to(memory_format=torch.contiguous_format)  # FSDP's only layout; features stay NHWC
    for block in network.modules():
        if isinstance(block, ResidualBlock):
            fully_shard(block)
    fully_shard(network)
    for name in ("jvp", "judge"):
        if hasattr(network, name):
            register_fsdp_forward_method(network, name)
