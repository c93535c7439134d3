"""CelebA from a mirror on the Hugging Face Hub, where Google Drive refuses the download."""

import hashlib
import io
import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vgan.runtime.errors import first_line
from vgan.runtime.files import write_atomically

REPO, REVISION = "flwrlabs/celeba", "2d738f56e0e7f925ea36ae7c808ea925264aacec"
FOLDER = "img_align+identity+attr"
_COMPLETE = "complete.json"  # names and sizes of the files, written when all were checked
_KEPT_GROUPS = 4  # groups of rows in memory, for threads that read ahead


class CelebAMirror:
    """The training images of CelebA in parquet files below `folder`, downloaded on first use.

    Items are an image and its attributes (40,), as those of torchvision.datasets.CelebA. The 19
    files take 9.4 GB. Raises OSError where one cannot be had or has another SHA-256 than the Hub
    lists.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet as parquet  # slow to import

        if not is_complete(folder):
            _download(folder)
        names = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        self._files = [parquet.ParquetFile(folder / name) for name in sorted(names)]
        columns = self._files[0].schema_arrow.names
        self.attr_names = [name for name in columns if name not in ("image", "celeb_id")]
        self._places = [(f, i) for f in self._files for i in range(f.num_row_groups)]
        self._ends = np.cumsum([f.metadata.row_group(i).num_rows for f, i in self._places])
        self._groups: OrderedDict[int, dict[str, list[Any]]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def attr(self) -> np.ndarray:
        """The attributes of all images, 0 or 1, int64 (N, 40)."""
        tables = [file.read(columns=self.attr_names) for file in self._files]
        columns = [[table.column(name).to_numpy() for table in tables] for name in self.attr_names]
        return np.stack([np.concatenate(parts) > 0 for parts in columns], axis=1).astype(np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> tuple[Image.Image, list[int]]:
        group = int(np.searchsorted(self._ends, i, side="right"))
        row = i - (int(self._ends[group - 1]) if group else 0)
        columns = self._group(group)
        image = Image.open(io.BytesIO(columns["image"][row]["bytes"]))
        return image, [int(columns[name][row] > 0) for name in self.attr_names]

    def _group(self, group: int) -> dict[str, list[Any]]:
        with self._lock:
            if group not in self._groups:
                file, i = self._places[group]
                table = file.read_row_group(i, columns=["image", *self.attr_names])
                self._groups[group] = table.to_pydict()
                while len(self._groups) > _KEPT_GROUPS:
                    self._groups.popitem(last=False)
            return self._groups[group]


def is_complete(folder: Path) -> bool:
    """Return whether all files are there, in the sizes in which they were checked."""
    try:
        sizes = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _download(folder: Path) -> None:
    """Download and check the training files; those that are there already are only checked."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    where: Any = {"repo_type": "dataset", "revision": REVISION}
    try:
        listed: list[Any] = list(hub.HfApi().list_repo_tree(REPO, FOLDER, **where))
    except getattr(errors, "HTTPError", OSError) as e:  # of httpx, which are no OSErrors
        raise OSError(first_line(e)) from e
    sizes = {}
    for entry in listed:
        if not Path(entry.path).name.startswith("train-"):
            continue
        path = Path(hub.hf_hub_download(REPO, entry.path, local_dir=folder, **where))
        if entry.lfs is None or _sha256(path) != entry.lfs.sha256:
            path.unlink()
            raise OSError(f"{entry.path}: has another SHA-256 than the Hub lists")
        sizes[entry.path] = path.stat().st_size
    if not sizes:
        raise OSError(f"{REPO}: has no training files in {FOLDER}")
    write_atomically(folder / _COMPLETE, json.dumps(sizes, indent=1).encode())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
