import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vgan.data.shapes import Shapes
from vgan.data.store import pack
from vgan.evaluate import Evaluator, Result, format_values, read_records, table
from vgan.models.generator import PlainGenerator


class Means(torch.nn.Module):
    """Features that anyone can work out: the means of the channels, and of the two halves of the first."""

    protocol = "means"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = images.float() / 255
        return torch.cat([x.mean((2, 3)), x[:, :1, :8].mean((2, 3)), x[:, :1, 8:].mean((2, 3)) ** 2], 1), None


class Repeating(torch.nn.Module):
    """A generator that draws the reals themselves."""

    def __init__(self, images: Tensor, label_dim: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.images, self.at, self.z_dim, self.label_dim, self.asked = images, 0, 4, label_dim, torch.zeros(0, label_dim)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        self.asked = torch.cat([self.asked, c])
        self.at += len(z)
        return self.images[(torch.arange(len(z)) + self.at - len(z)) % len(self.images)]


@pytest.fixture
def dataset(tmp_path: Path) -> object:
    return pack(Shapes(16, 300), tmp_path)


def reals_of(dataset: object) -> Tensor:
    return torch.from_numpy(dataset.images[:].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1  # type: ignore[attr-defined]


def test_the_reals_themselves_are_at_distance_nothing(dataset: object, tmp_path: Path) -> None:
    evaluator = Evaluator(dataset, Means(), ["fid", "kid", "pr"], 300, 1, 0, 64)  # type: ignore[arg-type]
    same = evaluator(Repeating(reals_of(dataset)), "fp32", tmp_path).values
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    assert (same["precision"], same["recall"]) == (1, 1)
    darker = evaluator(Repeating(reals_of(dataset) * 0.5), "fp32", tmp_path).values
    assert darker["fid"] > 0.01
    assert darker["precision"] < 1


def test_labels_follow_the_data_and_the_seed(dataset: object, tmp_path: Path) -> None:
    evaluator = Evaluator(dataset, Means(), ["fid"], 300, 2, 5, 64)  # type: ignore[arg-type]
    G = Repeating(reals_of(dataset), label_dim=8)
    result = evaluator(G, "fp32", tmp_path)
    labels = torch.bincount(torch.from_numpy(dataset.labels), minlength=8)  # type: ignore[attr-defined]
    assert G.asked[:300].sum(0).tolist() == labels.tolist()  # n equals the set: each picture's label once
    assert not torch.equal(G.asked[:300], G.asked[300:])  # and another order with another seed
    assert result.protocol["seeds"] == [5, 6]
    assert result.values["fid_std"] >= 0


def test_real_features_are_kept_by_data_and_protocol(dataset: object, tmp_path: Path) -> None:
    class Counting(Means):
        calls = 0

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
            Counting.calls += 1
            return super().forward(images)

    for expected in (10, 15):  # 5 batches of reals once, 5 of fakes each time
        evaluator = Evaluator(dataset, Counting(), ["fid", "kid"], 300, 1, 0, 64)  # type: ignore[arg-type]
        evaluator(Repeating(reals_of(dataset)), "fp32", tmp_path)
        assert Counting.calls == expected


def test_results_of_two_protocols_are_kept_apart() -> None:
    a, b = Result({"fid": 2.0}, {"reals": "a", "fakes": "100"}), Result({"fid": 1.0}, {"reals": "a", "fakes": "200"})
    text = table([Path("r/a.pt"), Path("r/b.pt"), Path("r/c.pt")], [a, b, a])
    first, second = text.split("NOT comparable")
    assert "r/a.pt   fid 2.000" in first
    assert "r/c.pt" in first
    assert "r/b.pt   fid 1.000" in second
    assert "200" in second


def test_format_of_values() -> None:
    text = format_values({"fid": 12.3456, "fid_std": 0.1, "kid": 0.00123, "kid_ci": 0.0001, "precision": 0.5})
    assert text == "fid 12.346 +- 0.100   kid 0.00123 +- 0.00010   precision 0.500"


def test_records_survive_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"cur_nimg": 1}) + "\n" + '{"cur_nimg": 2, "fi')
    assert read_records(tmp_path) == [{"cur_nimg": 1}]
    assert read_records(tmp_path / "none") == []


def test_plain_generator_can_be_judged(dataset: object, tmp_path: Path) -> None:
    evaluator = Evaluator(dataset, Means(), ["fid"], 40, 1, 0, 16)  # type: ignore[arg-type]
    G = PlainGenerator(8, 16, [16, 8, 8], label_dim=8).eval().requires_grad_(False)
    once, again = (evaluator(G, "fp32", tmp_path).values["fid"] for _ in range(2))
    assert once == again
