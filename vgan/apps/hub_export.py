"""The command vgan-export, and its upload to the Hugging Face Hub (to=hub).

The repo gets the generator as safetensors, its config, a grid of samples and a model card.
"""

import json
from pathlib import Path
from typing import Any

import torch

import vgan
from vgan.apps import model_card, static_page
from vgan.apps.command_line import Compose
from vgan.config import ExportConfig
from vgan.inference.latents import draw
from vgan.inference.load import Model, load_model, metadata, restore_generator, save_safetensors
from vgan.runtime import hub
from vgan.runtime.files import check_folder, png_bytes, write_folder
from vgan.runtime.images import enlarge, grid, zoom_for

CARD, CONFIG, SAMPLES = "README.md", "config.json", "samples.png"


def export(cfg: ExportConfig, compose: Compose) -> Path | str:
    """Upload a model for to=hub, or write its files to the folder `out`; else write an export.

    compose: vgan-train's config from overrides, for the command in the model card. Returns the
    address of the model's page or the path written. Raises UserError before anything is uploaded or
    written.
    """
    if cfg.to != "hub":
        return static_page.export(cfg)
    repo, out, is_new = str(cfg.repo), None, False
    if cfg.out:
        out = Path(cfg.out).expanduser()
        check_folder(out, "a model", (CARD, CONFIG, SAMPLES, hub.MODEL_FILE))
    else:
        is_new = hub.check_upload(repo, cfg.private)
    model = load_model(cfg.ckpt)
    contents = build_files(model, cfg, compose)
    size = f"{sum(map(len, contents.values())) / 1e6:,.1f} MB in {len(contents)} files"
    if out:
        write_folder(out, contents)
        print(f"{out}  {size}; nothing was uploaded")
        return out
    message = f"Upload a generator that has seen {model.state['cur_nimg']:,} images"
    url = hub.upload(repo, cfg.private, is_new, contents, message)
    print(f"{url}  {size}")
    return url


def build_files(model: Model, cfg: ExportConfig, compose: Compose) -> dict[str, bytes]:
    """Return the files of a repo by name, in which paths of this machine are their last part."""
    state = {**model.state, "config": shorten_paths(model.state["config"])}
    G = restore_generator(state, torch.device("cpu"))
    information = metadata(model.path, state, cfg.license)
    samples = model_card.choose_samples(G)
    images = draw(G, torch.arange(samples.n), cfg.seed)
    card = model_card.render_card(
        str(cfg.repo), G, model._replace(state=state), information, samples, cfg.seed, compose
    )
    return {
        hub.MODEL_FILE: save_safetensors(G, information),
        CONFIG: _config_json(state),
        SAMPLES: png_bytes(enlarge(grid(images, samples.columns), zoom_for(G.img_resolution))),
        CARD: card.encode(),
    }


def _config_json(state: dict[str, Any]) -> bytes:
    content = {
        "library_name": "vgan",
        "vgan_version": vgan.__version__,
        "generator": state["config"]["model"]["generator"],
        "sizes": state["sizes"],
        "data": {k: v for k, v in state["data"].items() if k != "conditions"},
        "images_seen": state["cur_nimg"],
        "training": state["config"],
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def shorten_paths(node: Any) -> Any:
    """Return a config in which paths of this machine are their last part: data, run folder."""
    if isinstance(node, dict):
        return {key: shorten_paths(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [shorten_paths(value) for value in node]
    if isinstance(node, str) and (node.startswith(("~", "..")) or Path(node).is_absolute()):
        return Path(node).name
    return node
