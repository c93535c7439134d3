"""One run on several processes: every process takes an equal part of each batch, and gradients are averaged.

`averaged` keeps whole networks on every process. `shard` spreads parameters, averages and the optimizers' moments over all of
them (FSDP2, Zhao et al. 2023), for networks that do not fit one GPU; a checkpoint is the same either way.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from vgan.models.layers import ResidualBlock
from vgan.training.step import Objective


class _Half(nn.Module):
    """The loss of one network as a module of its own, since that is what torch's wrappers hook into."""

    def __init__(self, network: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self._forward = network, forward

    def forward(self, *arguments: Any) -> Any:
        return self._forward(*arguments)


class Averaged:
    """A forward pass of the recipe whose backward pass averages the network's gradients over all processes.

    The exchange of one bucket of gradients goes on while the backward pass works out the next (Li et al. 2020, "PyTorch
    distributed"). Equal parts of a batch on each process give the gradient of the whole batch, since losses are means.
    """

    def __init__(self, network: nn.Module, forward: Callable[..., Any]) -> None:
        # filters of one channel have two equal descriptions in memory, and torch takes the other one for a loss of speed
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        # no device_ids: inputs are where they belong
        self._ddp = DistributedDataParallel(_Half(network, forward), gradient_as_bucket_view=True)

    def __call__(self, *arguments: Any) -> Any:
        return self._ddp(*arguments)

    def no_sync(self) -> AbstractContextManager[None]:
        """Backward passes in this context keep their gradients to themselves, until one outside it."""
        return self._ddp.no_sync()  # type: ignore[return-value]


def shard(network: nn.Module) -> nn.Module:
    """Spread the parameters over all processes, in place; each residual block is put together only while it works."""
    network.to(
        memory_format=torch.contiguous_format
    )  # FSDP takes no other; features stay channels-last
    for block in network.modules():
        if isinstance(block, ResidualBlock):
            fully_shard(block)
    fully_shard(network)
    if hasattr(network, "jvp"):
        register_fsdp_forward_method(network, "jvp")
    return network


def averaged(recipe: Objective, G: nn.Module, D: nn.Module) -> Objective:
    """The recipe with both forward passes averaged over the processes of the group."""
    return replace(
        recipe, d_forward=Averaged(D, recipe.d_forward), g_forward=Averaged(G, recipe.g_forward)
    )
