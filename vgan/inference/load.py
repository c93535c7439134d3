"""From a checkpoint to a generator, and from a generator to pictures."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgan.runs import checkpoint
from vgan.runtime.device import autocast, pick_device, pick_precision
from vgan.runtime.errors import UserError
from vgan.runtime.images import to_uint8
from vgan.runtime.instantiate import construct_own
from vgan.runtime.rng import normal


def load_generator(ckpt: str | Path, device: str = "auto") -> nn.Module:
    """The generator with averaged weights (EMA) of a checkpoint file or of a run folder's newest checkpoint.

    G(z (N, G.z_dim) ~ N(0, I), c (N, G.label_dim) one-hot, or None without classes) -> (N, img_channels,
    img_resolution, img_resolution) float32, black to white in [-1, 1]. In evaluation mode, without gradients for the
    weights; G.label_names names the classes. Reads what vgan-export to=safetensors wrote too. Raises UserError where there is no
    readable checkpoint.
    """
    path = Path(ckpt).expanduser()
    if not path.is_dir() and not checkpoint.is_checkpoint(path):
        return restore_generator(_read_safetensors(path), pick_device(device))
    return restore_generator(checkpoint.load_newest(ckpt)[1], pick_device(device))


def load_discriminator(ckpt: str | Path, device: str = "auto") -> nn.Module:
    """The discriminator of a checkpoint, as `load_generator` its generator.

    D(x (N, C, H, W) in [-1, 1], c (N, label_dim) one-hot) -> logits (N, 1, h, w). Raises UserError as `load_generator`.
    """
    return restore_discriminator(checkpoint.load_newest(ckpt)[1], pick_device(device))


def restore_generator(parts: dict[str, Any], device: torch.device) -> nn.Module:
    """The same from the parts of a checkpoint, which may say anything: memory is taken for the weights that it holds alone."""
    G = _restore(parts, "generator", "G_ema", build_generator)
    try:
        G.label_names = tuple(map(str, parts["data"]["labels"]))  # type: ignore[assignment]
    except (TypeError, LookupError) as e:
        raise UserError(f"ckpt: names no classes ({e}); use an intact one") from e
    return G.to(device).to(memory_format=torch.channels_last)


def restore_discriminator(parts: dict[str, Any], device: torch.device) -> nn.Module:
    """Likewise the discriminator."""
    return (
        _restore(parts, "discriminator", "D", build_discriminator)
        .to(device)
        .to(memory_format=torch.channels_last)
    )


def _restore(
    parts: dict[str, Any], kind: str, key: str, make: Callable[[Any, Any], nn.Module]
) -> nn.Module:
    fix = "ckpt: its weights do not fit the network it describes ({}); use an intact one"
    try:
        model, sizes, weights = parts["config"]["model"], parts["sizes"], parts[key]
        _refuse_giants(model[kind], len(weights))
        with torch.device("meta"):  # shapes without memory
            network = make(model, sizes)
        network.load_state_dict(weights, assign=True)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as e:
        raise UserError(fix.format(str(e).splitlines()[0] if str(e) else type(e).__name__)) from e
    if any(not isinstance(w, Tensor) or w.is_meta for w in network.state_dict().values()):
        raise UserError(fix.format("some are missing"))
    return network.eval().requires_grad_(False)


def save_safetensors(G: nn.Module, told: dict[str, str]) -> bytes:
    """The weights, with what is told of them; `load_generator` needs model, sizes and labels there."""
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as e:
        raise UserError(
            "to=safetensors: needs the package safetensors; pip install vgan[export]"
        ) from e
    return save(
        {name: weight.contiguous() for name, weight in G.state_dict().items()}, metadata=told
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The parts that a generator is made of."""
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as e:
        raise UserError(f"{path}: needs the package safetensors; pip install vgan[export]") from e
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
        model, sizes, labels = (json.loads(told[name]) for name in ("model", "sizes", "labels"))
    except (SafetensorError, ValueError, LookupError, RecursionError) as e:
        raise UserError(
            f"{path}: not a generator that vgan-export wrote ({e}); use an intact one"
        ) from e
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror or e}); check name and permissions"
        ) from e
    return {
        "config": {"model": {"generator": model}},
        "sizes": sizes,
        "data": {"labels": labels},
        "G_ema": weights,
    }


