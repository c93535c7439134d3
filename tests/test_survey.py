"""vgan-data, and what it is made of: what a data set holds, by the images themselves."""

import re
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import Cli, size_of

from vgan import cli
from vgan.data.folder import Folder
from vgan.data.packed import pack
from vgan.data.shapes import Shapes
from vgan.data.source import Source
from vgan.data.survey import evenly, find_duplicates, survey
from vgan.data.webdataset import Shards


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(monkeypatch, capsys)


@pytest.fixture
def mess(tmp_path: Path) -> Path:
    """Two classes: 5 good images, of which 2 are the same in other files, one is small; and 2 that cannot be read."""
    rng, folder = np.random.default_rng(0), tmp_path / "mess"
    for name, size, mode, suffix in (
        ("cats/a", (40, 30), "RGB", "png"), ("cats/b", (40, 30), "RGBA", "png"), ("dogs/c", (100, 90), "L", "jpg"),
        ("dogs/d", (8, 50), "RGB", "bmp"),
    ):  # fmt: skip
        path = folder / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(1, 256, (size[1], size[0], 3), np.uint8)).convert(mode).save(
            path
        )
    Image.open(folder / "cats/a.png").save(folder / "dogs/copy.bmp")
    (folder / "cats/text.png").write_text("no picture")
    (folder / "dogs/cut.png").write_bytes((folder / "cats/b.png").read_bytes()[:900])
    return folder


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_survey_counts_what_is_there(mess: Path, kind: str) -> None:
    path = mess if kind == "folder" else zipped(mess)
    found = survey(Folder(str(path), resolution=16, labels="folders"))
    assert (found.examined, found.good, found.copies) == (7, 5, 1)
    assert found.sizes == Counter({(40, 30): 3, (100, 90): 1, (8, 50): 1})
    assert found.modes == Counter({"RGB": 3, "RGBA": 1, "L": 1})
    assert found.formats == Counter({"PNG": 2, "BMP": 2, "JPEG": 1})
    assert found.small == ["dogs/d.bmp (8 x 50)"]
    assert found.duplicates == [["cats/a.png", "dogs/copy.bmp"]]
    assert found.per_class(2) == [2, 3]
    assert [b.split()[0] for b in found.bad] == ["cats/text.png", "dogs/cut.png"]
    assert "(not an image)" in found.bad[0]


@pytest.mark.parametrize("kind", ["shapes", "npy", "folder"])
def test_digest_is_that_of_the_packed_data(
    tmp_path: Path, pictures_npy: Path, mess: Path, kind: str
) -> None:
    sources = {"shapes": lambda: Shapes(16, 60), "npy": lambda: Folder(str(pictures_npy), 16)}
    source: Source = sources.get(kind, lambda: Folder(str(mess), 16, "folders", skip_bad=True))()
    assert survey(source).digest == pack(source, tmp_path / "cache").digest
    assert survey(source, 2).digest == ""  # of a part there is none


def test_survey_of_a_part_is_spread_over_the_whole() -> None:
    assert list(evenly(5, 9)) == [0, 1, 2, 3, 4]
    assert list(evenly(101, 3)) == [0, 50, 100]
    found = survey(Shapes(16, 300), 7)
    assert (found.examined, found.good, list(found.labels)) == (7, 7, list(evenly(300, 7)))


def test_jpegs_are_told_at_their_stored_size(tmp_path: Path) -> None:
    """They are decoded at a fraction of it."""
    for i in range(2):
        Image.new("RGB", (640, 480), (i, 0, 0)).save(tmp_path / f"{i}.jpg")
    assert survey(Folder(str(tmp_path), 16)).sizes == Counter({(640, 480): 2})


def test_duplicates_of_arrays() -> None:
    images = np.arange(4, dtype=np.uint8)[[0, 1, 0, 2, 0, 1], None, None, None].repeat(3, 1)
    assert find_duplicates(images) == [
        ["image 0", "image 2", "image 4"],
        ["image 1", "image 5"],
    ]


def test_info_and_its_sheet(run: Cli, mess: Path) -> None:
    argv = ["data=folder", f"data.path={mess}", "data.labels=folders", "data.resolution=16"]
    code, out, err = run(cli.data_main, "info", *argv, "sheet=sheets/contact.png")
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines() if "mess" not in line)
    for text in (
        "7 images (2 unreadable",
        "16 x 16 px, RGB",
        "8 x 50 px to 100 x 90 px",
        "RGB 3",
        "cats 2, dogs 3",
    ):
        assert text in out
    assert re.search(r"duplicates  1 .*cats/a.png = dogs/copy.bmp", out)
    assert size_of("sheets/contact.png") == (
        128 + 12 * 64,
        2 * 64,
    )  # a row for each class, its name on the left
    assert run(cli.data_main, *argv, "do=info")[1] == out.replace(
        "sheet       sheets/contact.png\n", ""
    )
    assert {p.name for p in Path().iterdir()} == {"mess", "sheets"}  # nothing else is written


