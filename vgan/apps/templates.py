"""HTML pages and model cards from the Jinja templates in assets/, and what pages embed."""

import base64
import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from PIL import Image

_ASSETS = Path(__file__).resolve().parent / "assets"
_ENVIRONMENT = Environment(
    autoescape=select_autoescape(["html"]),
    loader=FileSystemLoader(_ASSETS),
    lstrip_blocks=True,
    trim_blocks=True,
    undefined=StrictUndefined,
)
_MAX_PIXELS = 50_000_000  # of an embedded image
_MAX_WEBP_SIDE = 16_383  # px


@dataclass(frozen=True)
class Embedded:
    """An image in a page: its content as a data URI, and its size in px."""

    src: str
    width: int
    height: int


def render(name: str, /, **values: object) -> str:
    """Render a template of assets/. In HTML, every value that is not Markup is escaped."""
    return _ENVIRONMENT.get_template(name).render(values)


def asset(*names: str) -> Markup:
    """Return the text of files in assets/, joined, for a page to contain as it is."""
    return Markup("").join(Markup((_ASSETS / name).read_text(encoding="utf-8")) for name in names)


def digest(text: str) -> Markup:
    """Return the source that allows exactly this script or style in a Content-Security-Policy."""
    sha256 = hashlib.sha256(text.encode()).digest()
    return Markup("'sha256-{}'").format(base64.b64encode(sha256).decode())


def embed_png(path: Path) -> Embedded:
    """Read a PNG file, and encode it as WebP if that is smaller.

    Raises ValueError if the file cannot be read, is damaged or has over 50 million pixels.
    """
    webp = io.BytesIO()
    try:
        content = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warning of large images: see below
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                width, height = image.size
                if width * height > _MAX_PIXELS:
                    raise ValueError(f"{path}: has {width * height} pixels")
                pixels = image.convert("RGB")
        if max(width, height) <= _MAX_WEBP_SIDE:
            pixels.save(webp, "WEBP", quality=90, method=4)
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path}: {e}") from e
    kind = "png"
    if 0 < webp.tell() < len(content):
        kind, content = "webp", webp.getvalue()
    src = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Embedded(src, width, height)
