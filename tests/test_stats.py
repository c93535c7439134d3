import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import train_in_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from vgan.runs.log_reader import read_metrics
from vgan.runs.log_writer import RunLogger, append_metrics
from vgan.training.state import Stats


def test_means_over_the_steps_that_had_the_name() -> None:
    stats = Stats()
    stats.add({"a": torch.tensor(1.0), "b": torch.tensor(10.0)})
    stats.add({"a": torch.tensor(3.0)})
    assert stats.means() == {"a": 2.0, "b": 10.0}
    stats.reset()
    assert stats.means() == {}


GRID = np.zeros((80, 80, 3), dtype=np.uint8)


def log(run_dir: Path, start: int, end: int) -> None:
    """Log a value and a grid every 100 images."""
    logger = RunLogger(run_dir, start)
    for cur_nimg in range(start + 100, end + 1, 100):
        logger.write(cur_nimg, {"x": cur_nimg / 2, "note": "text", "bad": float("inf")})
        logger.image(cur_nimg, "grid", None, GRID)
    logger.close()


def events(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("events.out.tfevents.*"))


def curve(run_dir: Path, name: str = "x") -> dict[int, float]:
    """What TensorBoard shows of a curve: no step comes twice."""
    found = EventAccumulator(str(run_dir), {"scalars": 0})
    found.Reload()
    values = [(event.step, event.value) for event in found.Scalars(name)]
    assert len(values) == len(dict(values))
    return dict(values)


def test_a_resumed_run_overwrites_what_comes_later(tmp_path: Path) -> None:
    log(tmp_path, 0, 300)
    with open(tmp_path / "stats.jsonl", "a") as f:
        f.write('{"cur_nimg": 400, "x"')  # killed while writing
    RunLogger(tmp_path, 200).close()
    ticks = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert ticks == [{"cur_nimg": n, "x": n / 2, "note": "text", "bad": None} for n in (100, 200)]
    assert curve(tmp_path) == {100: 50, 200: 100}
    log(tmp_path, 200, 400)
    assert curve(tmp_path) == {100: 50, 200: 100, 300: 150, 400: 200}


def test_truncate_removes_lines_and_curves(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, 0)
    for cur_nimg in (100, 200, 300):
        logger.write(cur_nimg, {"x": cur_nimg})
    logger.truncate(100)
    logger.write(200, {"x": 7.0})
    logger.close()
    assert curve(tmp_path) == {100: 100, 200: 7}


@pytest.mark.parametrize("harm", ["missing", "begun", "scalar", "image", "behind"])
def test_curves_that_event_files_lack_are_written_again(tmp_path: Path, harm: str) -> None:
    """stats.jsonl is complete; what a full disk or a kill left of the event files is not."""
    log(tmp_path, 0, 200)
    log(tmp_path, 200, 400)
    whole = curve(tmp_path)
    newest = events(tmp_path)[-1]
    content = newest.read_bytes()
    if harm == "missing":
        for path in events(tmp_path):
            path.unlink()
    elif harm == "begun":
        newest.write_bytes(content[:50])
    elif harm == "scalar":
        newest.write_bytes(content[: content.rindex(b"bad") + 5])
    elif harm == "image":
        newest.write_bytes(content[:-10])
    else:
        newest.unlink()
        with open(tmp_path / "stats.jsonl", "a") as f:
            f.write('{"cur_nimg": 450, "x": 225.0}\n')
        whole[450] = 225.0
    RunLogger(tmp_path, 500).close()
    assert curve(tmp_path) == whole
    assert set(curve(tmp_path, "bad")) >= {100, 200, 300, 400}
    log(tmp_path, 500, 600)
    assert curve(tmp_path) == {**whole, 600: 300}


def test_intact_event_files_are_left_alone(tmp_path: Path) -> None:
    log(tmp_path, 0, 300)
    RunLogger(tmp_path, 300).close()
    found = EventAccumulator(str(tmp_path), {"images": 0})
    found.Reload()
    assert [event.step for event in found.Images("grid")] == [100, 200, 300]
    assert events(tmp_path)[-1].stat().st_size < 200


def test_an_unreadable_event_file_does_not_end_the_run(tmp_path: Path) -> None:
    log(tmp_path, 0, 200)
    (tmp_path / "events.out.tfevents.1").write_bytes(b"\xff" * 100)
    (tmp_path / "events.out.tfevents.2").write_bytes(bytes([9] + [0] * 11) + b"\xff" * 100)
    log(tmp_path, 200, 300)
    assert len(curve(tmp_path)) == 3


def test_metrics_are_read_with_the_names_of_today(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    append_metrics(tmp_path, "a.safetensors", 5, {"fid": 2.0}, {"n": 10}, {"best": None})
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('[1]\nnonsense\n{"cur_nimg": -1}\n')
        f.write('{"cur_nimg": 9, "copies": 0.5, "as_asked": 0.9, "classes_seen": 8}\n')
        f.write('{"cur_nimg": 10')
    first = {
        "ckpt": "a.safetensors",
        "cur_nimg": 5,
        "fid": 2.0,
        "best": None,
        "protocol": {"n": 10},
    }
    second = {"cur_nimg": 9, "copy_rate": 0.5, "class_accuracy": 0.9, "classes_covered": 8}
    assert read_metrics(tmp_path) == [first, second]


GRIDS = {"reals", "fakes", "patch_logits"}


@pytest.mark.parametrize(("model", "names"), [("adaptive", {*GRIDS, "attention"}), ("sep", GRIDS)])
def test_maps_are_in_tensorboard(tmp_path: Path, model: str, names: set[str]) -> None:
    train_in_process(
        tmp_path / "r", "total_kimg=0.04", f"model={model}", "size.attention_resolutions=[8]"
    )
    (path,) = (tmp_path / "r").glob("events*")
    values = [v for event in EventFileLoader(str(path)).Load() for v in event.summary.value]
    seen = {v.tag for v in values if v.metadata.plugin_data.plugin_name == "images"}
    assert seen == names
