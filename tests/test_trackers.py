"""Experiment trackers get what TensorBoard gets.

W&B is the real library, offline. Trackio and MLflow are heavy: modules in their place record the
calls that they get.
"""

import io
import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from runs import TINY, lines_of, train_in_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from vgan import cli
from vgan.config import TrackerConfig
from vgan.runs.trackers import start_tracker
from vgan.runtime.errors import UserError
from vgan.runtime.extras import install_extra

SHORT = ["total_kimg=0.08", "snapshot_kimg=0.04"]
LONGER = ["total_kimg=0.16", "snapshot_kimg=0.04"]


class Recorder:
    """The values and images of one run in a tracker, and the ids of its sessions."""

    def __init__(self) -> None:
        self.sessions: list[str] = []
        self.names: list[str] = []
        self.configs: list[dict[str, Any]] = []
        self.values: dict[str, dict[int, Any]] = {}
        self.images: dict[str, dict[int, tuple[int, int]]] = {}
        self.ended = 0
        self.broken = False

    def add(self, metrics: dict[str, Any], step: int) -> None:
        if self.broken:
            raise ConnectionError("no route to host\nand so on")
        for name, value in metrics.items():
            self.values.setdefault(name, {})[step] = value

    def add_image(self, image: Any, name: str, step: int) -> None:
        self.images.setdefault(name, {})[step] = image.size

    def end(self) -> None:
        self.ended += 1


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def mlflow(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A module in the place of mlflow."""
    module, exceptions = ModuleType("mlflow"), ModuleType("mlflow.exceptions")

    def start_run(run_id: str | None, run_name: str | None) -> Any:
        assert (run_id is None) != (run_name is None)
        recorder.sessions.append(run_id or "from-the-server")
        recorder.names += [run_name] if run_name else []
        return SimpleNamespace(info=SimpleNamespace(run_id=recorder.sessions[-1]))

    def log_metrics(metrics: dict[str, float], step: int) -> None:
        assert all(type(value) is float for value in metrics.values())
        recorder.add(metrics, step)

    module.exceptions = exceptions  # type: ignore[attr-defined]
    exceptions.MlflowException = type("MlflowException", (Exception,), {})  # type: ignore[attr-defined]
    module.__dict__.update(
        set_experiment=lambda name: recorder.names.append(name),
        start_run=start_run,
        log_params=recorder.configs.append,
        log_metrics=log_metrics,
        set_tags=lambda texts: None,
        log_image=lambda image, key, step: recorder.add_image(image, key, step),
        end_run=recorder.end,
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", exceptions)
    return recorder


@pytest.fixture
def trackio(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A module in the place of trackio."""
    module = ModuleType("trackio")

    def init(project: str, name: str, config: dict[str, Any], resume: str) -> Any:
        assert resume == "allow"
        recorder.sessions.append(name)
        recorder.names.append(project)
        recorder.configs.append(config)

        def log(metrics: dict[str, Any], step: int) -> None:
            for key, value in metrics.items():
                if hasattr(value, "size"):
                    recorder.add_image(value, key, step)
                else:
                    recorder.add({key: value}, step)

        return SimpleNamespace(log=log, finish=recorder.end)

    module.__dict__.update(init=init, Image=lambda image: image)
    monkeypatch.setitem(sys.modules, "trackio", module)
    return recorder


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of W&B's files, with W&B offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()  # it reads the environment once
    return tmp_path / "wandb"


def read_blocks(content: bytes) -> Iterator[bytes]:
    """Yield the records of a W&B file, in LevelDB's log format of 32 KiB blocks."""
    at, record = 7, b""  # after the header of the file
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # the rest of a block is padding
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_wandb(folder: Path) -> tuple[list[Record], list[dict[str, Any]]]:
    """Return the run records and the logged rows of all sessions in W&B's offline files."""
    runs, rows = [], []
    for path in sorted(folder.glob("offline-run-*/run-*.wandb")):
        for record in map(Record.FromString, read_blocks(path.read_bytes())):
            if record.HasField("run"):
                runs.append(record.run)
            elif record.HasField("history"):
                row: dict[str, Any] = {}
                for item in record.history.item:
                    name, *of_an_image = [*item.nested_key] or [item.key]
                    row[name] = {} if of_an_image else json.loads(item.value_json)
                rows.append(row)
    return runs, rows


def tensorboard(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir), {"scalars": 0, "images": 0})
    found.Reload()
    return found


def assert_same_curves(run_dir: Path, values: dict[str, dict[int, Any]]) -> None:
    found = tensorboard(run_dir)
    assert set(found.Tags()["scalars"]) <= values.keys()
    for name in found.Tags()["scalars"]:
        ours = {event.step: event.value for event in found.Scalars(name)}
        assert values[name].keys() == ours.keys()
        assert list(values[name].values()) == pytest.approx(list(ours.values()), nan_ok=True)