def _refuse_giants(node: Any, weights: int) -> None:
    """Raise ValueError for numbers that would build more layers than there are weights."""
    for name, value in node.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        limit = weights if name == "blocks" else 1_000_000
        if len(numbers) > 100 or any(
            isinstance(n, (int, float)) and not 0 <= n <= limit for n in numbers
        ):
            raise ValueError(f"{name}={value}")


def drawing_precision(name: str, device: torch.device) -> str:
    """'auto' is not bf16 on CPUs that have it: the same checkpoint gives the same pictures on all of them."""
    return "fp32" if name == "auto" and device.type == "cpu" else pick_precision(name, device)


def latents(
    G: nn.Module,
    index: Tensor,
    seed: int,
    label: int | Tensor | None = None,
    truncation: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """z (N, G.z_dim) and one-hot c (N, G.label_dim) of pictures number `index` (N,) of a seed, on G's device.

    label: one class for all, one for each (N,), or None for class i modulo their number for picture i. truncation scales z
    towards 0. There the first layer's input (z, class embedding) is at its mean for that class.
    """
    device = next(G.parameters()).device
    index = index.to(device)
    z = normal(seed, "sample", index, G.z_dim) * truncation  # type: ignore[arg-type]
    if label is None:
        classes = index % (G.label_dim or 1)  # type: ignore[operator]
    else:
        classes = torch.as_tensor(label, device=device).expand(len(index))
    c = (
        torch.nn.functional.one_hot(classes, G.label_dim).float()
        if G.label_dim
        else z.new_zeros(len(z), 0)
    )  # type: ignore[arg-type]
    return z, c


@torch.no_grad()
def render(G: nn.Module, z: Tensor, c: Tensor, precision: str = "fp32") -> Tensor:
    """uint8 (N, C, H, W) on G's device from z (N, z_dim) and c (N, label_dim)."""
    with autocast(z.device, precision):
        return to_uint8(G(z, c))


def draw(
    G: nn.Module,
    index: Tensor,
    seed: int,
    label: int | Tensor | None = None,
    truncation: float = 1.0,
    precision: str = "fp32",
) -> Tensor:
    """Pictures number `index` (N,) of a seed as uint8 (N, C, H, W) on G's device: each depends on (seed, its number) alone,
    but for single values rounded otherwise in another batch size.

    label and truncation as in `latents`.
    """
    return render(G, *latents(G, index, seed, label, truncation), precision)


def to_host(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each batch in the host's memory. From a GPU it comes one batch late, copied while the next one is made."""
    waiting: tuple[Tensor, torch.cuda.Event] | None = None
    for images in batches:
        if images.device.type != "cuda":
            yield images.cpu()
            continue
        host = torch.empty_like(images, device="cpu", pin_memory=True).copy_(
            images, non_blocking=True
        )
        done = torch.cuda.Event()
        done.record()
        if waiting:
            waiting[1].synchronize()
            yield waiting[0]
        waiting = host, done
    if waiting:
        waiting[1].synchronize()
        yield waiting[0]


def build_generator(model: Mapping[str, Any], sizes: Mapping[str, int]) -> nn.Module:
    """The generator that a checkpoint describes, if it is one of vgan's."""
    return construct_own(model["generator"], "model.generator", sizes)


def build_discriminator(model: Mapping[str, Any], sizes: Mapping[str, int]) -> nn.Module:
    """The discriminator that a checkpoint describes, if it is one of vgan's."""
    return construct_own(model["discriminator"], "model.discriminator", sizes)
