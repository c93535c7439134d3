"""vgan-sample's room: pictures, films and maps of attention from a checkpoint."""

import io
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig
from PIL import Image
from torch import Tensor, nn

from vgan.config import validate_sample
from vgan.inference import attention_maps as attention
from vgan.inference import latents as motion
from vgan.inference import writers as movies
from vgan.inference.load import (
    draw,
    drawing_precision,
    latents,
    render,
    restore_discriminator,
    restore_generator,
    to_host,
)
from vgan.runs import checkpoint
from vgan.runtime.console import progress_bar
from vgan.runtime.device import pick_device, prepare_process
from vgan.runtime.errors import UserError
from vgan.runtime.files import PngWriter, write_png
from vgan.runtime.images import enlarge, grid, zoom_for

STILLS = (".png", ".npy", ".zip")
STOPS = 8  # pictures that a film passes through, where nothing is said
ROWS, MOST_ROWS = 8, 64  # of a sheet of attention
MOST_SEEDS = 10_000_000


def parse_seeds(seeds: Any) -> list[int]:
    """Numbers and ranges, as 7, '0-15' or ['0-15', 40], in the order given; raises UserError for anything else."""
    numbers: list[int] = []
    for part in seeds if isinstance(seeds, (list, tuple, ListConfig)) else [seeds]:
        found = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", str(part).strip(), re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise UserError(
                f"seeds={seeds}: must be numbers and ranges, such as 7, 0-15 or [0-15,40]"
            )
        if last - first >= MOST_SEEDS:
            raise UserError(
                f"seeds={seeds}: names more than {MOST_SEEDS:,} pictures; give fewer at a time"
            )
        numbers += range(first, last + 1)
    if not numbers:
        raise UserError(f"seeds={seeds}: must name at least one, such as 7, 0-15 or [0-15,40]")
    return numbers


def parse_label(label: Any, names: tuple[str, ...]) -> int:
    """The class that a number or a name means; raises UserError for an unknown one."""
    if not names:
        raise UserError(f"label={label}: this model was trained without classes; leave label out")
    label = str(label).lower() if isinstance(label, bool) else label  # true and false may be names
    if str(label) in names:
        return names.index(str(label))
    if re.fullmatch(r"\d{1,9}", str(label), re.ASCII) and int(label) < len(names):
        return int(label)
    shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:20]))
    raise UserError(
        f"label={label}: unknown; use one of {shown}" + (" ..." if len(names) > 20 else "")
    )


def parse_labels(label: Any, names: tuple[str, ...]) -> list[int] | None:
    """The classes of one number or name, or of a list of them; None for all in turn."""
    if label is None:
        return None
    labels = [
        parse_label(one, names)
        for one in (label if isinstance(label, (list, tuple, ListConfig)) else [label])
    ]
    if not labels:
        raise UserError("label=[]: must name at least one class; leave label out for all in turn")
    return labels


def sample(cfg: DictConfig) -> Path:
    """Write what `cfg` (a SampleConfig) asks for, in the kind that the name of `out` ends in."""
    validate_sample(cfg)
    out = _checked_out(cfg)
    device = pick_device(cfg.device)
    precision = drawing_precision(cfg.precision, device)
    prepare_process(device, precision, threads=0)
    parts = checkpoint.load_newest(cfg.ckpt)[1]
    G = restore_generator(parts, device)
    labels = parse_labels(cfg.label, G.label_names)  # type: ignore[arg-type]
    if cfg.show != "images":
        D = restore_discriminator(parts, device) if cfg.show == "patches" else None
        return _write_maps(cfg, G, D, labels, precision, out)
    if cfg.motion:
        return _write_film(cfg, G, labels, precision, out)
    index = _index(cfg, 64)
    classes = _classes(labels, index)
    zoom = cfg.zoom or zoom_for(G.img_resolution)  # type: ignore[arg-type]
    batches = to_host(
        draw(G, part, cfg.seed, chosen, cfg.truncation, precision)
        for part, chosen in zip(
            index.split(cfg.batch_size), _split(classes, len(index), cfg.batch_size)
        )
    )
    _write_stills(out, index.tolist(), batches, zoom, cfg.columns)
    print(f"{len(index):,} pictures in {out}")
    return out


