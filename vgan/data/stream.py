"""Sets beyond one disk: tar shards, read through the webdataset library while training goes on."""

import contextlib
import hashlib
import json
import math
import os
import tarfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor

from vgan.data.source import UNREADABLE, BadImage, Dataset, Examined, Source, check_image_settings, examine_file
from vgan.errors import UserError
from vgan.files import write_atomically
from vgan.images import to_float
from vgan.randomness import permute

LANES = 16  # shards that are read side by side
AHEAD = 4  # batches that are being read while one is used
TRIES = 3  # to open or read a shard
_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
Sample = tuple[str, bytes, int]  # a name for messages, the picture's file, the label


class Shards(Source):
    """Tar shards of pictures (NAME.jpg, NAME.png, ...) with labels as text beside them (NAME.cls), as webdataset writes them.

    urls: local paths or http(s) addresses, with braces for ranges: shards/train-{0000..0099}.tar; several joined by '::'.
    classes: how many labels there are, 0 for none. The first `sample` pictures are packed: they are what the run's grids show
    and evaluation compares with. Training streams all of them (see `StreamFeed`). Shards should have been shuffled when
    they were written.
    """

    def __init__(
        self,
        urls: str,
        resolution: int = 64,
        channels: int = 3,
        classes: int = 0,
        sample: int = 10_000,
        skip_bad: bool = False,
    ) -> None:
        check_image_settings(resolution, channels)
        if not 0 <= classes <= 10_000:
            raise UserError(f"data.classes={classes}: must be from 0 to 10000")
        self.name, self.img_resolution, self.img_channels, self.skip_bad = "stream", resolution, channels, skip_bad
        self.label_names = tuple(str(i) for i in range(classes))
        self.urls = _expand(urls)
        if sample < 2:
            raise UserError(f"data.sample={sample}: must be at least 2")
        self._count = sample
        self._first: list[Sample] = []

    def __len__(self) -> int:
        return len(self._sample())

    def read(self, i: int) -> tuple[np.ndarray, int]:
        return self.decode(self._sample()[i])

    def fingerprint(self) -> str:
        told = (self.urls, self.img_resolution, self.img_channels, self.label_names, self._count, self.skip_bad)
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def decode(self, sample: Sample) -> tuple[np.ndarray, int]:
        """Pixels and label; raises BadImage."""
        found = self._examine(sample)
        return found.pixels, found.label

    def examine(self, i: int) -> Examined:
        return self._examine(self._sample()[i])

    def _examine(self, sample: Sample) -> Examined:
        name, content, label = sample
        if self.label_names and not 0 <= label < len(self.label_names):
            raise BadImage(name, f"label {label}, data.classes is {len(self.label_names)}")
        return examine_file(name, content, self.img_resolution, self.img_channels, label)

    def samples(self, url: str) -> Iterator[Sample]:
        """All pictures of a shard in their order. Raises UserError where it cannot be read, after TRIES tries."""
        from webdataset.tariterators import group_by_keys, tar_file_iterator  # an extra

        given = 0
        for attempt in range(TRIES):
            try:
                with _open(url) as file:
                    members = ({**member, "__url__": url} for member in tar_file_iterator(file))
                    for i, parts in enumerate(group_by_keys(members)):
                        kind = next((k for k in _PICTURES if k in parts), None)
                        if kind is None or i < given:
                            continue
                        given = i + 1
                        yield f"{parts['__key__']} of {url}", parts[kind], self._label(parts)
                return
            except (tarfile.TarError, *UNREADABLE) as e:
                if attempt + 1 == TRIES:
                    raise UserError(f"data.urls: {url} cannot be read ({e}); mend or leave out the shard") from e
                time.sleep(attempt + 1)

    def _label(self, parts: dict[str, Any]) -> int:
        if not self.label_names:
            return 0
        text = parts.get("cls", b"").strip()
        return int(text) if text.isdigit() else -1

    def _sample(self) -> list[Sample]:
        if not self._first:
            for url in self.urls:
                for sample in self.samples(url):
                    self._first.append(sample)
                    if len(self._first) >= self._count:
                        return self._first
        return self._first


def _expand(urls: str) -> list[str]:
    try:
        from webdataset.shardlists import expand_urls
    except ModuleNotFoundError as e:
        raise UserError("data=webdataset: needs the webdataset library; pip install vgan[webdataset]") from e
    found = [os.path.expanduser(url) for url in expand_urls(urls)]
    for url in found:
        # the library would run what stands behind pipe:
        if urlparse(url).scheme not in ("", "http", "https"):
            raise UserError(f"data.urls={urls}: must be local paths or http(s) addresses, {url} is neither")
        if not urlparse(url).scheme and not Path(url).is_file():
            raise UserError(f"data.urls={urls}: no such file {url}; {{0000..0099}} stands for numbers of four digits")
    return found


def _open(url: str) -> IO[bytes]:
    return urllib.request.urlopen(url, timeout=60) if urlparse(url).scheme else open(url, "rb")


