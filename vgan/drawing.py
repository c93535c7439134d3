"""From a checkpoint to a generator, and from a generator to pictures."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgan import build, checkpoint
from vgan.device import autocast, pick_device, pick_precision
from vgan.errors import UserError
from vgan.images import to_uint8
from vgan.randomness import normal


def load_generator(ckpt: str | Path, device: str = "auto") -> nn.Module:
    """The generator with averaged weights (EMA) of a checkpoint file or of a run folder's newest checkpoint.

    G(z (N, G.z_dim) ~ N(0, I), c (N, G.label_dim) one-hot, or None without classes) -> (N, img_channels,
    img_resolution, img_resolution) float32, black to white in [-1, 1]. In evaluation mode, without gradients for the
    weights; G.label_names names the classes. Raises UserError where there is no readable checkpoint.
    """
    return restore_generator(checkpoint.load_newest(ckpt)[1], pick_device(device))


def restore_generator(parts: dict[str, Any], device: torch.device) -> nn.Module:
    """The same from the parts of a checkpoint, which may say anything: memory is taken for the weights that it holds alone."""
    fix = "ckpt: its weights do not fit the network it describes ({}); use an intact one"
    try:
        model, sizes, weights, names = parts["config"]["model"], parts["sizes"], parts["G_ema"], parts["data"]["labels"]
        _refuse_giants(model["generator"], len(weights))
        with torch.device("meta"):  # shapes without memory
            G = build.build_generator(model, sizes)
        G.load_state_dict(weights, assign=True)
        G.label_names = tuple(map(str, names))  # type: ignore[assignment]
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as e:
        raise UserError(fix.format(str(e).splitlines()[0] if str(e) else type(e).__name__)) from e
    if any(not isinstance(w, Tensor) or w.is_meta for w in G.state_dict().values()):
        raise UserError(fix.format("some are missing"))
    return G.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def _refuse_giants(node: Any, weights: int) -> None:
    """Raise ValueError for numbers that would build more layers than there are weights."""
    for name, value in node.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        limit = weights if name == "blocks" else 1_000_000
        if len(numbers) > 100 or any(isinstance(n, (int, float)) and not 0 <= n <= limit for n in numbers):
            raise ValueError(f"{name}={value}")


def drawing_precision(name: str, device: torch.device) -> str:
    """'auto' is not bf16 on CPUs that have it: the same checkpoint gives the same pictures on all of them."""
    return "fp32" if name == "auto" and device.type == "cpu" else pick_precision(name, device)


@torch.no_grad()
def draw(
    G: nn.Module, index: Tensor, seed: int, label: int | Tensor | None = None, truncation: float = 1.0, precision: str = "fp32"
) -> Tensor:
    """Pictures number `index` (N,) of a seed as uint8 (N, C, H, W) on G's device: each depends on (seed, its number) alone.

    label: one class for all, one for each (N,), or None for class i modulo their number for picture i. truncation scales z
    towards its mean, 0.
    """
    device = next(G.parameters()).device
    index = index.to(device)
    z = normal(seed, "sample", index, G.z_dim) * truncation  # type: ignore[arg-type]
    if label is None:
        classes = index % (G.label_dim or 1)  # type: ignore[operator]
    else:
        classes = torch.as_tensor(label, device=device).expand(len(index))
    c = torch.nn.functional.one_hot(classes, G.label_dim).float() if G.label_dim else z.new_zeros(len(z), 0)  # type: ignore[arg-type]
    with autocast(device, precision):
        return to_uint8(G(z, c))


def to_host(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each batch in the host's memory. From a GPU it comes one batch late, copied while the next one is made."""
    waiting: tuple[Tensor, torch.cuda.Event] | None = None
    for images in batches:
        if images.device.type != "cuda":
            yield images.cpu()
            continue
        host = torch.empty_like(images, device="cpu", pin_memory=True).copy_(images, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        if waiting:
            waiting[1].synchronize()
            yield waiting[0]
        waiting = host, done
    if waiting:
        waiting[1].synchronize()
        yield waiting[0]
