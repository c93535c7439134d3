"""The page to play with a model, drawn by a server (vgan.apps.demo) or in the browser (vgan.apps.static_page)."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from torch import nn

import vgan

PAGES = Path(__file__).resolve().parent / "assets"
# What a page may do: its own script and style by the digest of their texts, and what its backend needs
_POLICY = "default-src 'none'; img-src data:; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'"
_NEEDS = {
    "server": ("", "; connect-src 'self'"),
    "static": (
        "'self' blob: 'wasm-unsafe-eval' ",
        "",
    ),  # scripts beside it, one unpacked from them, and the runtime's machine code
}


@dataclass(frozen=True)
class Model:
    """What the page knows. attention: (heads, h, w) of the map that comes with the pictures; batch: pictures at once."""

    title: str
    seen: int  # images in training
    resolution: int
    channels: int
    z_dim: int
    labels: tuple[str, ...]
    attention: tuple[int, int, int] | None
    batch: int
    license: str | None = None  # of the weights

    def values_a_picture(self) -> int:
        """Numbers that go in: a latent and a class vector."""
        return self.z_dim + len(self.labels)


def describe(
    G: nn.Module,
    path: Path,
    parts: dict[str, Any],
    attention: tuple[int, int, int] | None,
    batch: int,
    license: str | None = None,
) -> Model:
    """The model of the checkpoint at `path`, with these parts."""
    labels: tuple[str, ...] = G.label_names if G.label_dim else ()  # type: ignore[assignment]
    title = path.resolve().parent.name or path.stem
    sizes: tuple[int, int, int] = G.img_resolution, G.img_channels, G.z_dim  # type: ignore[assignment]
    return Model(title, int(parts["cur_nimg"]), *sizes, labels, attention, batch, license)


def render(model: Model, backend: str, scripts: Sequence[str] = ()) -> str:
    """The page as HTML. backend: 'server' or 'static'; scripts: names of files beside it to load first."""
    style = _read("play.css")
    script = _read(f"play_{backend}.js") + _read("play.js")
    before, after = _NEEDS[backend]
    classes = f" of {len(model.labels)} classes" if model.labels else ""
    info = asdict(model) | {
        "attention": model.attention and dict(zip(("heads", "h", "w"), model.attention))
    }
    return Template(_read("play.html")).substitute(
        policy=_POLICY.format(style=_digest(style), script=before + _digest(script)) + after,
        title=escape(model.title),
        what=f"{model.resolution} px pictures{classes}, after {model.seen:,} images of training",
        by=f"{'Drawn in this browser' if backend == 'static' else 'Drawn by vgan-demo'}, vgan {escape(vgan.__version__)}"
        + (f"; terms of the weights: {escape(model.license)}" if model.license else ""),
        info=json.dumps(info).replace(
            "<", "\\u003c"
        ),  # a name cannot end the element that holds it
        sources="".join(f'<script src="{name}"></script>\n' for name in scripts),
        style=style,
        script=script,
    )


def _read(name: str) -> str:
    return (PAGES / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
