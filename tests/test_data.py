"""Sources, the packed store and the feed."""

import hashlib
import io
import os
import subprocess
import sys
import time
import urllib.error
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gdown
import huggingface_hub
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from vgan.data import celeba_mirror, torchvision_sets
from vgan.data import packed as store
from vgan.data.folder import Folder
from vgan.data.loader import Loader
from vgan.data.packed import pack
from vgan.data.preprocess import prepare_image
from vgan.data.shapes import COLOURS, Shapes
from vgan.data.source import Dataset
from vgan.evaluation.shapes_oracle import Oracle, score_samples
from vgan.runtime.errors import UserError

CPU = torch.device("cpu")


# --- the embedded shapes and their oracle ---


@pytest.mark.parametrize(("resolution", "count"), [(16, 50), (32, 200), (64, 40)])
def test_oracle_is_exact_on_the_renderings(resolution: int, count: int) -> None:
    images, shape, colour = Shapes(resolution).render(np.arange(count))
    if resolution >= 32:
        reading = Oracle(resolution)(images)
        assert (reading.shape == shape).all()
        assert (reading.colour == colour).all()
    assert images.shape == (count, resolution, resolution, 3)
    border = np.concatenate([images[:, 0], images[:, -1]], axis=1)
    assert (np.median(border, axis=1) > 220).all()


def test_oracle_knows_nothing_in_noise_blobs_and_mixtures(generator: torch.Generator) -> None:
    rng = np.random.default_rng(0)
    images = Shapes(32).render(np.arange(80))[0]
    mixed = ((images[:40].astype(int) + images[40:]) // 2).astype(np.uint8)
    x, y = np.meshgrid(np.arange(32.0), np.arange(32.0))
    blob = np.exp(-((x - 15) ** 2 + (y - 17) ** 2) / 60)[None, :, :, None]
    blobs = (240 - blob * np.array([30, 200, 200])).astype(np.uint8)
    oracle = Oracle(32)
    assert (oracle(rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)).shape == -1).all()
    assert (oracle(np.full((1, 32, 32, 3), 240, np.uint8)).shape == -1).all()
    assert (oracle(blobs).shape == -1).all()
    assert (oracle(mixed).shape == -1).mean() > 0.9


def test_shapes_are_a_pure_function_of_seed_and_index() -> None:
    a, b = Shapes(32).render(np.arange(30)), Shapes(32).render(np.array([7, 3]))
    assert np.array_equal(a[0][[7, 3]], b[0])
    assert not np.array_equal(Shapes(32, seed=1).render(np.arange(30))[0], a[0])
    read, label = Shapes(32).read(7)
    assert np.array_equal(read, a[0][7])
    assert label == a[1][7]
    _, shape, colour = Shapes(32).render(np.arange(8000))
    pairs = np.bincount(shape * len(COLOURS) + colour, minlength=64)
    assert pairs.min() > 80  # 125 expected of each


def test_score_counts_what_was_asked() -> None:
    images, shape, colour = Shapes(32).render(np.arange(40))
    reading = Oracle(32)(images)
    assert score_samples(reading, shape)["precision"] == 1
    assert score_samples(reading, shape)["coverage"] == len(
        set(zip(shape.tolist(), colour.tolist()))
    )
    assert score_samples(reading, (shape + 1) % 8)["precision"] == 0


# --- rules for any picture ---


def test_pictures_of_every_mode_follow_the_stated_rules() -> None:
    def value(image: Image.Image, channels: int = 3) -> list[int]:
        return prepare_image(image, 16, channels)[8, 8].tolist()

    assert value(Image.new("L", (20, 20), 77)) == [77] * 3
    assert (
        value(Image.new("RGBA", (20, 20), (200, 0, 0, 0))) == [255] * 3
    )  # transparent: white paper
    assert value(Image.new("LA", (20, 20), (0, 255))) == [0] * 3
    assert value(Image.new("CMYK", (20, 20), (0, 255, 255, 0)))[0] > 200
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert value(palette) == [10, 20, 30]
    assert (
        value(Image.fromarray(np.full((20, 20), 32896, np.uint16))) == [128] * 3
    )  # scaled, not clipped
    assert value(Image.new("RGB", (20, 20), (255, 0, 0)), channels=1) == [76]


