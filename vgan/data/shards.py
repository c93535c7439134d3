"""Tar shards on disks, web servers and object stores: opening, identity, image counts, retries."""

import bz2
import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import ssl
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, cast
from urllib.parse import urlparse

import fsspec
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential
from tenacity.retry import retry_if_not_exception_type

from vgan.runtime.errors import UserError
from vgan.runtime.files import write_atomically

ATTEMPTS = 3  # to read a shard that is damaged or missing
OUTAGE_ATTEMPTS = 11  # to reach a server: with pauses of 1, 2, 4, ..., 60, 60 s about 5 minutes
MAX_PAUSE_S = 60
TIMEOUT_S = 15.0  # a server that sends nothing for so long has failed
# The protocols that are read through fsspec, and the extra of vgan that installs their client.
EXTRAS = {
    "http": "webdataset",
    "https": "webdataset",
    "s3": "s3",
    "gs": "gcs",
    "hf": "hf",
    "memory": "webdataset",
}
_BLOCK = 4_000_000  # bytes of one request to an object store
_ENDS = 64 * 1024  # bytes at either end of a file that identify it where nothing else does
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "blob_id")  # by which file systems report a version
_MAX_HEADER = 1_000_000  # bytes of the long names and attributes of one member
_METADATA_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_PERMANENT = {
    None,
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
}
# Names of the errors of aiohttp, botocore, requests and httpx that tell of a failing network.
_NETWORK_ERRORS = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "TimeoutError",
    "TransportError",
}
T = TypeVar("T")


class LoadingCancelled(Exception):
    """Reading ended early because the loader was closed or the run was asked to stop."""


class Identity(NamedTuple):
    """Size and version of a shard; "" where a file system does not report one."""

    size: str
    version: str  # an ETag or the like, else a hash of both ends of the file

    def matches(self, other: "Identity") -> bool:
        """Return whether both may be the same file, as far as is known of them."""
        pairs = zip(self, other, strict=True)
        return all(a == b or not a or not b for a, b in pairs)


UNKNOWN = Identity("", "")


def expand_urls(urls: str) -> list[str]:
    """Expand braces and `::` as the webdataset library does; raise UserError for bad addresses."""
    try:
        from webdataset.shardlists import expand_urls
    except ModuleNotFoundError as e:
        raise UserError("data=webdataset: needs webdataset; pip install 'vgan[webdataset]'") from e
    expanded = [os.path.expanduser(url) for url in expand_urls(urls)]
    for url in expanded:
        protocol = protocol_of(url)
        if protocol and protocol not in EXTRAS:
            raise UserError(
                f"data.urls={urls}: {url} is neither a path nor an address that begins with "
                "http://, https://, s3://, gs:// or hf://"
            )
        if not protocol and not Path(url).is_file():
            raise UserError(
                f"data.urls={urls}: no such file {url}; "
                "{0000..0099} stands for numbers of four digits"
            )
    for url in {protocol_of(url): url for url in expanded}.values():
        file_system(url)  # raises where its client is not installed
    return expanded


