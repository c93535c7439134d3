"""Data sets larger than one disk: webdataset's tar shards, read while training runs."""

import hashlib
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vgan.data.preprocess import MOST_BYTES, examine_file
from vgan.data.shards import (
    UNKNOWN,
    Identity,
    LoadingCancelled,
    Retries,
    ShardCounts,
    expand_urls,
    identity,
    is_temporary,
    protocol_of,
    read_members,
)
from vgan.data.source import BadImage, Dataset, Examined, Source, check_image_settings
from vgan.runtime.errors import UserError
from vgan.runtime.images import to_float
from vgan.runtime.rng import permute

MAX_STREAMS = 16  # shards that are read side by side
PREFETCH = 4  # batches that are read ahead
_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
_RESERVED = re.compile(r"__[^/]*__($|/)")  # names that webdataset reserves for itself
_MAX_ENCODED = 1_000_000_000  # bytes of undecoded images that the packed sample may hold
_IDENTIFIED = 16  # shards whose identity is in the fingerprint: mostly those of the packed sample
_POLL_S = 0.2  # how often a wait for data checks whether it should end
_MAX_BAD = 1000  # unreadable images in a row
Decoded = tuple[np.ndarray, int]  # pixels and label


class Sample(NamedTuple):
    """An encoded image of a shard."""

    name: str  # for messages
    content: bytes | None  # None: too large to read
    label: int


class Shards(Source):
    """Tar shards of images (NAME.jpg, NAME.png, ...) with labels as text (NAME.cls).

    Args:
        urls: local paths or addresses (http, https, s3, gs, hf), with braces for ranges, such as
            shards/train-{0000..0099}.tar; several joined by `::`.
        resolution: height and width of the square images in px.
        channels: 1 (grey) or 3 (RGB).
        classes: number of labels, 0 for none.
        sample: number of images that are packed, the first ones. Grids and evaluation use them;
            training reads all shards (see `ShardLoader`), which should have been shuffled when
            they were written.
        skip_bad: leave unreadable images out instead of stopping.
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
        if sample < 2:
            raise UserError(f"data.sample={sample}: must be at least 2")
        self.name = "stream"
        self.img_resolution = resolution
        self.img_channels = channels
        self.skip_bad = skip_bad
        self.label_names = tuple(str(i) for i in range(classes))
        self.urls = expand_urls(urls)
        self._count = sample
        self._first: list[Sample | Examined | BadImage] = []
        self._identities: dict[str, Identity] = {}  # as last seen by this process
        self._retries = Retries()

    def __len__(self) -> int:
        return len(self._first_samples())

    def read(self, i: int) -> Decoded:
        found = self.examine(i)
        return found.pixels, found.label

    def examine(self, i: int) -> Examined:
        found = self._first_samples()[i]
        if isinstance(found, BadImage):
            raise found
        return self._examine(found) if isinstance(found, Sample) else found

    def fingerprint(self) -> str:
        """Return a hash of settings and shards, as `Source.fingerprint`; equal for copies.

        It takes the size of every local shard and the identity of the first 16 shards: 0.1 s for
        10,000 shards on a local disk.
        """
        settings = (
            self.urls,
            self.img_resolution,
            self.img_channels,
            self.label_names,
            self._count,
            self.skip_bad,
        )
        sizes = [os.path.getsize(url) for url in self.urls if not protocol_of(url)]
        closed = threading.Event()
        with ThreadPoolExecutor(_IDENTIFIED) as pool:
            try:
                found = pool.map(lambda url: self.identity(url, closed), self.urls[:_IDENTIFIED])
                identities = [tuple(x) for x in found]
            finally:
                closed.set()  # or Ctrl-C would wait as long as the threads do
        return hashlib.sha256(repr((settings, sizes, identities)).encode()).hexdigest()

    def identity(self, url: str, closed: threading.Event) -> Identity:
        """Return a shard's identity as this process last saw it; waits and raises as `samples`."""
        if url not in self._identities:
            look = partial(_identity_or_unknown, url)
            self._identities[url] = self._retries(url, look, closed)
        return self._identities[url]

    def samples(self, url: str, closed: threading.Event | None = None) -> Iterator[Sample]:
        """Yield all images of a shard in their order.

        Temporary failures are retried for minutes. Raises UserError for those that last and for
        archives that are damaged or cut short, LoadingCancelled once `closed` is set.
        """
        closed = closed or threading.Event()
        reader = _ShardReader(url, bool(self.label_names), closed)
        while sample := self._retries(url, reader.next, closed):
            yield sample
        self._identities[url] = reader.identity

    def decode(self, sample: Sample) -> Decoded:
        """Return pixels and label; raise BadImage."""
        found = self._examine(sample)
        return found.pixels, found.label

    def _examine(self, sample: Sample) -> Examined:
        name, content, label = sample
        if self.label_names and not 0 <= label < len(self.label_names):
            raise BadImage(name, f"label {label}, data.classes is {len(self.label_names)}")
        if content is None:
            raise BadImage(name, f"over {MOST_BYTES / 1e6:.0f} MB")
        return examine_file(name, content, self.img_resolution, self.img_channels, label)

    def _first_samples(self) -> list[Sample | Examined | BadImage]:
        if not self._first:
            everything = (sample for url in self.urls for sample in self.samples(url))
            size = 0
            for sample in islice(everything, self._count):
                size += len(sample.content or b"")
                # Threads decode these later; beyond the limit only the small squares are kept.
                keep = size <= _MAX_ENCODED
                self._first.append(sample if keep else self._examine_or_bad(sample))
        return self._first

    def _examine_or_bad(self, sample: Sample) -> Examined | BadImage:
        try:
            return self._examine(sample)
        except BadImage as bad:
            return bad


