import math

import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from vgan.evaluation.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_pairwise_distance,
    moments,
    nearest,
    precision_recall,
)


@pytest.fixture
def fake(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(300, 16, generator=generator) * torch.linspace(0.5, 2, 16) + 0.3


@pytest.fixture
def real(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(300, 16, generator=generator) @ torch.randn(16, 16, generator=generator) / 4


def test_frechet_distance_of_two_gaussians_is_the_formula() -> None:
    # commuting covariances: the distance is sum (sqrt(a) - sqrt(b))^2 plus that of the means
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 1.0]).double()
    mean = torch.tensor([1.0, 0.0, -2.0]).double()
    value = frechet_distance(
        Moments(torch.zeros(3).double(), a.diag(), 10), Moments(mean, b.diag(), 10)
    )
    assert value == pytest.approx(5 + 1 + 0 + 4)


def test_frechet_distance_of_singular_covariances(fake: torch.Tensor) -> None:
    few = moments(fake[:5])  # rank 4 of 16
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_against_torch_fidelity(fake: torch.Tensor, real: torch.Tensor) -> None:
    statistics = [fid_features_to_statistics(x.double()) for x in (fake, real)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(moments(fake), moments(real)) == pytest.approx(fid, rel=1e-6)

    kid = kid_features_to_metric(fake, real, kid_subsets=1, kid_subset_size=300, verbose=False)
    assert kernel_distance(fake, real).value == pytest.approx(
        kid["kernel_inception_distance_mean"], rel=1e-4
    )

    isc = isc_features_to_metric(fake, splits=10, shuffle=False)["inception_score_mean"]
    assert inception_score(fake).value == pytest.approx(isc, rel=1e-6)

    prc = prc_features_to_metric(fake, real, verbose=False)
    precision, recall = precision_recall(fake, real)
    assert (precision, recall) == (pytest.approx(prc["precision"]), pytest.approx(prc["recall"]))
    assert 0 < precision < 1  # not a case that anything would pass
    assert 0 < recall < 1


def test_kernel_distance_covers_the_truth(generator: torch.Generator) -> None:
    """For equal distributions the interval contains 0 about 95 times in 100."""
    held = 0
    for _ in range(40):
        x, y = torch.randn(2, 1000, 8, generator=generator)
        interval = kernel_distance(x, y, block=100)
        held += abs(interval.value) <= interval.half_width
    assert held >= 33
    assert kernel_distance(x[:50], y[:50]).half_width == math.inf


def test_inception_score_of_certain_and_of_even_classes() -> None:
    assert inception_score(torch.eye(4).repeat(10, 1) * 100, splits=1).value == pytest.approx(4)
    assert inception_score(torch.zeros(40, 4), splits=1).value == pytest.approx(1)


def test_precision_and_recall_see_collapse_and_strangers(real: torch.Tensor) -> None:
    assert precision_recall(real[:20].repeat(15, 1), real)[0] == 1
    assert precision_recall(real[:20].repeat(15, 1), real)[1] < 0.2
    assert precision_recall(real + 100, real) == (0, 0)


def test_nearest_and_pairwise_distance() -> None:
    similarity, which = nearest(
        torch.tensor([[0.0, 3.0], [2.0, 2.1]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    )
    assert which.tolist() == [[1], [1]]
    assert similarity[:, 0].tolist() == [pytest.approx(1), pytest.approx(2.1 / math.hypot(2, 2.1))]
    assert mean_pairwise_distance(
        torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    ) == pytest.approx(10 / 3)
