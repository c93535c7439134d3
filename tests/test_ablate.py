"""scripts/ablate.py: settings compared at equal images, the same command once more, more rows."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from runs import TINY

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.mark.slow
def test_rows_get_equal_images_a_table_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import ablate

    def call(*words: str) -> None:
        command = ["ablate.py", *TINY, "features=learned", "features.train_kimg=0.1"]
        command += ["--kimg", "0.016", "--seeds", "1", "--n", "64", "--out", str(tmp_path), *words]
        monkeypatch.setattr(sys, "argv", command)
        ablate.main()

    rows = ["--variant", "1.5", "", "--variant", "hinge", "loss=hinge"]
    call(*rows)
    table = (tmp_path / "ladder.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[-2:]] == ["| 1.5", "| hinge"]
    ladder = json.loads((tmp_path / "ladder.json").read_text())
    assert (tmp_path / "1.5-0.log").exists()
    distances = [row["scores"][0]["fid"] for row in ladder.values()]
    assert distances[0] != distances[1]
    config = (tmp_path / "hinge-0" / "config.yaml").read_text()
    assert "name: hinge" in config
    assert "total_kimg: 0.016" in config
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (2 * 8 * 16 + 16, 8 * 16)

    trained = (tmp_path / "hinge-0" / "done").stat().st_mtime_ns
    call(*rows)
    assert (tmp_path / "hinge-0" / "done").stat().st_mtime_ns == trained
    assert (tmp_path / "ladder.md").read_text() == table
    call(*rows, "--variant", "lsgan", "loss=lsgan")
    longer = (tmp_path / "ladder.md").read_text().splitlines()
    assert longer[:-1] == table.splitlines()
    assert longer[-1].startswith("| lsgan | ")
    assert (tmp_path / "hinge-0" / "done").stat().st_mtime_ns == trained
    with pytest.raises(SystemExit, match="hinge had other overrides"):
        call(*rows[:-1], "loss=lsgan")
    for other in ([*rows, "gamma=1"], [*rows, "--n", "32"], []):
        with pytest.raises(SystemExit, match="holds another comparison"):
            call(*other)
    with pytest.raises(SystemExit, match="two rows would share a folder"):
        call(*rows, "--variant", "hin ge", "", "--variant", "hin-ge", "")
    with pytest.raises(SystemExit, match=r"run-0\.log: exit code 1: vgan-train: total_kimg=0"):
        ablate.train([*TINY, "total_kimg=0"], tmp_path / "run-0")