def _identity_or_unknown(url: str) -> Identity:
    try:
        return identity(url)
    except OSError as e:
        if is_temporary(e):
            raise
        return UNKNOWN  # reading the shard raises the same error, if it is read


class _ShardReader:
    """The images of one shard in their order, which can be read on after a failure."""

    def __init__(self, url: str, has_labels: bool, closed: threading.Event) -> None:
        self._url, self._has_labels, self._closed = url, has_labels, closed
        self._count = 0  # images returned so far
        self._samples: Iterator[Sample] | None = None
        self.identity = UNKNOWN

    def next(self) -> Sample | None:
        """Return the next image, None at the end; after a failure the shard is opened again."""
        samples, self._samples = self._samples or self._open(), None
        sample = next(samples, None)
        if self._closed.is_set():
            raise LoadingCancelled
        self._samples = samples  # not reached after a failure
        self._count += 1
        return sample

    def _open(self) -> Iterator[Sample]:
        now = identity(self._url)
        if self._count and not Identity(now.size, "").matches(self.identity):
            raise UserError(
                f"data.urls: {self._url} was changed while it was read; "
                "run the same command to resume"
            )
        if not self._count:
            self.identity = now
        return islice(self._read(), self._count, None)

    def _read(self) -> Iterator[Sample]:
        from webdataset.tariterators import group_by_keys

        for sample in group_by_keys(self._files()):
            kind = next((k for k in _EXTENSIONS if k in sample), None)
            if kind is not None:
                name = f"{sample['__key__']} of {self._url}"
                yield Sample(name, sample[kind], self._label(sample.get("cls")))

    def _files(self) -> Iterator[dict[str, Any]]:
        """Yield files as webdataset groups them; reads images and labels, MOST_BYTES a sample."""
        from webdataset.tariterators import base_plus_ext

        key, left = None, MOST_BYTES
        for member, read in read_members(self._url):
            if self._closed.is_set():
                raise LoadingCancelled
            if _RESERVED.match(member.name):
                continue
            prefix, suffix = base_plus_ext(member.name)
            if prefix != key:
                key, left = prefix, MOST_BYTES
            content: bytes | None = b""
            if suffix is not None and suffix.lower() in (*_EXTENSIONS, "cls"):
                left -= member.size
                content = read() if left >= 0 else None
            yield {"fname": member.name, "data": content, "__url__": self._url}

    def _label(self, text: bytes | None) -> int:
        if not self._has_labels:
            return 0
        text = (text or b"").strip()
        return int(text) if text.isdigit() else -1


