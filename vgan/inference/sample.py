"""The command vgan-sample: images, films and attention maps from a checkpoint."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgan.config import SampleConfig
from vgan.inference import attention_maps as maps
from vgan.inference import directions, writers
from vgan.inference.latent_files import read_latents
from vgan.inference.latents import (
    Film,
    default_labels,
    draw,
    interpolate,
    latents,
    render,
    to_host,
    walk,
)
from vgan.inference.load import (
    drawing_precision,
    load_model,
    restore_discriminator,
    restore_generator,
)
from vgan.inference.writers import FILMS, STILLS
from vgan.models.generator import GeneratorBase
from vgan.runtime.device import pick_device, prepare_process
from vgan.runtime.errors import UserError
from vgan.runtime.files import write_png
from vgan.runtime.images import grid, height_width, zoom_for

STOPS = 8  # images that a film passes through by default
ROWS, MAX_ROWS = 8, 64  # of a grid of attention maps
STRENGTHS = 7  # columns of an overview of components
MAX_SEEDS = 10_000_000


def sample(cfg: SampleConfig) -> Path:
    """Write images, a film or attention maps, in the format of the file name. Returns the path."""
    out = _check_out(cfg)
    device = pick_device(cfg.device)
    precision = drawing_precision(cfg.precision, device)
    prepare_process(device, precision, threads=0)
    state = load_model(cfg.ckpt).state
    G = restore_generator(state, device)
    if cfg.show == "attention":
        written = _write_attention(cfg, G, precision, out)
    elif cfg.show == "patches":
        written = _write_patches(cfg, G, state, precision, out)
    elif cfg.show == "components":
        written = _write_components(cfg, G, precision, out)
    elif cfg.motion:
        written = _write_film(cfg, G, precision, out)
    else:
        written = _write_images(cfg, G, precision, out)
    print(f"{written} in {out}")
    return out


def parse_seeds(seeds: Any) -> list[int]:
    """Return the image numbers of 7, '0-15' or ['0-15', 40]. Raises UserError for anything else."""
    numbers: list[int] = []
    for part in seeds if isinstance(seeds, (list, tuple)) else [seeds]:
        found = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", str(part).strip(), re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            rule = "must be numbers and ranges, such as 7, 0-15 or [0-15,40]"
            raise UserError(f"seeds={seeds}: {rule}")
        if last - first >= MAX_SEEDS:
            rule = f"names more than {MAX_SEEDS:,} images; give fewer at a time"
            raise UserError(f"seeds={seeds}: {rule}")
        numbers += range(first, last + 1)
    if not numbers:
        raise UserError(f"seeds={seeds}: must name at least one, such as 7, 0-15 or [0-15,40]")
    return numbers


def parse_label(label: Any, names: Sequence[str]) -> int:
    """Return the class of a number or a name. Raises UserError for an unknown one."""
    if not names:
        raise UserError(f"label={label}: this model was trained without classes; leave label out")
    # YAML reads true and false as booleans; they may be class names.
    text = str(label).lower() if isinstance(label, bool) else str(label)
    if text in names:
        return names.index(text)
    if re.fullmatch(r"\d{1,9}", text, re.ASCII) and int(text) < len(names):
        return int(text)
    known = ", ".join(f"{i} {name}" for i, name in enumerate(names[:20]))
    more = " ..." if len(names) > 20 else ""
    raise UserError(f"label={label}: unknown; use one of {known}{more}")


def parse_labels(label: Any, names: Sequence[str]) -> list[int] | None:
    """Return the classes of a number, a name or a list of them. None stands for all classes."""
    if label is None:
        return None
    labels = label if isinstance(label, (list, tuple)) else [label]
    if not labels:
        raise UserError("label=[]: must name at least one class; leave label out for all classes")
    return [parse_label(one, names) for one in labels]


def parse_c(label: Any, condition: Any, G: GeneratorBase) -> Tensor | None:
    """Return the classes (N,) or the c (N, label_dim) that label= or condition= name, in order.

    None stands for all classes, or for the conditions of the examples. Raises UserError for what
    does not fit the generator.
    """
    if G.conditions and label is not None:
        rule = "this model was trained with conditions"
        raise UserError(f"label={label}: {rule}; use condition=, or leave label out")
    if condition is not None and not G.conditions:
        rule = "this model was trained without conditions; leave it out"
        raise UserError(f"condition={condition}: {rule}")
    if G.conditions:
        if condition is None:
            return None
        return G.conditions.standardize(G.conditions.parse(condition))
    labels = parse_labels(label, G.label_names)
    return None if labels is None else torch.tensor(labels)


def _check_out(cfg: SampleConfig) -> Path:
    """Return the output path. Raises UserError unless it fits show and motion."""
    out = Path(cfg.out).expanduser()
    known = (*STILLS, *FILMS)
    if out.name.lower() in known:
        fix = f"give one, such as grid{out.name}"
        raise UserError(f"out={cfg.out}: has no name before its ending; {fix}")
    kind = out.suffix.lower()
    if out.is_dir() and kind not in known:
        kind = ""  # a folder may have a dot in its name
    draws_sheet = cfg.show != "images"
    allowed = (".png",) if draws_sheet else (*known, "")
    if kind not in allowed:
        problem = f"unknown kind {kind}" if kind else "a folder cannot hold this"
        fix = "give a name ending in .png"
        if not draws_sheet:
            fix = f"give a name ending in {', '.join(known)}, or a folder"
        raise UserError(f"out={cfg.out}: {problem}; {fix}")
    if kind in FILMS:
        if cfg.motion is None:
            raise UserError(
                f"out={cfg.out}: a film needs motion=interpolate, classes, walk or component"
            )
        writers.require_film_writer(out)
    if kind and out.is_dir():
        raise UserError(f"out={cfg.out}: is a folder; give the name of a file in it")
    if not kind and out.exists() and not out.is_dir():
        fix = f"give a folder, or a name ending in {', '.join(STILLS)}"
        raise UserError(f"out={cfg.out}: is a file; {fix}")
    return out


def _selection(cfg: SampleConfig, G: GeneratorBase, default: int) -> tuple[Tensor, Tensor]:
    """Return numbers (N,) and classes (N,), or c (N, label_dim), of the images of the series."""
    if cfg.seeds is None:
        index = torch.arange(cfg.n or default)
    elif cfg.n is None:
        index = torch.tensor(parse_seeds(cfg.seeds))
    else:
        raise UserError(f"n={cfg.n}: seeds={cfg.seeds} gives the number of images; leave n out")
    return index, _classes(cfg, G, index)


def _classes(cfg: SampleConfig, G: GeneratorBase, index: Tensor) -> Tensor:
    """Return the classes of images `index` (N,), or their c. Several are used in order."""
    given = parse_c(cfg.label, cfg.condition, G)
    if given is None:
        return default_labels(G, index)
    return given[torch.arange(len(index)) % len(given)]


def _inputs(cfg: SampleConfig, G: GeneratorBase, default: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers (N,), z and c of the images: those of latent=FILE, or of the series."""
    if cfg.latent is None:
        index, classes = _selection(cfg, G, default)
        return index, *latents(G, index, cfg.seed, classes, cfg.truncation)
    z, c = read_latents(cfg.latent, G)
    index = torch.arange(len(z))
    if c is None or cfg.label is not None or cfg.condition is not None:
        c = latents(G, index, cfg.seed, _classes(cfg, G, index))[1]
    return index, cfg.truncation * z, c


