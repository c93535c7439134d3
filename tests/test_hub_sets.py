"""data=hf: sets of the Hugging Face Hub (a server stands in for it) and folders of that layout."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import hub_sets_server
import huggingface_hub.errors
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from test_cli import TINY, Cli, message

from vgan import cli
from vgan.data.hub import HubImages
from vgan.data.packed import pack
from vgan.data.preprocess import examine_file
from vgan.data.survey import survey
from vgan.runtime.errors import UserError
from vgan.runtime.extras import install_extra

NAMES = ["cat", "dog", "hen"]
ROWS = 20
datasets.disable_progress_bars()


def png(i: int) -> bytes:
    """A noisy image of 20 x 16 px."""
    pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def make_set(count: int = ROWS) -> datasets.Dataset:
    """Images with class labels among columns that are neither."""
    columns = {
        "text": [f"number {i}" for i in range(count)],
        "picture": [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)],
        "kind": [i % 3 for i in range(count)],
    }
    features = {"text": datasets.Value("string"), "picture": datasets.Image()}
    features["kind"] = datasets.ClassLabel(names=NAMES)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_set(folder: Path, rows: datasets.Dataset) -> Path:
    """Write two parquet files of training images and one of test images, as on the Hub."""
    (folder / "data").mkdir(parents=True)
    half = len(rows) // 2
    rows.select(range(half)).to_parquet(folder / "data/train-00000-of-00002.parquet")
    rows.select(range(half, len(rows))).to_parquet(folder / "data/train-00001-of-00002.parquet")
    rows.select(range(2)).to_parquet(folder / "data/test-00000-of-00001.parquet")
    return folder


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / name))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "animals", make_set())


def refusal(make: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_columns_are_found_by_type_and_images_prepared_as_of_a_folder(folder: Path) -> None:
    source = HubImages(str(folder), 16)
    assert len(source) == ROWS
    assert (source.name, source.label_names) == ("animals", tuple(NAMES))
    for i in (0, 7, 19):
        pixels, label = source.read(i)
        assert np.array_equal(pixels, examine_file("x", png(i), 16, 3, 0).pixels)
        assert label == i % 3
    assert len(HubImages(str(folder), 16, split="test")) == 2
    grey = HubImages(str(folder), 16, channels=1, label="none")
    assert grey.read(1)[0].shape == (16, 16, 1)
    assert (grey.read(1)[1], grey.label_names) == (0, ())


def test_streamed_copied_and_saved_sets_hold_the_same(folder: Path, tmp_path: Path) -> None:
    make_set().save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=make_set()).save_to_disk(tmp_path / "several")
    sources = [HubImages(str(folder), 16, streaming=choice) for choice in (True, "false")]
    sources += [HubImages(str(tmp_path / name), 16) for name in ("one", "several")]
    packed = [pack(s, tmp_path / f"cache-{i}") for i, s in enumerate(sources)]
    assert len({dataset.digest for dataset in packed}) == 1
    assert packed[0].label_names == tuple(NAMES)
    assert survey(sources[0]).digest == packed[0].digest
    assert sources[0].fingerprint() == sources[1].fingerprint()
    assert [source.sequential for source in sources] == [True, False, False, False]
    assert "no such split" in refusal(
        lambda: len(HubImages(str(tmp_path / "several"), split="test"))
    )


def test_the_copy_is_in_the_cache_of_datasets_only_without_streaming(
    folder: Path, tmp_path: Path
) -> None:
    len(HubImages(str(folder), 16))
    assert not list((tmp_path / "HF_DATASETS_CACHE").rglob("*.arrow"))
    len(HubImages(str(folder), 16, streaming=False))
    assert list((tmp_path / "HF_DATASETS_CACHE").rglob("*.arrow"))


def test_a_stream_is_read_in_any_order_and_sampled_at_its_start(folder: Path) -> None:
    source = HubImages(str(folder), 16)
    expected = [examine_file("x", png(i), 16, 3, 0).pixels for i in range(ROWS)]
    for i in (3, 1, 1, 19, 0, 18):
        assert np.array_equal(source.read(i)[0], expected[i])
    assert list(survey(source, 4).labels) == [0, 1, 2, 3]
    assert [survey(source, 4).labels[i] for i in range(4)] == [0, 1, 2, 0]


def write_card(folder: Path, rows: int) -> None:
    """Write a README.md that states a number of rows."""
    split = f"{{name: train, num_bytes: 1, num_examples: {rows}}}"
    files = "[{split: train, path: data/train-*}, {split: test, path: data/test-*}]"
    text = f"dataset_info:\n  splits: [{split}]\nconfigs:\n- config_name: default\n"
    (folder / "README.md").write_text(f"---\n{text}  data_files: {files}\n---\n")


@pytest.mark.parametrize(("stated", "found"), [(ROWS + 1, "only 20"), (ROWS - 1, "more")])
def test_a_card_that_states_another_number_of_rows(
    folder: Path, tmp_path: Path, stated: int, found: str
) -> None:
    write_card(folder, stated)
    line = refusal(lambda: pack(HubImages(str(folder), 16), tmp_path / "cache"))
    assert f"states {stated} rows and has {found}; use data.streaming=false" in line
    assert not list((tmp_path / "cache").iterdir())
    assert len(pack(HubImages(str(folder), 16, streaming=False), tmp_path / "cache")) == ROWS


def test_the_fingerprint_follows_the_files_and_the_choice_of_rows(folder: Path) -> None:
    def fingerprint(**settings: Any) -> str:
        return HubImages(str(folder), **{"resolution": 16, **settings}).fingerprint()

    before = fingerprint()
    source = HubImages(str(folder), 16)
    assert len(source) == ROWS
    assert source.fingerprint() == before  # also after it was opened
    choices: list[dict[str, Any]] = [{"split": "test"}, {"label": "none"}, {"image": "picture"}]
    others = [fingerprint(**choice) for choice in [*choices, {"resolution": 32}]]
    assert len({before, *others}) == 5
    os.utime(folder / "data/train-00000-of-00002.parquet", ns=(1, 1))
    assert fingerprint() != before


def test_bytes_without_a_type_are_images_if_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    table = pyarrow.table({"img": [png(i) for i in range(3)], "n": [0, 1, 2]})
    parquet.write_table(table, tmp_path / "raw" / "a.parquet")
    raw = str(tmp_path / "raw")
    for streaming in (True, False):
        source = HubImages(raw, 16, image="img", streaming=streaming)
        assert np.array_equal(source.read(2)[0], examine_file("x", png(2), 16, 3, 0).pixels)
    line = refusal(lambda: len(HubImages(raw, 16)))
    assert "has no column of images; its columns: img, n;" in line
    assert "is no column of images" in refusal(lambda: len(HubImages(raw, 16, image="n")))


def test_image_files_in_folders_of_classes(tmp_path: Path) -> None:
    for i in range(6):
        path = tmp_path / "files" / "train" / NAMES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    line = refusal(lambda: len(HubImages(str(tmp_path / "files"), 16, streaming=True)))
    assert "does not state how many rows" in line
    source = HubImages(str(tmp_path / "files"), 16)
    assert (len(source), source.label_names) == (6, tuple(NAMES))
    found = {source.read(i)[0].tobytes(): source.read(i)[1] for i in range(6)}
    expected = {examine_file("x", png(i), 16, 3, 0).pixels.tobytes(): i % 3 for i in range(6)}
    assert found == expected


# --- bad input ---


def test_several_columns_must_be_named(tmp_path: Path) -> None:
    rows = make_set(6)
    for old, new in (("picture", "sketch"), ("kind", "colour")):
        column = rows.with_format("arrow")[old].to_pylist()
        rows = rows.add_column(new, column, feature=rows.features[old])
    path = str(write_set(tmp_path / "two", rows))
    line = refusal(lambda: len(HubImages(path, 16)))
    assert "several image columns: picture, sketch; choose one, as data.image=picture" in line
    line = refusal(lambda: len(HubImages(path, 16, image="sketch")))
    assert "several label columns: kind, colour" in line
    source = HubImages(path, 16, image="sketch", label="colour")
    assert (len(source), source.read(4)[1]) == (6, 1)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("split=val", "data.split=val: no such split; use one of train, test"),
        ("subset=big", "data.subset=big: no such subset; use one of default"),
        ("image=text", "data.image=text: is no column of images; use one of picture"),
        ("image=x", "data.image=x: no such column; use one of picture"),
        ("label=text", "data.label=text: is no column of type ClassLabel; use kind or none"),
        ("label=x", "data.label=x: no such column; use kind or none"),
        ("streaming=maybe", "data.streaming=maybe: must be auto, true or false"),
        ("revision=v2", "data.revision=v2: a folder has no revisions"),
        ("resolution=17", "data.resolution=17: must be N or"),
    ],
)
def test_a_wrong_choice_names_the_right_ones(
    folder: Path, tmp_path: Path, setting: str, says: str
) -> None:
    key, value = setting.split("=")
    settings: dict[str, Any] = {key: int(value) if value.isdigit() else value}
    assert says in refusal(lambda: pack(HubImages(str(folder), **settings), tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_several_subsets_must_be_named(folder: Path) -> None:
    subsets = "".join(
        f"- config_name: {name}\n  data_files: data/{name}-*\n" for name in ("train", "test")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{subsets}---\n")
    line = refusal(lambda: len(HubImages(str(folder), 16)))
    assert line == "data.subset=null: has several subsets; use one of train, test"
    assert len(HubImages(str(folder), 16, subset="test")) == 2


@pytest.mark.parametrize("repo", ["nowhere", "./user/set", "a/b/c", "https://huggingface.co/a"])
def test_what_is_neither_a_folder_nor_a_name_of_the_hub(repo: str) -> None:
    assert "give user/set as on huggingface.co/datasets" in refusal(lambda: HubImages(repo))


def test_a_folder_without_data_and_a_damaged_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "cannot be read" in refusal(lambda: len(HubImages(str(tmp_path / "empty"))))
    file = folder / "data/train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    for streaming in (True, False):
        line = refusal(lambda s=streaming: len(HubImages(str(folder), streaming=s)))
        assert line.startswith(f"data.repo={folder}: cannot be read (")


def test_unreadable_images_stop_or_are_skipped(tmp_path: Path) -> None:
    cells = [{"bytes": png(i), "path": None} for i in range(5)]
    cells[1] = {"bytes": b"no image", "path": None}
    cells[3] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    columns = {"image": [*cells, None], "label": [0, 1, 2, 0, -1, 1]}
    folder = tmp_path / "bad"
    folder.mkdir()
    table = pyarrow.table(columns, schema=features.arrow_schema)
    parquet.write_table(table, folder / "train.parquet")
    line = refusal(lambda: pack(HubImages(str(folder), 16), tmp_path / "cache"))
    assert "4 unreadable image(s): image 1 (not an image); image 3 (" in line
    assert not list((tmp_path / "cache").iterdir())
    found = survey(HubImages(str(folder), 16))
    assert found.bad[2:] == [
        "image 4 (label -1; data.label=none ignores labels)",
        "image 5 (empty)",
    ]
    packed = pack(HubImages(str(folder), 16, skip_bad=True), tmp_path / "cache")
    assert packed.labels.tolist() == [0, 2]


def test_a_missing_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert install_extra("hf") in refusal(lambda: len(HubImages(str(folder))))


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        reason = ConnectionError("Name or service not known")
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection") from reason

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    line = refusal(lambda: pack(HubImages("user/set", 16), tmp_path / "cache"))
    assert "the Hub cannot be reached (Name or service not known); check the network" in line
    assert not (tmp_path / "cache").exists()


# --- the commands ---


def test_train_resume_and_other_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Cli(monkeypatch, capsys)
    tiny = [word for word in TINY if not word.startswith(("data", "total_kimg"))]
    hf = ["data=hf", "data.repo=animals", "data.resolution=16"]
    words = [*tiny, *hf, "model=conv", "size=xs", "total_kimg=0.016", "run_dir=r"]
    assert run.train(*words)[0] == 0
    assert run.train(*words, "data.streaming=false")[0] == 0  # the same images
    line = message(*run.train(*words, "data.split=test"))
    assert "was trained on other data (data.split was train, is test" in line
    code, out, _ = run(cli.data_main, "info", *hf, "sheet=sheet.png")
    assert code == 0
    assert "cat 7, dog 7, hen 6" in out
    with Image.open("sheet.png") as sheet:
        assert sheet.size == (128 + 12 * 64, 3 * 64)
    assert "commit" not in out


CHILD = """
import contextlib, io, json, os, sys
from pathlib import Path
import huggingface_hub.constants
from vgan import cli
for name, env, words in json.loads(sys.argv[1]):
    os.environ.update(env)
    huggingface_hub.constants.HF_HUB_OFFLINE = name == "offline"
    sys.argv = ["vgan-data", *words]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.data_main()
        except SystemExit as e:
            code = e.code or 0
    home = Path(os.environ["HF_HOME"])
    kept = [p.name for p in home.rglob("*") if p.suffix in (".parquet", ".arrow")]
    print(json.dumps([name, code, out.getvalue(), err.getvalue(), kept]), flush=True)
    print(f"-- {name}", file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vgan-data says, in one process, of sets on a server that stands in for the Hub."""
    tmp_path = tmp_path_factory.mktemp("hub")
    for name in ("set", "private", "gated"):
        write_set(tmp_path / "root" / "user" / name, make_set())
    for name in ("set", "gated"):
        (tmp_path / "root" / "user" / name / "README.md").write_text("A set.")
    cases: list[tuple[str, dict[str, str], str]] = [
        ("streamed", {}, "do=pack data.repo=user/set data.streaming=true"),
        ("offline", {}, "do=pack data.repo=user/set"),
        ("pinned", {}, f"do=pack data.repo=user/set data.revision={hub_sets_server.COMMIT}"),
        ("downloaded", {}, "do=info data.repo=user/set"),
        ("missing", {}, "do=pack data.repo=user/nothing"),
        ("gated", {}, "do=pack data.repo=user/gated"),
        ("revision", {}, "do=pack data.repo=user/set data.revision=v2"),
        ("split", {}, "do=pack data.repo=user/set data.split=val"),
        ("private", {}, "do=pack data.repo=user/private"),
        ("token", {"HF_TOKEN": hub_sets_server.TOKEN}, "do=pack data.repo=user/private"),
    ]
    with hub_sets_server.serve(tmp_path / "root") as (url, log):
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        environment |= {"VGAN_CACHE": str(tmp_path / "cache"), "no_proxy": "127.0.0.1"}
        environment.pop("HF_TOKEN", None)
        jobs = [(n, e, ["data=hf", "data.resolution=16", *w.split()]) for n, e, w in cases]
        command = [sys.executable, "-c", CHILD, json.dumps(jobs)]
        child = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert child.returncode == 0, child.stderr
    found = {name: rest for name, *rest in map(json.loads, child.stdout.splitlines())}
    assert found.keys() == {name for name, *_ in cases}
    cached = sorted(path.name for path in (tmp_path / "cache").iterdir())
    return {**found, "log": log, "cached": cached}


def digest_of(out: str) -> str:
    return out.partition("digest")[2].split()[0]


def test_sets_of_the_hub_are_streamed_or_downloaded(
    answers: dict[str, Any], tmp_path: Path
) -> None:
    code, out, err, kept = answers["streamed"]
    assert (code, err, kept) == (0, "", [])
    assert "read as a stream; only the packed images are kept" in out
    expected = pack(HubImages(str(write_set(tmp_path / "x", make_set())), 16), tmp_path / "c")
    assert digest_of(out) == expected.digest
    code, out, _, kept = answers["downloaded"]
    assert code == 0
    assert digest_of(out) == expected.digest
    assert any(name.endswith(".arrow") for name in kept)
    assert f"commit      {hub_sets_server.COMMIT}" in out


@pytest.mark.parametrize("name", ["offline", "pinned"])
def test_a_packed_set_opens_without_the_hub(answers: dict[str, Any], name: str) -> None:
    code, out, err, kept = answers[name]
    assert (code, err, kept) == (0, "", [])
    assert digest_of(out) == digest_of(answers["streamed"][1])


def test_a_private_set_is_read_with_the_token(answers: dict[str, Any]) -> None:
    assert answers["token"][0] == 0
    assert digest_of(answers["token"][1]) == digest_of(answers["streamed"][1])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing", "data.repo=user/nothing: no such folder, and no such data set on the Hub"),
        ("private", "or a private one; check the name, or log in with hf auth login or HF_TOKEN"),
        ("gated", "is gated; ask for access at https://huggingface.co/datasets/user/gated"),
        ("revision", "data.revision=v2: no such branch, tag or commit"),
        ("split", "data.split=val: no such split; use one of train, test"),
    ],
)
def test_what_the_hub_refuses_is_one_line(answers: dict[str, Any], name: str, says: str) -> None:
    assert says in message(*answers[name][:3])
    assert len(answers["cached"]) == 2  # user/set and user/private