def _checked_out(cfg: DictConfig) -> Path:
    out = Path(cfg.out).expanduser()
    known = (*STILLS, *movies.KINDS)
    if out.name.lower() in known:
        raise UserError(
            f"out={cfg.out}: has no name before its ending; give one, such as grid{out.name}"
        )
    kind = "" if out.is_dir() and out.suffix.lower() not in known else out.suffix.lower()
    allowed = (".png",) if cfg.show != "images" else (*known, "")
    if kind not in allowed:
        kinds = ", ".join(k for k in allowed if k)
        fix = f"give a name ending in {kinds}" + (", or a folder" if "" in allowed else "")
        raise UserError(
            f"out={cfg.out}: {f'unknown kind {kind}' if kind else 'a folder cannot hold this'}; {fix}"
        )
    if kind in movies.KINDS:
        if cfg.motion is None:
            raise UserError(f"out={cfg.out}: a film needs motion=interpolate, classes or walk")
        movies.require_writer(out)
    if out.is_dir() and kind:
        raise UserError(f"out={cfg.out}: is a folder; give the name of a file in it")
    if not kind and out.exists() and not out.is_dir():
        raise UserError(
            f"out={cfg.out}: is a file; give a folder, or a name ending in {', '.join(STILLS)}"
        )
    return out


def _index(cfg: DictConfig, default: int) -> Tensor:
    """The numbers of the pictures."""
    if cfg.seeds is None:
        return torch.arange(cfg.n or default)
    if cfg.n is not None:
        raise UserError(f"n={cfg.n}: seeds={cfg.seeds} says how many; leave n out")
    return torch.tensor(parse_seeds(cfg.seeds))


