import json
from pathlib import Path

import pytest
import torch
from runs import train_in_process
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from vgan.runs.log_writer import RunLogger
from vgan.training.state import Stats


def test_means_over_the_steps_that_had_the_name() -> None:
    stats = Stats()
    stats.add({"a": torch.tensor(1.0), "b": torch.tensor(10.0)})
    stats.add({"a": torch.tensor(3.0)})
    assert stats.means() == {"a": 2.0, "b": 10.0}
    assert stats.means() == {}


def test_journal_is_cut_back_to_where_a_run_goes_on(tmp_path: Path) -> None:
    journal = RunLogger(tmp_path, 0)
    for cur_nimg in (100, 200, 300):
        journal.write(cur_nimg, {"x": cur_nimg / 2})
    journal.close()
    with open(tmp_path / "stats.jsonl", "a") as f:
        f.write('{"cur_nimg": 400, "x"')  # killed while writing
    RunLogger(tmp_path, 200).close()
    ticks = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert ticks == [{"cur_nimg": 100, "x": 50}, {"cur_nimg": 200, "x": 100}]
    assert list(tmp_path.glob("events.out.tfevents.*"))


GRIDS = {"reals", "fakes", "looks_fake"}


@pytest.mark.parametrize(("model", "names"), [("adaptive", {*GRIDS, "attention"}), ("sep", GRIDS)])
def test_maps_are_in_tensorboard(tmp_path: Path, model: str, names: set[str]) -> None:
    train_in_process(
        tmp_path / "r", "total_kimg=0.04", f"model={model}", "size.attention_resolutions=[8]"
    )
    (path,) = (tmp_path / "r").glob("events*")
    values = [v for event in EventFileLoader(str(path)).Load() for v in event.summary.value]
    seen = {v.tag for v in values if v.metadata.plugin_data.plugin_name == "images"}
    assert seen == names
