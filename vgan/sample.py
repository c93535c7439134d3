"""vgan-sample's room: pictures from a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from vgan import build, checkpoint
from vgan.config import validate_sample
from vgan.device import pick_device
from vgan.errors import UserError
from vgan.images import enlarge, grid, to_uint8, write_png, zoom_for
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
def draw(G: nn.Module, index: Tensor, seed: int, label: int | None = None, truncation: float = 1.0) -> Tensor:
    """Pictures number `index` (N,) of a seed as uint8 (N, C, H, W): each depends on (seed, its number) alone.

    label None gives picture i the class i modulo the number of classes. truncation scales z towards its mean, 0.
    """
    device = next(G.parameters()).device
    z = normal(seed, "sample", index, G.z_dim).to(device) * truncation  # type: ignore[arg-type]
    classes = index % G.label_dim if label is None and G.label_dim else torch.full_like(index, label or 0)  # type: ignore[operator]
    c = torch.nn.functional.one_hot(classes, G.label_dim).float() if G.label_dim else z.new_zeros(len(z), 0)  # type: ignore[arg-type]
    return to_uint8(G(z, c.to(device))).cpu()


def sample(cfg: DictConfig) -> Path:
    """Write pictures as `cfg` (a SampleConfig) says: one grid where `out` ends in .png, else single files in a folder."""
    validate_sample(cfg)
    out = Path(cfg.out).expanduser()
    if out.suffix.lower() not in (".png", ""):
        raise UserError(f"out={cfg.out}: unknown kind {out.suffix}; give a name ending in .png, or a folder")
    G = load_generator(cfg.ckpt, cfg.device)
    label = parse_label(cfg.label, G.label_names)  # type: ignore[arg-type]
    batches = torch.arange(cfg.n).split(cfg.batch_size)
    bar = tqdm(total=cfg.n, unit="img", delay=2)
    images = []
    for index in batches:
        pictures = draw(G, index, cfg.seed, label, cfg.truncation)
        if out.suffix:
            images.append(pictures)
        else:
            for i, picture in zip(index.tolist(), pictures):
                write_png(out / f"{i:06d}.png", grid(picture[None]))
        bar.update(len(index))
    bar.close()
    if images:
        write_png(out, enlarge(grid(torch.cat(images)), zoom_for(G.img_resolution)))  # type: ignore[arg-type]
    print(f"{cfg.n} pictures in {out}")
    return out
