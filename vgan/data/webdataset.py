"""Sets beyond one disk: tar shards, read through the webdataset library while training goes on."""

import bz2
import contextlib
import errno
import gzip
import hashlib
import http.client
import json
import math
import os
import re
import ssl
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import numpy as np
import torch
from torch import Tensor

from vgan.data.source import (
    MOST_BYTES,
    UNREADABLE,
    BadImage,
    Dataset,
    Examined,
    Source,
    check_image_settings,
    examine_file,
)
from vgan.runtime.errors import UserError
from vgan.runtime.files import write_atomically
from vgan.runtime.images import to_float
from vgan.runtime.rng import permute

LANES = 16  # shards that are read side by side
AHEAD = 4  # batches that are being read while one is used
TRIES = 3  # to read a shard that is damaged or not there
PAUSES_S = (
    1,
    2,
    4,
    8,
    15,
    30,
    30,
    30,
    60,
    60,
    60,
)  # before each new try of what may pass by itself: five minutes
TIMEOUT_S = 15.0  # for which a server may be silent, and so the longest that `ShardLoader.close` waits for one
_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset keeps for itself
_READ_WHOLE = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_MOST_HEADER = 1_000_000  # bytes of those: long names and attributes of members
_MOST_HELD = 1_000_000_000  # bytes of undecoded pictures
_LOOKED_AT = 16  # shards whose stamps are in the fingerprint: those that the packed sample comes from, as a rule
_END = 64 * 1024  # bytes at either end of a local shard that are looked at
_SLICE_S = 0.2  # a wait for data asks as often whether it should end
_FAILURES = (tarfile.TarError, http.client.HTTPException, *UNREADABLE)
_LASTING = (
    None,
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
)
Sample = tuple[
    str, bytes | None, int
]  # a name for messages, the picture's file (None: too large), the label
Stamp = tuple[
    str, str
]  # a shard's length and what tells versions apart; "" where a server does not say


class Interrupted(Exception):
    """A wait for a batch that ended because it was asked to."""


class _Closed(Exception):
    """The feed was closed while a lane read."""


