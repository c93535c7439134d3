import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vgan.data.packed import pack
from vgan.data.shapes import Shapes
from vgan.data.source import Dataset
from vgan.evaluation.evaluate import table
from vgan.evaluation.evaluator import Evaluator, Result, shown_values
from vgan.models.generator import GeneratorBase, PlainGenerator
from vgan.runs.log_reader import read_metrics
from vgan.runtime.console import in_lines
from vgan.runtime.errors import UserError
from vgan.runtime.rng import normal


class Means(torch.nn.Module):
    """Features that are easy to compute: means of the channels, and of halves of the first."""

    protocol = "means"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = images.float() / 255
        return torch.cat(
            [x.mean((2, 3)), x[:, :1, :8].mean((2, 3)), x[:, :1, 8:].mean((2, 3)) ** 2], 1
        ), None


class Repeating(GeneratorBase):
    """A generator that draws the reals themselves."""

    def __init__(self, images: Tensor, label_dim: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.images, self.at, self.z_dim, self.label_dim, self.asked = (
            images,
            0,
            4,
            label_dim,
            torch.zeros(0, label_dim),
        )

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        self.asked = torch.cat([self.asked, c])
        self.at += len(z)
        return self.images[(torch.arange(len(z)) + self.at - len(z)) % len(self.images)]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return pack(Shapes(16, 300), tmp_path)


def reals_of(dataset: Dataset) -> Tensor:
    return torch.from_numpy(dataset.images[:].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_the_reals_themselves_are_at_distance_nothing(dataset: Dataset, tmp_path: Path) -> None:
    evaluator = Evaluator(dataset, Means(), ["fid", "kid", "pr"], 300, 1, 0, 64)
    same = evaluator(Repeating(reals_of(dataset)), "fp32", tmp_path).values
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    assert (same["precision"], same["recall"]) == (1, 1)
    darker = evaluator(Repeating(reals_of(dataset) * 0.5), "fp32", tmp_path).values
    assert darker["fid"] > 0.01
    assert darker["precision"] < 1


def test_labels_follow_the_data_and_the_seed(dataset: Dataset, tmp_path: Path) -> None:
    evaluator = Evaluator(dataset, Means(), ["fid"], 300, 2, 5, 64)
    G = Repeating(reals_of(dataset), label_dim=8)
    result = evaluator(G, "fp32", tmp_path)
    labels = torch.bincount(torch.from_numpy(dataset.labels), minlength=8)
    assert (
        G.asked[:300].sum(0).tolist() == labels.tolist()
    )  # n equals the set: each picture's label once
    assert not torch.equal(G.asked[:300], G.asked[300:])  # and another order with another seed
    assert result.protocol["seeds"] == [5, 6]
    assert result.values["fid_std"] >= 0


def test_real_features_are_kept_by_data_and_protocol(dataset: Dataset, tmp_path: Path) -> None:
    class Counting(Means):
        calls = 0

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
            Counting.calls += 1
            return super().forward(images)

    for expected in (10, 15):  # 5 batches of reals once, 5 of fakes each time
        evaluator = Evaluator(dataset, Counting(), ["fid", "kid"], 300, 1, 0, 64)
        evaluator(Repeating(reals_of(dataset)), "fp32", tmp_path)
        assert Counting.calls == expected


def test_results_of_two_protocols_are_kept_apart() -> None:
    a, b = (
        Result({"fid": 2.0}, {"reals": "a", "fakes": "100"}),
        Result({"fid": 1.0}, {"reals": "a", "fakes": "200"}),
    )
    text = table(["r/a.pt", "r/b.pt", "r/c.pt"], [a, b, a])
    first, second = text.split("NOT comparable")
    assert "r/a.pt   fid 2.000" in first
    assert "r/c.pt" in first
    assert "r/b.pt   fid 1.000" in second
    assert "200" in second


def test_format_of_values() -> None:
    parts = shown_values(
        {"fid": 12.3456, "fid_std": 0.1, "kid": 0.00123, "kid_ci": 0.0001, "precision": 0.5}
    )
    assert parts == ["fid 12.346 +- 0.100", "kid 0.00123 +- 0.00010", "precision 0.500"]
    assert (
        in_lines(parts, "r/a.pt   ")
        == "r/a.pt   fid 12.346 +- 0.100   kid 0.00123 +- 0.00010   precision 0.500"
    )
    assert in_lines(parts * 2, "x ").splitlines()[1].startswith("  fid")
    assert max(map(len, in_lines(parts * 9, "x ").splitlines())) <= 80


def test_records_survive_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"cur_nimg": 1}) + "\n" + '{"cur_nimg": 2, "fi'
    )
    assert read_metrics(tmp_path) == [{"cur_nimg": 1}]
    assert read_metrics(tmp_path / "none") == []


