"""Image and film files: PNG, npy, zip, GIF, WebP and MP4. The same images give the same bytes."""

import io
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vgan.runtime.console import progress_bar
from vgan.runtime.errors import UserError
from vgan.runtime.extras import install_extra
from vgan.runtime.files import PngWriter, atomic_path, png_bytes, write_atomically, write_png
from vgan.runtime.images import enlarge, grid, on_white, to_straight_alpha

STILLS = (".png", ".npy", ".zip")
FILMS = (".gif", ".webp", ".mp4")
_MAX_PX = {".gif": 65535, ".webp": 16383, ".mp4": 16384}  # of a side
_PALETTE_FRAMES = 16  # frames from which the colours of a GIF are chosen


def write_images(
    out: Path, numbers: Sequence[int], batches: Iterable[Tensor], zoom: int, columns: int | None
) -> None:
    """Write batches of uint8 images (N, C, H, W) in the format of the file name, or into a folder.

    .png: one grid. .npy: an array (N, H, W, C). .zip: PNG files. RGBA gets straight alpha. numbers:
    the image numbers, which name single files. Raises UserError if the output cannot be written.
    """
    kind = "" if out.is_dir() else out.suffix.lower()
    names = _file_names(numbers)
    batches = _with_progress(batches, len(numbers))
    if kind == ".png":
        write_png(out, enlarge(grid(torch.cat(list(batches)), columns), zoom))
    elif kind == ".npy":
        with _open_atomically(out) as file:
            _write_array(file, len(numbers), batches)
    elif kind == ".zip":
        with _open_atomically(out) as file, zipfile.ZipFile(file, "w") as archive:
            for image in chain.from_iterable(batches):
                entry = zipfile.ZipInfo(next(names))  # without the time of day
                archive.writestr(entry, png_bytes(grid(image[None])))
    else:
        with PngWriter() as writer:
            for images in batches:
                paths = [out / name for name in islice(names, len(images))]
                writer.write(paths, to_straight_alpha(images.permute(0, 2, 3, 1).numpy()))


def collect(batches: Iterable[Tensor], total: int) -> Tensor:
    """Concatenate batches of `total` images in all, with a progress bar."""
    return torch.cat(list(_with_progress(batches, total)))


def _with_progress(batches: Iterable[Tensor], total: int) -> Iterator[Tensor]:
    with progress_bar(total, "drawing") as bar:
        for images in batches:
            yield images
            bar.update(len(images))


def _file_names(numbers: Sequence[int]) -> Iterator[str]:
    """Yield 000007.png, and 000007-2.png if a number comes again, such as with another class."""
    seen: Counter[int] = Counter()
    for number in numbers:
        seen[number] += 1
        suffix = f"-{seen[number]}" if seen[number] > 1 else ""
        yield f"{number:06d}{suffix}.png"


def _write_array(file: IO[bytes], count: int, batches: Iterable[Tensor]) -> None:
    """Write an .npy file of uint8 (count, H, W, C) batch by batch."""
    header = None
    for images in batches:
        pixels = to_straight_alpha(images.permute(0, 2, 3, 1).contiguous().numpy())
        if header is None:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *pixels.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(pixels.tobytes())


@contextmanager
def _open_atomically(out: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that is renamed to `out` on success."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as temporary, open(temporary, "wb") as file:
            yield file
    except OSError as e:
        fix = "free space or choose another folder"
        raise UserError(f"out={out}: cannot be written ({e.strerror}); {fix}") from e


def require_film_writer(out: Path, key: str = "out") -> None:
    """Raise UserError, about `key`, if the library for the film format is missing."""
    if out.suffix.lower() == ".mp4":
        try:
            import av  # noqa: F401
        except ModuleNotFoundError as e:
            fix = f"{install_extra('video')}, or give a name ending in .webp or .gif"
            raise UserError(f"{key}={out}: mp4 needs PyAV; {fix}") from e


def require_film_size(out: Path, height: int, width: int, key: str = "out") -> None:
    """Raise UserError, about `key`, if frames are larger than the film format allows."""
    kind = out.suffix.lower()
    if max(height, width) > _MAX_PX[kind]:
        problem = f"frames of {width} x {height} px are larger than {kind[1:]} allows"
        fix = "use a smaller zoom, or fewer tiles or columns"
        raise UserError(f"{key}={out}: {problem} ({_MAX_PX[kind]} px); {fix}")


def write_film(path: Path, frames: np.ndarray, fps: float, zoom: int = 1) -> None:
    """Write uint8 frames (T, H, W[, 3 or 4]), enlarged `zoom` times, as .gif, .webp or .mp4.

    GIF has 256 colours, chosen once for the whole film to avoid flicker, and frame durations in
    multiples of 10 ms. WebP is lossless and keeps alpha; the others lay RGBA on white. MP4 is H.264
    without visible loss. Raises UserError if the file cannot be written.
    """
    kind = path.suffix.lower()
    if kind != ".webp" and frames.shape[-1] == 4 and frames.ndim == 4:
        frames = np.stack([on_white(frame) for frame in frames])
    enlarged = (enlarge(frame, zoom) for frame in frames)
    if kind == ".mp4":
        content = _encode_mp4(enlarged, fps)
    else:
        images: Iterator[Image.Image] = map(Image.fromarray, enlarged)
        options: dict[str, Any] = {"duration": round(1000 / fps), "lossless": True, "quality": 50}
        if kind == ".gif":
            images = _with_one_palette(images, frames)
            # Browsers show frames of less than 20 ms at 100 ms.
            options = {"duration": max(2, round(100 / fps)) * 10}
        options |= {"save_all": True, "append_images": images, "loop": 0}
        buffer = io.BytesIO()
        next(images).save(buffer, format=kind[1:].upper(), **options)
        content = buffer.getvalue()
    write_atomically(path, content)


def _with_one_palette(images: Iterable[Image.Image], frames: np.ndarray) -> Iterator[Image.Image]:
    """Quantize to 256 colours that are chosen from evenly spaced frames."""
    count = min(len(frames), _PALETTE_FRAMES)
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    source = Image.fromarray(np.concatenate(list(chosen))).convert("RGB")
    palette = source.quantize(256, Image.Quantize.MEDIANCUT)
    for image in images:
        yield image.convert("RGB").quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _encode_mp4(frames: Iterable[np.ndarray], fps: float) -> bytes:
    import av

    # A file, not a buffer: at the end the index is moved to its front.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "film.mp4")
        options = {"movflags": "faststart", "fflags": "+bitexact"}
        with av.open(str(path), mode="w", options=options) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            # The bytes would depend on the number of threads, and vary with macroblock trees.
            stream.codec_context.thread_count = 1
            stream.options = {
                "crf": "14",
                "preset": "slow",
                "x264-params": "mbtree=0",
                "flags": "+bitexact",
            }
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                pixels = frame if frame.ndim == 3 else frame[:, :, None].repeat(3, axis=2)
                # H.264 halves the resolution of colours, so that sides must be even.
                odd = ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0))
                pixels = np.ascontiguousarray(np.pad(pixels, odd, mode="edge"))
                if not stream.codec_context.is_open:
                    stream.height, stream.width = pixels.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return path.read_bytes()
