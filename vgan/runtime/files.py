"""Files that are whole or not there, and PNG."""

import contextlib
import errno
import inspect
import io
import os
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image

from vgan.runtime.distributed import print0, rank
from vgan.runtime.errors import UserError


def png_bytes(image: np.ndarray) -> bytes:
    """Encode uint8 (H, W) or (H, W, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 (H, W) or (H, W, 3) atomically. Raises UserError if it cannot be written."""
    write_atomically(path, png_bytes(image))


def write_atomically(path: Path, content: bytes, durable: bool = False) -> None:
    """To a temporary file beside `path`, then os.replace: readers see the old file or the new one, never half of one.

    durable: that holds after a loss of power too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(content)
            if durable:
                f.flush()
                os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{path}: cannot be written ({e.strerror}); free space or choose another folder"
        ) from e


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """While inside, no other process may enter for the same folder. Raises UserError where one is in already.

    The kernel lets go of the lock when its process ends, however it ends: a lock cannot be left behind. Where the file system
    has no such locks, a line says so and none is held: a file in their place would outlive a kill.
    """
    if rank() != 0:
        yield
        return
    hard = (
        {"fallback_to_soft": False}
        if "fallback_to_soft" in inspect.signature(FileLock).parameters
        else {}
    )  # since filelock 4
    lock = FileLock(folder / ".lock", **hard)  # type: ignore[arg-type]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except (NotImplementedError, OSError) as e:
            if isinstance(e, OSError) and e.errno not in (
                errno.ENOSYS,
                errno.ENOLCK,
                errno.ENOTSUP,
                errno.EOPNOTSUPP,
            ):
                raise
            print0(
                f"run_dir={folder}: its file system has no locks; see to it that no second run works here"
            )
    except Timeout as e:
        raise UserError(
            f"run_dir={folder}: another vgan-train is at work here; wait for it or use another run_dir"
        ) from e
    except OSError as e:
        raise UserError(
            f"{folder}: cannot be written ({e.strerror}); free space or choose another folder"
        ) from e
    try:
        yield
    finally:
        lock.release()


class PngWriter:
    """Encodes and writes PNG files in threads while the caller makes more pictures.

    A context manager: leaving it waits until all is written. At most QUEUED groups wait, so memory is bounded. What cannot
    be written raises UserError, at a later `write` or on leaving.
    """

    GROUP, QUEUED = 64, 64

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="png")
        self._begun: deque[Future[None]] = deque()

    def __enter__(self) -> "PngWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while self._begun and kind is None:
                self._begun.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write(self, paths: Sequence[Path], sheets: np.ndarray) -> None:
        """sheets[i] of uint8 (N, H, W, C) into paths[i]; returns at once unless too much is waiting."""
        for i in range(0, len(paths), self.GROUP):
            while len(self._begun) >= self.QUEUED:
                self._begun.popleft().result()
            group = slice(i, i + self.GROUP)
            self._begun.append(self._pool.submit(_write_all, paths[group], sheets[group]))


def _write_all(paths: Sequence[Path], sheets: np.ndarray) -> None:
    for path, sheet in zip(paths, sheets):
        write_png(path, sheet[:, :, 0] if sheet.shape[2] == 1 else sheet)


def save_cached(path: Path, parts: dict[str, Any]) -> None:
    """Tensors and plain numbers that can be made again, into a file that is whole or not there."""
    file = io.BytesIO()
    torch.save(parts, file)
    write_atomically(path, file.getvalue())


def load_cached(path: Path, *names: str) -> list[Any] | None:
    """The named parts of what `save_cached` wrote, on the CPU; None without a file. Raises UserError if it is damaged."""
    if not path.is_file():
        return None
    try:
        parts = torch.load(path, map_location="cpu", weights_only=True)
        return [parts[name] for name in names]
    except (
        OSError,
        RuntimeError,
        KeyError,
        EOFError,
        ValueError,
        TypeError,
        pickle.UnpicklingError,
    ) as e:
        raise UserError(f"{path}: damaged cache; delete this file and it is made anew") from e


def append_line(path: Path, text: str) -> None:
    """Add lines to a text file, all or none. Raises UserError if they cannot be written."""
    try:
        with open(path, "ab", buffering=0) as f:
            before = os.fstat(f.fileno()).st_size
            rest = memoryview((text + "\n").encode())
            try:
                while rest:  # a disk takes what it has room for, and refuses the next call
                    rest = rest[f.write(rest) :]
            except OSError:
                f.truncate(before)
                raise
    except OSError as e:
        raise UserError(
            f"{path}: cannot be written ({e.strerror}); free space or choose another folder"
        ) from e
