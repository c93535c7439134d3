from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vgan.errors import UserError
from vgan.images import enlarge, grid, to_float, to_uint8, write_png


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