def test_plain_generator_can_be_judged(dataset: Dataset, tmp_path: Path) -> None:
    evaluator = Evaluator(dataset, Means(), ["fid"], 40, 1, 0, 16)
    G = PlainGenerator(8, 16, [16, 8, 8], label_dim=8).eval().requires_grad_(False)
    once, again = (evaluator(G, "fp32", tmp_path).values["fid"] for _ in range(2))
    assert once == again


class ByNumber(Repeating):
    """Draws the i-th of its images for number i of seed 0, in any order."""

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        known = normal(0, "sample", torch.arange(len(self.images)), self.z_dim)
        return self.images[torch.cdist(z, known).argmin(1)]


def test_copies_are_found_and_shown(dataset: Dataset, tmp_path: Path) -> None:
    evaluator = Evaluator(dataset, Means(), ["copies", "diversity"], 100, 1, 0, 64, holdout=60)
    trained_on, held_out = dataset.split(60)
    reals = reals_of(dataset)
    copied = evaluator(ByNumber(reals[trained_on[:100]]), "fp32", tmp_path)
    assert copied.values["nearest"] == pytest.approx(1, abs=1e-5)
    assert copied.values["copy_rate"] > 0.9
    unseen = evaluator(Repeating(reals[held_out]), "fp32", tmp_path)
    assert unseen.values["nearest"] == pytest.approx(unseen.values["nearest_reals"], abs=1e-3)
    assert unseen.values["copy_rate"] < 0.1
    assert copied.nearest is not None
    rows = copied.nearest.unflatten(
        0, (8, 8)
    )  # each fake, then its nearest training pictures: itself first
    assert torch.equal(rows[:, 0], rows[:, 1])


def test_diversity_sees_the_class_that_collapsed(dataset: Dataset, tmp_path: Path) -> None:
    class OnePicture(Repeating):
        def forward(self, z: Tensor, c: Tensor) -> Tensor:
            out = super().forward(z, c)
            out[c[:, 3] == 1] = 0.5
            return out

    evaluator = Evaluator(dataset, Means(), ["diversity"], 300, 1, 0, 300)
    reals = reals_of(dataset)
    labels = evaluator.labels(torch.arange(300), 0).numpy()
    order = np.concatenate([np.flatnonzero(labels == k) for k in range(8)])
    pool = np.concatenate([np.flatnonzero(dataset.labels == k) for k in range(8)])
    matched = torch.empty_like(reals)
    matched[order] = reals[pool]  # fake i is a real of the class that fake i is asked for
    varied = evaluator(Repeating(matched, label_dim=8), "fp32", tmp_path).values
    assert varied["diversity"] == pytest.approx(1, abs=0.02)
    assert varied["diversity_least"] == pytest.approx(1, abs=0.02)
    collapsed = evaluator(OnePicture(matched, label_dim=8), "fp32", tmp_path).values
    assert collapsed["diversity_least"] == 0
    assert collapsed["diversity"] > 0.7


def test_classes_are_counted_as_asked(dataset: Dataset, tmp_path: Path) -> None:
    class Sighted(Means):
        """Sees the class in the first pixel."""

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
            return super().forward(images)[0], torch.eye(8)[
                images[:, 0, 0, 0].long().clamp(max=239) // 30
            ]

    class Painter(Repeating):
        def forward(self, z: Tensor, c: Tensor) -> Tensor:
            label = c.argmax(1).clamp(max=5)  # two classes are never drawn
            return (label * 30 + 5).view(-1, 1, 1, 1).expand(-1, 3, 16, 16) / 127.5 - 1

    evaluator = Evaluator(dataset, Sighted(), ["classes"], 300, 1, 0, 64)
    values = evaluator(Painter(reals_of(dataset), label_dim=8), "fp32", tmp_path).values
    drawn = (dataset.labels < 6).mean()
    assert values == {"class_accuracy": pytest.approx(drawn), "classes_covered": 6}
    with pytest.raises(UserError, match="metrics=classes"):
        Evaluator(dataset, Means(), ["classes"], 30, 1, 0, 64)(
            Painter(reals_of(dataset), 8), "fp32", tmp_path
        )
