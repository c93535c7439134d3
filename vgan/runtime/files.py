"""Files that are written completely or not at all, PNG, locks and caches."""

import contextlib
import errno
import inspect
import io
import os
import pickle
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image

from vgan.runtime.distributed import print0, rank
from vgan.runtime.errors import UserError

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
# What torch.load raises for damaged files.
_DAMAGED = (
    OSError,
    RuntimeError,
    LookupError,
    EOFError,
    ValueError,
    TypeError,
    pickle.UnpicklingError,
)


def png_bytes(image: np.ndarray) -> bytes:
    """Encode uint8 (H, W) or (H, W, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 (H, W) or (H, W, 3) atomically. Raises UserError if it cannot be written."""
    write_atomically(path, png_bytes(image))


def cannot_write(path: Path, e: OSError) -> UserError:
    """Return the error for a file or folder that cannot be written."""
    return UserError(
        f"{path}: cannot be written ({e.strerror}); free space or choose another folder"
    )


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`, which replaces `path` at the end of the block.

    Readers see the old file or the new one, never a part. An exception in the block removes the
    temporary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # not there any more after os.replace


def write_atomically(path: Path, content: bytes, durable: bool = False) -> None:
    """Write a file completely or not at all. Raises UserError if it cannot be written.

    durable: flush it to the disk first, so that this also holds after a power failure.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as f:
            f.write(content)
            if durable:
                f.flush()
                os.fsync(f.fileno())
    except OSError as e:
        raise cannot_write(path, e) from e


def check_folder(
    out: Path, what: str, required: Sequence[str], optional: Sequence[str] = ()
) -> None:
    """Raise UserError unless `write_folder` may write `out`: it is new, empty, or holds `what`.

    That is all the required files, and none but these and the optional ones.
    """
    if out.is_dir() and not out.is_symlink():
        names = {path.name for path in out.iterdir()}
        if names and not (set(required) <= names <= {*required, *optional}):
            raise UserError(f"out={out}: contains files other than {what}'s; give a new folder")
    elif out.exists() or out.is_symlink():
        raise UserError(f"out={out}: is not a folder; give a new one")


def write_folder(out: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder of files completely or not at all; an older one is replaced.

    Raises UserError if it cannot be written.
    """
    new, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        new.mkdir(parents=True)
        for name, content in contents.items():
            (new / name).write_bytes(content)
        if out.exists():  # no system replaces a folder with files in one step
            os.replace(out, old)
        os.replace(new, out)
    except OSError as e:
        if old.exists() and not out.exists():
            os.replace(old, out)
        fix = "free space or choose another folder"
        raise UserError(f"out={out}: cannot be written ({e.strerror}); {fix}") from e
    finally:
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)


def append_line(path: Path, text: str) -> None:
    """Append lines to a text file, all or none. Raises UserError if they cannot be written."""
    try:
        with open(path, "ab", buffering=0) as f:
            before = os.fstat(f.fileno()).st_size
            rest = memoryview((text + "\n").encode())
            try:
                while rest:  # a full disk takes a part first and refuses the next call
                    rest = rest[f.write(rest) :]
            except OSError:
                f.truncate(before)
                raise
    except OSError as e:
        raise cannot_write(path, e) from e


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder. Raises UserError if another process holds it.

    The kernel releases the lock when its process ends, so that no lock is left behind. Where the
    file system has no such locks, a message says so and there is none: a lock file in its place
    would survive a kill.
    """
    if rank() != 0:
        yield
        return
    # filelock 4 falls back to lock files unless told not to; earlier versions lack the argument.
    can_fall_back = "fallback_to_soft" in inspect.signature(FileLock).parameters
    options: dict[str, Any] = {"fallback_to_soft": False} if can_fall_back else {}
    lock = FileLock(folder / ".lock", **options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except (NotImplementedError, OSError) as e:
            if isinstance(e, OSError) and e.errno not in _NO_LOCKS:
                raise
            print0(
                f"run_dir={folder}: its file system has no locks; "
                "make sure that no second run uses this folder"
            )
    except Timeout as e:
        raise UserError(
            f"run_dir={folder}: another vgan-train is at work here; "
            "wait for it or use another run_dir"
        ) from e
    except OSError as e:
        raise cannot_write(folder, e) from e
    try:
        yield
    finally:
        lock.release()


class PngWriter:
    """A context manager that encodes and writes PNG files in threads.

    Leaving it waits until all files are written. At most QUEUED groups wait, which bounds memory.
    `write` or leaving raises UserError for a file that cannot be written.
    """

    GROUP, QUEUED = 64, 64

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="png")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> "PngWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while self._pending and kind is None:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write(self, paths: Sequence[Path], images: np.ndarray) -> None:
        """Write images[i] of uint8 (N, H, W, C) to paths[i]; blocks only if too many are queued."""
        for i in range(0, len(paths), self.GROUP):
            while len(self._pending) >= self.QUEUED:
                self._pending.popleft().result()
            group = slice(i, i + self.GROUP)
            self._pending.append(self._pool.submit(_write_all, paths[group], images[group]))


def _write_all(paths: Sequence[Path], images: np.ndarray) -> None:
    for path, image in zip(paths, images):
        write_png(path, image[:, :, 0] if image.shape[2] == 1 else image)


def save_cached(path: Path, values: dict[str, Any]) -> None:
    """Save tensors and plain numbers that can be computed again."""
    file = io.BytesIO()
    torch.save(values, file)
    write_atomically(path, file.getvalue())


def load_cached(path: Path, *names: str) -> list[Any] | None:
    """Return the named values of a file of `save_cached` on the CPU, None without the file.

    Raises UserError if it is damaged.
    """
    if not path.is_file():
        return None
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        return [values[name] for name in names]
    except _DAMAGED as e:
        raise UserError(f"{path}: damaged cache; delete this file to create it again") from e
