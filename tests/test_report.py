"""vgan-report: the page shows what the run folder holds, and escapes all of it."""

import base64
import hashlib
import html
import io
import json
import math
import os
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from runs import TINY, train_in_process
from test_cli import Cli, message

import vgan
from vgan import cli
from vgan.apps.charts import Curve, chart, label, log_ticks, thin, ticks
from vgan.apps.command_line import command
from vgan.runs.log_reader import read_run
from vgan.schema import CONFIG_DIR

PROTOCOL = {
    "features": "learned",
    "reals": "shapes, 64",
    "fakes": "40",
    "labels": "none",
    "seeds": [0, 1],
}
cli.register_schemas()
EVIL = "<script>alert(1)</script>\"'&${seed}"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(monkeypatch, capsys)


class Page(HTMLParser):
    """The elements of a page, its text, and whether every element is closed."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.source = Path(path).read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self._open: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in ("meta", "img", "input"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += data + " "

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and kind in f" {a.get('class', '')} "]

    def charts(self) -> dict[str, Any]:
        names = re.findall(r'data-chart="(.*?)"><figcaption><b>(.*?)</b>', self.source)
        return {html.unescape(name): json.loads(html.unescape(data)) for data, name in names}

    def is_closed(self) -> None:
        """Nothing is loaded from anywhere, and no script runs but the page's own."""
        assert all(a["src"].startswith("data:image/") for _, a in self.elements if "src" in a)
        assert not any(
            k.startswith("on") or k in ("href", "style", "action")
            for _, a in self.elements
            for k in a
        )
        assert len(self.all("script")) == len(self.all("style")) == 1
        policy = next(a["content"] for a in self.all("meta") if "http-equiv" in a)
        assert policy.startswith("default-src 'none'; img-src data:;")
        for tag in ("style", "script"):
            text = re.search(rf"<{tag}>(.*?)</{tag}>", self.source, re.DOTALL)
            assert text
            digest = base64.b64encode(hashlib.sha256(text[1].encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True)  # type: ignore[return-value]


def reproduced(config: dict[str, Any]) -> str | None:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return command(config, "outputs/again", cli.compose_train)


def make_run(
    folder: Path, ticks: int = 5, grids: int = 3, config: dict[str, Any] | None = None, **more: Any
) -> Path:
    """A run folder as vgan-train leaves it, without the training. more: keys of every tick."""
    folder.mkdir(parents=True)
    config = config or {**composed(*TINY), "run_dir": str(folder)}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    values = {"loss/D": 1.5, "loss/G": 2.5, "speed/img_per_s": 120.0, "augment_p": 0.0, **more}
    lines = [
        {"cur_nimg": 1000 * (i + 1), **values, "speed/session_s": 8.0 * (i + 1)}
        for i in range(ticks)
    ]
    (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in range(grids):
        Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(
            folder / f"fakes-{1000 * (i + 1):09d}.png"
        )
    return folder


def add(folder: Path, name: str, *lines: Any) -> None:
    with open(folder / name, "a", encoding="utf-8") as f:
        f.write(
            "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        )


# --- what works ---------------------------------------------------------------------------------


def test_a_page_about_a_run(run: Cli, tmp_path: Path) -> None:
    train_in_process(tmp_path / "mine", "total_kimg=0.08")
    start = json.loads((tmp_path / "mine" / "starts.jsonl").read_text())
    add(tmp_path / "mine", "starts.jsonl", {**start, "cur_nimg": 40})
    for nimg, fid in ((40, 5.5), (80, 3.5)):
        add(
            tmp_path / "mine",
            "metrics.jsonl",
            {"cur_nimg": nimg, "fid": fid, "kid": 0.5, "protocol": PROTOCOL},
        )
    code, out, _ = run(cli.report_main, "run=mine")
    assert code == 0
    assert re.search(r"^mine/report.html \(0\.\d MB\)$", out.replace("\\", "/"), re.M)
    page = Page("mine/report.html")
    page.is_closed()
    for fact in (
        "attn, size xs, loss rpgan, data shapes",
        "16 px, 64 images, 8 classes",
        "80 of 80",
        f"vgan {vgan.__version__}, torch",
    ):
        assert fact in page.text
    parameters = re.search(r"([\d,]+) G \+ ([\d,]+) D", page.text)
    assert parameters
    assert int(parameters[1].replace(",", "")) > 1000
    assert "resume" in page.text
    assert "shapes, 64" in page.text  # the protocol
    assert "All 2 evaluations" in page.text
    drawn = page.charts()
    assert drawn["Losses"]["curves"][0]["x"] == [0.04, 0.08]
    assert {
        "Logits",
        "Gradient penalties",
        "Gradient norms",
        "Speed (images/s)",
        "fid",
    } <= drawn.keys()
    assert "kid" not in drawn  # it did not move
    assert "watchdog:\n  max_rollbacks: 3" in page.text  # the config
    assert len(page.all("img")) == 1 + len(list(Path("mine").glob("fakes-*.png")))  # and the reals


def test_grids_are_thinned_and_the_last_stays_and_is_shown(run: Cli, tmp_path: Path) -> None:
    make_run(tmp_path / "r", ticks=900, grids=100)
    (tmp_path / "r" / "fakes-x.png").write_text("")
    (tmp_path / "r" / "fakes-000001000.png").write_bytes(b"no picture")
    (tmp_path / "r" / "fakes-000100000.png").write_bytes(
        (tmp_path / "r" / "fakes-000099000.png").read_bytes()
    )
    run(cli.report_main, "run=r")
    page = Page("r/report.html")
    images = page.all("img")
    assert len(images) == 24
    assert ["hidden" in image for image in images] == [True] * 23 + [False]
    assert images[-1]["data-at"] == "100.0 kimg"
    content = base64.b64decode(images[-1]["src"].partition(",")[2])
    with Image.open(io.BytesIO(content)) as image:
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - 98).max() <= 2
    slider = page.all("input")[0]
    assert (slider["max"], slider["value"]) == ("23", "23")
    assert len(page.charts()["Losses"]["curves"][0]["x"]) == 300  # of 900
    assert len(page.source) < 100_000


@pytest.mark.skipif(os.name == "nt", reason="its file names are harmless")
def test_what_a_folder_says_cannot_become_part_of_the_page(run: Cli, tmp_path: Path) -> None:
    config = composed(*TINY)
    config["data"]["name"] = config["model"]["name"] = config["loss"][EVIL] = EVIL
    folders = []
    for name in ("<script>alert(1)<", "b&<img src=x onerror=alert(1)>"):
        folder = make_run(tmp_path / name, config={**config, "run_dir": name, "holdout": len(name)})
        add(
            folder,
            "stats.jsonl",
            {"cur_nimg": 1000, "watchdog": EVIL},
            {"cur_nimg": 1000, EVIL: 1.0, "loss/D": EVIL},
        )
        add(
            folder,
            "metrics.jsonl",
            {
                "cur_nimg": 1000,
                "fid": 3,
                EVIL: 1,
                "protocol": {**PROTOCOL, EVIL: EVIL, "seeds": [EVIL]},
            },
        )
        first = {
            "cur_nimg": 0,
            "vgan": EVIL,
            "device": EVIL,
            "precision": [EVIL],
            "parameters": EVIL,
            "data": {"images": EVIL},
        }
        add(folder, "starts.jsonl", first, first | {"time": EVIL, "device": "\ud800"})
        folders.append(f"'{name}'")
    for argv in ([f"run={folders[0]}"], [f"run=[{','.join(folders)}]"]):
        code, _, err = run(cli.report_main, *argv, "out=page.html")
        assert (code, err) == (0, "")
        page = Page("page.html")
        page.is_closed()
        assert page.text.count(EVIL) >= 6


def test_damaged_lines_are_left_out_and_what_is_not_finite_is_a_gap(
    run: Cli, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "r", ticks=3)
    add(
        folder,
        "stats.jsonl",
        '{"cur_nimg": 4000, "loss/D": NaN, "loss/G": 1e999}',
        '{"cur_nimg": 5000, "loss/D": null}',
    )
    add(
        folder,
        "stats.jsonl",
        "{",
        "[1]",
        '{"cur_nimg": -1}',
        '{"cur_nimg": 1e3}',
        "[" * 100_000,
        '{"cur_nimg": 6000, "loss/D": 9}',
    )
    with open(folder / "stats.jsonl", "a") as f:
        f.write('{"cur_nimg": 7000, "lo')
    code, out, _ = run(cli.report_main, "run=r")
    assert code == 0
    assert "r: 5 damaged lines of stats.jsonl left out" in out
    page = Page("r/report.html")
    assert "5 damaged lines of stats.jsonl left out" in page.text
    assert page.charts()["Losses"]["curves"][0] == {
        "x": [1, 2, 3, 4, 5, 6],
        "y": [1.5, 1.5, 1.5, None, None, 9],
    }
    assert "6,000 of 400" in page.text


def test_several_runs_side_by_side(run: Cli, tmp_path: Path) -> None:
    make_run(tmp_path / "a", config=composed(*TINY))
    make_run(
        tmp_path / "b",
        ticks=4,
        config=composed(*TINY, "loss=hinge", "+data.speed=[1,2]"),
        **{"loss/D": 7.0, "grad_norm/D": 3.0},
    )
    add(tmp_path / "a", "metrics.jsonl", {"cur_nimg": 2000, "fid": 31.5, "protocol": PROTOCOL})
    add(
        tmp_path / "b",
        "metrics.jsonl",
        {"cur_nimg": 1000, "fid": 99.5, "fid_std": 1.5, "protocol": PROTOCOL},
    )
    add(tmp_path / "b", "metrics.jsonl", {"cur_nimg": 3000, "fid": 29.5, "protocol": PROTOCOL})
    add(
        tmp_path / "b",
        "metrics.jsonl",
        {"cur_nimg": 4000, "fid": 12.5, "protocol": {**PROTOCOL, "fakes": "50000"}},
    )
    code, out, err = run(cli.report_main, "run=[a,b]")
    assert (code, err) == (0, "")
    assert out.startswith("report.html")
    page = Page("report.html")
    page.is_closed()
    curves = page.charts()["Losses: D"]["curves"]
    assert [len(c["x"]) for c in curves] == [5, 4]
    assert [c["y"][0] for c in curves] == [1.5, 7.0]
    assert [c["y"] for c in page.charts()["Gradient norms: D"]["curves"]] == [
        [3, 3, 3, 3]
    ]  # a has none
    differences = page.source.partition("Settings that differ")[2].partition("</table>")[0]
    assert re.findall(r'<th scope="row"><code>(.*?)</code>', differences) == [
        "loss.name",
        "data.speed",
    ]
    assert "<i>none</i>" in differences  # a has no data.speed
    tables = page.source.partition("<h2>Quality</h2>")[2].split("<h3>")[1:3]
    assert ["31.500" in t and "29.500" in t and "12.500" not in t for t in tables] == [True, False]
    assert "Not evaluated by this protocol: a" in tables[1]
    assert page.text.count("different protocols") == 1
    assert len(page.charts()["fid"]["curves"]) == 2
    assert len(page.all("img")) == 2


def test_time_and_resumes_follow_from_the_statistics(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", ticks=3)  # to 24 s
    add(folder, "stats.jsonl", {"cur_nimg": 4000, "loss/D": 1, "speed/session_s": 5.0})
    add(folder, "stats.jsonl", {"cur_nimg": 5000, "loss/D": 1, "speed/session_s": 10.0})
    log = read_run(str(folder), "r")
    assert log.seconds == 34
    assert [nimg for nimg, _ in log.resumes] == [3000]


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["total_kimg=20", "loss=hinge"],
        ["data=cifar10", "model=sep", "size=m", "augment=adaptive", "features=learned", "seed=3"],
        [
            "data=folder",
            "data.path='my pictures/it\\'s $HOME; rm'",
            "data.labels='null'",
            "batch_gpu=4",
        ],
        [
            "experiment=few",
            "data.path=x",
            "schedule_kimg=7",
            "model.generator.conv=dense",
            "+optim.optimizer.weight_decay=1e-05",
        ],
        [
            "eval.metrics=[fid,kid]",
            "size.g_widths=[8,8,8]",
            "+data.extra={a: [1, null], b: 'true'}",
            "compile=true",
        ],
        ["optimizer=adam", "~optim.optimizer.fused", "data.cache_dir='12'"],
    ],
)
def test_the_command_gives_the_same_config(overrides: list[str]) -> None:
    config = composed(*overrides, "run_dir=outputs/again")
    line = reproduced(config)
    assert line is not None
    program, *found = shlex.split(line)
    assert program == "vgan-train"
    assert composed(*found) == config
    assert len(found) <= len(overrides) + 16


def test_the_command_is_short() -> None:
    assert reproduced(composed("total_kimg=20", "loss=hinge")) == (
        "vgan-train data=shapes loss=hinge total_kimg=20.0 run_dir=outputs/again"
    )


def test_no_command_where_none_is_true() -> None:
    config = composed()
    for name, value in (
        ("device", "${oc.env:HOME}"),  # would be read from the environment
        ("device", "cpu\nrm"),
        ("total_kimg", "many"),
        ("data", {"name": "../../elsewhere"}),
        ("loss", []),
        ("x y", 1),
    ):
        assert reproduced({**config, name: value}) is None, name


# --- charts -------------------------------------------------------------------------------------


def test_ticks_and_labels() -> None:
    assert ticks(0, 20) == [0, 5, 10, 15, 20]
    assert ticks(-0.1, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert log_ticks(0.002, 500) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert len(log_ticks(1e-12, 1e12)) <= 6
    assert [label(v) for v in (0, 0.25, 1000, 25_000, 3e-4, -1.5, 2_500_000, 1234.5)] == [
        "0", "0.25", "1k", "25k", "3e-4", "-1.5", "2.5M", "1234",
    ]  # fmt: skip


def test_thinning_takes_means_and_keeps_gaps() -> None:
    x, y = thin(range(1, 1001), [1.0] * 500 + [None] + [3.0] * 499, 100)
    assert (len(x), x[0], x[-1]) == (100, 10, 1000)
    assert [y[0], y[50], y[99]] == [1, None, 3]
    assert thin([1, 2], [1.0, None]) == ([1, 2], [1.0, None])


def test_charts_of_extremes() -> None:
    assert chart("empty", [Curve("a", [1, 2], [None, None])]) == ""
    assert chart("empty", []) == ""
    for values in (
        [5.0],
        [0.0, 0.0],
        [1e-300, 1e300],
        [-1e299, 1e299],
        [3.0, None, 4.0],
        [1e-9, 1.0, None],
    ):
        svg = chart("t", [Curve("a", range(len(values)), values)])
        path = re.search(r'class="line c0" d="(.*?)"', svg)
        assert path
        numbers = [float(v) for v in re.findall(r"-?[\d.]+", path[1])]
        assert all(math.isfinite(v) and -1 <= v <= 401 for v in numbers), values
        assert path[1].count("M") == 1 + (values == [3.0, None, 4.0])


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        ([], 2, "run: must be given, as run=VALUE"),
        (["run=nowhere"], 1, "run=nowhere: no such folder; give the run_dir of a vgan-train"),
        (["run=empty"], 1, r"run=empty: not a run folder \(it holds no config.yaml\)"),
        (["run=young"], 1, "run=young: has no statistics yet; they come every tick_kimg=0.04"),
        (["run=broken"], 1, "broken/config.yaml: cannot be read as YAML"),
        (["run=bomb"], 1, "bomb/config.yaml: cannot be read as YAML .too many"),
        (["run=text"], 1, "text/config.yaml: not the config of a run"),
        (["run=[]"], 1, r"run=\[\]: must be a run folder, or several as \[a,b\]"),
        (["run={a:1}"], 1, "run={'a': 1}: must be a run folder"),
        (["run=[r,./r]"], 1, "names a run twice"),
        (["run=[1,2,3,4,5,6,7,8,9]"], 1, "has 9 runs; compare at most 8"),
        (["run=[r,nowhere]"], 1, "run=nowhere: no such folder"),
        (
            ["run=r", "out=page.pdf"],
            1,
            "out=page.pdf: unknown kind .pdf; give a name ending in .html",
        ),
        (["run=r", "out=page"], 1, "out=page: unknown kind of file; give a name ending in .html"),
        (["run=r", "out=file/page.html"], 1, r"file/page.html: cannot be written \(\w+"),
        (["run=r", "out=folder.html"], 1, "folder.html: cannot be written"),
        (["run=r", "colour=red"], 2, "colour=red: unknown key colour"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    run: Cli, tmp_path: Path, argv: list[str], code: int, says: str
) -> None:
    make_run(tmp_path / "r")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "young", ticks=0)
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    for name, text in (("broken", "a: [1"), ("bomb", bomb), ("text", "hello")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    line = message(*run(cli.report_main, *argv), expect_code=code)
    assert re.match(f"vgan-report: .*{says}", line.replace("\\", "/")), line
    assert sorted(tmp_path.rglob("*")) == before


def test_help_names_the_keys(run: Cli) -> None:
    out = run(cli.report_main, "--help")[1]
    assert re.search(r"^  run .*run folder", out, re.M)
    assert re.search(r"^  out .*\.html", out, re.M)