def _classes(labels: list[int] | None, index: Tensor) -> Tensor | None:
    """One label for all; several in turn, in the order of the pictures; None by the pictures' own numbers."""
    return (
        None
        if labels is None
        else torch.tensor(labels).repeat(-(-len(index) // len(labels)))[: len(index)]
    )


def _split(classes: Tensor | None, n: int, size: int) -> list[Tensor | None]:
    return [None] * -(-n // size) if classes is None else list(classes.split(size))


def _write_stills(
    out: Path, numbers: list[int], batches: Iterator[Tensor], zoom: int, columns: int | None
) -> None:
    """uint8 batches (N, C, H, W) into a grid, an array (N, H, W, C), a zip of PNG, or a folder of PNG."""
    kept: list[Tensor] = []
    seen: Counter[int] = Counter()
    names = []
    for number in numbers:
        seen[number] += 1  # a number asked for again, with another class say, has a file of its own
        names.append(f"{number:06d}" + (f"-{seen[number]}" if seen[number] > 1 else "") + ".png")
    kind, done = "" if out.is_dir() else out.suffix.lower(), 0
    with (
        progress_bar(len(numbers), "drawing") as bar,
        PngWriter() as writer,
        _opened(out, kind) as file,
        ExitStack() as opened,
    ):
        archive = (
            opened.enter_context(zipfile.ZipFile(file, "w")) if file and kind == ".zip" else None
        )
        for pictures in batches:
            chosen = names[done : done + len(pictures)]
            if kind == ".png":
                kept.append(pictures)
            elif archive:
                for name, picture in zip(chosen, pictures):
                    archive.writestr(
                        zipfile.ZipInfo(name), _png(picture)
                    )  # without the time of day: the same bytes again
            elif file:
                if done == 0:
                    shape = (len(numbers), *pictures.shape[2:], pictures.shape[1])
                    np.lib.format.write_array_header_1_0(
                        file, {"descr": "|u1", "fortran_order": False, "shape": shape}
                    )
                file.write(pictures.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            else:
                writer.write([out / name for name in chosen], pictures.permute(0, 2, 3, 1).numpy())
            bar.update(len(pictures))
            done += len(pictures)
    if kept:
        write_png(out, enlarge(grid(torch.cat(kept), columns), zoom))


@contextmanager
def _opened(out: Path, kind: str) -> Iterator[IO[bytes] | None]:
    """For .npy and .zip a file to write to, which gets its name when all is in it; None for other kinds."""
    if kind not in (".npy", ".zip"):
        yield None
        return
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, out)
    except OSError as e:
        raise UserError(
            f"out={out}: cannot be written ({e.strerror}); free space or choose another folder"
        ) from e
    finally:
        with suppress(OSError):
            temporary.unlink()


def _png(picture: Tensor) -> bytes:
    buffer = io.BytesIO()
    pixels = picture.permute(1, 2, 0).numpy()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_film(
    cfg: DictConfig, G: nn.Module, labels: list[int] | None, precision: str, out: Path
) -> Path:
    film = _film(cfg, G, labels)
    total, kind = len(film) * cfg.tiles, out.suffix.lower()
    zoom = cfg.zoom or zoom_for(G.img_resolution)  # type: ignore[arg-type]
    z, c = film.z.flatten(0, 1), film.c.flatten(0, 1)
    batches = to_host(
        render(G, *pair, precision)
        for pair in zip(z.split(cfg.batch_size), c.split(cfg.batch_size))
    )
    if kind not in movies.KINDS:  # the frames themselves; a grid has a row for each step of the way
        _write_stills(out, list(range(total)), batches, zoom, cfg.columns or cfg.frames * cfg.tiles)
    else:
        columns = min(cfg.columns or math.ceil(math.sqrt(cfg.tiles)), cfg.tiles)
        side = zoom * int(G.img_resolution)  # type: ignore[arg-type]
        movies.require_size(out, side * math.ceil(cfg.tiles / columns), side * columns)
        pictures = torch.empty(
            total, G.img_channels, G.img_resolution, G.img_resolution, dtype=torch.uint8
        )  # type: ignore[call-overload]
        done = 0
        with progress_bar(total, "drawing") as bar:
            for batch in batches:
                pictures[done : done + len(batch)] = batch
                done += len(batch)
                bar.update(len(batch))
        frames = pictures.unflatten(0, (len(film), cfg.tiles))
        movies.write_movie(out, np.stack([grid(frame, columns) for frame in frames]), cfg.fps, zoom)
    print(f"{len(film):,} frames in {out}")
    return out


def _film(cfg: DictConfig, G: nn.Module, labels: list[int] | None) -> motion.Film:
    """The latents of every frame."""
    tiles, default = cfg.tiles, cfg.tiles * (STOPS if cfg.motion == "interpolate" else 1)
    index = _index(cfg, default)
    if len(index) % tiles:
        raise UserError(
            f"tiles={tiles}: {len(index)} pictures cannot be shared out equally; give a divisor, or other seeds"
        )
    z, c = latents(G, index, cfg.seed, _classes(labels, index), cfg.truncation)
    if cfg.motion == "interpolate":
        if len(index) == tiles:
            raise UserError(
                f"motion=interpolate: needs two pictures a tile or more, n or seeds give {len(index)} for {tiles}"
            )
        return motion.through(z, c, tiles, cfg.frames, cfg.loop)
    if len(index) != tiles:
        raise UserError(
            f"motion={cfg.motion}: needs one picture a tile, n or seeds give {len(index)} for tiles={tiles}"
        )
    if cfg.motion == "walk":
        film = motion.walk(G.z_dim, c, cfg.seed, index.to(z.device), STOPS, cfg.frames)  # type: ignore[arg-type]
        return motion.Film(film.z * cfg.truncation, film.c)
    stops = range(G.label_dim) if labels is None else labels  # type: ignore[arg-type]
    if len(stops) < 2:
        raise UserError(
            "motion=classes: needs a model with classes, and two of them or more in label=[...]"
        )
    eye = torch.eye(len(G.label_names), device=z.device)[list(stops)]  # type: ignore[arg-type]
    return motion.through(
        z.repeat_interleave(len(stops), dim=0), eye.repeat(tiles, 1), tiles, cfg.frames, cfg.loop
    )


def _write_maps(
    cfg: DictConfig,
    G: nn.Module,
    D: nn.Module | None,
    labels: list[int] | None,
    precision: str,
    out: Path,
) -> Path:
    """A sheet of where the generator looks, or of what the discriminator finds fake."""
    index = _index(cfg, ROWS)
    if len(index) > MOST_ROWS:
        raise UserError(
            f"show={cfg.show}: draws at most {MOST_ROWS} pictures, n or seeds give {len(index)}; give fewer"
        )
    z, c = latents(G, index, cfg.seed, _classes(labels, index), cfg.truncation)
    if D is not None:
        images = render(G, z, c, precision)
        sheet = attention.verdict_sheet(images, attention.verdicts(D, images, c, precision))
    else:
        query = None
        if cfg.query is not None:
            side: int = G.img_resolution  # type: ignore[assignment]
            if not (len(cfg.query) == 2 and all(0 <= place < side for place in cfg.query)):
                raise UserError(
                    f"query={list(cfg.query)}: must be [row,column] in pixels from 0 to {side - 1}"
                )
            query = (cfg.query[0] / side, cfg.query[1] / side)
        images, looks = attention.look(G, z, c, precision)
        sheet = attention.attention_sheet(images, looks, query)
    write_png(out, sheet)
    print(f"{cfg.show} of {len(index)} pictures in {out}")
    return out
