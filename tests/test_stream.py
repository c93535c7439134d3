"""Tar shards: the same batches on any number of processes, started anywhere; errors in one line."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import seams
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from runs import TINY, assert_same_run, train_in_process

from vgan.data import shards as tar_shards
from vgan.data import webdataset
from vgan.data.packed import pack
from vgan.data.shards import LoadingCancelled
from vgan.data.source import BadImage, Dataset
from vgan.data.webdataset import ShardLoader, Shards
from vgan.runs import checkpoint
from vgan.runtime.errors import UserError
from vgan.runtime.extras import install_extra
from vgan.runtime.signals import RESTART, Stopped

CPU = torch.device("cpu")
COUNTS = (7, 12, 3, 20, 9)  # images in each shard


def write_shards(folder: Path, bad: set[int] = frozenset()) -> str:  # type: ignore[assignment]
    """Write shards whose image number i is grey of level 2 i, of class i % 3."""
    folder.mkdir(parents=True, exist_ok=True)
    i = 0
    for shard, count in enumerate(COUNTS):
        with tarfile.open(folder / f"x-{shard}.tar", "w") as archive:
            for _ in range(count):
                buffer = io.BytesIO()
                Image.new("RGB", (16, 16), (2 * i,) * 3).save(buffer, format="PNG")
                content = b"no image" if i in bad else buffer.getvalue()
                for name, data in (
                    (f"{i:04d}.png", content),
                    (f"{i:04d}.cls", str(i % 3).encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                i += 1
    return str(folder / f"x-{{0..{len(COUNTS) - 1}}}.tar")


def dataset(urls: str, tmp_path: Path, **settings: object) -> Dataset:
    source = Shards(urls, 16, **{"classes": 3, "sample": 10, **settings})  # type: ignore[arg-type]
    return replace(pack(source, tmp_path / "cache"), stream=source)


def loader(
    data: Dataset, tmp_path: Path, share: tuple[int, int] = (0, 1), seed: int = 1
) -> ShardLoader:
    return ShardLoader(data, 8, seed, CPU, share, tmp_path / "cache")


def numbers(batch: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
    """Return which images a batch holds; each must have its own label."""
    real, c = batch
    found = [round(float(x) * 127.5 + 127.5) // 2 for x in real[:, 0, 0, 0]]
    assert c.argmax(1).tolist() == [i % 3 for i in found]
    return found


def test_every_image_comes_once_an_epoch_of_its_lane_and_orders_differ(tmp_path: Path) -> None:
    data = dataset(write_shards(tmp_path / "s"), tmp_path)
    assert len(data) == 10
    stream = loader(data, tmp_path)
    seen = [numbers(stream.batch(n)) for n in range(0, 8 * 60, 8)]
    stream.close()
    counts = np.bincount([i for batch in seen for i in batch], minlength=sum(COUNTS))
    assert counts.min() >= 1
    assert len(counts) == sum(COUNTS)
    other = loader(data, tmp_path, seed=2)
    assert [numbers(other.batch(n)) for n in range(0, 80, 8)] != seen[:10]
    other.close()


def test_batches_do_not_depend_on_processes_or_on_where_one_starts(tmp_path: Path) -> None:
    data = dataset(write_shards(tmp_path / "s"), tmp_path)
    whole = loader(data, tmp_path)
    batches = {n: numbers(whole.batch(n)) for n in range(0, 8 * 40, 8)}
    whole.close()
    for fresh in (True, False):  # with and without what was learned of the shards
        if fresh:
            for path in (tmp_path / "cache").glob("shards-*.json"):
                path.unlink()
        for start in (8, 96, 312):
            late = loader(data, tmp_path)
            assert numbers(late.batch(start)) == batches[start]
            assert numbers(late.batch(0)) == batches[0]  # back again
            late.close()
    for n in (2, 4):
        parts = [loader(data, tmp_path, share=(i, n)) for i in range(n)]
        for start in range(0, 80, 8):
            assert [i for part in parts for i in numbers(part.batch(start))] == batches[start]
        for part in parts:
            part.close()


def test_bad_images_stop_or_are_replaced(tmp_path: Path) -> None:
    urls = write_shards(tmp_path / "s", bad={15, 30})
    strict = loader(dataset(urls, tmp_path, sample=7), tmp_path)
    with pytest.raises(
        UserError, match=r"unreadable image: 00(15|30) of .*x-\d.tar .*data.skip_bad=true"
    ):
        [strict.batch(n) for n in range(0, 400, 8)]
    strict.close()
    lenient = loader(dataset(urls, tmp_path, sample=7, skip_bad=True), tmp_path)
    seen = {i for n in range(0, 400, 8) for i in numbers(lenient.batch(n))}
    lenient.close()
    assert seen == set(range(sum(COUNTS))) - {15, 30}


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        ("nowhere-{0..3}.tar", "no such file nowhere-0.tar"),
        ("pipe:touch harm", "pipe:touch harm must begin with"),
        ("file:///etc/passwd", "must begin with http"),
    ],
)
def test_bad_addresses(
    urls: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        Shards(urls)
    assert not (tmp_path / "harm").exists()


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    seams.replace_pause(lambda closed, seconds: closed.is_set(), monkeypatch)


def member_at(path: Path, i: int) -> int:
    with tarfile.open(path) as archive:
        return archive.getmembers()[i].offset


TEARS: dict[str, Callable[[bytes, int], bytes]] = {
    "between two members": lambda whole, at: whole[:at],
    "inside a header": lambda whole, at: whole[: at + 100],
    "inside a picture": lambda whole, at: whole[: at + 600],
    "a damaged header": lambda whole, at: (
        whole[:at] + random.Random(0).randbytes(512) + whole[at + 512 :]
    ),
    "a header of zeros": lambda whole, at: whole[:at] + bytes(512) + whole[at + 512 :],
    "one block of zeros": lambda whole, at: whole[:at] + bytes(512),
    "a gz cut short": lambda whole, at: gzip.compress(whole)[:-300],
    "a gz with a wrong sum": lambda whole, at: gzip.compress(whole)[:-8] + bytes(8),
    "two archives in one": lambda whole, at: whole + whole,
    "no byte": lambda whole, at: b"",
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_shard_is_named_and_its_count_is_not_kept(
    tear: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = write_shards(tmp_path / "s")
    data = dataset(urls, tmp_path, sample=7)  # of the first shard
    shard = tmp_path / "s" / "x-3.tar"
    shard.write_bytes(TEARS[tear](shard.read_bytes(), member_at(shard, 10)))
    pauses: list[float] = []
    seams.replace_pause(lambda closed, s: pauses.append(s) or closed.is_set(), monkeypatch)
    stream = loader(data, tmp_path)
    with pytest.raises(
        UserError, match=r"x-3.tar cannot be read .*; repair or leave out the shard"
    ):
        [stream.batch(n) for n in range(0, 8 * 60, 8)]
    stream.close()
    assert pauses[:2] == [1, 2]
    assert not [
        path
        for path in (tmp_path / "cache").glob("shards-*.json")
        if str(shard) in path.read_text()
    ]


def gnu_tar(folder: Path, *options: str) -> bytes:
    names = sorted(path.name for path in folder.iterdir())
    return subprocess.run(
        ["tar", "-c", *options, "-C", str(folder), *names], check=True, capture_output=True
    ).stdout


def test_sound_archives_of_every_writer_are_read(tmp_path: Path) -> None:
    from webdataset.writer import TarWriter

    write_shards(tmp_path / "s")
    source = tmp_path / "s" / "x-1.tar"
    parts = {}
    with tarfile.open(source) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            parts[member.name] = file.read()
    made: dict[str, bytes] = {
        "a.tar.gz": gzip.compress(source.read_bytes()),
        "a.tar.bz2": bz2.compress(source.read_bytes()),
    }
    long = "BZh" + "n" * 150 + "/"  # longer than a header has room for
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
            for name, content in parts.items():
                member = tarfile.TarInfo(long + name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        made[f"python-{kind}.tar"] = buffer.getvalue()
    for name in ("w.tar", "w.tar.gz", "w.tar.bz2"):
        with TarWriter(str(tmp_path / name), encoder=False) as writer:
            for key in sorted({Path(name).stem for name in parts}):
                writer.write(
                    {"__key__": key, "png": parts[f"{key}.png"], "cls": parts[f"{key}.cls"]}
                )
        made[name] = (tmp_path / name).read_bytes()
    if shutil.which("tar"):
        for name, content in parts.items():
            (tmp_path / "files").mkdir(exist_ok=True)
            (tmp_path / "files" / name).write_bytes(content)
        made |= {
            f"tar{options}.tar": gnu_tar(tmp_path / "files", *options)
            for options in ((), ("-b", "1"), ("-b", "200"))
        }
    want = sorted((parts[f"{i:04d}.png"], i % 3) for i in range(7, 19))
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
        shards = Shards(str(tmp_path / name), 16, classes=3)
        assert (
            sorted((picture, label) for _, picture, label in shards.samples(str(tmp_path / name)))
            == want
        ), name


@pytest.mark.usefixtures("no_pauses")
def test_a_tiny_shard_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MOST_BYTES", 1_000_000)
    urls = write_shards(tmp_path / "s")
    with tarfile.open(tmp_path / "s" / "x-0.tar") as archive:
        sound = archive.extractfile(archive.getmembers()[0])
        assert sound is not None
        content = sound.read()
    for kind in ("gz", "bz2"):
        with tarfile.open(tmp_path / "bomb.tar", f"w:{kind}") as archive:
            for name, size in (
                ("0.png", 30_000_000),
                ("1.mp4", 30_000_000),
                ("2.jpg", 600_000),
                ("2.png", 600_000),
            ):
                member = tarfile.TarInfo(name)
                member.size = size
                archive.addfile(member, io.BytesIO(bytes(size)))
            member = tarfile.TarInfo("3.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        shards = Shards(str(tmp_path / "bomb.tar"), 16, skip_bad=True)
        tracemalloc.start()
        try:
            samples = list(shards.samples(str(tmp_path / "bomb.tar")))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 10_000_000
        assert samples[-1][1] == content
        with pytest.raises(BadImage, match=r"0 of .*bomb.tar \(over 1 MB\)"):
            shards.decode(samples[0])
    # the packed sample holds no more than this of files that are still to be decoded
    plain = dataset(urls, tmp_path, sample=30).digest
    monkeypatch.setattr(webdataset, "_MAX_ENCODED", 500)
    shutil.rmtree(tmp_path / "cache")
    assert dataset(urls, tmp_path, sample=30).digest == plain


def headers(**attributes: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("0.png")
        member.pax_headers = {k.replace("_", "."): v for k, v in attributes.items()}
        member.size = 3
        archive.addfile(member, io.BytesIO(b"1\n1"))
    return buffer.getvalue()


def gnu_sparse() -> bytes:
    member = tarfile.TarInfo("0.png")
    member.type = tarfile.GNUTYPE_SPARSE
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            headers(GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize="9" * 12),
            "sparse",
        ),
        (headers(GNU_sparse_map="0,1", GNU_sparse_realsize="9" * 12), "sparse"),
        (headers(GNU_sparse_size="9" * 12), "sparse"),
        (gnu_sparse(), "sparse"),
        (headers(comment="x" * 2_000_000), "a header of 2,000,"),
        (lzma.compress(headers()), "xz is not supported"),
    ],
)
@pytest.mark.usefixtures("no_pauses")
def test_what_would_take_much_memory_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"x.tar cannot be read .*{says}"):
        list(Shards(str(shard), 16).samples(str(shard)))


def test_a_drive_of_windows_is_no_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        Path, "is_file", lambda self: str(self).replace(os.sep, "/").startswith("C:/shards/")
    )
    assert Shards("C:/shards/x-{0..1}.tar").urls == ["C:/shards/x-0.tar", "C:/shards/x-1.tar"]


def test_replaced_shards_are_noticed_and_copies_are_equal(tmp_path: Path) -> None:
    urls = write_shards(tmp_path / "s")
    data = dataset(urls, tmp_path)
    stream = loader(data, tmp_path)
    [stream.batch(n) for n in range(0, 400, 8)]
    stream.close()
    first, last = (tmp_path / "s" / f"x-{i}.tar" for i in (0, 4))
    assert first.stat().st_size == last.stat().st_size
    before = Shards(urls, 16).fingerprint()
    for path in (tmp_path / "s").iterdir():
        os.utime(path, (1, 1))
    assert Shards(urls, 16).fingerprint() == before
    shutil.copy(first, last)
    data = dataset(urls, tmp_path)
    assert Shards(urls, 16).fingerprint() != before
    late = loader(data, tmp_path)
    found = numbers(late.batch(392))
    late.close()
    for path in (tmp_path / "cache").glob("shards-*.json"):
        path.unlink()
    fresh = loader(data, tmp_path)
    assert numbers(fresh.batch(392)) == found
    fresh.close()


class Memory(MemoryFileSystem):
    """An object store: memory:// whose n-th opening fails if `answer(n)` is an error."""

    opened: list[str]
    answer: Callable[[int], Any]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            self.opened.append(path)
            error = type(self).answer(len(self.opened))
            if isinstance(error, Exception):
                raise error
        content = super()._open(path, mode, **options)
        return content if mode == "wb" else Torn(content.getvalue(), error)


