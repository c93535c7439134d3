"""The model card of a generator on the Hugging Face Hub."""

import contextlib
import json
import shlex
from typing import Any, NamedTuple

import yaml  # comes with omegaconf

import vgan
from vgan.apps.command_line import Compose, command
from vgan.apps.evaluations import format_cell, heading, measured
from vgan.apps.templates import render
from vgan.data.source import CHANNELS
from vgan.inference.load import NOT_STATED, Model
from vgan.models.generator import GeneratorBase
from vgan.runs.log_reader import read_metrics
from vgan.runtime.images import height_width

# The identifiers of https://huggingface.co/docs/hub/repositories-licenses that suit weights. The
# Hub refuses a card with any other.
LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigscience-openrail-m", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0",
    "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0",
    "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
    "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "gfdl", "gpl", "gpl-2.0",
    "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl",
    "odc-by", "ofl-1.1", "openrail", "openrail++", "osl-3.0", "other", "pddl", "postgresql",
    "unknown", "unlicense", "wtfpl", "zlib",
}  # fmt: skip
_WIDTH = 88  # of a command


class Samples(NamedTuple):
    """The grid of a card: n images in columns. by_class: whether each column is a class."""

    n: int
    columns: int
    by_class: bool


def choose_samples(G: GeneratorBase) -> Samples:
    """Return 8 rows of images, or 4 of large ones; a column for each of 4 to 10 classes."""
    rows = 8 if max(height_width(G.img_resolution)) <= 64 else 4
    by_class = 4 <= len(G.label_names) <= 10
    columns = len(G.label_names) if by_class else rows
    return Samples(rows * columns, columns, by_class)


def render_card(
    repo: str,
    G: GeneratorBase,
    model: Model,
    information: dict[str, str],
    samples: Samples,
    seed: int,
    compose: Compose,
) -> str:
    """Return the text of README.md.

    model: its config has no paths of this machine. information: the metadata of the safetensors
    file.
    """
    state, name = model.state, repo.partition("/")[2]
    data = state["data"]
    license = information["license"]
    colours = CHANNELS[G.img_channels]
    reproduced = command(state["config"], f"outputs/{name}", compose)
    return render(
        "model_card.md",
        front_matter=yaml.safe_dump(_front_matter(license), sort_keys=False),
        repo=repo,
        name=name,
        size="{} x {}".format(*height_width(G.img_resolution)),
        channels=G.img_channels,
        colours=colours,
        z_dim=G.z_dim,
        parameters=f"{sum(p.numel() for p in G.parameters()):,}",
        network=_network(state["config"]),
        classes=[_one_line(label) for label in G.label_names],
        conditions=[_one_line(name) for name in G.conditions.names] if G.conditions else [],
        data_name=_one_line(data.get("name")),
        data_digest=_one_line(data.get("digest")),
        images_seen=f"{state['cur_nimg']:,}",
        license=license if license != NOT_STATED else None,
        samples=samples,
        seed=seed,
        evaluations=[_evaluation(record) for record in _records(model)],
        command=reproduced and _fold(reproduced),
        version=vgan.__version__,
    )


def _front_matter(license: str) -> dict[str, Any]:
    known = license.lower()
    fields: dict[str, Any] = {
        "library_name": "vgan",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["gan", "image-generation", "vgan"],
    }
    if known in LICENSES:
        fields["license"] = known
    elif license != NOT_STATED:
        fields |= {"license": "other", "license_name": license}
    return fields


def _network(config: dict[str, Any]) -> str:
    names = []
    for group in ("model", "size", "loss"):
        node = config.get(group)
        if isinstance(node, dict) and node.get("name"):
            names.append(f"`{group}={_one_line(node['name'])}`")
    return ", ".join(names) or "not recorded"


def _records(model: Model) -> list[dict[str, Any]]:
    """Return the newest evaluation of these weights by each protocol."""
    cur_nimg = model.state["cur_nimg"]
    records = [r for r in read_metrics(model.path.parent) if r["cur_nimg"] == cur_nimg]
    with contextlib.suppress(ValueError, RecursionError):  # an export's metadata may be foreign
        records.append(json.loads(model.state.get("export", {}).get("metrics", "")))
    found = [r for r in records if isinstance(r, dict) and isinstance(r.get("protocol"), dict)]
    return list({json.dumps(r["protocol"], sort_keys=True): r for r in found}.values())


def _evaluation(record: dict[str, Any]) -> dict[str, Any]:
    """Return what the card shows of a record: head, row and fields of its protocol."""
    names = measured([[record]])
    cells = [format_cell(record, name) for name in names]
    fields = {}
    for name, value in record["protocol"].items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        fields[_one_line(name)] = _one_line(shown)
    return {
        "head": [heading(name) for name in names],
        "row": [value + (f" ± {spread}" if spread else "") for value, spread in cells],
        "fields": fields,
    }


def _one_line(text: Any) -> str:
    """Return text for a cell or a code span of Markdown."""
    return " ".join(str(text).replace("|", " ").replace("`", "'").split())


def _fold(text: str) -> str:
    """Break a command into lines of a shell."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(text)):
        if lines[-1] and len(lines[-1]) + len(word) > _WIDTH:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)
