"""Streams of tar shards: the same batches on any number of processes, entered anywhere, and bad input in one line."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TINY, assert_same_run, train_in_process

import vgan.training.train
from vgan.data import webdataset as streams
from vgan.data.packed import pack
from vgan.data.source import BadImage, Dataset
from vgan.data.webdataset import Interrupted, ShardLoader, Shards
from vgan.runs import checkpoint
from vgan.runtime.errors import UserError
from vgan.runtime.signals import RESTART, Stopped

CPU = torch.device("cpu")
COUNTS = (7, 12, 3, 20, 9)  # pictures in each shard


def write_shards(folder: Path, bad: set[int] = frozenset()) -> str:  # type: ignore[assignment]
    """Shards whose picture number i is grey of level 2 i, of class i % 3."""
    folder.mkdir(parents=True, exist_ok=True)
    i = 0
    for shard, count in enumerate(COUNTS):
        with tarfile.open(folder / f"x-{shard}.tar", "w") as archive:
            for _ in range(count):
                buffer = io.BytesIO()
                Image.new("RGB", (16, 16), (2 * i,) * 3).save(buffer, format="PNG")
                content = b"no picture" if i in bad else buffer.getvalue()
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
    from dataclasses import replace

    source = Shards(urls, 16, **{"classes": 3, "sample": 10, **settings})  # type: ignore[arg-type]
    return replace(pack(source, tmp_path / "cache"), stream=source)


def feed(
    data: Dataset, tmp_path: Path, share: tuple[int, int] = (0, 1), seed: int = 1
) -> ShardLoader:
    return ShardLoader(data, 8, seed, CPU, share, tmp_path / "cache")


def numbers(batch: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
    """Which pictures a batch holds; each must have its own label."""
    real, c = batch
    found = [round(float(x) * 127.5 + 127.5) // 2 for x in real[:, 0, 0, 0]]
    assert c.argmax(1).tolist() == [i % 3 for i in found]
    return found


def test_every_picture_comes_once_an_epoch_of_its_lane_and_orders_differ(tmp_path: Path) -> None:
    data = dataset(write_shards(tmp_path / "s"), tmp_path)
    assert len(data) == 10
    stream = feed(data, tmp_path)
    seen = [numbers(stream.batch(n)) for n in range(0, 8 * 60, 8)]
    stream.close()
    counts = np.bincount([i for batch in seen for i in batch], minlength=sum(COUNTS))
    assert counts.min() >= 1
    assert len(counts) == sum(COUNTS)
    other = feed(data, tmp_path, seed=2)
    assert [numbers(other.batch(n)) for n in range(0, 80, 8)] != seen[:10]
    other.close()


def test_batches_do_not_depend_on_processes_or_on_where_one_enters(tmp_path: Path) -> None:
    data = dataset(write_shards(tmp_path / "s"), tmp_path)
    whole = feed(data, tmp_path)
    batches = {n: numbers(whole.batch(n)) for n in range(0, 8 * 40, 8)}
    whole.close()
    for fresh in (True, False):  # with and without what was learned of the shards
        if fresh:
            for path in (tmp_path / "cache").glob("shards-*.json"):
                path.unlink()
        for start in (8, 96, 312):
            late = feed(data, tmp_path)
            assert numbers(late.batch(start)) == batches[start]
            assert numbers(late.batch(0)) == batches[0]  # back again
            late.close()
    for n in (2, 4):
        parts = [feed(data, tmp_path, share=(i, n)) for i in range(n)]
        for start in range(0, 80, 8):
            assert [i for part in parts for i in numbers(part.batch(start))] == batches[start]
        for part in parts:
            part.close()


def test_a_run_on_a_stream_resumes_to_the_last_bit(tmp_path: Path) -> None:
    stream = [
        "data=webdataset",
        f"data.urls='{write_shards(tmp_path / 's')}'",
        "data.classes=3",
        "data.sample=20",
        "size=xs",
    ]
    tiny = [
        *stream,
        "data.resolution=16",
        f"data.cache_dir={tmp_path / 'cache'}",
        *(o for o in TINY if "data" not in o),
    ]
    for name, lengths in (("whole", ["0.24"]), ("cut", ["0.12", "0.24"])):
        for kimg in lengths:
            train_in_process(tmp_path / name, f"total_kimg={kimg}", "schedule_kimg=0.24", tiny=tiny)
    for folder in ("whole", "cut"):
        (tmp_path / folder / "fakes-000000120.png").unlink(missing_ok=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_bad_pictures_stop_or_are_stood_in_for(tmp_path: Path) -> None:
    urls = write_shards(tmp_path / "s", bad={15, 30})
    strict = feed(dataset(urls, tmp_path, sample=7), tmp_path)
    with pytest.raises(
        UserError, match=r"unreadable picture: 00(15|30) of .*x-\d.tar .*data.skip_bad=true"
    ):
        [strict.batch(n) for n in range(0, 400, 8)]
    strict.close()
    lenient = feed(dataset(urls, tmp_path, sample=7, skip_bad=True), tmp_path)
    seen = {i for n in range(0, 400, 8) for i in numbers(lenient.batch(n))}
    lenient.close()
    assert seen == set(range(sum(COUNTS))) - {15, 30}


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        ("nowhere-{0..3}.tar", "no such file nowhere-0.tar"),
        ("pipe:touch harm", "pipe:touch harm is neither"),
        ("file:///etc/passwd", "must be local paths or http"),
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
    monkeypatch.setattr(streams, "PAUSES_S", (0.0,) * 8)


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
@pytest.mark.usefixtures("no_pauses")
def test_a_torn_shard_is_named_and_its_count_is_not_kept(
    tear: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = write_shards(tmp_path / "s")
    data = dataset(urls, tmp_path, sample=7)  # of the first shard
    shard = tmp_path / "s" / "x-3.tar"
    shard.write_bytes(TEARS[tear](shard.read_bytes(), member_at(shard, 10)))
    opened: list[str] = []
    openly = streams._open
    monkeypatch.setattr(streams, "_open", lambda url: (opened.append(url), openly(url))[1])
    stream = feed(data, tmp_path)
    with pytest.raises(UserError, match=r"x-3.tar cannot be read .*; mend or leave out the shard"):
        [stream.batch(n) for n in range(0, 8 * 60, 8)]
    stream.close()
    assert opened.count(str(shard)) >= streams.TRIES
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
    monkeypatch.setattr(streams, "MOST_BYTES", 1_000_000)
    urls = write_shards(tmp_path / "s")
    with tarfile.open(tmp_path / "s" / "x-0.tar") as archive:
        sound = archive.extractfile(archive.getmembers()[0])
        assert sound is not None
        content = sound.read()
    for kind in ("gz", "bz2"):
        with tarfile.open(tmp_path / "bomb.tar", f"w:{kind}") as archive:
            for name, size in (
                ("0.png", 50_000_000),
                ("1.mp4", 50_000_000),
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
    monkeypatch.setattr(streams, "_MOST_HELD", 500)
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
        (lzma.compress(headers()), "xz is not read"),
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
    stream = feed(data, tmp_path)
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
    late = feed(data, tmp_path)
    found = numbers(late.batch(392))
    late.close()
    for path in (tmp_path / "cache").glob("shards-*.json"):
        path.unlink()
    fresh = feed(data, tmp_path)
    assert numbers(fresh.batch(392)) == found
    fresh.close()


class Server:
    """Shards over HTTP. `answer` says for the n-th GET: 200, another status, "short" or "hang"."""

    def __init__(self, folder: Path) -> None:
        self.gets, self.answer, self.etags, self.heads = 0, lambda n: 200, True, True  # type: ignore[var-annotated]
        self.failing, self.done = threading.Event(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.gets += 1
                answer = server.answer(server.gets)
                if answer != 200:
                    server.failing.set()
                if answer == "hang":
                    server.done.wait()
                elif answer in (200, "short"):
                    content = self.begin()
                    with contextlib.suppress(ConnectionError):
                        self.wfile.write(
                            content[: len(content) // 2 // 512 * 512]
                            if answer == "short"
                            else content
                        )
                else:
                    self.send_error(answer)

            def do_HEAD(self) -> None:
                if server.answer(0) == "hang":
                    server.failing.set()
                    server.done.wait()
                elif server.heads:
                    self.begin()
                else:
                    self.send_error(405)

            def begin(self) -> bytes:
                content = (folder / Path(self.path).name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                if server.etags:
                    self.send_header("ETag", f'"{hash(content)}"')
                self.end_headers()
                return content

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.urls = f"http://127.0.0.1:{self.http.server_port}/x-{{0..{len(COUNTS) - 1}}}.tar"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_shards(tmp_path / "s")
    server = Server(tmp_path / "s")
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.done.set()
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.mark.parametrize("answer", [503, 429, "short"])
@pytest.mark.usefixtures("no_pauses")
def test_an_outage_is_waited_out_and_told_once(
    answer: object, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dataset(server.urls, tmp_path)
    stream = feed(data, tmp_path)
    whole = [numbers(stream.batch(n)) for n in range(0, 400, 8)]
    stream.close()
    begun = server.gets
    server.answer = lambda n: answer if begun + 4 < n <= begun + 12 else 200  # type: ignore[assignment,return-value]
    capsys.readouterr()
    with contextlib.closing(feed(data, tmp_path)) as stream:
        assert [numbers(stream.batch(n)) for n in range(0, 400, 8)] == whole
    assert server.failing.is_set()
    # for good
    server.answer = lambda n: answer  # type: ignore[assignment,return-value]
    capsys.readouterr()
    says = r"x-\d.tar cannot be read .*; see to the server or disk"
    with (
        contextlib.closing(feed(data, tmp_path, seed=3)) as stream,
        pytest.raises(UserError, match=says),
    ):
        [stream.batch(n) for n in range(0, 400, 8)]
    assert capsys.readouterr().out.count("it is tried again for") == 1


@pytest.mark.usefixtures("no_pauses")
def test_what_is_not_there_is_not_waited_for(server: Server, tmp_path: Path) -> None:
    server.answer = lambda n: 404
    with pytest.raises(
        UserError, match=r"x-0.tar cannot be read .*404.*; mend or leave out the shard"
    ):
        dataset(server.urls, tmp_path)
    assert server.gets == streams.TRIES


@pytest.mark.usefixtures("no_pauses")
def test_a_server_that_is_down_is_waited_for(server: Server, tmp_path: Path) -> None:
    url = server.urls.replace("{0..4}", "0")
    shards = Shards(url, 16)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match=r"urlopen error.*; see to the server or disk"):
        list(shards.samples(url))


@pytest.mark.parametrize("says", ["etag", "length", "no HEAD"])
def test_replaced_shards_of_a_server_are_noticed(says: str, server: Server, tmp_path: Path) -> None:
    server.etags, server.heads = says == "etag", says != "no HEAD"
    data = dataset(server.urls, tmp_path)
    stream = feed(data, tmp_path)
    [stream.batch(n) for n in range(0, 400, 8)]
    stream.close()
    shutil.copy(tmp_path / "s" / f"x-{0 if says == 'etag' else 3}.tar", tmp_path / "s" / "x-4.tar")
    (kept,) = (tmp_path / "cache").glob("shards-*.json")
    data = dataset(server.urls, tmp_path)
    late = feed(data, tmp_path)
    found = numbers(late.batch(392))
    [late.batch(n) for n in range(0, 400, 8)]
    late.close()
    learned = json.loads(kept.read_text())
    kept.unlink()
    fresh = feed(data, tmp_path)
    assert numbers(fresh.batch(392)) == found
    fresh.close()
    assert learned[server.urls.replace("{0..4}", "4")][0] == (7 if says == "etag" else 20)


@pytest.mark.parametrize(
    "start", [0, 392]
)  # the latter passes over shards, which are only looked at
@pytest.mark.parametrize("answer", [503, "hang"])
def test_a_wait_for_data_can_be_ended(
    start: int, answer: object, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(server.urls, tmp_path)
    with contextlib.closing(feed(data, tmp_path)) as stream:
        [stream.batch(n) for n in range(0, start, 8)]
    data.stream._stamps.clear()  # as in another process
    monkeypatch.setattr(streams, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(streams, "PAUSES_S", (3600.0,))
    server.answer = lambda n: answer  # type: ignore[assignment,return-value]
    before = set(threading.enumerate())
    stream = ShardLoader(
        data, 8, 1, CPU, (0, 1), tmp_path / "cache", end_wait=server.failing.is_set
    )
    with contextlib.closing(stream), pytest.raises(Interrupted):
        stream.batch(start)
    assert not [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("lane-") and thread not in before
    ]


def test_a_run_without_data_saves_and_goes_on_to_the_last_bit(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        "data=webdataset",
        f"data.urls='{server.urls}'",
        "data.classes=3",
        "data.sample=20",
        "size=xs",
    ]
    options += [
        "data.resolution=16",
        f"data.cache_dir={tmp_path / 'cache'}",
        "schedule_kimg=0.4",
        "checkpoint_kimg=1",
    ]
    tiny = [
        *options,
        *(o for o in TINY if "data" not in o and "kimg" not in o),
        "tick_kimg=0.04",
        "snapshot_kimg=0.4",
    ]
    train_in_process(tmp_path / "whole", "total_kimg=0.4", tiny=tiny)
    cut = tmp_path / "cut"

    wait, step, steps = streams.wait, vgan.training.train.train_step, []

    def counted(*args: Any) -> Any:
        steps.append(1)
        return step(*args)

    def wait_and_stop(
        *args: object,
    ) -> object:  # a stop is asked for once data is waited for in vain
        done, left = wait(*args)  # type: ignore[arg-type]
        if left and server.failing.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
        return done, left

    monkeypatch.setattr(streams, "wait", wait_and_stop)
    monkeypatch.setattr(vgan.training.train, "train_step", counted)
    server.answer = lambda n: 200 if len(steps) < 3 else 503
    with pytest.raises(Stopped) as stopped:
        train_in_process(cut, "total_kimg=0.4", tiny=tiny)
    assert stopped.value.code == RESTART
    then = checkpoint.nimg_of(checkpoint.find(cut))
    assert 24 <= then < 400
    steps.clear()
    monkeypatch.setattr(streams, "wait", wait)
    monkeypatch.setattr(streams, "PAUSES_S", (0.0,) * 3)
    with pytest.raises(UserError, match="see to the server"):
        train_in_process(cut, "total_kimg=0.4", tiny=tiny)
    assert then + 24 <= checkpoint.nimg_of(checkpoint.find(cut)) < 400
    server.answer = lambda n: 200
    train_in_process(cut, "total_kimg=0.4", tiny=tiny)
    assert_same_run(tmp_path / "whole", cut)


def test_labels_beyond_the_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0002 of .*\(label 2, data.classes is 2\)"):
        dataset(write_shards(tmp_path / "s"), tmp_path, classes=2)