class Torn(io.BytesIO):
    """A file whose connection is lost after `limit` bytes, if that is a number."""

    def __init__(self, content: bytes, limit: Any) -> None:
        super().__init__(content)
        self.limit = limit

    def readinto(self, buffer: Any) -> int:
        if self.limit is not None and self.tell() >= self.limit:
            raise ConnectionResetError("connection lost")
        return super().readinto(memoryview(buffer)[:512])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[type[Memory]]:
    """The shards as memory://s/x-{0..4}.tar."""
    fsspec.register_implementation("memory", Memory, clobber=True)
    Memory.opened, Memory.answer = [], staticmethod(lambda n: None)
    write_shards(tmp_path / "s")
    for path in (tmp_path / "s").iterdir():
        Memory().pipe(f"/s/{path.name}", path.read_bytes())
    yield Memory
    Memory.answer = staticmethod(lambda n: None)
    Memory().rm("/s", recursive=True)
    fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)


IN_STORE = "memory://s/x-{0..4}.tar"


def outage(first: int, last: int) -> Callable[[int], Any]:
    return lambda n: ConnectionResetError("connection lost") if first <= n <= last else None


def batches(data: Dataset, tmp_path: Path, last: int = 80, seed: int = 1) -> list[list[int]]:
    with contextlib.closing(loader(data, tmp_path, seed=seed)) as stream:
        return [numbers(stream.batch(n)) for n in range(0, last, 8)]


