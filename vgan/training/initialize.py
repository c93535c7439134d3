"""Start a run from the networks of another: init=CKPT.

Weights are taken by name and shape. At a higher resolution the stages of both are counted from 4
px, so that all but the finest fit; class embeddings are taken by the name of the class.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vgan.data.conditions import Conditions
from vgan.inference.load import load_model
from vgan.models.discriminator import DiscriminatorBase
from vgan.models.generator import GeneratorBase
from vgan.models.sizes import coarsest_size
from vgan.runs import checkpoint
from vgan.runtime.errors import UserError
from vgan.runtime.images import Resolution, format_px, height_width, parse_resolution

_STAGE = re.compile(r"^(stages|transitions)\.(\d+)\.")
_LATENT = ("input.scale.", "modulations.")  # linear maps of z, then of the class embedding
# What follows from the resolution, the colours or the classes, and may have another shape.
_ENDS = ("act.", "to_rgb.", "from_rgb.")


class Source(NamedTuple):
    """The networks of another run."""

    name: str
    digest: str
    resolution: Resolution
    labels: tuple[str, ...]
    G: dict[str, Tensor]  # averaged weights
    D: dict[str, Tensor]  # empty for an exported generator


def read_source(init: str) -> Source:
    """Read a checkpoint, a run folder, an exported generator or a model of the Hugging Face Hub.

    Raises UserError.
    """
    try:
        state = load_model(init).state
        G, D = dict(state["G_ema"]), dict(state.get("D", {}))
        labels = tuple(map(str, state["data"]["labels"]))
        if kept := state["data"].get("conditions"):
            labels = Conditions.from_state_dict(kept).key
        resolution = parse_resolution(state["sizes"]["img_resolution"])
    except UserError as e:
        raise UserError(f"init={init}: {str(e).removeprefix(f'ckpt={init}: ')}") from e
    except (LookupError, TypeError, ValueError) as e:
        raise UserError(f"init={init}: holds no networks ({e}); use an intact file") from e
    return Source(init, checkpoint.digest({"G": G, "D": D})[:16], resolution, labels, G, D)


def initialize(
    G: GeneratorBase,
    D: DiscriminatorBase,
    source: Source,
    labels: tuple[str, ...],
    freeze_d: int = 0,
) -> str:
    """Copy what fits from `source` into G and D, in place; return a line that says what was taken.

    labels: the names of the new data's classes or conditions. Raises UserError where networks are
    of other sizes, the source has a higher resolution, or one of the freeze_d finest stages of D
    would be new.
    """
    own, theirs = format_px(G.img_resolution), format_px(source.resolution)
    if coarsest_size(G.img_resolution) != coarsest_size(source.resolution):
        rule = f"has images of another shape ({theirs}) than data.resolution ({own})"
        raise UserError(f"init={source.name}: {rule}; use one that is doubled or equal")
    if max(height_width(G.img_resolution)) < max(height_width(source.resolution)):
        rule = f"has a higher resolution ({theirs}) than data.resolution ({own})"
        raise UserError(f"init={source.name}: {rule}; use an equal or lower one")
    if freeze_d > 0 and (not source.D or G.img_resolution != source.resolution):
        rule = f"needs a discriminator of {own} in init={source.name}"
        raise UserError(f"freeze_d={freeze_d}: {rule}; use freeze_d=0")
    parts = [_copy("G", G, source, source.G, labels)]
    if source.D:
        parts.append(_copy("D", D, source, source.D, labels))
    else:
        parts.append("D is new (an exported generator has none)")
    if labels:
        known = sum(name in source.labels for name in labels)
        parts.append(f"{known} of {len(labels)} classes or conditions known by name")
    return f"init={source.name}: " + "; ".join(parts) + "."


@torch.no_grad()
def _copy(
    name: str, network: nn.Module, source: Source, weights: Mapping[str, Tensor],
    labels: tuple[str, ...],
) -> str:  # fmt: skip
    """Copy weights into a network; return how many tensors were taken and which are new."""
    own = network.state_dict()
    fitted = _align(weights, own) if name == "D" else dict(weights)
    new: list[str] = []
    for key, target in own.items():
        value = fitted.get(key)
        if value is None:
            new.append(key)
        elif _is_class_embedding(key):
            if len(value) != len(target):
                raise _misfit(source, name, key, value, target)
            for i, label in enumerate(labels):
                if label in source.labels:
                    target[:, i] = value[:, source.labels.index(label)]
        elif key.startswith(_LATENT) and key.endswith("weight") and len(value) == len(target):
            if _z_dim(weights) != _z_dim(own):
                raise _misfit(source, name, key, value, target)
            columns = min(value.shape[1], target.shape[1])  # those of z; classes come after it
            target[:, :columns] = value[:, :columns]
        elif value.shape == target.shape:
            target.copy_(value)
        elif key.startswith(_ENDS):
            new.append(key)
        else:
            raise _misfit(source, name, key, value, target)
    if len(new) == len(own):
        raise UserError(f"init={source.name}: nothing in it fits {name}; use the same model=")
    layers = sorted({".".join(key.split(".")[:2]) for key in new})
    fresh = f", new: {', '.join(layers)}" if layers else ""
    return f"{len(own) - len(new)} of {len(own)} tensors of {name}{fresh}"


def _z_dim(weights: Mapping[str, Tensor]) -> int:
    embed = weights.get("input.embed.weight")
    return weights["input.scale.weight"].shape[1] - (0 if embed is None else len(embed))


def _is_class_embedding(key: str) -> bool:
    return key.endswith("embed.weight") and not key.endswith("to_embed.weight")


def _align(weights: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Number the stages of a discriminator, which begin with the finest, as the new one does."""
    shift = _count_stages(own) - _count_stages(weights)
    return {
        _STAGE.sub(lambda m: f"{m[1]}.{int(m[2]) + shift}.", key): value
        for key, value in weights.items()
    }


def _count_stages(weights: Mapping[str, Any]) -> int:
    found = [_STAGE.match(key) for key in weights]
    return 1 + max((int(m[2]) for m in found if m and m[1] == "stages"), default=-1)


def _misfit(source: Source, name: str, key: str, value: Tensor, target: Tensor) -> UserError:
    shapes = f"{tuple(value.shape)} there, {tuple(target.shape)} here"
    fix = "use the same model= and size= as there"
    return UserError(f"init={source.name}: other sizes of networks ({name} {key}: {shapes}); {fix}")


def freeze_stages(D: DiscriminatorBase, count: int) -> None:
    """Keep the `count` stages of D nearest to the pixels as they are (Mo et al. 2020, FreezeD).

    Raises UserError where D has no more stages than that.
    """
    stages = getattr(D, "stages", [])
    if count >= len(stages):
        rule = f"must be below the {len(stages)} stages of the discriminator"
        raise UserError(f"freeze_d={count}: {rule}")
    for name, parameter in D.named_parameters():
        m = _STAGE.match(name)
        if name.startswith("from_rgb.") or (m and int(m[2]) < count):
            parameter.requires_grad_(False)
