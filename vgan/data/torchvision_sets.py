"""CIFAR-10 and CelebA through torchvision, with its downloads and integrity checks."""

import difflib
import hashlib
import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vgan.data.source import Examined, Source, check_image_settings, to_square_uint8
from vgan.runtime.errors import UserError

_CIFAR10_FIX = (
    "put cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html into {root}"
)
_CELEBA_FIX = (
    "put img_align_celeba.zip, list_attr_celeba.txt, identity_CelebA.txt, list_bbox_celeba.txt, "
    "list_landmarks_align_celeba.txt and list_eval_partition.txt "
    "from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into {root}/celeba"
)


def _fetch(make: Callable[[], Any], name: str, root: Path, fix: str) -> Any:
    """torchvision's data set; where it cannot be had, a UserError that says which files to put where."""
    try:
        return make()
    except (urllib.error.URLError, OSError, RuntimeError, ModuleNotFoundError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        how = fix.format(root=root.absolute())
        raise UserError(
            f"data={name}: could not be downloaded or checked ({reason}); {how}, then give the same command"
        ) from e


class Cifar10(Source):
    """The 50,000 training pictures of CIFAR-10 (Krizhevsky 2009), downloaded into `root` on first use."""

    def __init__(self, root: str = "data", resolution: int = 32, labels: bool = True) -> None:
        check_image_settings(resolution)
        from torchvision.datasets import CIFAR10  # imports slowly

        self.name, self.img_resolution, self.img_channels = "cifar10", resolution, 3
        folder = Path(root).expanduser()
        self._set = _fetch(
            lambda: CIFAR10(str(folder), train=True, download=True), self.name, folder, _CIFAR10_FIX
        )
        self.label_names = tuple(self._set.classes) if labels else ()

    def __len__(self) -> int:
        return len(self._set)

    def read(self, i: int) -> tuple[np.ndarray, int]:
        found = self.examine(i)
        return found.pixels, found.label

    def examine(self, i: int) -> Examined:
        image, label = self._set[i]
        pixels = to_square_uint8(image, self.img_resolution, 3)
        return Examined(
            f"picture {i}",
            image.size,
            image.mode,
            "array",
            pixels,
            label if self.label_names else 0,
        )

    def fingerprint(self) -> str:  # the content is known: torchvision has checked it
        return hashlib.sha256(
            f"cifar10 train {self.img_resolution} {self.label_names}".encode()
        ).hexdigest()


class CelebA(Source):
    """The 162,770 training faces of CelebA (Liu et al. 2015), aligned: centre crop of `crop` px, then resized.

    attributes, such as ['Smiling', 'Male'], make every combination a class: 2^k of them, named 'Smiling, not Male'.
    """

    def __init__(
        self,
        root: str = "data",
        resolution: int = 64,
        crop: int = 178,
        attributes: Sequence[str] = (),
    ) -> None:
        check_image_settings(resolution)
        if not 16 <= crop <= 178:
            raise UserError(
                f"data.crop={crop}: must be from 16 to 178, the width of CelebA's pictures"
            )
        from torchvision.datasets import CelebA as Torchvision  # imports slowly

        self.name, self.img_resolution, self.img_channels, self._crop = (
            "celeba",
            resolution,
            3,
            crop,
        )
        folder = Path(root).expanduser()
        self._set = _fetch(
            lambda: Torchvision(str(folder), split="train", download=True),
            self.name,
            folder,
            _CELEBA_FIX,
        )
        names = [n for n in self._set.attr_names if n]
        self._columns = [self._column(a, names) for a in attributes]
        if attributes:
            bits = range(len(attributes))
            self.label_names = tuple(
                ", ".join(a if label >> b & 1 else f"not {a}" for b, a in zip(bits, attributes))
                for label in range(2 ** len(attributes))
            )

    @staticmethod
    def _column(attribute: str, names: list[str]) -> int:
        if attribute not in names:
            close = difflib.get_close_matches(attribute, names, 3, 0.4) or names[:5]
            raise UserError(
                f"data.attributes={attribute}: unknown; did you mean {' or '.join(close)}?"
            )
        return names.index(attribute)

    def __len__(self) -> int:
        return len(self._set)

    def read(self, i: int) -> tuple[np.ndarray, int]:
        found = self.examine(i)
        return found.pixels, found.label

    def examine(self, i: int) -> Examined:
        image, attributes = self._set[i]
        label = sum(int(attributes[column]) << b for b, column in enumerate(self._columns))
        pixels = to_square_uint8(image, self.img_resolution, 3, self._crop)
        return Examined(f"picture {i}", image.size, image.mode, "JPEG", pixels, label)

    def fingerprint(self) -> str:
        return hashlib.sha256(
            f"celeba train {self.img_resolution} {self._crop} {self.label_names}".encode()
        ).hexdigest()
