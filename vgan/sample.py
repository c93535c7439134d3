"""vgan-sample's room: pictures from a checkpoint."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from vgan import build, checkpoint
from vgan.config import validate_sample
from vgan.device import autocast, pick_device, pick_precision, prepare_process
from vgan.errors import UserError
from vgan.files import PngWriter, write_png
from vgan.images import enlarge, grid, to_uint8, zoom_for
from vgan.randomness import normal


def load_generator(ckpt: str | Path, device: str = "auto") -> nn.Module:
    """The generator with averaged weights (EMA) of a checkpoint file or of a run folder's newest checkpoint.

    G(z (N, G.z_dim) ~ N(0, I), c (N, G.label_dim) one-hot, or None without classes) -> (N, img_channels,
    img_resolution, img_resolution) float32, black to white in [-1, 1]. In evaluation mode, without gradients for the
    weights; G.label_names names the classes. Raises UserError where there is no readable checkpoint.
    """
    return _restore(checkpoint.load(checkpoint.find(ckpt)), pick_device(device))


def _restore(parts: dict[str, Any], device: torch.device) -> nn.Module:
    G = build.build_generator(parts["config"]["model"], parts["sizes"])
    try:
        G.load_state_dict(parts["G_ema"])
    except RuntimeError as e:
        raise UserError(
            f"ckpt: its weights do not fit the network it describes ({str(e).splitlines()[0]}); use an intact one"
        ) from e
    G.label_names = tuple(parts["data"]["labels"])  # type: ignore[assignment]
    return G.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def parse_label(label: str | None, names: tuple[str, ...]) -> int | None:
    """The class that a number or a name means, None for all in turn; raises UserError for an unknown one."""
    if label is None:
        return None
    if not names:
        raise UserError(f"label={label}: this model was trained without classes; leave label out")
    if label in names:
        return names.index(label)
    if label.isdigit() and int(label) < len(names):
        return int(label)
    shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:20]))
    raise UserError(f"label={label}: unknown; use one of {shown}" + (" ..." if len(names) > 20 else ""))


@torch.no_grad()
def draw(
    G: nn.Module, index: Tensor, seed: int, label: int | None = None, truncation: float = 1.0, precision: str = "fp32"
) -> Tensor:
    """Pictures number `index` (N,) of a seed as uint8 (N, C, H, W) on G's device: each depends on (seed, its number) alone.

    label None gives picture i the class i modulo the number of classes. truncation scales z towards its mean, 0.
    """
    device = next(G.parameters()).device
    index = index.to(device)
    z = normal(seed, "sample", index, G.z_dim) * truncation  # type: ignore[arg-type]
    classes = index % G.label_dim if label is None and G.label_dim else torch.full_like(index, label or 0)  # type: ignore[operator]
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


def sample(cfg: DictConfig) -> Path:
    """Write pictures as `cfg` (a SampleConfig) says: one grid where `out` ends in .png, else single files in a folder."""
    validate_sample(cfg)
    out = Path(cfg.out).expanduser()
    if out.suffix.lower() not in (".png", ""):
        raise UserError(f"out={cfg.out}: unknown kind {out.suffix}; give a name ending in .png, or a folder")
    device = pick_device(cfg.device)
    # not bf16 on CPUs that have it: the same checkpoint gives the same pictures on all of them
    precision = "fp32" if cfg.precision == "auto" and device.type == "cpu" else pick_precision(cfg.precision, device)
    prepare_process(device, precision, threads=0)
    G = load_generator(cfg.ckpt, cfg.device)
    label = parse_label(cfg.label, G.label_names)  # type: ignore[arg-type]
    indices = torch.arange(cfg.n).split(cfg.batch_size)
    batches = to_host(draw(G, index, cfg.seed, label, cfg.truncation, precision) for index in indices)
    images = []
    with tqdm(total=cfg.n, unit="img", delay=2) as bar, PngWriter() as writer:
        for index, pictures in zip(indices, batches):
            if out.suffix:
                images.append(pictures)
            else:
                writer.write([out / f"{i:06d}.png" for i in index.tolist()], pictures.permute(0, 2, 3, 1).numpy())
            bar.update(len(index))
    if images:
        write_png(out, enlarge(grid(torch.cat(images)), zoom_for(G.img_resolution)))  # type: ignore[arg-type]
    print(f"{cfg.n} pictures in {out}")
    return out