class Shards(Source):
    """Tar shards of pictures (NAME.jpg, NAME.png, ...) with labels as text beside them (NAME.cls), as webdataset writes them.

    urls: local paths or http(s) addresses, with braces for ranges: shards/train-{0000..0099}.tar; several joined by '::'.
    classes: how many labels there are, 0 for none. The first `sample` pictures are packed: they are what the run's grids show
    and evaluation compares with. Training streams all of them (see `ShardLoader`). Shards should have been shuffled when
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
        self.name, self.img_resolution, self.img_channels, self.skip_bad = (
            "stream",
            resolution,
            channels,
            skip_bad,
        )
        self.label_names = tuple(str(i) for i in range(classes))
        self.urls = _expand(urls)
        if sample < 2:
            raise UserError(f"data.sample={sample}: must be at least 2")
        self._count = sample
        self._first: list[Sample | Examined | BadImage] = []
        self._stamps: dict[str, Stamp] = {}  # as last seen by this process
        self._waited_for: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sample())

    def read(self, i: int) -> tuple[np.ndarray, int]:
        found = self.examine(i)
        return found.pixels, found.label

    def fingerprint(self) -> str:
        """As `Source.fingerprint`. Copies on several machines are equal: times of files do not count.

        Costs one look at every local shard's size, and both ends (or a HEAD request) of the first 16 at once: 0.1 s for 10,000
        shards on a local disk.
        """
        told = (
            self.urls,
            self.img_resolution,
            self.img_channels,
            self.label_names,
            self._count,
            self.skip_bad,
        )
        sizes = [os.path.getsize(url) for url in self.urls if not _scheme(url)]
        closed = threading.Event()
        with ThreadPoolExecutor(_LOOKED_AT) as pool:
            try:
                stamps = list(pool.map(lambda url: self.stamp(url, closed), self.urls[:_LOOKED_AT]))
            finally:
                closed.set()  # or a Ctrl-C would wait as long as the threads do
        return hashlib.sha256(repr((told, sizes, stamps)).encode()).hexdigest()

    def stamp(self, url: str, closed: threading.Event | None = None) -> Stamp:
        """What a shard is now, or was when this process last looked; "" for what is not told. Waits and raises as `samples`."""
        closed, tries = closed or threading.Event(), 0
        while url not in self._stamps:
            try:
                self._stamps[url] = _look(url, closed)
            except _FAILURES as e:
                if _may_pass(e):
                    tries = self._pause(url, e, tries, closed)
                else:  # reading it will say so, if it comes to that
                    self._stamps[url] = ("", "")
        self._waited_for.discard(url)
        return self._stamps[url]

    def decode(self, sample: Sample) -> tuple[np.ndarray, int]:
        """Pixels and label; raises BadImage."""
        found = self._examine(sample)
        return found.pixels, found.label

    def examine(self, i: int) -> Examined:
        found = self._sample()[i]
        if isinstance(found, BadImage):
            raise found
        return found if isinstance(found, Examined) else self._examine(found)

    def _examine(self, sample: Sample) -> Examined:
        name, content, label = sample
        if self.label_names and not 0 <= label < len(self.label_names):
            raise BadImage(name, f"label {label}, data.classes is {len(self.label_names)}")
        if content is None:
            raise BadImage(name, f"over {MOST_BYTES / 1e6:.0f} MB")
        return examine_file(name, content, self.img_resolution, self.img_channels, label)

    def samples(self, url: str, closed: threading.Event | None = None) -> Iterator[Sample]:
        """All pictures of a shard in their order; in the midst of a sample in bounded memory, whatever the shard is.

        Failures that may pass by themselves are waited out for minutes. Raises UserError for those that last, and for archives
        that are damaged or cut short; ends with an exception of its own once `closed` is set.
        """
        closed = closed or threading.Event()
        given = tries = 0
        first: Stamp | None = None
        while True:
            try:
                with contextlib.closing(_Shard(url)) as shard:
                    first = first or shard.stamp
                    if given and not _same(first[:1], shard.stamp[:1]):
                        raise UserError(
                            f"data.urls: {url} was changed while it was read; the same command goes on"
                        )
                    for i, sample in enumerate(self._read(shard, url)):
                        if closed.is_set():
                            raise _Closed
                        if i >= given:
                            given, tries = i + 1, 0
                            self._waited_for.discard(url)
                            yield sample
                self._waited_for.discard(url)
                self._stamps[url] = shard.stamp
                return
            except UserError:
                raise
            except _FAILURES as e:
                tries = self._pause(url, e, tries, closed)

    def _pause(self, url: str, e: Exception, tries: int, closed: threading.Event) -> int:
        """Wait before the next try, of which there were `tries` so far; returns their number then. Raises as `samples`."""
        passing = _may_pass(e)
        pauses = PAUSES_S if passing else PAUSES_S[: TRIES - 1]
        what = f"data.urls: {url} cannot be read ({str(e) or type(e).__name__})"
        if tries >= len(pauses):
            fix = (
                "see to the server or disk, then the same command goes on"
                if passing
                else "mend or leave out the shard"
            )
            raise UserError(f"{what}; {fix}") from e
        if passing and tries:  # what the first new try mends is not worth a line
            self._tell(url, f"{what}; it is tried again for {sum(PAUSES_S) / 60:.0f} minutes")
        if closed.wait(pauses[tries]):
            raise _Closed from e
        return tries + 1

    def _tell(self, url: str, text: str) -> None:
        """Say once for all lanes that data is waited for; in whichever process it is."""
        with self._lock:
            if not self._waited_for:
                print(f"\n{text}", flush=True)
            self._waited_for.add(url)

    def _read(self, shard: "_Shard", url: str) -> Iterator[Sample]:
        from webdataset.tariterators import group_by_keys  # an extra

        with tarfile.open(fileobj=shard, mode="r|", tarinfo=_Header) as archive:  # type: ignore[call-overload]
            for parts in group_by_keys(_members(archive, shard, url)):
                kind = next((k for k in _PICTURES if k in parts), None)
                if kind is not None:
                    yield f"{parts['__key__']} of {url}", parts[kind], self._label(parts)

    def _label(self, parts: dict[str, Any]) -> int:
        if not self.label_names:
            return 0
        text = (parts.get("cls") or b"").strip()
        return int(text) if text.isdigit() else -1

    def _sample(self) -> list[Sample | Examined | BadImage]:
        if not self._first:
            held = 0
            for url in self.urls:
                for sample in self.samples(url):
                    held += len(sample[1] or b"")
                    # threads decode what is held later; beyond that, only the small squares are kept
                    self._first.append(
                        sample if held <= _MOST_HELD else self._examine_or_bad(sample)
                    )
                    if len(self._first) >= self._count:
                        return self._first
        return self._first

    def _examine_or_bad(self, sample: Sample) -> Examined | BadImage:
        try:
            return self._examine(sample)
        except BadImage as bad:
            return bad


def _expand(urls: str) -> list[str]:
    try:
        from webdataset.shardlists import expand_urls
    except ModuleNotFoundError as e:
        raise UserError(
            "data=webdataset: needs the webdataset library; pip install vgan[webdataset]"
        ) from e
    found = [os.path.expanduser(url) for url in expand_urls(urls)]
    for url in found:
        # the library would run what stands behind pipe:
        if _scheme(url) not in ("", "http", "https"):
            raise UserError(
                f"data.urls={urls}: must be local paths or http(s) addresses, {url} is neither"
            )
        if not _scheme(url) and not Path(url).is_file():
            raise UserError(
                f"data.urls={urls}: no such file {url}; {{0000..0099}} stands for numbers of four digits"
            )
    return found


def _scheme(url: str) -> str:
    """http, https or another; "" for local paths, drives of Windows (C:/shards) among them."""
    scheme = urlparse(url).scheme
    return scheme if len(scheme) > 1 else ""


def _may_pass(e: BaseException) -> bool:
    """Whether a failure to read may pass by itself: a server or network that is down, not what is missing or damaged."""
    if isinstance(e, HTTPError):
        return e.code >= 500 or e.code in (408, 425, 429)
    if isinstance(e, URLError):
        return isinstance(e.reason, OSError) and not isinstance(
            e.reason, ssl.SSLCertVerificationError
        )
    if isinstance(e, ssl.SSLError):
        return not isinstance(e, ssl.SSLCertVerificationError)
    if isinstance(e, http.client.HTTPException):
        return not isinstance(e, http.client.InvalidURL)
    return isinstance(e, (TimeoutError, ConnectionError)) or (
        isinstance(e, OSError) and e.errno not in _LASTING
    )


def _look(url: str, closed: threading.Event) -> Stamp:
    """A shard's stamp without reading it; servers that refuse HEAD are asked as for the shard itself."""
    if not _scheme(url):
        return _stamp_of_file(Path(url))
    with contextlib.suppress(*_FAILURES), _open(url, "HEAD") as response:
        return _stamp_of_response(response)
    if closed.is_set():
        raise _Closed
    with _open(url) as response:
        return _stamp_of_response(response)