class _Lane:
    """An endless walk through a lane's part of the shards, each epoch in another order, entered anywhere."""

    def __init__(self, shards: Shards, lane: int, lanes: int, seed: int, counts: "_Counts") -> None:
        self._shards, self._lane, self._lanes, self._seed, self._counts = shards, lane, lanes, seed, counts
        self._at = -1
        self._walk: Iterator[tuple[np.ndarray, int]] = iter(())

    def take(self, start: int, n: int) -> list[tuple[np.ndarray, int]]:
        """Pictures number start .. start + n - 1 of the lane; reads on where the last call ended, or finds the place anew."""
        if start != self._at:
            self._walk = self._from(start)
        taken = [next(self._walk) for _ in range(n)]
        self._at = start + n
        return taken

    def _from(self, start: int) -> Iterator[tuple[np.ndarray, int]]:
        waiting = 0  # pictures that could not be read are stood in for by the next one
        for sample in self._samples(start):
            try:
                picture = self._shards.decode(sample)
            except BadImage as e:
                if not self._shards.skip_bad:
                    raise UserError(f"data: unreadable picture: {e}; mend it, or set data.skip_bad=true") from e
                waiting += 1
                if waiting > 1000:
                    raise UserError("data: 1,000 unreadable pictures in a row; look at data.urls") from e
                continue
            for _ in range(waiting + 1):
                yield picture
            waiting = 0

    def _samples(self, start: int) -> Iterator[Sample]:
        n, epoch = len(self._shards.urls), 0
        while True:
            order = permute(torch.arange(n), n, self._seed, epoch).tolist()
            seen = 0
            for i in order[self._lane :: self._lanes]:
                url = self._shards.urls[i]
                known = self._counts.get(url)
                if known is not None and start >= known:  # a whole shard that was read before
                    start, seen = start - known, seen + known
                    continue
                count = 0
                for sample in self._shards.samples(url):
                    count += 1
                    if start:
                        start -= 1
                    else:
                        yield sample
                self._counts.learn(url, count)
                seen += count
            if not seen:
                raise UserError(f"data.urls: lane {self._lane} of {self._lanes} found no picture in its shards")
            epoch += 1


class _Counts:
    """How many pictures each shard holds, as far as they were read, kept for the next run."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            self._known: dict[str, int] = {k: int(v) for k, v in known.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            self._known = {}

    def get(self, url: str) -> int | None:
        return self._known.get(url)

    def learn(self, url: str, count: int) -> None:
        with self._lock:
            if url in self._known:
                return
            self._known[url] = count
            with contextlib.suppress(UserError):  # a disk that refuses costs some reading next time
                write_atomically(self._path, json.dumps(self._known).encode())


class StreamFeed:
    """Batches of a stream, a function of (shards, seed, batch size, cur_nimg) on any number of processes.

    Every batch is cut into `lanes` equal runs of rows, each read from its own lane: a share of the shards, in an order
    computed from (seed, epoch). A process reads the lanes of its rows alone. To go on somewhere, a lane passes over whole
    shards whose count is known and reads through the one it lands in without decoding. Same methods as `Feed`.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, seed: int, device: torch.device, share: tuple[int, int], cache_dir: Path
    ) -> None:
        shards = dataset.stream
        assert isinstance(shards, Shards)
        self._dataset, self._device, self._batch_size = dataset, device, batch_size
        lanes = math.gcd(batch_size, LANES)
        while lanes > len(shards.urls):
            lanes //= 2
        self._each = batch_size // lanes  # rows of a lane in every batch
        rows = batch_size // share[1]
        self._first_row, self._rows = share[0] * rows, rows
        counts = _Counts(cache_dir / f"shards-{shards.fingerprint()[:16]}.json")
        mine = range(self._first_row // self._each, (self._first_row + rows - 1) // self._each + 1)
        self._lanes = {i: _Lane(shards, i, lanes, seed, counts) for i in mine}
        self._pools = {i: ThreadPoolExecutor(1, thread_name_prefix=f"lane-{i}") for i in mine}
        self._ahead: dict[int, list[Future[list[tuple[np.ndarray, int]]]]] = {}  # by cur_nimg
        self._one_hot = torch.eye(dataset.label_dim, device=device)
        self.waited_s = 0.0

    def batch(self, cur_nimg: int) -> tuple[Tensor, Tensor]:
        """As `Feed.batch`."""
        if cur_nimg not in self._ahead:  # the first, or one that was gone back to
            self._ahead = {}
        for k in range(AHEAD + 1):
            nimg = cur_nimg + k * self._batch_size
            if nimg not in self._ahead:
                start = nimg // self._batch_size * self._each
                self._ahead[nimg] = [self._pools[i].submit(lane.take, start, self._each) for i, lane in self._lanes.items()]
        begun = time.perf_counter()
        taken = [picture for future in self._ahead.pop(cur_nimg) for picture in future.result()]
        self.waited_s += time.perf_counter() - begun
        skip = self._first_row - min(self._lanes) * self._each
        taken = taken[skip : skip + self._rows]
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in taken])).to(self._device)
        real = to_float(pixels.permute(0, 3, 1, 2))
        labels = torch.tensor([label for _, label in taken], device=self._device)
        return real, self._one_hot[labels] if self._dataset.label_dim else real.new_zeros(len(real), 0)

    def reals(self, n: int) -> tuple[Tensor, Tensor]:
        """As `Feed.reals`, of the packed sample."""
        return self._dataset.reals(n)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)
