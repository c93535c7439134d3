"""The user's own images: a folder, a zip or a .npy."""

import hashlib
import os
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from vgan.data.conditions import check_conditions
from vgan.data.preprocess import MOST_BYTES, RULES, UNREADABLE, examine_file, prepare_image
from vgan.data.source import BadImage, Examined, Source, check_image_settings, natural_key
from vgan.runtime.distributed import print0
from vgan.runtime.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class Folder(Source):
    """Images under `path`: a folder of any depth, a zip, or a uint8 .npy (N, H, W, C) or (N, H, W).

    labels: 'folders' makes every first-level sub-folder a class. The path of a .npy gives what
    comes with each image, in their order: classes as integers (N,), or conditions as floats (N,) or
    as any numbers (N, k), of which 0 and 1 stand for several classes at once. 'none' ignores
    labels. 'auto' takes X_labels.npy next to X.npy or X_images.npy, if there is one.

    Images are prepared by the rules of `prepare_image`. Hidden files and files without an image
    suffix are ignored. Raises UserError if there is nothing to train on.
    """

    def __init__(
        self,
        path: str,
        resolution: int | Sequence[int] = 64,
        labels: str = "auto",
        channels: int = 3,
        skip_bad: bool = False,
    ) -> None:
        self.img_resolution = check_image_settings(resolution, channels)
        self.img_channels, self.skip_bad = channels, skip_bad
        self._path = Path(path).expanduser()
        self._shown = f"data.path={path}"
        self.name = "".join(ch if ch.isalnum() else "-" for ch in self._path.stem)[:40] or "folder"
        self._array: np.ndarray | None = None
        self._members: list[str] = []  # names below path with '/', in the order of the data set
        self._local = threading.local()  # an open zip for every thread
        if self._path.is_dir():
            self._members = self._list_folder()
        elif self._path.suffix.lower() == ".npy" and self._path.is_file():
            self._array = self._open_array(self._path)
        elif self._path.suffix.lower() == ".zip" and self._path.is_file():
            self._members = self._list_zip()
        else:
            reason = "neither a folder nor a .zip nor a .npy"
            if not self._path.exists():
                reason = "no such folder or file"
            raise UserError(
                f"{self._shown}: {reason}; give a folder of images, a .zip of them "
                "or a .npy of uint8 (N, H, W, C)"
            )
        if len(self) < 2:
            found = "only one image" if len(self) else "no images"
            raise UserError(
                f"{self._shown}: holds {found} ({', '.join(sorted(SUFFIXES))}); "
                "training needs at least 2"
            )
        self._labels = self._find_labels(labels)

    def __len__(self) -> int:
        return len(self._members) if self._array is None else len(self._array)

    def examine(self, i: int) -> Examined:
        label = int(self._labels[i]) if self.label_names and self._labels is not None else 0
        if self._array is None:
            name = self._members[i]
            try:
                content = self._content(name)
            except UNREADABLE as e:
                raise BadImage.of(name, e) from e
            return examine_file(name, content, self.img_resolution, self.img_channels, label)
        name = f"{self._path.name}[{i}]"
        try:
            image = Image.fromarray(self._array[i].squeeze())
            pixels = prepare_image(image, self.img_resolution, self.img_channels)
        except UNREADABLE as e:
            raise BadImage.of(name, e) from e
        return Examined(name, image.size, image.mode, "array", pixels, label)

    def fingerprint(self) -> str:
        settings = (RULES, self.img_resolution, self.img_channels, self.skip_bad, self.label_names)
        digest = hashlib.sha256(" ".join(map(str, settings)).encode())
        if self._path.is_dir():
            for name in self._members:
                try:
                    status = (self._path / name).stat()
                    line = f"{name} {status.st_size} {status.st_mtime_ns}\n"
                except OSError:  # a dangling link; reading it raises BadImage
                    line = f"{name} -\n"
                digest.update(line.encode(errors="surrogateescape"))
        else:
            status = self._path.stat()
            digest.update(f"{self._path.name} {status.st_size} {status.st_mtime_ns}".encode())
        if self._labels is not None:
            digest.update(self._labels.tobytes())
        return digest.hexdigest()

    def _list_folder(self) -> list[str]:
        names, seen = [], set()
        for folder, folders, files in os.walk(self._path, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:  # a link to a parent folder
                folders[:] = []
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            inside = Path(folder).relative_to(self._path)
            names += [(inside / f).as_posix() for f in files if _is_image(f)]
        return sorted(names, key=natural_key)

    def _list_zip(self) -> list[str]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                files = [n for n in archive.namelist() if "__MACOSX" not in n]
        except UNREADABLE as e:
            raise UserError(
                f"{self._shown}: not a readable zip ({e}); create it again, "
                "or unpack it and give the folder"
            ) from e
        names = [n for n in files if _is_image(PurePosixPath(n).name)]
        return sorted(names, key=natural_key)

    def _open_array(self, path: Path) -> np.ndarray:
        try:
            array = _load_array(path)
        except UNREADABLE as e:
            raise UserError(
                f"{self._shown}: not a readable .npy ({e}); save it with numpy.save"
            ) from e
        valid_shape = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3, 4))
        if array.dtype != np.uint8 or not valid_shape:
            raise UserError(
                f"{self._shown}: holds {array.dtype} {array.shape}; must be uint8 (N, H, W, C) "
                "with C of 1, 3 or 4, or uint8 (N, H, W)"
            )
        return array

    def _content(self, name: str) -> bytes:
        if self._path.is_dir():
            size = (self._path / name).stat().st_size
        else:
            if not hasattr(self._local, "archive"):
                self._local.archive = zipfile.ZipFile(self._path)
            size = self._local.archive.getinfo(name).file_size
        if size > MOST_BYTES:
            raise BadImage(name, f"over {MOST_BYTES / 1e6:.0f} MB")
        if self._path.is_dir():
            return (self._path / name).read_bytes()
        content: bytes = self._local.archive.read(name)
        return content

    def _find_labels(self, labels: str) -> np.ndarray | None:
        """Return what comes with every image; None without labels.

        Sets label_names, or condition_names and conditions.
        """
        if labels == "none":
            return None
        if labels == "folders":
            firsts = [n.split("/")[0] if "/" in n else None for n in self._members]
            if not firsts or None in firsts or len(set(firsts)) < 2:
                raise UserError(
                    f"data.labels=folders: {self._path} must have its images in two or more "
                    "sub-folders, one per class"
                )
            self.label_names = tuple(sorted({str(f) for f in firsts}, key=natural_key))
            return np.array([self.label_names.index(str(f)) for f in firsts], dtype=np.int64)
        beside = self._path.with_name(self._path.stem.removesuffix("_images") + "_labels.npy")
        if labels == "auto" and (self._array is None or not beside.is_file()):
            return None
        return self._load_labels(beside if labels == "auto" else Path(labels).expanduser())

    def _load_labels(self, path: Path) -> np.ndarray:
        shown = f"data.labels={path}"
        try:
            array = _load_array(path)
        except UNREADABLE as e:
            reason = "no such file" if not path.exists() else "not a readable .npy"
            raise UserError(
                f"{shown}: {reason}; give auto, none, folders or a .npy of numbers (N,) or (N, k)"
            ) from e
        is_float, ndim = array.dtype.kind == "f", array.ndim
        are_conditions = (is_float and ndim == 1) or (array.dtype.kind in "biuf" and ndim == 2)
        if are_conditions and len(array) == len(self):
            columns = array.reshape(len(array), -1)
            names = tuple(str(i) for i in range(columns.shape[1]))
            self.conditions = check_conditions(columns, names, shown)
            self.condition_names = names
            if len(names) == 1 and len(np.unique(columns)) <= 20 and (columns % 1 == 0).all():
                note = "taken as one condition; if they are classes, save integers (N,)"
                print0(f"{shown}: holds few whole numbers, {note}.")
            return self.conditions
        if array.shape != (len(self),) or array.dtype.kind not in "iu" or array.min() < 0:
            raise UserError(
                f"{shown}: holds {array.dtype} {array.shape}; must be integers from 0 (N,) for "
                f"classes or numbers (N, k) for conditions, with N = {len(self)}, as many as images"
            )
        if array.max() >= 10_000:
            raise UserError(
                f"{shown}: has label {array.max()}; number the classes from 0 to 9999 at most, "
                "without large gaps"
            )
        self.label_names = tuple(str(i) for i in range(int(array.max()) + 1))
        return array.astype(np.int64)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def _load_array(path: Path) -> np.ndarray:
    """Return the memory-mapped array of a .npy. Raises one of UNREADABLE."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("several arrays in one file")
    return array
