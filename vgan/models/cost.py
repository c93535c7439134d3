"""How large a network is and how much one picture costs."""

import torch
from torch import Tensor, nn

from vgan.models.layers import SelfAttention2d


def count_parameters(module: nn.Module) -> int:
    """The number of trained numbers."""
    return sum(p.numel() for p in module.parameters())


def count_multiply_adds(module: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds of the convolutions, linear layers and attention products of one forward pass over `inputs`.

    Element-wise work is not counted: it moves memory rather than multiplying. Attention is counted as the two
    products of (H W) x (H W) x d for every head.
    """
    total = 0

    def count(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += output.numel() * layer.in_features
        else:
            n, channels, height, width = args[0].shape
            total += 2 * n * (height * width) ** 2 * channels

    kinds = (nn.Conv2d, nn.Linear, SelfAttention2d)
    hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return total