def test_an_object_store_gives_the_same_batches(store: type[Memory], tmp_path: Path) -> None:
    local = dataset(str(tmp_path / "s" / "x-{0..4}.tar"), tmp_path)
    remote = dataset(IN_STORE, tmp_path)
    assert remote.digest == local.digest
    assert batches(remote, tmp_path) == batches(local, tmp_path)


@pytest.mark.parametrize(("failures", "reported"), [(1, 0), (2, 1), (10, 1)])
def test_an_outage_is_waited_out_and_reported_once(
    failures: int,
    reported: int,
    store: type[Memory],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    seams.replace_pause(lambda closed, s: pauses.append(s) or closed.is_set(), monkeypatch)
    source = Shards("memory://s/x-3.tar", 16, classes=3)
    want = list(source.samples(source.urls[0]))
    capsys.readouterr()
    store.opened, store.answer = [], outage(1, failures)
    assert list(source.samples(source.urls[0])) == want
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60][:failures]
    assert (
        capsys.readouterr().out.count("x-3.tar cannot be read (connection lost); retry") == reported
    )


@pytest.mark.usefixtures("no_pauses")
def test_a_lost_connection_is_resumed_where_it_ended(store: type[Memory], tmp_path: Path) -> None:
    data = dataset(IN_STORE, tmp_path)
    want = batches(data, tmp_path)
    store.answer = staticmethod(
        lambda n: 15_000 if n % 3 == 0 else None
    )  # in the midst of a sample
    assert batches(dataset(IN_STORE, tmp_path), tmp_path) == want


