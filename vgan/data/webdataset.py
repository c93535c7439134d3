"""Data sets larger than one disk: webdataset's tar shards, read while training runs."""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import cached_property, partial
from itertools import groupby, islice
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vgan.data import shards
from vgan.data.preprocess import MOST_BYTES, examine_file
from vgan.data.shards import Identity, LoadingCancelled, Retries, ShardCounts
from vgan.data.source import BadImage, Dataset, Examined, Source, check_image_settings
from vgan.runtime.errors import UserError
from vgan.runtime.images import to_float
from vgan.runtime.rng import permute

MAX_STREAMS = 16  # shards that are read side by side
PREFETCH = 4  # batches that are read ahead
_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
_MAX_ENCODED = 1_000_000_000  # bytes of undecoded images that the packed sample may hold
_POLL_S = 0.2  # how often a wait for data checks whether it should end
_MAX_BAD = 1000  # unreadable images in a row


class Sample(NamedTuple):
    """An encoded image of a shard."""

    name: str  # for messages
    content: bytes | None  # None: too large to read
    label: int


class Shards(Source):
    """Tar shards of images (NAME.jpg, NAME.png, ...) with labels as text (NAME.cls).

    Args:
        urls: local paths or addresses (http, https, s3, gs, hf), with braces for ranges, such as
            shards/train-{0000..0099}.tar; several joined by `::`. They should have been shuffled.
        resolution: side of square images in px, or height and width.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        classes: number of labels, 0 for none.
        sample: number of images, the first ones, that are packed for grids and evaluation.
            Training reads all (see `ShardLoader`).
        skip_bad: leave unreadable images out instead of stopping.
    """

    def __init__(
        self,
        urls: str,
        resolution: int | Sequence[int] = 64,
        channels: int = 3,
        classes: int = 0,
        sample: int = 10_000,
        skip_bad: bool = False,
    ) -> None:
        self.img_resolution, self.img_channels = (
            check_image_settings(resolution, channels),
            channels,
        )
        if not 0 <= classes <= 10_000:
            raise UserError(f"data.classes={classes}: must be from 0 to 10000")
        if sample < 2:
            raise UserError(f"data.sample={sample}: must be at least 2")
        self.name, self.skip_bad = "stream", skip_bad
        self.label_names = tuple(str(i) for i in range(classes))
        self.urls = shards.expand_urls(urls)
        self._count = sample
        self._identities: dict[str, Identity] = {}  # as last seen by this process
        self._waiting: set[str] = set()  # see Retries

    def __len__(self) -> int:
        return len(self._first)

    def examine(self, i: int) -> Examined:
        sample = self._first[i]
        if isinstance(sample, BadImage):
            raise sample
        return self.decode(sample) if isinstance(sample, Sample) else sample

    def fingerprint(self) -> str:
        """Return a hash of settings and shards, as `Source.fingerprint`; equal for copies.

        It takes the size of every local shard and the identity of the first 16, mostly those of the
        packed sample: 0.1 s for 10,000 shards on a local disk.
        """
        images = (self.img_resolution, self.img_channels, self.label_names)
        settings = (self.urls, *images, self._count, self.skip_bad)
        sizes = [os.path.getsize(url) for url in self.urls if not shards.protocol_of(url)]
        identities = [tuple(self.identity(url, Event())) for url in self.urls[:16]]
        return hashlib.sha256(repr((settings, sizes, identities)).encode()).hexdigest()

    def identity(self, url: str, closed: Event) -> Identity:
        """Return a shard's identity as this process last saw it; waits and raises as `samples`."""
        retries = Retries(url, closed, self._waiting)
        while url not in self._identities:
            with retries:
                self._identities[url] = shards.identity(url)
        return self._identities[url]

    def samples(self, url: str, closed: Event | None = None) -> Iterator[Sample]:
        """Yield all images of a shard in their order.

        Temporary failures are retried for minutes. Raises UserError for those that last and for
        archives that are damaged or cut short, LoadingCancelled once `closed` is set.
        """
        closed = closed or Event()
        retries = Retries(url, closed, self._waiting)
        count, now = 0, Identity("", "")
        while True:
            with retries:
                before, now = now, shards.identity(url)
                if count and now.size != before.size:
                    fix = "run the same command to resume"
                    raise UserError(f"data.urls: {url} was changed while it was read; {fix}")
                for sample in islice(_read(url, bool(self.label_names), closed), count, None):
                    count += 1
                    retries.succeed()
                    yield sample
                self._identities[url] = now
                return

    def decode(self, sample: Sample) -> Examined:
        """Decode an image; raise BadImage."""
        name, content, label = sample
        if self.label_names and not 0 <= label < len(self.label_names):
            raise BadImage(name, f"label {label}, data.classes is {len(self.label_names)}")
        if content is None:
            raise BadImage(name, f"over {MOST_BYTES / 1e6:.0f} MB")
        return examine_file(name, content, self.img_resolution, self.img_channels, label)

    @cached_property
    def _first(self) -> list[Sample | Examined | BadImage]:
        """The images to pack, decoded beyond _MAX_ENCODED bytes since pixels take less memory."""
        everything = (sample for url in self.urls for sample in self.samples(url))
        first: list[Sample | Examined | BadImage] = []
        size = 0
        for sample in islice(everything, self._count):
            size += len(sample.content or b"")
            try:
                first.append(sample if size <= _MAX_ENCODED else self.decode(sample))
            except BadImage as bad:
                first.append(bad)
        return first