def test_sheet_without_classes_and_in_grey(run: Cli, pictures_npy: Path) -> None:
    argv = [
        "data=folder",
        f"data.path={pictures_npy}",
        "data.labels=none",
        "data.channels=1",
        "data.resolution=16",
    ]
    assert run(cli.data_main, "info", *argv, "sheet=c.png")[0] == 0
    with Image.open("c.png") as sheet:
        assert (sheet.mode, sheet.size) == ("L", (12 * 64, 4 * 64))


def test_check_lists_problem_files_and_fails_for_unreadable_ones(run: Cli, mess: Path) -> None:
    argv = ["data=folder", f"data.path={mess}", "data.resolution=16"]
    code, out, _ = run(cli.data_main, "check", *argv)
    assert code == 1
    lines = out.splitlines()
    assert lines[0] == "unreadable  cats/text.png (not an image)"
    assert lines[1].startswith("unreadable  dogs/cut.png (")
    assert lines[2:4] == [
        "enlarged    dogs/d.bmp (8 x 50)",
        "duplicate   dogs/copy.bmp = cats/a.png",
    ]
    for name in ("cats/text.png", "dogs/cut.png"):
        (mess / name).unlink()
    code, out, _ = run(cli.data_main, "check", *argv)
    assert code == 0
    assert "5 images, 0 unreadable, 1 enlarged, 1 duplicate; ready for training" in out


def test_check_lists_at_most_twenty_of_a_kind(run: Cli, tmp_path: Path) -> None:
    np.save(tmp_path / "same.npy", np.zeros((30, 16, 16), np.uint8))
    code, out, _ = run(
        cli.data_main,
        "check",
        "data=folder",
        f"data.path={tmp_path}/same.npy",
        "data.resolution=16",
    )
    assert code == 0
    assert len(re.findall(r"^duplicate +same.npy", out, re.M)) == 20
    assert "duplicate   and 9 more\n" in out


def test_pack_makes_what_training_opens(run: Cli, tmp_path: Path) -> None:
    argv = [
        "pack",
        "data=shapes",
        "data.size=40",
        "data.resolution=16",
        f"data.cache_dir={tmp_path / 'c'}",
    ]
    code, out, _ = run(cli.data_main, *argv)
    assert code == 0
    assert "shapes: 40 images of 16 px" in out
    dataset = pack(Shapes(16, 40), tmp_path / "c")
    assert f"digest      {dataset.digest}\n" in out
    assert [p.name for p in (tmp_path / "c").iterdir()] == [re.findall(r"folder.*/(\S+)", out)[0]]


def test_a_stream_is_examined_by_its_sample(run: Cli, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(6):
            Image.new("RGB", (20 + i, 30), (40 * i, 0, 0)).save(tmp_path / f"{i:03d}.png")
            tar.add(tmp_path / f"{i:03d}.png", f"{i:03d}.png")
    assert survey(Shards(str(tmp_path / "x.tar"), 16, sample=4)).sizes.keys() == {
        (20 + i, 30) for i in range(4)
    }
    code, out, _ = run(
        cli.data_main,
        "info",
        "data=webdataset",
        "data.urls=x.tar",
        "data.resolution=16",
        "data.sample=4",
    )
    assert code == 0
    assert "the first of 1 shards" in out
    assert "stream: 4 images" in out


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["chek"], 1, "do=chek: must be one of info, check, pack"),
        (["info", "data=folder"], 2, "data.path: must be given, as data.path=VALUE"),
        (["data=folder", "data.path=nowhere"], 1, "data.path=nowhere: no such folder"),
        (["data=faces"], 2, "data=faces: no such option; use one of celeba, cifar10, folder"),
        (["info", "sheets=a.png"], 2, "sheets=a.png: unknown key sheets; did you mean sheet"),
        (["info", "sheet=a.jpg"], 1, "sheet=a.jpg: must end in .png"),
        (["pack", "sheet=a.png"], 1, "sheet=a.png: needs do=info or do=check"),
    ],
)
def test_errors_are_one_line(run: Cli, argv: list[str], code: int, says: str) -> None:
    got, out, err = run(cli.data_main, *argv)
    assert (got, out) == (code, "")
    assert err.startswith(f"vgan-data: {says}")
    assert err.count("\n") == 1


def test_keys_of_training_are_unknown(run: Cli) -> None:
    for word in ("experiment=few", "size=m", "batch_size=8"):
        code, _, err = run(cli.data_main, "info", word)
        assert code == 2
        assert err.startswith(f"vgan-data: {word}: unknown key {word.partition('=')[0]}")


def test_help_names_the_data_sets_and_no_other_group(run: Cli) -> None:
    out = run(cli.data_main, "--help")[1]
    assert "data=webdataset" in out
    assert "model=attn" not in out
    assert re.search(r"^  sheet ", out, re.M)
    assert "total_kimg" not in out
