"""What is printed and recorded when a run starts; parameter and multiply-add counts."""

from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn

import vgan
from vgan.models.attention import SelfAttention2d
from vgan.runtime.console import report_line
from vgan.runtime.distributed import world_size
from vgan.runtime.hardware import describe
from vgan.runtime.images import format_px, height_width
from vgan.training.setup import Run


def count_parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in module.parameters())


def count_multiply_adds(module: nn.Module, *inputs: Tensor) -> int:
    """Return the multiply-adds of one forward pass over `inputs`.

    Counts convolutions, linear layers and attention: the two products of (H W) x (H W) x d for
    every head. Element-wise work moves memory rather than multiplying, and is not counted.
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


def start_record(run: Run) -> dict[str, Any]:
    """Return a line of starts.jsonl: versions, device and sizes of this start.

    config.yaml holds what the run was asked for; this holds what it found.
    """
    state, data, n = run.state, run.dataset, world_size()
    device = describe(run.device)
    return {
        "cur_nimg": state.cur_nimg,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "vgan": vgan.__version__,
        "torch": str(torch.__version__),
        "device": f"{n} x {device}" if n > 1 else device,
        "precision": run.precision,
        "parameters": {"G": count_parameters(state.G), "D": count_parameters(state.D)},
        "data": {
            "images": len(data),
            "digest": data.digest,
            **run.identity["sizes"],
            "conditions": list(data.conditions.names) if data.conditions else [],
        },
    }


def summary(run: Run) -> str:
    """Return the facts of a run as lines of at most 80 columns."""
    return "\n".join(report_line(name, text) for name, text in facts(run).items())


def facts(run: Run) -> dict[str, str]:
    """Return data, networks, device and length of a run, in words."""
    state, data, device = run.state, run.dataset, run.device
    size = format_px(data.img_resolution)
    height, width = height_width(data.img_resolution)
    c = torch.zeros(1, data.label_dim, device=device)
    z = torch.zeros(1, state.G.z_dim, device=device)
    x = torch.zeros(1, data.img_channels, height, width, device=device)
    count = f"{len(data):,} images"
    if data.stream:
        count = f"a stream, of which {count} are packed,"
    kind = "conditions" if data.conditions else "classes"
    classes = f", {data.label_dim} {kind}" if data.label_dim else ""
    field = getattr(state.D, "receptive_field_px", None)
    seen = min(field or 0, max(height, width))
    patch = f", each logit sees {seen} of {size}" if field else ""
    resumed = f", resumed at {state.cur_nimg:,} images" if state.cur_nimg else ""
    return {
        "data": f"{data.name}: {count} of {size}, {data.img_channels} channels{classes}",
        "G": _describe_network(state.G, z, c),
        "D": _describe_network(state.D, x, c) + patch,
        "device": f"{describe(device)}, {run.precision}",
        "run": f"{run.run_dir}, {run.cfg.total_kimg:g} kimg{resumed}",
    }


def _describe_network(network: nn.Module, *inputs: Tensor) -> str:
    parameters, cost = count_parameters(network), count_multiply_adds(network, *inputs)
    return f"{parameters:,} parameters, {cost / 1e6:,.1f} M multiply-adds per image"