def test_wandb_offline_gets_curves_grids_and_config_and_goes_on_after_a_resume(
    tmp_path: Path, offline: Path
) -> None:
    run_dir = tmp_path / "faces"
    tracker = ["tracker=wandb", "tracker.project=gans"]
    train_in_process(run_dir, *SHORT, *tracker)
    train_in_process(run_dir, *LONGER, *tracker)

    wandb.teardown()  # its own process may still be writing
    runs, rows = read_wandb(offline)
    (id,) = {run.run_id for run in runs}
    assert json.loads((run_dir / "tracker.json").read_text()) == {"wandb": id}
    assert {(run.project, run.display_name) for run in runs} == {("gans", "faces")}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["batch_size"] == 8
    assert config["loss"]["name"] == "rpgan"
    assert len(list(offline.glob("offline-run-*"))) == 2

    values: dict[str, dict[int, Any]] = {}
    images: dict[str, list[int]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, dict):
                images.setdefault(name, []).append(row["cur_nimg"])
            else:
                values.setdefault(name, {})[row["cur_nimg"]] = value
    assert_same_curves(run_dir, values)
    found = tensorboard(run_dir)
    shown = {name: [i.step for i in found.Images(name)] for name in found.Tags()["images"]}
    assert shown == images
    assert {"reals", "fakes", "attention", "patch_logits"} <= images.keys()


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_trackers_get_the_same_as_tensorboard(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    recorder, run_dir = request.getfixturevalue(name), tmp_path / "faces"
    train_in_process(run_dir, *SHORT, f"tracker={name}")
    train_in_process(run_dir, *LONGER, f"tracker={name}")

    assert len(recorder.sessions) == 2
    assert len(set(recorder.sessions)) == 1
    assert "vgan" in recorder.names
    assert any(n.startswith("faces") for n in recorder.names + recorder.sessions)
    if name == "mlflow":  # it refuses to change a parameter, so that they are set once
        (config,) = recorder.configs
        assert config["loss.name"] == "rpgan"
    else:
        assert [config["total_kimg"] for config in recorder.configs] == [0.08, 0.16]
    assert recorder.ended == 2
    assert_same_curves(run_dir, recorder.values)
    shown = tensorboard(run_dir)
    for image in shown.Tags()["images"]:
        sizes = {i.step: (i.width, i.height) for i in shown.Images(image)}
        assert recorder.images[image] == sizes


def test_a_failure_in_the_middle_costs_one_warning(
    tmp_path: Path, mlflow: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    train_in_process(run_dir, *SHORT, "tracker=mlflow")
    mlflow.broken = True
    train_in_process(run_dir, *LONGER, "tracker=mlflow")
    assert [line["cur_nimg"] for line in lines_of(run_dir / "stats.jsonl")] == [40, 80, 120, 160]
    warnings = [line for line in capsys.readouterr().out.splitlines() if "tracker=" in line]
    assert warnings == ["tracker=mlflow: no route to host; training continues without it"]
    assert mlflow.ended == 1


def test_a_tracker_that_cannot_begin_ends_a_new_run_but_not_a_resumed_one(
    tmp_path: Path,
    mlflow: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unreachable(name: str) -> None:
        raise sys.modules["mlflow.exceptions"].MlflowException("server is down")

    monkeypatch.setattr(sys.modules["mlflow"], "set_experiment", unreachable)
    cfg = TrackerConfig("mlflow", "vgan")
    with pytest.raises(UserError, match="tracker=mlflow: server is down"):
        start_tracker(cfg, tmp_path, {}, cur_nimg=0)
    start_tracker(cfg, tmp_path, {}, cur_nimg=8).log(8, {"x": 1.0})
    assert "training continues" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_only_rank_0_reports(
    tmp_path: Path, mlflow: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    reporter = start_tracker(TrackerConfig("mlflow", "vgan"), tmp_path, {}, 0)
    reporter.log(8, {"x": math.nan})
    reporter.image(8, "grid", np.zeros((4, 4), np.uint8))
    assert not mlflow.sessions
    assert not mlflow.values


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    run_dir = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["vgan-train", *TINY, f"tracker={name}", f"run_dir={run_dir}"])
    with pytest.raises(SystemExit) as e:
        cli.train_main()
    assert e.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"tracker={name}" in line
    assert install_extra(name) in line
    assert not run_dir.exists()


def test_wandb_without_a_login_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    wandb.teardown()
    with pytest.raises(UserError, match=r"tracker=wandb: .*wandb login.*WANDB_MODE=offline"):
        train_in_process(tmp_path / "run", *SHORT, "tracker=wandb")
    assert not (tmp_path / "run").exists()


def test_a_damaged_tracker_json_is_named(tmp_path: Path, mlflow: Recorder) -> None:
    (tmp_path / "tracker.json").write_text("[1,")
    with pytest.raises(UserError, match=r"tracker.json: cannot be read .* delete it"):
        start_tracker(TrackerConfig("mlflow", "vgan"), tmp_path, {}, 0)