class _Stream:
    """An endless stream of the images of every n-th shard, in another order each epoch.

    Reading can start anywhere in it.
    """

    def __init__(
        self,
        shards: Shards,
        index: int,
        n: int,
        seed: int,
        counts: ShardCounts,
        closed: threading.Event,
    ) -> None:
        self._shards, self._index, self._n, self._seed = shards, index, n, seed
        self._counts, self._closed = counts, closed
        self._position = -1
        self._images: Iterator[Decoded] = iter(())

    def take(self, start: int, n: int) -> list[Decoded]:
        """Return images start .. start + n - 1; seeks unless the last call ended at `start`."""
        if start != self._position:
            self._images = self._from(start)
        self._position = -1  # stays so if reading fails
        images = list(islice(self._images, n))
        self._position = start + n
        return images

    def _from(self, start: int) -> Iterator[Decoded]:
        bad = 0  # unreadable images, each of which the next readable one replaces
        for sample in self._samples(start):
            try:
                image = self._shards.decode(sample)
            except BadImage as e:
                if not self._shards.skip_bad:
                    raise UserError(
                        f"data: unreadable image: {e}; repair it, or set data.skip_bad=true"
                    ) from e
                bad += 1
                if bad > _MAX_BAD:
                    raise UserError(
                        f"data: {_MAX_BAD:,} unreadable images in a row; check data.urls"
                    ) from e
                continue
            for _ in range(bad + 1):
                yield image
            bad = 0

    def _samples(self, start: int) -> Iterator[Sample]:
        urls, epoch = self._shards.urls, 0
        while True:
            order = permute(torch.arange(len(urls)), len(urls), self._seed, epoch).tolist()
            seen = 0
            for i in order[self._index :: self._n]:
                known = self._counts.get(urls[i], self._closed) if start else None
                if known is not None and start >= known:  # the whole shard is skipped
                    start, seen = start - known, seen + known
                    continue
                count = 0
                for sample in self._shards.samples(urls[i], self._closed):
                    count += 1
                    if start:
                        start -= 1
                    else:
                        yield sample
                self._counts.put(urls[i], count, self._closed)
                seen += count
            if not seen:
                raise UserError(
                    f"data.urls: stream {self._index} of {self._n} found no image in its shards"
                )
            epoch += 1


class ShardLoader:
    """Batches of tar shards, a function of (shards, seed, batch size, cur_nimg).

    Every batch is cut into equal runs of rows, each from its own stream: a share of the shards in
    an order computed from (seed, epoch). A process reads the streams of its rows alone, so batches
    are the same on any number of processes. To start anywhere, a stream skips shards whose count
    is known and reads through the next one without decoding. The methods are those of `Loader`.

    While `batch` waits it polls `stop_waiting`, and raises LoadingCancelled once that is true.
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
        shards = dataset.stream
        assert isinstance(shards, Shards)
        self._dataset, self._device, self._batch_size = dataset, device, batch_size
        self._closed, self._stop_waiting = threading.Event(), stop_waiting
        n = math.gcd(batch_size, MAX_STREAMS)
        while n > len(shards.urls):
            n //= 2
        self._each = each = batch_size // n  # rows of a stream in every batch
        rows = batch_size // share[1]
        first = share[0] * rows
        used = range(first // each, (first + rows - 1) // each + 1)
        self._rows = slice(first - used[0] * each, first - used[0] * each + rows)
        counts = ShardCounts(cache_dir, shards.urls, shards.identity)
        self._streams = [_Stream(shards, i, n, seed, counts, self._closed) for i in used]
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix=f"shards-{i}") for i in used]
        self._prefetched: dict[int, list[Future[list[Decoded]]]] = {}  # by cur_nimg
        self._one_hot = torch.eye(dataset.label_dim, device=device)
        self.waited_s = 0.0

    def batch(self, cur_nimg: int) -> tuple[Tensor, Tensor]:
        """Return the batch at cur_nimg, as `Loader.batch`.

        Raises UserError for data that cannot be read and LoadingCancelled if a wait was ended.
        """
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
        self._wait(futures)
        del self._prefetched[cur_nimg]
        images = [image for future in futures for image in future.result()][self._rows]
        self.waited_s += time.perf_counter() - start_s
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in images])).to(self._device)
        real = to_float(pixels.permute(0, 3, 1, 2))
        if not self._dataset.label_dim:
            return real, real.new_zeros(len(real), 0)
        labels = torch.tensor([label for _, label in images], device=self._device)
        return real, self._one_hot[labels]

    def reals(self, n: int) -> tuple[Tensor, Tensor]:
        """Return the first n images of the packed sample, as `Loader.reals`."""
        return self._dataset.reals(n)

    def _wait(self, futures: list[Future[list[Decoded]]]) -> None:
        while True:
            done, pending = wait(futures, _POLL_S, FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises what the thread raised
            if not pending:
                return
            if self._stop_waiting():
                raise LoadingCancelled

    def close(self) -> None:
        """End the threads; pauses end at once, a silent server after shards.TIMEOUT_S seconds."""
        self._closed.set()
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools:
            pool.shutdown()
