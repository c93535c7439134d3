"""Tar shards on disks, web servers and object stores: opening, identity, image counts, retries."""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import ssl
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlparse

import fsspec

from vgan.runtime.errors import UserError
from vgan.runtime.extras import install_extra
from vgan.runtime.files import write_atomically

ATTEMPTS = 3  # to read a shard that is damaged or missing
OUTAGE_ATTEMPTS = 11  # to reach a server: with pauses of 1, 2, 4, ..., 60, 60 s about 5 minutes
TIMEOUT_S = 15.0  # a server that sends nothing for so long has failed
EXTRAS = {"s3": "s3", "gs": "gcs", "hf": "hf"}  # extras of vgan that install clients
_PROTOCOLS = ("", "http", "https", "memory", *EXTRAS)
_ENDS = 64 * 1024  # bytes at either end of a file that identify it where nothing else does
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "blob_id")  # by which file systems report a version
_MAX_HEADER = 1_000_000  # bytes of the long names and attributes of one member
_METADATA_TYPES = (b"x", b"g", b"X", b"L", b"K")  # tarfile holds such headers in memory
_RESERVED = re.compile(r"__[^/]*__($|/)")  # names that webdataset reserves for itself
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# Names of network errors: of aiohttp (twice), botocore, httpx and fsspec; of Python and requests.
_NETWORK_ERRORS = {"ClientConnectionError", "ClientPayloadError", "HTTPClientError"}
_NETWORK_ERRORS |= {"TransportError", "FSTimeoutError", "ConnectionError", "TimeoutError"}


class LoadingCancelled(Exception):
    """Reading ended early because the loader was closed or the run was asked to stop."""


class Identity(NamedTuple):
    """Size and version of a shard; "" where a file system does not report one."""

    size: str
    version: str  # an ETag or the like, else a hash of both ends of the file

    def matches(self, other: "Identity") -> bool:
        """Return whether both may be the same file, as far as is known of them."""
        return all(a == b or not a or not b for a, b in zip(self, other))


def expand_urls(urls: str) -> list[str]:
    """Expand braces and `::` as the webdataset library does; raise UserError for bad addresses."""
    try:
        from webdataset.shardlists import expand_urls
    except ModuleNotFoundError as e:
        fix = install_extra("webdataset")
        raise UserError(f"data=webdataset: needs webdataset; {fix}") from e
    expanded = [os.path.expanduser(url) for url in expand_urls(urls)]
    for url in expanded:
        protocol = protocol_of(url)
        if protocol not in _PROTOCOLS:
            rule = "must begin with http://, https://, s3://, gs:// or hf://, or be a path"
            raise UserError(f"data.urls={urls}: {url} {rule}")
        if protocol:
            file_system(url)  # raises where its client is not installed
        elif not Path(url).is_file():
            fix = "{0000..0099} stands for numbers of four digits"
            raise UserError(f"data.urls={urls}: no such file {url}; {fix}")
    return expanded


