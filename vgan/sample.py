"""vgan-sample's room: pictures from a checkpoint."""

from pathlib import Path

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from vgan.config import validate_sample
from vgan.device import pick_device, prepare_process
from vgan.drawing import draw, drawing_precision, load_generator, to_host
from vgan.errors import UserError
from vgan.files import PngWriter, write_png
from vgan.images import enlarge, grid, zoom_for


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


def sample(cfg: DictConfig) -> Path:
    """Write pictures as `cfg` (a SampleConfig) says: one grid where `out` ends in .png, else single files in a folder."""
    validate_sample(cfg)
    out = Path(cfg.out).expanduser()
    if out.suffix.lower() not in (".png", ""):
        raise UserError(f"out={cfg.out}: unknown kind {out.suffix}; give a name ending in .png, or a folder")
    device = pick_device(cfg.device)
    precision = drawing_precision(cfg.precision, device)
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
