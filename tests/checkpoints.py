"""Checkpoints of small untrained networks, made without a training run."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vgan.cli import register_schemas
from vgan.data.shapes import SHAPE_NAMES
from vgan.runs import checkpoint
from vgan.runtime.instantiate import construct_own
from vgan.schema import CONFIG_DIR, typed
from vgan.validation import validate

T = TypeVar("T")

SMALL = ["data=shapes", "data.resolution=16", "size.g_widths=[8,8,8]", "size.d_widths=[8,8,8]"]


def compose_as(schema: type[T], name: str, *overrides: object) -> T:
    """Return the typed and validated config of a command."""
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = typed(compose(name, list(map(str, overrides))))
    assert isinstance(cfg, schema)
    validate(cfg)
    return cfg


def make_checkpoint(
    folder: Path, *overrides: str, labels: tuple[str, ...] = SHAPE_NAMES, noise: float = 0.0
) -> Path:
    """Write a checkpoint of seed 0. noise is added to the weights, many of which are 0."""
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = compose("train", [*SMALL, *overrides])
    config = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(config, dict)
    sizes = {"img_resolution": 16, "img_channels": 3, "label_dim": len(labels)}
    torch.manual_seed(0)
    state: dict[str, Any] = dict.fromkeys(checkpoint.REQUIRED_KEYS)
    state |= {"config": config, "sizes": sizes, "cur_nimg": 40}
    state["data"] = {"name": "shapes", "digest": "0123456789", "labels": list(labels)}
    for key, kind in (("G", "generator"), ("G_ema", "generator"), ("D", "discriminator")):
        network = construct_own(config["model"][kind], f"model.{kind}", sizes)
        state[key] = network.state_dict()
        for weight in state[key].values():
            weight.add_(noise * torch.randn(weight.shape))
    path = checkpoint.path_at(folder, state["cur_nimg"])
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, state, keep=1)
    return path