def protocol_of(url: str) -> str:
    """Return http, s3, ...; "" for local paths, which drives of Windows (C:/shards) are too."""
    scheme = urlparse(url).scheme
    return scheme if len(scheme) > 1 else ""


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address and the path in it."""
    protocol = protocol_of(url)
    try:
        if protocol not in ("http", "https"):
            return fsspec.core.url_to_fs(url)
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)
        client = {"timeout": timeout, "trust_env": True}  # which has proxies
        return fsspec.core.url_to_fs(url, client_kwargs=client)
    except ImportError as e:
        fix = install_extra(EXTRAS.get(protocol, "webdataset"))
        raise UserError(f"data.urls={url}: needs a client; {fix}") from e


def open_shard(url: str) -> io.BufferedReader:
    """Open a shard for reading from its first byte to its last."""
    fs, path = file_system(url)
    options: dict[str, Any] = {"block_size": 4_000_000, "cache_type": "readahead"}
    if protocol_of(url) in ("http", "https"):  # one request, whose answer is read as it arrives
        options = {"block_size": 0, "size": 1, "headers": {"Accept-Encoding": "identity"}}
    return io.BufferedReader(fs.open(path, "rb", **options), _ENDS)


def identity(url: str) -> Identity:
    """Return what a shard is now; equal for copies, since times of files do not count."""
    fs, path = file_system(url)
    try:
        info = fs.info(path)
    except FileNotFoundError as e:
        raise e.__cause__ or e from None  # fsspec's name for every HTTP error
    size = "" if info.get("size") is None else str(info["size"])
    version = next((str(info[k]) for k in _VERSION_KEYS if info.get(k)), "")
    if not version and protocol_of(url) not in ("http", "https"):
        with open_shard(url) as file:
            ends = file.read(_ENDS)
            file.seek(max(0, int(size) - _ENDS))
            version = hashlib.sha256(ends + file.read(_ENDS)).hexdigest()[:32]
    return Identity(size, version)


def is_temporary(e: Exception) -> bool:
    """Return whether an error may pass: a server or network is down, nothing missing or damaged."""
    status = getattr(e, "status", None) or getattr(getattr(e, "response", e), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 425, 429)
    if isinstance(e, ssl.SSLCertVerificationError):
        return False
    if _NETWORK_ERRORS & {c.__name__ for c in type(e).__mro__}:
        return not isinstance(e, ValueError)
    return isinstance(e, OSError) and e.errno is not None and not isinstance(e, _PERMANENT)


class Retries:
    """Attempts to read a shard, as in `while not done: with retries: ...`.

    A block that fails is left in silence, after a pause, unless it was the last attempt: what may
    pass (`is_temporary`) is tried for about five minutes, anything else three times. Raises
    UserError, or LoadingCancelled once `closed` is set.
    """

    pause = staticmethod(Event.wait)  # pause(closed, seconds) returns whether `closed` was set
    _lock = Lock()

    def __init__(self, url: str, closed: Event, waiting: set[str]) -> None:
        self._url, self._closed = url, closed
        self._waiting = waiting  # shards of the data set whose server is down; one is reported
        self._failures = 0  # since the last success

    def succeed(self) -> None:
        """Count failures from 0 again."""
        self._failures = 0
        self._waiting.discard(self._url)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, e: BaseException | None, trace: object) -> bool:
        if e is None:
            self.succeed()
        # Each file system raises errors of its own client, so no list of types is complete.
        if not isinstance(e, Exception) or isinstance(e, (UserError, LoadingCancelled)):
            return False
        self._failures += 1
        reason = " ".join(str(e).split()) or type(e).__name__
        failure = f"data.urls: {self._url} cannot be read ({reason})"
        attempts, fix = ATTEMPTS, "repair or leave out the shard"
        if is_temporary(e):
            attempts = OUTAGE_ATTEMPTS
            fix = "check the server or disk, then run the same command to resume"
        if self._failures >= attempts:
            raise UserError(f"{failure}; {fix}") from e
        if is_temporary(e) and self._failures > 1:  # what the second attempt mends is not reported
            with self._lock:
                if not self._waiting:
                    print(f"\n{failure}; retrying for 5 minutes", flush=True)
                self._waiting.add(self._url)
        if self.pause(self._closed, min(2 ** (self._failures - 1), 60)):
            raise LoadingCancelled
        return True


class ShardCounts:
    """Numbers of images of the shards read so far, kept on disk for the next run.

    A count is valid while the shard's identity is the same. Looking it up costs both ends of a
    local file or one request, for shards that are skipped, once in a process.
    """

    def __init__(self, folder: Path, urls: list[str], identify: Callable[[str], Identity]) -> None:
        name = hashlib.sha256(repr(urls).encode()).hexdigest()[:16]
        self._path = folder / f"shards-{name}.json"
        self._identify, self._lock = identify, Lock()
        self._known: dict[str, tuple[int, str, str]] = {}
        # A file that is missing or damaged costs some reading.
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            rows = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = {url: (int(n), str(a), str(b)) for url, (n, a, b) in rows.items()}

    def get(self, url: str) -> int | None:
        """Return the number of images of a shard, None if it is not known."""
        if url not in self._known:
            return None
        count, *known = self._known[url]
        return count if Identity(*known).matches(self._identify(url)) else None

    def put(self, url: str, count: int) -> None:
        """Keep the number of images of a shard that was just read to its end."""
        row = (count, *self._identify(url))
        with self._lock, contextlib.suppress(UserError):  # a full disk costs reading next time
            if self._known.get(url) != row:
                self._known[url] = row
                write_atomically(self._path, json.dumps(self._known).encode())


class TarStream:
    """The bytes of an archive, decompressed a few kB at a time as tarfile reads them.

    tarfile takes a shard that ends between two members, or has a damaged header, for complete. Here
    reading beyond the last byte is an error, and `check_end` requires the end of an archive.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file: Any = file
        self._count = self._filled = 0  # bytes so far, and up to the last that is not zero
        head = file.peek(10)[:10]
        if head.startswith(b"\x1f\x8b"):
            self._file = gzip.GzipFile(fileobj=file, mode="rb")
        elif head.startswith(b"BZh") and head[4:] == b"1AY&SY":  # or a member is called so
            self._file = bz2.BZ2File(file)
        elif head.startswith(b"\xfd7zXZ\0"):  # its reader may be told to take gigabytes
            raise tarfile.ReadError("xz is not supported; use tar, tar.gz or tar.bz2")

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, at least one; raise ReadError at the end."""
        data: bytes = self._file.read(size)
        if not data:
            raise tarfile.ReadError("it ends too early")
        filled = len(data.rstrip(b"\0"))
        self._filled = self._count + filled if filled else self._filled
        self._count += len(data)
        return data

    def check_end(self, end: int) -> None:
        """Read on to the end; raise ReadError unless only zeros follow, two blocks or more."""
        with contextlib.suppress(tarfile.ReadError):
            while True:
                self.read(_ENDS)
        if self._filled > end:
            reason = "is damaged, or more follows the end of the archive"
            raise tarfile.ReadError(f"the header at byte {end:,} {reason}")
        if self._count < end + 2 * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends too early")


class _Member(tarfile.TarInfo):
    """A member of a shard; refuses headers that take much memory to read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        if member.type in _METADATA_TYPES and member.size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member

    def _refuse_sparse(self, *args: object) -> NoReturn:
        raise tarfile.ReadError("sparse members are not supported; write it without --sparse")

    # tarfile calls these for the four ways to store a sparse member.
    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def read_files(url: str, closed: Event) -> Iterator[tuple[str, str, int, Callable[[], bytes]]]:
    """Yield key, extension, size and a function that reads the file, to be called before the next.

    Keys and extensions are webdataset's. Memory stays bounded whatever the archive is. Raises
    tarfile.TarError if it is damaged, cut short, compressed with xz or holds sparse members.
    """
    from webdataset.tariterators import base_plus_ext

    with open_shard(url) as file:
        stream: Any = TarStream(file)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as archive:
            for member in archive:
                if closed.is_set():
                    raise LoadingCancelled
                vars(archive).update(members=[], pax_headers={})  # or they would add up
                content = archive.extractfile(member) if member.isreg() else None
                key, extension = base_plus_ext(member.name)
                if content is not None and key is not None and not _RESERVED.match(member.name):
                    yield key, extension.lower(), member.size, content.read
            stream.check_end(archive.offset)
