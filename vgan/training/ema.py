"""The exponential moving average of the generator, which makes the better pictures."""

import copy

import torch
from torch import Tensor, nn


def ema_copy(G: nn.Module) -> nn.Module:
    """A copy of G in evaluation mode whose parameters take no gradient."""
    return copy.deepcopy(G).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(G_ema: nn.Module, G: nn.Module, decay: float) -> None:
    """G_ema <- decay G_ema + (1 - decay) G in one fused call; buffers are copied."""
    torch._foreach_lerp_(
        [_local(p) for p in G_ema.parameters()], [_local(p) for p in G.parameters()], 1 - decay
    )
    for a, b in zip(G_ema.buffers(), G.buffers()):
        a.copy_(b)


def _local(p: Tensor) -> Tensor:
    """What this process holds of a parameter; both networks are spread alike."""
    return p.to_local() if hasattr(p, "to_local") else p
