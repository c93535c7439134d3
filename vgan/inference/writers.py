"""Films as GIF, WebP and MP4, from uint8 frames, the same bytes for the same frames."""

import io
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from vgan.runtime.errors import UserError
from vgan.runtime.files import write_atomically

KINDS = (".gif", ".webp", ".mp4")
_MOST_PX = {".gif": 65535, ".webp": 16383, ".mp4": 16384}  # a side
_PALETTE_FRAMES = 16  # of which the colours of a GIF are chosen


def require_writer(path: Path) -> None:
    """Raise UserError where the library for that kind is missing; before hours of drawing."""
    if path.suffix.lower() == ".mp4":
        try:
            import av  # noqa: F401
        except ModuleNotFoundError as e:
            raise UserError(
                f"out={path}: mp4 needs PyAV; pip install vgan[video], or give a name ending in .webp or .gif"
            ) from e


def require_size(path: Path, height: int, width: int) -> None:
    """Raise UserError for frames that the kind cannot hold."""
    most = _MOST_PX[path.suffix.lower()]
    if max(height, width) > most:
        fix = "give a smaller zoom, or fewer tiles or columns"
        raise UserError(
            f"out={path}: frames of {width} x {height} px are larger than {path.suffix[1:]} allows ({most} px); {fix}"
        )


def write_movie(path: Path, frames: np.ndarray, fps: float, zoom: int = 1) -> None:
    """uint8 frames (T, H, W) or (T, H, W, 3), `zoom` times larger, as the kind that the name ends in; whole or not there.

    GIF has 256 colours, chosen once for the whole film so that it does not flicker, and shows a frame for a multiple of 10 ms.
    WebP is without loss, MP4 is H.264 at a quality where pictures look the same. Raises UserError if it cannot be written.
    """
    kind = path.suffix.lower()
    enlarged = (frame.repeat(zoom, axis=0).repeat(zoom, axis=1) for frame in frames)
    if kind == ".mp4":
        content = _mp4(enlarged, fps)
    else:
        pictures: Iterable[Image.Image] = map(Image.fromarray, enlarged)
        # browsers show a GIF of less than 20 ms a frame at 100 ms
        options = {
            "duration": max(2, round(100 / fps)) * 10 if kind == ".gif" else round(1000 / fps),
            "loop": 0,
        }
        if kind == ".gif":
            pictures = _with_one_palette(pictures, frames)
        else:
            options |= {"lossless": True, "quality": 50}
        waiting, buffer = iter(pictures), io.BytesIO()
        next(waiting).save(
            buffer, format=kind[1:].upper(), save_all=True, append_images=waiting, **options
        )  # type: ignore[arg-type]
        content = buffer.getvalue()
    write_atomically(path, content)


def _with_one_palette(pictures: Iterable[Image.Image], frames: np.ndarray) -> Iterator[Image.Image]:
    chosen = frames[
        np.linspace(0, len(frames) - 1, min(len(frames), _PALETTE_FRAMES)).round().astype(int)
    ]
    palette = (
        Image.fromarray(np.concatenate(chosen))
        .convert("RGB")
        .quantize(256, Image.Quantize.MEDIANCUT)
    )
    for picture in pictures:
        yield picture.convert("RGB").quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _mp4(frames: Iterable[np.ndarray], fps: float) -> bytes:
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # a buffer will not do: the index is moved to the front at the end
        path = Path(folder, "film.mp4")
        _encode(path, frames, fps)
        return path.read_bytes()


def _encode(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    import av

    with av.open(
        str(path), mode="w", options={"movflags": "faststart", "fflags": "+bitexact"}
    ) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        # One thread, for how many there are would change the bytes; without macroblock trees, which did so from call to call.
        stream.options = {
            "crf": "14",
            "preset": "slow",
            "x264-params": "mbtree=0",
            "flags": "+bitexact",
        }
        stream.codec_context.thread_count, stream.pix_fmt = 1, "yuv420p"
        for frame in frames:
            picture = frame if frame.ndim == 3 else frame[:, :, None].repeat(3, axis=2)
            even = (
                (0, picture.shape[0] % 2),
                (0, picture.shape[1] % 2),
                (0, 0),
            )  # H.264 has colours at half the resolution
            picture = np.pad(picture, even, mode="edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = picture.shape[:2]
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                )
            )
        container.mux(stream.encode())
