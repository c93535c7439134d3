"""The user's own pictures: a folder, a zip or a .npy."""

import hashlib
import os
import threading
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from vgan.data.source import (
    MOST_BYTES,
    UNREADABLE,
    BadImage,
    Examined,
    Source,
    check_image_settings,
    examine_file,
    natural_key,
    to_square_uint8,
)
from vgan.runtime.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_RULES = 2  # counts up with every change to how a picture becomes a square, so that packed ones are made anew


class Folder(Source):
    """Pictures under `path`: a folder of any depth, a zip, or a uint8 .npy (N, H, W, C) or (N, H, W).

    labels: 'folders' makes every first-level sub-folder a class; the path of an integer .npy (N,) gives them in the
    order of the pictures; 'none' leaves them out; 'auto' takes X_labels.npy beside X.npy or X_images.npy and else none.
    Pictures become squares by the rules of `to_square_uint8`. Hidden files and files that are not pictures by their suffix are
    passed over. Raises UserError where nothing can be trained on.
    """

    def __init__(
        self,
        path: str,
        resolution: int = 64,
        labels: str = "auto",
        channels: int = 3,
        skip_bad: bool = False,
    ) -> None:
        check_image_settings(resolution, channels)
        self.img_resolution, self.img_channels, self.skip_bad = resolution, channels, skip_bad
        self._path = Path(path).expanduser()
        self._shown = f"data.path={path}"
        self.name = "".join(ch if ch.isalnum() else "-" for ch in self._path.stem)[:40] or "folder"
        self._array: np.ndarray | None = None
        self._members: list[
            str
        ] = []  # names below path, '/'-separated, in the order of the data set
        self._local = threading.local()  # an open zip for every thread
        if self._path.is_dir():
            self._members = self._list_folder()
        elif self._path.suffix.lower() == ".npy" and self._path.is_file():
            self._array = self._open_array(self._path)
        elif self._path.suffix.lower() == ".zip" and self._path.is_file():
            self._members = self._list_zip()
        else:
            rule = (
                "no such folder or file"
                if not self._path.exists()
                else "neither a folder nor a .zip nor a .npy"
            )
            raise UserError(
                f"{self._shown}: {rule}; give a folder of pictures, a .zip of them or a .npy of uint8 (N, H, W, C)"
            )
        if len(self) < 2:
            found = "no pictures" if not len(self) else "only one picture"
            raise UserError(
                f"{self._shown}: holds {found} ({', '.join(sorted(SUFFIXES))}); training needs at least 2"
            )
        self._labels = self._find_labels(labels)

    def __len__(self) -> int:
        return len(self._members) if self._array is None else len(self._array)

    def read(self, i: int) -> tuple[np.ndarray, int]:
        found = self.examine(i)
        return found.pixels, found.label

    def examine(self, i: int) -> Examined:
        label = int(self._labels[i]) if self._labels is not None else 0
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
            pixels = to_square_uint8(image, self.img_resolution, self.img_channels)
        except UNREADABLE as e:
            raise BadImage.of(name, e) from e
        return Examined(name, image.size, image.mode, "array", pixels, label)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(
            f"{_RULES} {self.img_resolution} {self.img_channels} {self.skip_bad} {self.label_names}".encode()
        )
        if self._path.is_dir():
            for name in self._members:
                try:
                    status = (self._path / name).stat()
                except OSError:  # a link to nothing; reading it will say so
                    digest.update(f"{name} -\n".encode(errors="surrogateescape"))
                    continue
                digest.update(
                    f"{name} {status.st_size} {status.st_mtime_ns}\n".encode(
                        errors="surrogateescape"
                    )
                )
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
            if (status.st_dev, status.st_ino) in seen:  # a link that leads back
                folders[:] = []
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            names += [
                (Path(folder) / f).relative_to(self._path).as_posix()
                for f in files
                if _is_picture(f)
            ]
        return sorted(names, key=natural_key)

    def _list_zip(self) -> list[str]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                names = [
                    n
                    for n in archive.namelist()
                    if _is_picture(PurePosixPath(n).name) and "__MACOSX" not in n
                ]
        except UNREADABLE as e:
            raise UserError(
                f"{self._shown}: not a readable zip ({e}); make it anew or unpack it and give the folder"
            ) from e
        return sorted(names, key=natural_key)

    def _open_array(self, path: Path) -> np.ndarray:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("several arrays in one file")
        except UNREADABLE as e:
            raise UserError(
                f"{self._shown}: not a readable .npy ({e}); save it with numpy.save"
            ) from e
        if (
            array.dtype != np.uint8
            or array.ndim not in (3, 4)
            or (array.ndim == 4 and array.shape[3] not in (1, 3, 4))
        ):
            got = f"{array.dtype} {array.shape}"
            raise UserError(
                f"{self._shown}: holds {got}; must be uint8 (N, H, W, C) with C of 1, 3 or 4, or uint8 (N, H, W)"
            )
        return array

    def _content(self, name: str) -> bytes:
        if self._path.is_dir():
            if (self._path / name).stat().st_size > MOST_BYTES:
                raise BadImage(name, f"over {MOST_BYTES / 1e6:.0f} MB")
            return (self._path / name).read_bytes()
        if not hasattr(self._local, "archive"):
            self._local.archive = zipfile.ZipFile(self._path)
        if self._local.archive.getinfo(name).file_size > MOST_BYTES:
            raise BadImage(name, f"over {MOST_BYTES / 1e6:.0f} MB")
        return self._local.archive.read(name)

    def _find_labels(self, labels: str) -> np.ndarray | None:
        """The class of every picture, setting label_names; None without labels."""
        if labels == "none":
            return None
        if labels == "folders":
            firsts = [n.split("/")[0] if "/" in n else None for n in self._members]
            if not firsts or None in firsts or len(set(firsts)) < 2:
                raise UserError(
                    f"data.labels=folders: {self._path} must hold its pictures in two or more sub-folders, one a class"
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
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("several arrays in one file")
        except UNREADABLE as e:
            reason = "no such file" if not path.exists() else "not a readable .npy"
            raise UserError(
                f"{shown}: {reason}; give auto, none, folders or an integer .npy (N,)"
            ) from e
        if (
            array.shape != (len(self),)
            or not np.issubdtype(array.dtype, np.integer)
            or array.min() < 0
        ):
            got = f"{array.dtype} {array.shape}"
            raise UserError(
                f"{shown}: holds {got}; must be whole numbers from 0, one for each of the {len(self)} pictures"
            )
        if array.max() >= 10_000:
            raise UserError(
                f"{shown}: has label {array.max()}; classes are numbered from 0 without large gaps, up to 9999"
            )
        self.label_names = tuple(str(i) for i in range(int(array.max()) + 1))
        return array.astype(np.int64)


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