def _write_images(cfg: SampleConfig, G: GeneratorBase, precision: str, out: Path) -> str:
    if cfg.latent is None:
        index, classes = _selection(cfg, G, default=64)
        selected = zip(index.split(cfg.batch_size), classes.split(cfg.batch_size))
        batches = to_host(draw(G, i, cfg.seed, c, cfg.truncation, precision) for i, c in selected)
    else:
        index, z, c = _inputs(cfg, G, default=64)
        inputs = zip(z.split(cfg.batch_size), c.split(cfg.batch_size))
        batches = to_host(render(G, *pair, precision) for pair in inputs)
    zoom = cfg.zoom or zoom_for(G.img_resolution)
    writers.write_images(out, index.tolist(), batches, zoom, cfg.columns)
    return f"{len(index):,} images"


def _write_film(cfg: SampleConfig, G: GeneratorBase, precision: str, out: Path) -> str:
    film = _film(cfg, G)
    total = len(film) * cfg.tiles
    zoom = cfg.zoom or zoom_for(G.img_resolution)
    z, c = film.z.flatten(0, 1), film.c.flatten(0, 1)
    inputs = zip(z.split(cfg.batch_size), c.split(cfg.batch_size))
    batches = to_host(render(G, *pair, precision) for pair in inputs)
    kind = out.suffix.lower()
    if kind in FILMS:
        columns = min(cfg.columns or math.ceil(math.sqrt(cfg.tiles)), cfg.tiles)
        height, width = (zoom * side for side in height_width(G.img_resolution))
        rows = math.ceil(cfg.tiles / columns)
        writers.require_film_size(out, height * rows, width * columns)
        images = writers.collect(batches, total).unflatten(0, (len(film), cfg.tiles))
        frames = np.stack([grid(frame, columns) for frame in images])
        writers.write_film(out, frames, cfg.fps, zoom)
    else:  # single frames; each row of a grid goes from one image to the next
        columns = cfg.columns or cfg.frames * cfg.tiles
        writers.write_images(out, list(range(total)), batches, zoom, columns)
    return f"{len(film):,} frames"