def _stamp_of_response(response: http.client.HTTPResponse) -> Stamp:
    return response.headers.get("Content-Length") or "", response.headers.get("ETag") or ""


def _stamp_of_file(path: Path) -> Stamp:
    """Length and a hash of both ends: names, sizes and times of the first and last members, and their pictures."""
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        ends = file.read(_END)
        file.seek(max(0, length - _END))
        return str(length), hashlib.sha256(ends + file.read(_END)).hexdigest()[:32]


def _open(url: str, method: str = "GET") -> Any:
    if not _scheme(url):
        return open(url, "rb")
    try:
        return urlopen(Request(url, method=method), timeout=TIMEOUT_S)
    except HTTPError as e:
        e.close()  # the connection that a refusal holds
        raise


def _same(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    return all(x == y or not x or not y for x, y in zip(a, b, strict=True))


class _Body:
    """A shard's bytes as they are stored or sent; a connection that ends before it has sent all is an error."""

    def __init__(self, url: str) -> None:
        self._head, self._left = (
            b"",
            None,
        )  # the latter: bytes that are still to come, where a server has said so
        if not _scheme(url):
            self.stamp = _stamp_of_file(Path(url))
        self._file = _open(url)
        if _scheme(url):
            self.stamp, self._left = _stamp_of_response(self._file), self._file.length

    def head(self) -> bytes:
        """The first bytes, which `read` gives once more."""
        self._head = self.read(10)
        return self._head

    def read(self, size: int) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        data = self._file.read(size)
        if self._left is not None:
            self._left -= len(data)
            if not data and self._left > 0:
                raise ConnectionResetError(f"the connection ended {self._left:,} bytes too early")
        return data

    def close(self) -> None:
        self._file.close()


class _Shard:
    """An opened shard, unpacked a few kB at a time, as tarfile reads it.

    tarfile takes a shard that ends anywhere between two members, and one with a damaged header, for complete. Here reading
    beyond the last byte is an error, and `finish` wants the end of an archive and nothing behind it.
    """

    def __init__(self, url: str) -> None:
        self._body = _Body(url)
        self.stamp = self._body.stamp
        self._file: Any = None
        self._count = self._filled = 0  # bytes so far, and up to the last that is not zero

    def read(self, size: int) -> bytes:
        data = self._more(size)
        if not data:
            raise tarfile.ReadError("it ends too early")
        return data

    def _more(self, size: int) -> bytes:
        if self._file is None:
            self._file = self._unpacked()
        data: bytes = self._file.read(size)
        if filled := len(data.rstrip(b"\0")):
            self._filled = self._count + filled
        self._count += len(data)
        return data

    def _unpacked(self) -> Any:
        body: Any = self._body
        head = body.head()
        if head.startswith(b"\x1f\x8b"):
            return gzip.GzipFile(fileobj=body, mode="rb")
        if head.startswith(b"BZh") and head[4:] == b"1AY&SY":  # or a member is called so
            return bz2.BZ2File(body)
        if head.startswith(b"\xfd7zXZ\0"):  # what is in it may tell its reader to take gigabytes
            raise tarfile.ReadError("xz is not read; use tar, tar.gz or tar.bz2")
        return body

    def finish(self, end: int) -> None:
        """Raise TarError unless two blocks of zeros and padding alone follow `end` bytes; also checks the sum of a gz."""
        while self._more(_END):
            pass
        if self._filled > end:
            raise tarfile.ReadError(
                f"the header at byte {end:,} is damaged, or more follows the end of the archive"
            )
        if self._count < end + 2 * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends too early")

    def close(self) -> None:
        self._body.close()


class _Header(tarfile.TarInfo):
    """A member of a shard; refuses headers that take much memory to read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type == tarfile.GNUTYPE_SPARSE:
            header._refuse_sparse()
        if header.type in _READ_WHOLE and header.size > _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header

    def _refuse_sparse(self, *args: object) -> NoReturn:
        raise tarfile.ReadError("sparse members are not read; write it without --sparse")

    # what tarfile calls for the other three ways to store a sparse member
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def _members(archive: tarfile.TarFile, shard: _Shard, url: str) -> Iterator[dict[str, Any]]:
    """The members as webdataset groups them; only pictures and labels are read, at most MOST_BYTES of a sample."""
    from webdataset.tariterators import base_plus_ext

    key, room = None, MOST_BYTES
    for member in archive:
        archive.members, archive.pax_headers = [], {}  # type: ignore[attr-defined]  # or they would add up
        if not member.isreg() or _META.match(member.name):
            continue
        prefix, suffix = base_plus_ext(member.name)
        if prefix != key:
            key, room = prefix, MOST_BYTES
        content: bytes | None = b""
        if suffix is not None and suffix.lower() in (*_PICTURES, "cls"):
            room -= member.size
            file = archive.extractfile(member) if room >= 0 else None
            content = file.read() if file is not None else None
        yield {"fname": member.name, "data": content, "__url__": url}
    shard.finish(archive.offset)


class _Lane:
    """An endless walk through a lane's part of the shards, each epoch in another order, entered anywhere."""

    def __init__(
        self,
        shards: Shards,
        lane: int,
        lanes: int,
        seed: int,
        counts: "_Counts",
        closed: threading.Event,
    ) -> None:
        self._shards, self._lane, self._lanes, self._seed, self._counts = (
            shards,
            lane,
            lanes,
            seed,
            counts,
        )
        self._closed = closed
        self._at = -1
        self._walk: Iterator[tuple[np.ndarray, int]] = iter(())

    def take(self, start: int, n: int) -> list[tuple[np.ndarray, int]]:
        """Pictures number start .. start + n - 1 of the lane; reads on where the last call ended, or finds the place anew."""
        if start != self._at:
            self._walk = self._from(start)
        self._at = -1  # a walk that failed is not gone on with
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
                    raise UserError(
                        f"data: unreadable picture: {e}; mend it, or set data.skip_bad=true"
                    ) from e
                waiting += 1
                if waiting > 1000:
                    raise UserError(
                        "data: 1,000 unreadable pictures in a row; look at data.urls"
                    ) from e
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
                known = self._counts.get(url, self._closed) if start else None
                if known is not None and start >= known:  # a whole shard that was read before
                    start, seen = start - known, seen + known
                    continue
                count = 0
                for sample in self._shards.samples(url, self._closed):
                    count += 1
                    if start:
                        start -= 1
                    else:
                        yield sample
                self._counts.learn(url, count)
                seen += count
            if not seen:
                raise UserError(
                    f"data.urls: lane {self._lane} of {self._lanes} found no picture in its shards"
                )
            epoch += 1


class _Counts:
    """How many pictures each shard holds, as far as they were read, kept for the next run.

    A count holds as long as the shard's stamp: looking costs both ends of a local file, or a HEAD request, for shards that are
    passed over, once in a process.
    """

    def __init__(self, folder: Path, shards: Shards) -> None:
        name = hashlib.sha256(repr(shards.urls).encode()).hexdigest()[:16]
        self._path, self._shards, self._lock = (
            folder / f"shards-{name}.json",
            shards,
            threading.Lock(),
        )
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = {
                k: (int(count), (str(length), str(tag)))
                for k, (count, length, tag) in known.items()
            }
        except (OSError, ValueError, AttributeError, TypeError):
            self._known = {}

    def get(self, url: str, closed: threading.Event) -> int | None:
        count, stamp = self._known.get(url, (None, ("", "")))
        return (
            count if count is not None and _same(stamp, self._shards.stamp(url, closed)) else None
        )

    def learn(self, url: str, count: int) -> None:
        """Keep the count of a shard that was just read to its end."""
        with self._lock:
            now = (count, self._shards.stamp(url))
            if self._known.get(url) == now:
                return
            self._known[url] = now
            told = {k: (count, *stamp) for k, (count, stamp) in self._known.items()}
            with contextlib.suppress(UserError):  # a disk that refuses costs some reading next time
                write_atomically(self._path, json.dumps(told).encode())


class ShardLoader:
    """Batches of a stream, a function of (shards, seed, batch size, cur_nimg) on any number of processes.

    Every batch is cut into `lanes` equal runs of rows, each read from its own lane: a share of the shards, in an order
    computed from (seed, epoch). A process reads the lanes of its rows alone. To go on somewhere, a lane passes over whole
    shards whose count is known and reads through the one it lands in without decoding. Same methods as `Loader`.
    While `batch` waits it asks `end_wait` again and again, and raises Interrupted once that is so.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        device: torch.device,
        share: tuple[int, int],
        cache_dir: Path,
        end_wait: Callable[[], bool] = lambda: False,
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
        counts = _Counts(cache_dir, shards)
        self._closed, self._end_wait = threading.Event(), end_wait
        mine = range(self._first_row // self._each, (self._first_row + rows - 1) // self._each + 1)
        self._lanes = {i: _Lane(shards, i, lanes, seed, counts, self._closed) for i in mine}
        self._pools = {i: ThreadPoolExecutor(1, thread_name_prefix=f"lane-{i}") for i in mine}
        self._ahead: dict[int, list[Future[list[tuple[np.ndarray, int]]]]] = {}  # by cur_nimg
        self._one_hot = torch.eye(dataset.label_dim, device=device)
        self.waited_s = 0.0

    def batch(self, cur_nimg: int) -> tuple[Tensor, Tensor]:
        """As `Loader.batch`. Raises UserError for data that cannot be read, Interrupted where a wait for it was ended."""
        if cur_nimg not in self._ahead:  # the first, or one that was gone back to
            self._ahead = {}
        for k in range(AHEAD + 1):
            nimg = cur_nimg + k * self._batch_size
            if nimg not in self._ahead:
                start = nimg // self._batch_size * self._each
                self._ahead[nimg] = [
                    self._pools[i].submit(lane.take, start, self._each)
                    for i, lane in self._lanes.items()
                ]
        begun = time.perf_counter()
        self._wait(self._ahead[cur_nimg])
        taken = [picture for future in self._ahead.pop(cur_nimg) for picture in future.result()]
        self.waited_s += time.perf_counter() - begun
        skip = self._first_row - min(self._lanes) * self._each
        taken = taken[skip : skip + self._rows]
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in taken])).to(self._device)
        real = to_float(pixels.permute(0, 3, 1, 2))
        labels = torch.tensor([label for _, label in taken], device=self._device)
        return real, self._one_hot[labels] if self._dataset.label_dim else real.new_zeros(
            len(real), 0
        )

    def reals(self, n: int) -> tuple[Tensor, Tensor]:
        """As `Loader.reals`, of the packed sample."""
        return self._dataset.reals(n)

    def _wait(self, futures: list[Future[list[tuple[np.ndarray, int]]]]) -> None:
        while True:
            done, left = wait(futures, _SLICE_S, FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises what the lane did
            if not left:
                return
            if self._end_wait():
                raise Interrupted

    def close(self) -> None:
        """End the reading threads; soon, as pauses end at once and no server is waited for longer than TIMEOUT_S."""
        self._closed.set()
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools.values():
            pool.shutdown()