def test_exif_crop_and_resize() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 250
    wide[:10, 20:40, 1] = 0
    assert (
        prepare_image(Image.fromarray(wide), 16, 3)[15].min() == 250
    )  # the middle square, nothing else
    turned = Image.fromarray(wide)
    turned.getexif()[0x0112] = 6  # turn right by a quarter to look at it
    upright = prepare_image(turned, 16, 3)
    assert upright[8, 15, 1] < 50
    assert upright[8, 0, 1] == 250
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 200
    assert (
        np.ptp(prepare_image(Image.fromarray(stripes), 16, 1)[:, 4:12].astype(int)) < 60
    )  # antialiased
    assert prepare_image(Image.new("RGB", (178, 218)), 64, 3, crop=178).shape == (64, 64, 3)


# --- folder, zip, npy ---


def write_pictures(folder: Path, count: int = 3, shade: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (24, 20), (shade + i, 0, 0)).save(folder / f"{i}.png")


def test_folder_with_classes_and_zip_hold_the_same(tmp_path: Path) -> None:
    write_pictures(tmp_path / "p" / "cats", 3)
    write_pictures(tmp_path / "p" / "dogs" / "deep", 11, 100)
    (tmp_path / "p" / "cats" / "notes.txt").write_text("x")
    (tmp_path / "p" / ".hidden.png").write_text("x")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for f in (tmp_path / "p").rglob("*.png"):
            archive.write(f, f.relative_to(tmp_path / "p").as_posix())
    for path in (tmp_path / "p", tmp_path / "p.zip"):
        source = Folder(str(path), 16, labels="folders")
        assert source.label_names == ("cats", "dogs")
        items = [source.read(i) for i in range(len(source))]
        assert [label for _, label in items] == [0] * 3 + [1] * 11
        assert [int(pixels[0, 0, 0]) for pixels, _ in items] == [0, 1, 2] + [
            100 + i for i in range(11)
        ]


def test_npy_finds_its_labels_and_fingerprint_follows_content(pictures_npy: Path) -> None:
    source = Folder(str(pictures_npy), 16)
    assert source.label_names == ("0", "1", "2", "3")
    assert np.array_equal(source.read(5)[0], np.load(pictures_npy)[5])
    assert source.read(5)[1] == 1
    assert Folder(str(pictures_npy), 16, labels="none").label_names == ()
    prints = {
        source.fingerprint(),
        Folder(str(pictures_npy), 32).fingerprint(),
        Folder(str(pictures_npy), 16, "none").fingerprint(),
    }
    np.save(pictures_npy.with_name("tiny_labels.npy"), np.arange(40) % 2)
    prints.add(Folder(str(pictures_npy), 16).fingerprint())
    assert len(prints) == 4


def test_grey_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "g.npy", np.full((3, 16, 16), 9, np.uint8))
    assert Folder(str(tmp_path / "g.npy"), 16, channels=1).read(0)[0].shape == (16, 16, 1)


def with_pictures(folder: Path, **settings: object) -> dict[str, object]:
    write_pictures(folder)
    return {"path": str(folder), **settings}


def with_file(path: Path) -> dict[str, str]:
    path.write_text("x")
    return {"path": str(path)}


def grey_npy(folder: Path) -> str:
    return bad_npy(folder, np.zeros((3, 9, 9), np.uint8))


