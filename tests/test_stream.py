"""Streams of tar shards: the same batches on any number of processes, entered anywhere, and bad input in one line."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TINY, assert_same_run, train_in_process

from vgan.data.source import Dataset
from vgan.data.store import pack
from vgan.data.stream import Shards, StreamFeed
from vgan.errors import UserError

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
                for name, data in ((f"{i:04d}.png", content), (f"{i:04d}.cls", str(i % 3).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                i += 1
    return str(folder / f"x-{{0..{len(COUNTS) - 1}}}.tar")


def dataset(urls: str, tmp_path: Path, **settings: object) -> Dataset:
    from dataclasses import replace

    source = Shards(urls, 16, **{"classes": 3, "sample": 10, **settings})  # type: ignore[arg-type]
    return replace(pack(source, tmp_path / "cache"), stream=source)


def feed(data: Dataset, tmp_path: Path, share: tuple[int, int] = (0, 1), seed: int = 1) -> StreamFeed:
    return StreamFeed(data, 8, seed, CPU, share, tmp_path / "cache")


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
    stream = ["data=webdataset", f"data.urls='{write_shards(tmp_path / 's')}'", "data.classes=3", "data.sample=20", "size=xs"]
    tiny = [*stream, "data.resolution=16", f"data.cache_dir={tmp_path / 'cache'}", *(o for o in TINY if "data" not in o)]
    for name, lengths in (("whole", ["0.24"]), ("cut", ["0.12", "0.24"])):
        for kimg in lengths:
            train_in_process(tmp_path / name, f"total_kimg={kimg}", "schedule_kimg=0.24", tiny=tiny)
    for folder in ("whole", "cut"):
        (tmp_path / folder / "fakes-000000120.png").unlink(missing_ok=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_bad_pictures_stop_or_are_stood_in_for(tmp_path: Path) -> None:
    urls = write_shards(tmp_path / "s", bad={15, 30})
    strict = feed(dataset(urls, tmp_path, sample=7), tmp_path)
    with pytest.raises(UserError, match=r"unreadable picture: 00(15|30) of .*x-\d.tar .*data.skip_bad=true"):
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
def test_bad_addresses(urls: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        Shards(urls)
    assert not (tmp_path / "harm").exists()


def test_a_torn_shard_is_named_after_some_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = write_shards(tmp_path / "s")
    shard = tmp_path / "s" / "x-0.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(UserError, match=r"x-0.tar cannot be read .*; mend or leave out the shard"):
        dataset(urls, tmp_path)
    assert len(waits) == 2


def test_labels_beyond_the_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0002 of .*\(label 2, data.classes is 2\)"):
        dataset(write_shards(tmp_path / "s"), tmp_path, classes=2)
