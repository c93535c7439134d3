import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vgan.runtime.errors import UserError
from vgan.runtime.files import PngWriter, write_png
from vgan.runtime.images import enlarge, grid, to_float, to_uint8


def test_uint8_round_trip_and_clipping() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_grid_is_in_reading_order() -> None:
    tiles = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    sheet = grid(tiles, columns=3)
    assert sheet.shape == (4, 6, 3)
    assert sheet[::2, ::2, 0].tolist() == [[0, 1, 2], [3, 4, 0]]
    assert grid(tiles[:, :1]).shape == (4, 6)
    assert enlarge(sheet, 3).shape == (12, 18, 3)


def test_png_is_whole_or_absent(tmp_path: Path) -> None:
    sheet = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    write_png(tmp_path / "new" / "a.png", sheet)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), sheet)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_png(tmp_path / "file" / "a.png", sheet)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.png", "file", "new"]


@pytest.mark.parametrize("channels", [1, 3])
def test_writer_writes_everything_it_was_given(tmp_path: Path, channels: int) -> None:
    sheets = np.random.default_rng(0).integers(0, 256, (300, 8, 8, channels), dtype=np.uint8)
    paths = [tmp_path / "new" / f"{i}.png" for i in range(300)]
    with PngWriter() as writer:
        writer.write(paths[:10], sheets[:10])
        writer.write(paths[10:], sheets[10:])
    for path, sheet in zip(paths, sheets):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image).reshape(sheet.shape), sheet)


def test_writer_reports_what_it_cannot_write_and_leaves_no_thread(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    sheets = np.zeros((300, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="cannot be written"), PngWriter() as writer:  # noqa: PT012
        for i in range(100):
            writer.write([tmp_path / "file" / f"{i}-{j}.png" for j in range(300)], sheets)
    assert not any(t.name.startswith("png") for t in threading.enumerate())