def test_an_outage_that_lasts_ends_after_five_minutes(
    store: type[Memory], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    seams.replace_pause(lambda closed, s: pauses.append(s) or closed.is_set(), monkeypatch)
    store.answer = outage(1, 1000)
    source = Shards(IN_STORE, 16)
    says = r"x-0.tar cannot be read \(connection lost\); check the server or disk, .* to resume"
    with pytest.raises(UserError, match=says):
        list(source.samples(source.urls[0]))
    assert 300 <= sum(pauses) < 310
    assert capsys.readouterr().out.count("retrying for 5 minutes") == 1


@pytest.mark.usefixtures("no_pauses")
def test_a_missing_shard_is_not_waited_for(store: type[Memory]) -> None:
    store.answer = staticmethod(lambda n: FileNotFoundError(2, "not there"))
    with pytest.raises(UserError, match=r"x-0.tar cannot be read .*; repair or leave out"):
        len(Shards(IN_STORE, 16))
    assert len(store.opened) == tar_shards.ATTEMPTS


@pytest.mark.usefixtures("no_pauses")
def test_a_shard_that_changes_while_it_is_read_is_named(store: type[Memory]) -> None:
    source = Shards("memory://s/x-3.tar", 16)
    samples = source.samples(source.urls[0])
    store.answer = staticmethod(lambda n: 15_000 if n == 2 else None)
    next(samples)
    Memory().pipe("/s/x-3.tar", Memory().cat("/s/x-1.tar"))
    with pytest.raises(UserError, match=r"x-3.tar was changed while it was read"):
        list(samples)


@pytest.mark.parametrize("start", [0, 392])  # the latter skips shards, which are only identified
def test_a_wait_for_data_can_be_ended(start: int, store: type[Memory], tmp_path: Path) -> None:
    data = dataset(IN_STORE, tmp_path)
    batches(data, tmp_path, start)
    data = replace(data, stream=Shards(IN_STORE, 16, classes=3))  # as in another process
    failing = threading.Event()

    def fail(n: int) -> None:
        failing.set()
        raise ConnectionResetError

    store.answer = staticmethod(fail)
    before = set(threading.enumerate())
    stream = ShardLoader(data, 8, 1, CPU, (0, 1), tmp_path / "cache", failing.is_set)
    with contextlib.closing(stream), pytest.raises(LoadingCancelled):
        stream.batch(start)
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("shards-")]


