"""The page that draws images of a model, with vgan-demo or in the browser alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from markupsafe import Markup

import vgan
from vgan.apps.templates import asset, digest, render
from vgan.models.generator import GeneratorBase
from vgan.runtime.errors import UserError
from vgan.runtime.images import height_width

# What the page may load besides its own script and style: a server's answers, or the scripts in
# its folder, and a worker from them. A worker has the page's policy: script-src allows it the
# module of the runtime, which is unpacked to a Blob, and WebAssembly.
_SCRIPTS = {"server": "", "static": "'self' blob: 'wasm-unsafe-eval'"}
_WORKERS = {"server": "'none'", "static": "blob:"}
_CONNECT = {"server": "'self'", "static": "'none'"}


@dataclass(frozen=True)
class PageInfo:
    """What the page needs to know of a model. The page's script reads it as JSON."""

    title: str
    nimg: int  # images seen in training
    height: int  # px
    width: int  # px
    channels: int
    z_dim: int
    labels: tuple[str, ...]
    attention: tuple[int, int, int] | None  # (heads, h, w) of the map that comes with images
    batch: int  # images of one request
    license: str | None = None  # of the weights

    @property
    def values_per_image(self) -> int:
        """The inputs of one image: a latent and a one-hot class."""
        return self.z_dim + len(self.labels)


def page_info(
    G: GeneratorBase,
    title: str,
    state: Mapping[str, Any],
    attention: tuple[int, int, int] | None,
    batch: int,
    license: str | None = None,
) -> PageInfo:
    """Return the PageInfo of a generator from the `state` of its model.

    Raises UserError for a model with conditions, which the page cannot set.
    """
    if G.conditions:
        rule = "the page has no controls for its conditions"
        raise UserError(f"ckpt={title}: {rule}; use vgan-sample condition=[...]")
    height, width = height_width(G.img_resolution)
    return PageInfo(
        title=title,
        nimg=int(state["cur_nimg"]),
        height=height,
        width=width,
        channels=G.img_channels,
        z_dim=G.z_dim,
        labels=G.label_names,
        attention=attention,
        batch=batch,
        license=license,
    )


def render_page(info: PageInfo, backend: str, sources: Sequence[str] = ()) -> str:
    """Return the page as HTML.

    backend: 'server' or 'static'. sources: scripts beside the page to load first.
    """
    style, script = asset("play.css"), asset(f"play_{backend}.js", "play.js")
    scripts = Markup(_SCRIPTS[backend] + " ") + digest(script)
    policy = Markup("style-src {}; script-src {}; worker-src {}; connect-src {}")
    attention = info.attention and dict(zip(("heads", "h", "w"), info.attention))
    return render(
        "play.html",
        policy=policy.format(
            digest(style), scripts, Markup(_WORKERS[backend]), Markup(_CONNECT[backend])
        ),
        info=info,
        data=asdict(info) | {"attention": attention},
        static=backend == "static",
        sources=sources,
        style=style,
        script=script,
        version=vgan.__version__,
    )
