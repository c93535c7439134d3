"""Networks from checkpoints and from exported safetensors files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import vgan
from vgan.data.conditions import Conditions
from vgan.data.source import CHANNELS
from vgan.models.discriminator import DiscriminatorBase
from vgan.models.generator import GeneratorBase
from vgan.runs import checkpoint
from vgan.runs.log_reader import read_metrics
from vgan.runtime import hub
from vgan.runtime.device import pick_device, pick_precision
from vgan.runtime.errors import UserError, first_line
from vgan.runtime.instantiate import construct_own
from vgan.runtime.renamed import upgrade_config

NOT_STATED = "not stated"  # the license of a model without one
_FORMAT = "vgan generator"


class Model(NamedTuple):
    """The state of a model, which has no discriminator if it was exported, and its origin.

    title: the name of the run folder, of the exported file, or USER/MODEL on the Hub.
    """

    title: str
    path: Path
    state: dict[str, Any]


def find_model(ckpt: str | Path) -> Path:
    """Return the file that `load_model` would read, downloaded if it is on the Hub.

    Raises UserError if there is none.
    """
    return hub.download(str(ckpt)) if hub.is_address(ckpt) else checkpoint.find(ckpt)


def load_model(ckpt: str | Path) -> Model:
    """Read a checkpoint file, a run folder's newest readable checkpoint, or an exported generator.

    hf://USER/MODEL names a model on the Hugging Face Hub. Raises UserError if it cannot be read.
    """
    path = find_model(ckpt)
    on_hub = hub.is_address(ckpt)
    if checkpoint.is_checkpoint(path):
        path, state = checkpoint.load_newest(path if on_hub else ckpt)
        title = path.resolve().parent.name or path.stem
    else:
        state, title = read_safetensors(path), path.stem
    return Model(hub.parse_address(str(ckpt)).repo if on_hub else title, path, state)


def load_generator(ckpt: str | Path, device: str = "auto") -> GeneratorBase:
    """Return the generator with averaged weights (EMA) of a checkpoint file or run folder.

    G(z (N, G.z_dim) ~ N(0, I), c (N, G.label_dim), or None without classes and conditions) -> (N,
    img_channels, H, W) float32, black to white in [-1, 1]; colours of RGBA are multiplied by alpha.
    G.img_resolution is the side of a square or (H, W). G is in evaluation mode and its weights have
    no gradients. c is one-hot for the classes G.label_names, or G.conditions.standardize(values)
    for values (N, G.label_dim) of the conditions G.conditions.names. Files written by vgan-export
    to=safetensors can be read too, and models of the Hugging Face Hub as hf://USER/MODEL,
    hf://USER/MODEL@REVISION or hf://USER/MODEL/FILE.safetensors.

    Raises UserError if there is no readable checkpoint.
    """
    return restore_generator(load_model(ckpt).state, pick_device(device))


def load_discriminator(ckpt: str | Path, device: str = "auto") -> DiscriminatorBase:
    """Return the discriminator of a checkpoint or of a run folder's newest checkpoint.

    D(x (N, C, H, W) in [-1, 1], c (N, label_dim)) -> logits (N, 1, h, w). Raises UserError if there
    is no readable checkpoint, and for an exported generator, which has none.
    """
    return restore_discriminator(load_model(ckpt).state, pick_device(device))


def restore_generator(state: Mapping[str, Any], device: torch.device) -> GeneratorBase:
    """Build the generator of a checkpoint's state. Nothing in the state is trusted."""
    G: GeneratorBase = _restore(state, "generator", "G_ema")
    try:
        G.label_names = tuple(map(str, state["data"]["labels"]))
        if kept := state["data"].get("conditions"):
            G.conditions = Conditions.from_state_dict(kept)
        if len(G.conditions.names if G.conditions else G.label_names) != G.label_dim:
            raise ValueError(f"not {G.label_dim} names")
        if G.conditions and G.label_names:
            raise ValueError("both classes and conditions")
    except (TypeError, ValueError, LookupError, RuntimeError) as e:
        problem = f"names of classes or conditions are damaged ({e})"
        raise UserError(f"ckpt: {problem}; use an intact checkpoint") from e
    return G.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def restore_discriminator(state: Mapping[str, Any], device: torch.device) -> DiscriminatorBase:
    """Build the discriminator of a checkpoint's state. Nothing in the state is trusted."""
    if "D" not in state:
        raise UserError("ckpt: an exported generator has no discriminator; use a checkpoint")
    D: DiscriminatorBase = _restore(state, "discriminator", "D")
    return D.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _restore(state: Mapping[str, Any], kind: str, key: str) -> Any:
    problem = "ckpt: its weights do not fit the network it describes ({}); use an intact checkpoint"
    try:
        node, sizes, weights = state["config"]["model"][kind], state["sizes"], state[key]
        _check_sizes(node, len(weights))
        with torch.device("meta"):  # no memory is allocated for what the checkpoint describes
            network = construct_own(node, f"model.{kind}", sizes)
        network.load_state_dict(weights, assign=True)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as e:
        raise UserError(problem.format(first_line(e))) from e
    if any(not isinstance(w, Tensor) or w.is_meta for w in network.state_dict().values()):
        raise UserError(problem.format("some are missing"))
    return network.eval().requires_grad_(False)


