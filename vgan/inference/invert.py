"""The command vgan-invert: the latent whose image is nearest to a given photo."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vgan.config import InvertConfig
from vgan.data.preprocess import examine_file
from vgan.data.source import BadImage
from vgan.inference import writers
from vgan.inference.latent_files import latents_npy
from vgan.inference.latents import latents, render
from vgan.inference.load import restore_discriminator, restore_generator
from vgan.inference.sample import parse_label
from vgan.models.discriminator import Discriminator
from vgan.models.generator import GeneratorBase
from vgan.runs import checkpoint
from vgan.runtime.console import progress_bar
from vgan.runtime.device import pick_device, prepare_process
from vgan.runtime.errors import UserError
from vgan.runtime.files import write_atomically, write_png
from vgan.runtime.images import Resolution, enlarge, grid, height_width, to_float, zoom_for

MAX_FRAMES = 100  # of the film; a longer search is shown in larger steps
SIDE = 256  # px of an image in the picture and the film, at least

Distance = Callable[[Tensor], Tensor]


def invert(cfg: InvertConfig) -> Path:
    """Find the latent of a photo; write it, a picture and perhaps a film. Returns its path."""
    out = _check_outputs(cfg)
    device = pick_device(cfg.device)
    prepare_process(device, "fp32", threads=0)
    state = checkpoint.load_newest(cfg.ckpt)[1]
    G, D = restore_generator(state, device), restore_discriminator(state, device)
    label = None if cfg.label is None else parse_label(cfg.label, G.label_names)
    zoom = cfg.zoom or zoom_for(G.img_resolution, SIDE)
    if cfg.animation:
        height, width = (zoom * side for side in height_width(G.img_resolution))
        writers.require_film_size(Path(cfg.animation), height, 2 * width, "animation")

    photo = read_photo(cfg.image, G.img_resolution, G.img_channels).to(device)
    found = search(cfg, G, PhotoDistance(to_float(photo), D), label)

    path = found.path[[0, -1]]
    start, image = render(G, path, found.c.expand(2, -1)).split(1)
    write_atomically(out, latents_npy(found.path[-1:], found.c[None]))
    write_png(out.with_suffix(".png"), enlarge(grid(torch.cat([photo, image]), 2), zoom))
    if cfg.animation:
        frames = _frames(G, photo, found, hold=round(cfg.fps))
        writers.write_film(Path(cfg.animation).expanduser(), frames, cfg.fps, zoom)
    print(_summary(cfg, G, found, psnr(photo, start), psnr(photo, image), out))
    return out


def _check_outputs(cfg: InvertConfig) -> Path:
    """Return the path of the latent. Raises UserError unless all outputs can be written."""
    out, photo = Path(cfg.out).expanduser(), Path(cfg.image).expanduser()
    if out.suffix.lower() != ".npy":
        raise UserError(f"out={cfg.out}: must end in .npy; the picture beside it ends in .png")
    outputs = {"out": out, "out's picture": out.with_suffix(".png")}
    if cfg.animation:
        outputs["animation"] = Path(cfg.animation).expanduser()
        writers.require_film_writer(outputs["animation"], "animation")
    for name, path in outputs.items():
        if path.is_dir():
            raise UserError(f"{name}={path}: is a folder; give the name of a file in it")
        if path.exists() and photo.exists() and path.samefile(photo):
            raise UserError(f"{name}={path}: is the photo itself; give another name")
    return out


def read_photo(name: str, resolution: Resolution, channels: int) -> Tensor:
    """Return an image file as uint8 (1, C, H, W), prepared like the images of training.

    The largest centred part of that shape is cropped and resized. Raises UserError for an
    unreadable file.
    """
    path = Path(name).expanduser()
    try:
        content = path.read_bytes()
        pixels = examine_file(str(path), content, resolution, channels, label=0).pixels
    except OSError as e:
        raise UserError(f"image={name}: cannot be read ({e.strerror}); check the name") from e
    except BadImage as e:
        raise UserError(f"image={e}: cannot be used; give a PNG, JPEG or WebP file") from e
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


class PhotoDistance:
    """The distance of images (N, C, H, W) in [-1, 1] to one photo (1, C, H, W), as (N,).

    It is the sum of two parts. The first is the mean absolute difference of pixels, averaged over
    scales from the full size down to 4 px. The second is the squared difference of the features of
    each stage of the discriminator, scaled to unit length at every place, as in LPIPS (Zhang et al.
    2018). A discriminator is a perceptual metric of its own data (Wang et al. 2018, pix2pixHD), and
    every checkpoint has one.
    """

    def __init__(self, photo: Tensor, D: torch.nn.Module) -> None:
        assert isinstance(D, Discriminator)
        self.D = D
        self._maps: list[Tensor] = []
        for stage in D.stages:
            list(stage.children())[-1].register_forward_hook(self._record)
        self.pyramid, self.features = _pyramid(photo), self._features(photo)

    def _record(self, layer: object, args: object, output: Tensor) -> None:
        self._maps.append(output)

    def _features(self, images: Tensor) -> list[Tensor]:
        self.D(images, images.new_zeros(len(images), self.D.label_dim))
        maps = [F.normalize(features, dim=1) for features in self._maps]
        self._maps.clear()
        return maps

    def __call__(self, images: Tensor) -> Tensor:
        pixels = [(a - b).abs().mean((1, 2, 3)) for a, b in zip(_pyramid(images), self.pyramid)]
        features = [
            (a - b).square().sum(1).mean((1, 2))
            for a, b in zip(self._features(images), self.features)
        ]
        return torch.stack(pixels).mean(0) + torch.stack(features).mean(0)


def _pyramid(images: Tensor) -> list[Tensor]:
    """Return images (N, C, H, W) at full size, a half, a quarter and so on, down to 4 px."""
    scales = [images]
    while min(scales[-1].shape[2:]) >= 8:
        scales.append(F.avg_pool2d(scales[-1], 2))
    return scales


class Found(NamedTuple):
    """The result of a search. path (steps, z_dim) leads from the best draw to the nearest z."""

    path: Tensor
    c: Tensor  # (label_dim,)
    start_distance: float  # of the best of all draws
    distance: float


def search(cfg: InvertConfig, G: GeneratorBase, distance: Distance, label: int | None) -> Found:
    """Find the z and class of the image with the least distance.

    The nearest cfg.starts of cfg.draws random images are improved together by Adam, with a learning
    rate that falls to 0 along a cosine. A prior holds the norm of z near sqrt(z_dim), where the
    model was trained. label None starts from all classes, or from the conditions of the examples;
    each search keeps the c of its start.
    """
    z, c, start_distance = _nearest_draws(cfg, G, distance, label)
    z.requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=cfg.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)
    path, losses = [], []
    with progress_bar(cfg.steps, "searching", unit="step") as bar:
        for _ in range(cfg.steps + 1):
            distances = distance(G(z, c))
            excess = z.norm(dim=1) / math.sqrt(G.z_dim) - 1
            loss = distances + cfg.prior * excess.square()
            path.append(z.detach().clone())
            losses.append(distances.detach())
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            schedule.step()
            bar.update()
    step, start = divmod(int(torch.stack(losses).argmin()), len(z))
    way = torch.stack(path)[: step + 1, start]
    return Found(way, c[start], start_distance, float(losses[step][start]))


@torch.no_grad()
def _nearest_draws(
    cfg: InvertConfig, G: GeneratorBase, distance: Distance, label: int | None
) -> tuple[Tensor, Tensor, float]:
    """Return z and c of the nearest of vgan-sample's first images, and the least distance."""
    zs, cs, distances = [], [], []
    with progress_bar(cfg.draws, "drawing") as bar:
        for index in torch.arange(cfg.draws).split(cfg.batch_size):
            z, c = latents(G, index, cfg.seed, label)
            zs.append(z)
            cs.append(c)
            distances.append(distance(G(z, c)))
            bar.update(len(z))
    values, best = torch.cat(distances).topk(min(cfg.starts, cfg.draws), largest=False)
    return torch.cat(zs)[best], torch.cat(cs)[best], float(values[0])


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images in dB, infinite for equal ones."""
    error = (a.float() - b.float()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def _frames(G: GeneratorBase, photo: Tensor, found: Found, hold: int) -> np.ndarray:
    """Return frames (T, H, 2 W) or (T, H, 2 W, 3): the photo and the image of each step.

    The last frame is shown `hold` times.
    """
    count = min(len(found.path), MAX_FRAMES)
    steps = torch.linspace(0, len(found.path) - 1, count).round().long()
    images = render(G, found.path[steps], found.c.expand(count, -1))
    frames = [grid(torch.cat([photo, image[None]]), 2) for image in images]
    return np.stack(frames + frames[-1:] * (hold - 1))


def _summary(
    cfg: InvertConfig, G: GeneratorBase, found: Found, before: float, after: float, out: Path
) -> str:
    name = f"class {G.label_names[int(found.c.argmax())]}, " if G.label_names else ""
    first = f"best of {cfg.draws:,} draws: distance {found.start_distance:.3f}, {before:.1f} dB"
    return f"{out}  {name}distance {found.distance:.3f}, {after:.1f} dB ({first})"