def bad_npy(tmp_path: Path, array: np.ndarray) -> str:
    np.save(tmp_path / "bad.npy", array)
    return str(tmp_path / "bad.npy")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: {"path": str(t / "no")}, "no such folder"),
        (lambda t: {"path": str(t)}, "no images"),
        (lambda t: (write_pictures(t, 1), {"path": str(t)})[1], "only one image"),
        (lambda t: with_pictures(t, resolution=50), "data.resolution=50: .* try 48"),
        (lambda t: (write_pictures(t), {"path": str(t), "channels": 2})[1], "data.channels=2"),
        (lambda t: (write_pictures(t), {"path": str(t), "labels": "folders"})[1], "sub-folders"),
        (lambda t: with_pictures(t, labels="nowhere.npy"), "no such file"),
        (lambda t: {"path": bad_npy(t, np.zeros((3, 16, 16, 3)))}, "must be uint8"),
        (lambda t: {"path": bad_npy(t, np.zeros((3, 16), np.uint8))}, "must be uint8"),
        (lambda t: dict.fromkeys(("path", "labels"), grey_npy(t)), "as many as images"),
        (lambda t: with_file(t / "x.zip"), "not a readable zip"),
        (lambda t: with_file(t / "x.txt"), "neither a folder"),
    ],
)  # fmt: skip
def test_folder_refuses_in_one_line(tmp_path: Path, make: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Folder(**({"resolution": 16} | make(tmp_path)))  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    assert "data." in str(caught.value)


# --- the store ---


def test_pack_once_then_open(
    pictures_npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Folder(str(pictures_npy), 16)
    first = pack(source, tmp_path / "cache")
    assert np.array_equal(first.images, np.load(pictures_npy))
    assert first.labels.tolist() == [i % 4 for i in range(40)]
    assert (first.img_resolution, first.img_channels, first.label_dim, len(first)) == (16, 3, 4, 40)
    monkeypatch.setattr(Folder, "read", None)  # a second start reads no picture
    second = pack(source, tmp_path / "cache")
    assert second.digest == first.digest
    assert isinstance(second.images, np.memmap)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [
        f"tiny-images-{source.fingerprint()[:16]}"
    ]


def test_unreadable_pictures_stop_or_are_skipped_with_their_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "p" / "a", 3)
    write_pictures(tmp_path / "p" / "b", 3, 100)
    (tmp_path / "p" / "a" / "1.png").write_bytes(b"not a png")
    cut = tmp_path / "p" / "b" / "0.png"
    cut.write_bytes(cut.read_bytes()[:45])
    with pytest.raises(UserError, match=r"2 unreadable image\(s\): a/1.png.*data.skip_bad=true"):
        pack(Folder(str(tmp_path / "p"), 16, "folders"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    dataset = pack(Folder(str(tmp_path / "p"), 16, "folders", skip_bad=True), tmp_path / "cache")
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 2, 101, 102]
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    assert "skipped 2 unreadable" in capsys.readouterr().out


PACK = """
import sys, time
from pathlib import Path
from vgan.data.folder import Folder
from vgan.data.packed import pack
Folder.read = lambda self, i: time.sleep(30)
pack(Folder(sys.argv[1], 16), Path(sys.argv[2]))
"""


def test_what_a_killed_process_packed_is_removed(pictures_npy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    killed = subprocess.Popen([sys.executable, "-c", PACK, str(pictures_npy), str(cache)])
    deadline = time.time() + 60
    while not list(cache.glob(".packing-*/images.npy")) and time.time() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    left = list(cache.glob(".packing-*"))
    assert len(left) == 1
    for path in (*left[0].iterdir(), left[0]):
        os.utime(path, (0, 0))
    pack(Folder(str(pictures_npy), 16), cache)
    assert [p.name[0] for p in cache.iterdir()] != ["."]
    assert len(list(cache.iterdir())) == 1


def test_two_packing_at_once_agree(pictures_npy: Path, tmp_path: Path) -> None:
    class Slow(Folder):
        def read(self, i: int) -> tuple[np.ndarray, int]:
            time.sleep(0.01)
            return super().read(i)

    def packed(_: int) -> str:
        return pack(Slow(str(pictures_npy), 16), tmp_path / "cache").digest

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(packed, range(2)))) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_full_and_unwritable_cache(
    pictures_npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Folder(str(pictures_npy), 16)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir=.*cannot be written"):
        pack(source, tmp_path / "file")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="free space"):
        pack(source, tmp_path / "cache")


# --- the feed ---


@pytest.fixture
def dataset() -> Dataset:
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    return Dataset("ten", images, np.arange(10) % 3, ("a", "b", "c"), "digest")


def test_every_epoch_shows_every_item_once_in_another_order(dataset: Dataset) -> None:
    feed = Loader(dataset, 4, seed=1, device=CPU)
    order = torch.cat([feed.items(i) for i in range(0, 40, 4)])
    epochs = order.view(4, 10)
    assert all(sorted(e.tolist()) == list(range(10)) for e in epochs)
    assert len({tuple(e.tolist()) for e in epochs}) == 4


def test_batches_do_not_depend_on_how_the_run_is_cut(dataset: Dataset) -> None:
    whole, parts = Loader(dataset, 25, 1, CPU), Loader(dataset, 5, 1, CPU)
    real, c = whole.batch(5)
    pieces = [parts.batch(i) for i in range(5, 30, 5)]
    assert torch.equal(real, torch.cat([p[0] for p in pieces]))
    assert torch.equal(c, torch.cat([p[1] for p in pieces]))


def test_batch_is_in_range_with_its_class(dataset: Dataset) -> None:
    feed = Loader(dataset, 4, 1, CPU)
    real, c = feed.batch(0)
    items = feed.items(0)
    assert torch.allclose(real[:, 0, 0, 0], items / 127.5 - 1)
    assert torch.equal(c.argmax(1), items % 3)
    assert real.is_contiguous(memory_format=torch.channels_last)
    plain = Dataset("plain", dataset.images, dataset.labels * 0, (), "digest")
    assert Loader(plain, 4, 1, CPU).batch(0)[1].shape == (4, 0)


def test_reading_ahead_gives_the_asked_batch_in_any_order(dataset: Dataset) -> None:
    ahead, plain = (
        Loader(dataset, 4, 1, torch.device("meta"), hold_on_device=False),
        Loader(dataset, 4, 1, CPU),
    )
    for cur_nimg in (0, 4, 8, 100, 104, 0):
        assert torch.equal(ahead._read_ahead(cur_nimg)[0], plain._read_ahead(cur_nimg)[0])
    ahead.close()


def test_reals_take_turns_over_the_classes(dataset: Dataset) -> None:
    images, labels = dataset.reals(6)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_mapped_file_is_read_row_by_row_and_a_shortened_one_noticed(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    labels = np.arange(10, dtype=np.int64)
    of_file, of_memory = (
        Loader(Dataset("x", x, labels, ("a",) * 10, "digest"), 4, 3, CPU) for x in (mapped, images)
    )
    for cur_nimg in (0, 4, 8, 12):
        for a, b in zip(of_file.batch(cur_nimg), of_memory.batch(cur_nimg)):
            assert torch.equal(a, b)
    of_file.close()
    of_memory.close()
    feed = Loader(Dataset("x", mapped, labels, (), "digest"), 10, 3, CPU)
    os.truncate(tmp_path / "x.npy", 200)
    with pytest.raises(OSError, match="cut short"):
        feed.batch(0)
    feed.close()


# --- torchvision's sets ---


class FakeSet:
    classes = ("cat", "dog")
    attr_names = ("Smiling", "Male", "Young", "")
    attr = torch.tensor([[i & 1, i >> 1, 0] for i in range(4)])

    def __init__(self, root: str, **_: object) -> None:
        self.root = root

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[Image.Image, object]:
        size = (178, 218) if isinstance(self, FakeFaces) else (32, 32)
        return Image.new("RGB", size, (i, 0, 0)), torch.tensor([i & 1, i >> 1, 0]) if isinstance(
            self, FakeFaces
        ) else i % 2


class FakeFaces(FakeSet):
    pass


def test_cifar10_and_celeba_through_torchvision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeSet)
    monkeypatch.setattr("torchvision.datasets.CelebA", FakeFaces)
    cifar = torchvision_sets.Cifar10(str(tmp_path))
    assert cifar.label_names == ("cat", "dog")
    assert cifar.read(3)[1] == 1
    assert torchvision_sets.Cifar10(str(tmp_path), labels=False).label_names == ()
    faces = torchvision_sets.CelebA(str(tmp_path), 32, attributes=["Smiling", "Male"])
    assert faces.label_names == (
        "not Smiling, not Male",
        "Smiling, not Male",
        "not Smiling, Male",
        "Smiling, Male",
    )
    assert [faces.read(i)[1] for i in range(4)] == [0, 1, 2, 3]
    assert faces.read(3)[0].shape == (32, 32, 3)
    with pytest.raises(UserError, match="did you mean Smiling"):
        torchvision_sets.CelebA(str(tmp_path), 32, attributes=["Smilling"])
    with pytest.raises(UserError, match=r"data.conditions=Smilling: .*did you mean Smiling"):
        torchvision_sets.CelebA(str(tmp_path), 32, conditions=["Smilling"])
    with pytest.raises(UserError, match="cannot be combined"):
        torchvision_sets.CelebA(str(tmp_path), 32, attributes=["Male"], conditions="all")
    with pytest.raises(UserError, match="column Young is the same for all images"):
        torchvision_sets.CelebA(str(tmp_path), 32, conditions="all")
    both = torchvision_sets.CelebA(str(tmp_path), 32, conditions=["Male", "Smiling"])
    assert (both.label_names, both.condition_names) == ((), ("Male", "Smiling"))
    assert both.conditions.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert both.fingerprint() != torchvision_sets.CelebA(str(tmp_path), 32).fingerprint()


@pytest.mark.parametrize(
    ("kind", "name", "file"),
    [
        ("Cifar10", "CIFAR10", "cifar-10-python.tar.gz"),
        ("CelebA", "CelebA", "img_align_celeba.zip"),
    ],
)
@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), RuntimeError("File not found or corrupted.")]
)
def test_failed_download_says_which_files_to_put_where(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    name: str,
    file: str,
    error: Exception,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"torchvision.datasets.{name}", fail)
    monkeypatch.setattr(torchvision_sets.celeba_mirror, "CelebAMirror", fail)
    with pytest.raises(UserError, match=file) as caught:
        getattr(torchvision_sets, kind)(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def write_faces(folder: Path, count: int) -> list[Path]:
    """Write what the mirror of CelebA has: parquet files of images and attributes."""
    folder.mkdir(parents=True)
    paths = [folder / f"train-0000{i}-of-00002.parquet" for i in range(2)]
    for path in paths:
        rows: dict[str, list[object]] = {"image": [], "celeb_id": [], "Smiling": [], "Male": []}
        for i in range(count):
            png = io.BytesIO()
            colour = (10 * i, 100 * paths.index(path), 0)
            Image.new("RGB", (178, 218), colour).save(png, format="PNG")
            rows["image"].append({"bytes": png.getvalue(), "path": f"{i}.png"})
            rows["celeb_id"].append(i)
            rows["Smiling"].append(i % 2 == 1)
            rows["Male"].append(i > 1)
        parquet.write_table(pyarrow.table(rows), path, row_group_size=3)
    (folder / "valid-00000-of-00001.parquet").write_bytes(b"")
    return paths


@pytest.fixture
def hub_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands in for the mirror on the Hub, and Google Drive refuses."""
    folder = tmp_path / "hub" / celeba_mirror.FOLDER

    def refuse(*_: object, **__: object) -> None:
        raise gdown.exceptions.FileURLRetrievalError("Too many users\nhave viewed this file")

    class Api:
        def list_repo_tree(self, repo: str, path: str, **where: str) -> list[SimpleNamespace]:
            assert (repo, path) == (celeba_mirror.REPO, celeba_mirror.FOLDER)
            assert where["revision"] == celeba_mirror.REVISION
            listed = []
            for file in sorted(folder.iterdir()):
                sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
                entry = {"path": f"{path}/{file.name}", "lfs": SimpleNamespace(sha256=sha256)}
                listed.append(SimpleNamespace(**entry))
            return listed

    def download(repo: str, path: str, local_dir: Path, **where: str) -> str:
        there = local_dir / path
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes((folder.parent / path).read_bytes())
        return str(there)

    monkeypatch.setattr("torchvision.datasets.CelebA", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return folder


def test_celeba_comes_from_the_mirror_where_google_drive_refuses(
    hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_faces(hub_folder, 4)
    root = str(tmp_path / "data")
    faces = torchvision_sets.CelebA(root, 32, attributes=["Male"])
    out = capsys.readouterr().out
    assert "Too many users" in out
    assert celeba_mirror.REPO in out
    assert len(faces) == 8
    assert [faces.read(i)[1] for i in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    reds = [int(faces.read(i)[0][16, 16, 0]) for i in (7, 0, 3, 6)]  # in any order
    assert reds == [30, 0, 30, 20]
    assert faces.read(5)[0][0, 0].tolist() == [10, 100, 0]
    both = torchvision_sets.CelebA(root, 32, conditions="all")
    assert both.condition_names == ("Smiling", "Male")
    assert both.conditions.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]] * 2
    for name in ("HfApi", "hf_hub_download"):  # the second time no network is needed
        monkeypatch.setattr(f"huggingface_hub.{name}", None)
    assert len(torchvision_sets.CelebA(root, 32)) == 8


def test_a_damaged_or_missing_mirror_is_refused(
    hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_faces(hub_folder, 4)
    root = tmp_path / "data"

    def damage(repo: str, path: str, local_dir: Path, **_: str) -> str:
        (local_dir / path).parent.mkdir(parents=True, exist_ok=True)
        (local_dir / path).write_bytes(b"torn")
        return str(local_dir / path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", damage)
    with pytest.raises(UserError, match=r"another SHA-256.*img_align_celeba.zip") as caught:
        torchvision_sets.CelebA(str(root))
    assert "\n" not in str(caught.value)
    assert not list(root.rglob("*.parquet"))

    def no_network(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.HTTPError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", no_network, raising=False)
    with pytest.raises(UserError, match="no route to host"):
        torchvision_sets.CelebA(str(root))


def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path: Path) -> None:
    ramp = (
        np.linspace(0, 255, 640)[None, :, None]
        * np.linspace(0.2, 1, 480)[:, None, None]
        * np.array([1, 0.5, 0.2])
    )
    picture = Image.fromarray(ramp.astype(np.uint8))
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "b.png")
    source = Folder(str(tmp_path), 32)
    of_jpeg, of_png = (source.read(i)[0].astype(int) for i in range(2))
    assert np.abs(of_jpeg - of_png).mean() < 1.5
    with Image.open(tmp_path / "a.jpg") as image:
        image.draft(None, (64, 64))
        assert min(image.size) >= 64


def test_held_out_pictures_are_never_trained_on(tmp_path: Path) -> None:
    dataset = pack(Shapes(16, 100), tmp_path)
    trained_on, held_out = dataset.split(30)
    assert sorted([*trained_on, *held_out]) == list(range(100))
    feed = Loader(dataset, 35, 3, torch.device("cpu"), holdout=30)
    for epoch in (0, 70):
        seen = torch.cat([feed.items(epoch), feed.items(epoch + 35)])
        assert sorted(seen.tolist()) == trained_on.tolist()
    feed.close()
    with pytest.raises(UserError, match=r"holdout=99: leaves 1 of 100"):
        dataset.split(99)