def _check_sizes(node: Mapping[str, Any], weights: int) -> None:
    """Raise ValueError for sizes that would build more layers than there are weights."""
    for name, value in node.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        limit = weights if name == "blocks" else 1_000_000
        known = [n for n in numbers if isinstance(n, (int, float))]
        if len(numbers) > 100 or not all(0 <= n <= limit for n in known):
            raise ValueError(f"{name}={value}")


def metadata(path: Path, state: Mapping[str, Any], license: str | None) -> dict[str, str]:
    """Return what describes the weights, as text: the network, its origin and its last metrics.

    An exported generator keeps the license and the metrics that it has.
    """
    config, sizes, data = state["config"], state["sizes"], state["data"]
    colours = CHANNELS[sizes["img_channels"]]
    if colours == "RGBA":
        colours = "RGBA, multiplied by alpha"
    information = {
        "format": _FORMAT,
        "vgan": vgan.__version__,
        "model": json.dumps(config["model"]["generator"]),
        "sizes": json.dumps(sizes),
        "labels": json.dumps(list(data["labels"])),
        "data": json.dumps({key: data[key] for key in ("name", "digest")}),
        "images_seen": str(state["cur_nimg"]),
        "range": f"images in [-1, 1], black to white, {colours}; z ~ N(0, I)",
        "config": json.dumps(config),
        "license": NOT_STATED,
    }
    if kept := data.get("conditions"):
        lists = {key: v.tolist() if isinstance(v, Tensor) else v for key, v in kept.items()}
        information["conditions"] = json.dumps(lists)
    information |= state.get("export", {})
    if license:
        information["license"] = license
    for line in read_metrics(path.parent):
        if line.get("cur_nimg") == state["cur_nimg"]:
            information["metrics"] = json.dumps(line)  # the last one is kept
    return information


def save_safetensors(G: GeneratorBase, metadata: dict[str, str]) -> bytes:
    """Return a safetensors file. `load_generator` needs what `metadata` returns."""
    weights = {name: weight.contiguous() for name, weight in G.state_dict().items()}
    return save(weights, metadata=metadata)


def read_safetensors(path: Path) -> dict[str, Any]:
    """Return what `restore_generator` needs from a file of `save_safetensors`.

    Raises UserError if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        state = _parse_metadata(metadata)
    except (SafetensorError, ValueError, LookupError, RecursionError) as e:
        problem = f"not a generator that vgan-export wrote ({e})"
        raise UserError(f"{path}: {problem}; use an intact file") from e
    except OSError as e:
        reason = e.strerror or e
        raise UserError(f"{path}: cannot be read ({reason}); check name and permissions") from e
    return {**state, "G_ema": weights}


def _parse_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what `metadata` was given. Raises ValueError or LookupError for other contents."""
    if metadata.get("format") != _FORMAT:
        raise ValueError("no metadata of vgan")
    parsed = {key: json.loads(metadata[key]) for key in ("model", "sizes", "data", "config")}
    for key, value in parsed.items():
        if not isinstance(value, dict):
            raise ValueError(f"{key}={value!r:.20}")
    conditions = {key: json.loads(metadata[key]) for key in ("conditions",) if key in metadata}
    config, networks = parsed["config"], parsed["config"].get("model")
    networks = dict(networks) if isinstance(networks, dict) else {}
    return {
        "config": upgrade_config({**config, "model": networks | {"generator": parsed["model"]}}),
        "sizes": parsed["sizes"],
        "data": parsed["data"] | {"labels": json.loads(metadata["labels"])} | conditions,
        "cur_nimg": int(metadata["images_seen"]),
        "export": {key: metadata[key] for key in ("license", "metrics") if key in metadata},
    }


def drawing_precision(name: str, device: torch.device) -> str:
    """Resolve 'auto' for drawing: fp32 on every CPU, so that all of them draw the same images."""
    if name == "auto" and device.type == "cpu":
        return "fp32"
    return pick_precision(name, device)
