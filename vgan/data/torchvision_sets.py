"""CIFAR-10 and CelebA through torchvision, with its downloads and integrity checks.

CelebA also comes from a mirror.
"""

import difflib
import hashlib
import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vgan.data import celeba_mirror
from vgan.data.conditions import check_conditions
from vgan.data.preprocess import prepare_image
from vgan.data.source import Examined, Source, check_image_settings
from vgan.runtime.distributed import print0
from vgan.runtime.errors import UserError, first_line

_CIFAR10_FIX = (
    "put cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html into {root}"
)
_CELEBA_FIX = (
    "put img_align_celeba.zip, list_attr_celeba.txt, identity_CelebA.txt, list_bbox_celeba.txt, "
    "list_landmarks_align_celeba.txt and list_eval_partition.txt "
    "from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into {root}/celeba"
)


def _fetch(make: Callable[[], Any], name: str, root: Path, fix: str) -> Any:
    """Return make(), a data set of torchvision. Raises UserError with the files to download."""
    try:
        return make()
    except (urllib.error.URLError, OSError, RuntimeError, ModuleNotFoundError) as e:
        raise UserError(
            f"data={name}: could not be downloaded or checked ({first_line(e)}); "
            f"{fix.format(root=root.absolute())}, then give the same command"
        ) from e


def _fetch_celeba(root: Path) -> Any:
    """Return CelebA from Google Drive, through torchvision, or else from the mirror.

    Raises UserError with the files to download where neither is reached.
    """
    mirror = root / "celeba-mirror"

    def from_drive() -> Any:
        # Slow to import.
        from gdown.exceptions import DownloadError
        from torchvision.datasets import CelebA

        try:
            return CelebA(str(root), split="train", download=True)
        except DownloadError as e:
            raise OSError(first_line(e)) from e

    def from_mirror() -> Any:
        return celeba_mirror.CelebAMirror(mirror)

    if celeba_mirror.is_complete(mirror):
        return _fetch(from_mirror, "celeba", root, _CELEBA_FIX)
    try:
        return _fetch(from_drive, "celeba", root, _CELEBA_FIX)
    except UserError as refused:
        print0(f"{str(refused).partition(';')[0]}.")
        print0(f"Trying the mirror {celeba_mirror.REPO} on huggingface.co: 9.4 GB into {mirror}.")
        return _fetch(from_mirror, "celeba", root, _CELEBA_FIX)


def _names(key: str, value: Any) -> tuple[str, ...]:
    """Return one attribute or a list of them. Raises UserError for anything else."""
    names = (value,) if isinstance(value, str) else value
    listed = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not listed or len(set(names)) != len(names):
        rule = "must be a list of different attributes, such as [Male]"
        raise UserError(f"data.{key}={value}: {rule}")
    return tuple(names)


class Cifar10(Source):
    """The 50,000 training images of CIFAR-10 (Krizhevsky 2009), downloaded into `root`."""

    def __init__(
        self, root: str = "data", resolution: int | Sequence[int] = 32, labels: bool = True
    ) -> None:
        self.img_resolution, self.img_channels = check_image_settings(resolution), 3
        from torchvision.datasets import CIFAR10  # slow to import

        self.name = "cifar10"
        folder = Path(root).expanduser()
        self._set = _fetch(
            lambda: CIFAR10(str(folder), train=True, download=True), self.name, folder, _CIFAR10_FIX
        )
        self.label_names = tuple(self._set.classes) if labels else ()

    def __len__(self) -> int:
        return len(self._set)

    def examine(self, i: int) -> Examined:
        image, label = self._set[i]
        pixels = prepare_image(image, self.img_resolution, 3)
        if not self.label_names:
            label = 0
        return Examined(f"image {i}", image.size, image.mode, "array", pixels, label)

    def fingerprint(self) -> str:
        # torchvision has checked the content.
        settings = f"cifar10 train {self.img_resolution} {self.label_names}"
        return hashlib.sha256(settings.encode()).hexdigest()


class CelebA(Source):
    """The 162,770 training faces of CelebA (Liu et al. 2015), aligned, with a centre crop.

    crop: shorter side in px of what is cropped before resizing. attributes, such as ['Smiling',
    'Male'], make every combination a class: 2^k classes, named such as 'Smiling, not Male'.
    conditions, a list of attributes or 'all', gives each as a number, 1 or 0, to the networks.
    """

    def __init__(
        self,
        root: str = "data",
        resolution: int | Sequence[int] = 64,
        crop: int = 178,
        attributes: Sequence[str] = (),
        conditions: Sequence[str] | str = (),
    ) -> None:
        self.img_resolution, self.img_channels = check_image_settings(resolution), 3
        if not 16 <= crop <= 178:
            raise UserError(
                f"data.crop={crop}: must be from 16 to 178, the width of the images of CelebA"
            )
        attributes, wanted = _names("attributes", attributes), _names("conditions", conditions)
        if attributes and wanted:
            rule = "cannot be combined with data.attributes; leave one of them out"
            raise UserError(f"data.conditions={conditions}: {rule}")
        self.name, self._crop = "celeba", crop
        self._set = _fetch_celeba(Path(root).expanduser())
        names = [n for n in self._set.attr_names if n]
        self._columns = [self._column("attributes", a, names) for a in attributes]
        if wanted:
            self.condition_names = tuple(names if wanted == ("all",) else wanted)
            columns = [self._column("conditions", a, names) for a in self.condition_names]
            values = np.asarray(self._set.attr)[:, columns]
            self.conditions = check_conditions(values, self.condition_names, "data.conditions")
        if attributes:
            names_of = [
                ", ".join(a if label >> b & 1 else f"not {a}" for b, a in enumerate(attributes))
                for label in range(2 ** len(attributes))
            ]
            self.label_names = tuple(names_of)

    @staticmethod
    def _column(key: str, attribute: str, names: list[str]) -> int:
        if attribute not in names:
            close = difflib.get_close_matches(attribute, names, 3, 0.4) or names[:5]
            raise UserError(f"data.{key}={attribute}: unknown; did you mean {' or '.join(close)}?")
        return names.index(attribute)

    def __len__(self) -> int:
        return len(self._set)

    def examine(self, i: int) -> Examined:
        image, attributes = self._set[i]
        label = sum(int(attributes[column]) << b for b, column in enumerate(self._columns))
        pixels = prepare_image(image, self.img_resolution, 3, self._crop)
        return Examined(f"image {i}", image.size, image.mode, "JPEG", pixels, label)

    def fingerprint(self) -> str:
        settings = f"celeba train {self.img_resolution} {self._crop} {self.label_names}"
        if self.condition_names:
            settings += f" {self.condition_names}"
        return hashlib.sha256(settings.encode()).hexdigest()