def protocol_of(url: str) -> str:
    """Return http, s3, ...; "" for local paths, which drives of Windows (C:/shards) are too."""
    scheme = urlparse(url).scheme
    return scheme if len(scheme) > 1 else ""


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address and the path in it."""
    protocol = protocol_of(url)
    options: dict[str, Any] = {}
    try:
        if protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}  # proxies
        if protocol == "s3":
            options["config_kwargs"] = {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S}
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **options))
    except ImportError as e:
        raise UserError(
            f"data.urls={url}: {protocol}:// needs a client; "
            f"pip install 'vgan[{EXTRAS.get(protocol, 'webdataset')}]'"
        ) from e


def open_shard(url: str) -> io.BufferedReader:
    """Open a shard for reading from its first byte to its last."""
    fs, path = file_system(url)
    options: dict[str, Any] = {"block_size": _BLOCK, "cache_type": "readahead"}
    if protocol_of(url) in ("http", "https"):  # one request, whose answer is read as it arrives
        options = {"block_size": 0, "size": 1, "headers": {"Accept-Encoding": "identity"}}
    return io.BufferedReader(fs.open(path, "rb", **options), _ENDS)


def identity(url: str) -> Identity:
    """Return what a shard is now; equal for copies, since times of files do not count."""
    fs, path = file_system(url)
    info = fs.info(path)
    size = "" if info.get("size") is None else str(info["size"])
    version = next((str(info[k]) for k in _VERSION_KEYS if info.get(k)), "")
    if not version and protocol_of(url) not in ("http", "https"):
        with open_shard(url) as file:
            ends = file.read(_ENDS)
            file.seek(max(0, int(size) - _ENDS))
            version = hashlib.sha256(ends + file.read(_ENDS)).hexdigest()[:32]
    return Identity(size, version)


def is_temporary(e: BaseException | None) -> bool:
    """Return whether an error may pass: a server or network is down, nothing missing or damaged."""
    if isinstance(e, FileNotFoundError) and e.__cause__ is not None:
        return is_temporary(e.__cause__)  # fsspec reports every failed HTTP request for a size so
    response = getattr(e, "response", None)
    for status in (getattr(e, "status", None), getattr(response, "status_code", None)):
        if isinstance(status, int):
            return status >= 500 or status in (408, 425, 429)
    if isinstance(e, ssl.SSLCertVerificationError):
        return False
    if _NETWORK_ERRORS & {c.__name__ for c in type(e).__mro__}:
        return not isinstance(e, ValueError)
    return isinstance(e, OSError) and e.errno not in _PERMANENT


class Retries:
    """Repeated attempts to read shards, for all threads of a data set.

    What may pass (`is_temporary`) is retried for about five minutes with growing pauses, which is
    reported once; anything else three times. `pause(closed, seconds)` waits and returns whether
    `closed` was set.
    """

    pause = staticmethod(threading.Event.wait)

    def __init__(self) -> None:
        self._waiting: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, url: str, read: Callable[[], T], closed: threading.Event) -> T:
        """Return read(); raise UserError if it keeps failing, LoadingCancelled once closed."""
        # What an object store raises is known only to its client: no list of types is complete.
        retrying = Retrying(
            retry=retry_if_exception_type() & retry_if_not_exception_type(_NOT_RETRIED),
            stop=_is_last,
            wait=wait_exponential(max=MAX_PAUSE_S),
            sleep=partial(self._sleep, closed),
            before_sleep=partial(self._report, url),
            retry_error_callback=partial(_give_up, url),
        )
        result: T = retrying(read)
        self._waiting.discard(url)
        return result

    def _sleep(self, closed: threading.Event, seconds: float) -> None:
        if self.pause(closed, seconds):
            raise LoadingCancelled

    def _report(self, url: str, state: RetryCallState) -> None:
        # What the second attempt mends is not worth a line.
        if state.attempt_number < 2 or not is_temporary(_error(state)):
            return
        with self._lock:
            if not self._waiting:
                print(f"\n{_failure(url, state)}; retrying for 5 minutes", flush=True)
            self._waiting.add(url)


_NOT_RETRIED = (UserError, LoadingCancelled)


def _error(state: RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome else None
    assert error is not None
    return error


def _is_last(state: RetryCallState) -> bool:
    attempts = OUTAGE_ATTEMPTS if is_temporary(_error(state)) else ATTEMPTS
    return state.attempt_number >= attempts


def _failure(url: str, state: RetryCallState) -> str:
    error = _error(state)
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"data.urls: {url} cannot be read ({reason})"


def _give_up(url: str, state: RetryCallState) -> NoReturn:
    fix = "repair or leave out the shard"
    if is_temporary(_error(state)):
        fix = "check the server or disk, then run the same command to resume"
    raise UserError(f"{_failure(url, state)}; {fix}") from _error(state)


class ShardCounts:
    """Numbers of images of the shards read so far, kept on disk for the next run.

    A count is valid while the shard's identity is the same. Looking it up costs both ends of a
    local file or one request, for shards that are skipped, once in a process.
    """

    def __init__(
        self, folder: Path, urls: list[str], identify: Callable[[str, threading.Event], Identity]
    ) -> None:
        name = hashlib.sha256(repr(urls).encode()).hexdigest()[:16]
        self._path = folder / f"shards-{name}.json"
        self._identify = identify
        self._lock = threading.Lock()
        self._known: dict[str, tuple[int, Identity]] = {}
        # A file that is missing or damaged costs some reading.
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            rows = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = {
                url: (int(count), Identity(str(size), str(version)))
                for url, (count, size, version) in rows.items()
            }

    def get(self, url: str, closed: threading.Event) -> int | None:
        """Return the number of images of a shard, None if it is not known."""
        if url not in self._known:
            return None
        count, known = self._known[url]
        return count if known.matches(self._identify(url, closed)) else None

    def put(self, url: str, count: int, closed: threading.Event) -> None:
        """Keep the number of images of a shard that was just read to its end."""
        entry = (count, self._identify(url, closed))
        with self._lock:
            if self._known.get(url) == entry:
                return
            self._known[url] = entry
            rows = {url: (count, *known) for url, (count, known) in self._known.items()}
            with contextlib.suppress(UserError):  # a full disk costs some reading next time
                write_atomically(self._path, json.dumps(rows).encode())


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
        data = self._read(size)
        if not data:
            raise tarfile.ReadError("it ends too early")
        return data

    def _read(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        if filled := len(data.rstrip(b"\0")):
            self._filled = self._count + filled
        self._count += len(data)
        return data

    def check_end(self, end: int) -> None:
        """Raise ReadError unless only zeros, two blocks or more, follow byte `end`.

        Reading to the end also checks the sum of a gz file.
        """
        while self._read(_ENDS):
            pass
        if self._filled > end:
            raise tarfile.ReadError(
                f"the header at byte {end:,} is damaged, or more follows the end of the archive"
            )
        if self._count < end + 2 * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends too early")


class _Member(tarfile.TarInfo):
    """A member of a shard; refuses headers that take much memory to read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        if member.type == tarfile.GNUTYPE_SPARSE:
            member._refuse_sparse()
        if member.type in _METADATA_TYPES and member.size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member

    def _refuse_sparse(self, *args: object) -> NoReturn:
        raise tarfile.ReadError("sparse members are not supported; write it without --sparse")

    # tarfile calls these for the other three ways to store a sparse member.
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def read_members(url: str) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """Yield each file of a shard with a function that reads it, to be called before the next.

    Memory stays bounded whatever the archive is. Raises tarfile.TarError if it is damaged, cut
    short, compressed with xz or holds sparse members.
    """
    with open_shard(url) as file:
        stream = TarStream(file)
        opened = tarfile.open(fileobj=cast(Any, stream), mode="r|", tarinfo=_Member)
        with opened as archive:
            for member in archive:
                vars(archive).update(members=[], pax_headers={})  # or they would add up
                if member.isreg():
                    yield member, partial(_content, archive, member)
            stream.check_end(archive.offset)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return file.read()