def test_a_run_without_data_saves_and_resumes_to_the_last_bit(
    store: type[Memory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = [
        "data=webdataset",
        f"data.urls='{IN_STORE}'",
        "data.classes=3",
        "data.sample=20",
        "data.resolution=16",
        f"data.cache_dir={tmp_path / 'cache'}",
        "size=xs",
        "schedule_kimg=0.32",
        "total_kimg=0.32",
        "checkpoint_kimg=1",
        "tick_kimg=0.04",
        "snapshot_kimg=0.32",
        *(o for o in TINY if "data" not in o and "kimg" not in o),
    ]
    cut = tmp_path / "cut"
    asked: list[bool] = []
    train_in_process(tmp_path / "whole", tiny=tiny)

    def stop(closed: threading.Event, seconds: float) -> bool:
        if not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return closed.wait()

    # 40 openings are more than 3 steps and the batches read ahead need.
    store.opened, store.answer = [], outage(40, 1000)
    seams.replace_pause(stop, monkeypatch)
    with pytest.raises(Stopped) as stopped:
        train_in_process(cut, tiny=tiny)
    assert stopped.value.code == RESTART
    saved = checkpoint.nimg_of(checkpoint.find(cut))
    assert 24 <= saved < 320
    store.opened, store.answer = [], outage(40, 1000)
    seams.replace_pause(lambda closed, seconds: closed.is_set(), monkeypatch)
    with pytest.raises(UserError, match="check the server"):
        train_in_process(cut, tiny=tiny)
    assert saved < checkpoint.nimg_of(checkpoint.find(cut)) < 320
    store.answer = outage(0, 0)
    train_in_process(cut, tiny=tiny)
    assert_same_run(tmp_path / "whole", cut)


class Server:
    """Shards over HTTP. `answer(n)` for the n-th GET is 200, another status, "short" or "hang"."""

    def __init__(self, folder: Path) -> None:
        self.gets, self.etags, self.heads = 0, True, True
        self.answer: Callable[[int], Any] = lambda n: 200
        self.failing, self.done = threading.Event(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.gets += 1
                self.reply(server.answer(server.gets))

            def do_HEAD(self) -> None:
                self.reply(server.answer(0) if server.heads else 405)

            def reply(self, answer: Any) -> None:
                if answer != 200:
                    server.failing.set()
                if answer == "hang":
                    server.done.wait()
                elif answer not in (200, "short"):
                    self.send_error(answer)
                else:
                    self.send_shard(answer == "short")

            def send_shard(self, short: bool) -> None:
                path = folder / self.path[1:]
                content = path.read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                if server.etags:
                    self.send_header("ETag", f'"{hash(content)}"')
                self.end_headers()
                if self.command == "GET":
                    with contextlib.suppress(ConnectionError):
                        self.wfile.write(content[: len(content) // 2] if short else content)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.urls = f"http://127.0.0.1:{self.http.server_port}/x-{{0..4}}.tar"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    write_shards(tmp_path / "s")
    server = Server(tmp_path / "s")
    yield server
    server.done.set()
    server.http.shutdown()
    server.http.server_close()


@pytest.mark.usefixtures("no_pauses")
def test_a_web_server_that_fails_gives_the_same_batches(server: Server, tmp_path: Path) -> None:
    local = batches(dataset(str(tmp_path / "s" / "x-{0..4}.tar"), tmp_path), tmp_path)
    answers = (503, "short", 200, 429, 200)
    server.answer = lambda n: answers[n % len(answers)] if n else 200
    data = dataset(server.urls, tmp_path)
    assert batches(data, tmp_path) == local
    assert server.failing.is_set()
    # A missing file is not waited for, a server that is down is.
    shards = Shards(server.urls, 16)
    server.answer = lambda n: 404 if n else 200
    before = server.gets
    with pytest.raises(UserError, match=r"x-0.tar cannot be read .*; repair or leave out"):
        len(shards)
    assert server.gets == before + tar_shards.ATTEMPTS
    server.answer = lambda n: 503
    with pytest.raises(UserError, match=r"x-0.tar cannot be read .*503.*; check the server"):
        len(shards)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match=r"x-0.tar cannot be read .*onnect.*; check the server"):
        len(shards)


def test_a_silent_web_server_does_not_hold_up_the_end(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(server.urls, tmp_path)
    monkeypatch.setattr(tar_shards, "TIMEOUT_S", 0.2)
    server.answer = lambda n: "hang"
    before = set(threading.enumerate())
    stream = ShardLoader(data, 8, 1, CPU, (0, 1), tmp_path / "cache", server.failing.is_set)
    with contextlib.closing(stream), pytest.raises(LoadingCancelled):
        stream.batch(0)
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("shards-")]


@pytest.mark.parametrize("says", ["etag", "length", "no HEAD"])
def test_replaced_shards_of_a_server_are_noticed(says: str, server: Server, tmp_path: Path) -> None:
    server.etags, server.heads = says == "etag", says != "no HEAD"
    batches(dataset(server.urls, tmp_path), tmp_path, 400)
    shutil.copy(tmp_path / "s" / f"x-{0 if says == 'etag' else 3}.tar", tmp_path / "s" / "x-4.tar")
    (kept,) = (tmp_path / "cache").glob("shards-*.json")
    data = dataset(server.urls, tmp_path)
    late = loader(data, tmp_path)
    found = numbers(late.batch(392))
    [late.batch(n) for n in range(0, 400, 8)]
    late.close()
    learned = json.loads(kept.read_text())
    kept.unlink()
    fresh = loader(data, tmp_path)
    assert numbers(fresh.batch(392)) == found
    fresh.close()
    assert learned[server.urls.replace("{0..4}", "4")][0] == (7 if says == "etag" else 20)


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("aiohttp", "s3fs"):
        monkeypatch.setitem(sys.modules, module, None)
    for url, extra in (("http://localhost/x.tar", "webdataset"), ("s3://x/x.tar", "s3")):
        with pytest.raises(UserError, match=re.escape(install_extra(extra))):
            Shards(url, 16)


def test_labels_beyond_the_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0002 of .*\(label 2, data.classes is 2\)"):
        dataset(write_shards(tmp_path / "s"), tmp_path, classes=2)