def _film(cfg: SampleConfig, G: GeneratorBase) -> Film:
    """Return the latents and labels of every frame."""
    tiles = cfg.tiles
    through_images = cfg.motion == "interpolate"
    index, z, c = _inputs(cfg, G, default=tiles * STOPS if through_images else tiles)
    n = len(index)
    if n % tiles:
        rule = f"{n} images cannot be shared equally; use a divisor, or other seeds"
        raise UserError(f"tiles={tiles}: {rule}")
    if through_images and n == tiles:
        rule = f"needs two images per tile or more, there are {n} for {tiles}; give more"
        raise UserError(f"motion=interpolate: {rule}")
    if not through_images and n != tiles:
        rule = f"needs one image per tile, there are {n}; give tiles={n}"
        raise UserError(f"motion={cfg.motion}: {rule}")
    if cfg.motion == "component":
        direction = directions.component(G, cfg.component or 1)
        return directions.move(z, c, direction, cfg.strength, cfg.frames, cfg.loop)
    if cfg.motion == "walk":
        film = walk(G.z_dim, c, cfg.seed, index.to(z.device), STOPS, cfg.frames)
        return Film(film.z * cfg.truncation, film.c)
    if cfg.motion == "classes":
        stops = parse_c(cfg.label, cfg.condition, G)
        if stops is None:
            stops = torch.arange(0 if G.conditions else G.label_dim)
        if len(stops) < 2:
            rule = (
                "needs a model with classes, and at least two of them in label=[...], or conditions"
            )
            raise UserError(f"motion=classes: {rule}")
        z = z.repeat_interleave(len(stops), dim=0)
        if not G.conditions:
            stops = torch.eye(G.label_dim)[stops]
        c = stops.to(z).repeat(tiles, 1)
    return interpolate(z, c, tiles, cfg.frames, cfg.loop)


def _map_inputs(cfg: SampleConfig, G: GeneratorBase) -> tuple[Tensor, Tensor]:
    index, z, c = _inputs(cfg, G, ROWS)
    if len(index) > MAX_ROWS:
        rule = f"draws at most {MAX_ROWS} images, there are {len(index)}; give fewer"
        raise UserError(f"show={cfg.show}: {rule}")
    return z, c


def _write_attention(cfg: SampleConfig, G: GeneratorBase, precision: str, out: Path) -> str:
    z, c = _map_inputs(cfg, G)
    query = None
    if cfg.query is not None:
        sides = height_width(G.img_resolution)
        if len(cfg.query) != 2 or not all(0 <= at < side for at, side in zip(cfg.query, sides)):
            rule = f"must be [row,column] in pixels below {sides[0]} and {sides[1]}"
            raise UserError(f"query={list(cfg.query)}: {rule}")
        query = (cfg.query[0] / sides[0], cfg.query[1] / sides[1])
    write_png(out, maps.attention_grid(*maps.attention_maps(G, z, c, precision, query)))
    return f"attention of {len(z)} images"


def _write_patches(
    cfg: SampleConfig, G: GeneratorBase, state: dict[str, Any], precision: str, out: Path
) -> str:
    z, c = _map_inputs(cfg, G)
    D = restore_discriminator(state, z.device)
    images = render(G, z, c, precision)
    logits = maps.patch_logits(D, images, c, precision)
    write_png(out, maps.patch_logits_grid(images, logits))
    return f"patches of {len(z)} images"


def _write_components(cfg: SampleConfig, G: GeneratorBase, precision: str, out: Path) -> str:
    """Draw one image moved along several components, a component a row."""
    index, z, c = _inputs(cfg, G, default=1)
    if len(index) != 1:
        rule = f"draws one image, there are {len(index)}; give one, such as seeds=7"
        raise UserError(f"show=components: {rule}")
    first = cfg.component or 1
    directions.component(G, first)  # refuses numbers out of range
    numbers = range(first, min(first + ROWS, G.z_dim + 1))
    rows = directions.components(G)[first - 1 : numbers[-1]]
    columns = {}
    for t in torch.linspace(-cfg.strength, cfg.strength, STRENGTHS).tolist():
        title = f"{t:+.3g}" if t else "0"
        columns[title] = render(G, z + t * rows, c.expand(len(rows), -1), precision)
    write_png(out, maps.image_grid(columns, [str(number) for number in numbers]))
    return f"components {first} to {numbers[-1]} of {G.z_dim}"