def _read(url: str, has_labels: bool, closed: Event) -> Iterator[Sample]:
    """Group files by name and extension as webdataset does; read images and labels alone."""
    for key, files in groupby(shards.read_files(url, closed), key=lambda file: file[0]):
        parts: dict[str, bytes | None] = {}
        left = MOST_BYTES
        for _, extension, size, read in files:
            if extension in parts:
                raise ValueError(f"{key}.{extension} is there twice")
            parts[extension] = None
            if extension in (*_EXTENSIONS, "cls"):
                left -= size
                parts[extension] = read() if left >= 0 else None
        text = (parts.get("cls") or b"").strip() if has_labels else b"0"
        label = int(text) if text.isdigit() else -1
        for extension in [x for x in _EXTENSIONS if x in parts][:1]:
            yield Sample(f"{key} of {url}", parts[extension], label)


class _Stream:
    """An endless stream of the images of part of the shards, in another order each epoch."""

    def __init__(
        self, source: Shards, part: slice, seed: int, counts: ShardCounts, closed: Event
    ) -> None:
        self._source, self._part, self._seed = source, part, seed
        self._counts, self._closed = counts, closed
        self._position, self._images = 0, self._from(0)

    def take(self, start: int, n: int) -> list[Examined]:
        """Return images start .. start + n - 1; seeks unless the last call ended at `start`."""
        if start != self._position:
            self._images = self._from(start)
        self._position = -1  # stays so if reading fails
        images = list(islice(self._images, n))
        self._position = start + n
        return images

    def _from(self, start: int) -> Iterator[Examined]:
        bad = 0  # unreadable images, each of which the next readable one replaces
        for sample in self._samples(start):
            try:
                image = self._source.decode(sample)
            except BadImage as e:
                if not self._source.skip_bad:
                    fix = "repair it, or set data.skip_bad=true"
                    raise UserError(f"data: unreadable image: {e}; {fix}") from e
                bad += 1
                if bad > _MAX_BAD:
                    raise UserError(f"data.urls: {bad:,} unreadable images in a row") from e
                continue
            yield from [image] * (bad + 1)
            bad = 0

    def _samples(self, start: int) -> Iterator[Sample]:
        urls, epoch = self._source.urls, 0
        while True:
            order = permute(torch.arange(len(urls)), len(urls), self._seed, epoch).tolist()
            seen = 0
            for i in order[self._part]:
                known = self._counts.get(urls[i]) if start else None
                if known is not None and start >= known:  # the whole shard is skipped
                    start, seen = start - known, seen + known
                    continue
                count = 0
                for count, sample in enumerate(self._source.samples(urls[i], self._closed), 1):
                    if count > start:
                        yield sample
                self._counts.put(urls[i], count)
                start, seen = max(0, start - count), seen + count
            if not seen:
                part = f"every {self._part.step}th shard from number {self._part.start}"
                raise UserError(f"data.urls: found no image in {part}; check the shards")
            epoch += 1


class ShardLoader:
    """Batches of tar shards, a function of (shards, seed, batch size, cur_nimg).

    Every batch is cut into equal runs of rows, each from its own stream: a share of the shards in
    an order computed from (seed, epoch). A process reads the streams of its rows alone, so batches
    are the same on any number of processes. To start anywhere, a stream skips shards whose count
    is known and reads through the next one without decoding. The methods are those of `Loader`;
    `batch` polls `stop_waiting` while it waits, and raises LoadingCancelled once that is true.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        device: torch.device,
        share: tuple[int, int],
        cache_dir: Path,
        stop_waiting: Callable[[], bool] = lambda: False,
    ) -> None:
        source = dataset.stream
        assert isinstance(source, Shards)
        self._device, self._batch_size = device, batch_size
        self._closed, self._stop_waiting = Event(), stop_waiting
        n = math.gcd(batch_size, MAX_STREAMS)
        while n > len(source.urls):
            n //= 2
        self._each = each = batch_size // n  # rows of a stream in every batch
        rows = batch_size // share[1]
        first = share[0] * rows
        used = range(first // each, (first + rows - 1) // each + 1)
        self._rows = slice(first - used[0] * each, first - used[0] * each + rows)
        counts = ShardCounts(cache_dir, source.urls, partial(source.identity, closed=self._closed))
        parts = [slice(i, None, n) for i in used]
        self._streams = [_Stream(source, part, seed, counts, self._closed) for part in parts]
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix=f"shards-{i}") for i in used]
        self._prefetched: dict[int, list[Future[list[Examined]]]] = {}  # by cur_nimg
        self._c_table = dataset.c_table().to(device)
        self.waited_s = 0.0

    def batch(self, cur_nimg: int) -> tuple[Tensor, Tensor]:
        """Return the batch at cur_nimg, as `Loader.batch`; raise UserError for unreadable data."""
        if cur_nimg not in self._prefetched:  # the first batch, or one after a jump
            self._prefetched = {}
        for k in range(PREFETCH + 1):
            nimg = cur_nimg + k * self._batch_size
            if nimg not in self._prefetched:
                start = nimg // self._batch_size * self._each
                self._prefetched[nimg] = [
                    pool.submit(stream.take, start, self._each)
                    for pool, stream in zip(self._pools, self._streams, strict=True)
                ]
        start_s = time.perf_counter()
        futures = self._prefetched[cur_nimg]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, _POLL_S, FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises what the thread raised
            if pending and self._stop_waiting():
                raise LoadingCancelled
        del self._prefetched[cur_nimg]
        images = [image for future in futures for image in future.result()][self._rows]
        self.waited_s += time.perf_counter() - start_s
        pixels = torch.from_numpy(np.stack([image.pixels for image in images])).to(self._device)
        labels = torch.tensor([image.label for image in images], device=self._device)
        return to_float(pixels.permute(0, 3, 1, 2)), self._c_table[labels]

    def close(self) -> None:
        """End the threads; pauses end at once, a silent server after shards.TIMEOUT_S seconds."""
        self._closed.set()
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools:
            pool.shutdown()
