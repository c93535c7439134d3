"""Distances between sets of pictures, worked out from features (N, d) on whatever device these are.

Pure functions of features and logits: what made these, and of which pictures, is the caller's
business, and belongs to the protocol that makes two results comparable (`vgan/evaluate.py`).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 2048  # of a matrix of distances that are held at once


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) in float64 of n features."""

    mean: Tensor
    cov: Tensor
    n: int


class Interval(NamedTuple):
    """A value, and how far the truth may lie from it either way, with 95 % confidence."""

    value: float
    half_width: float


def moments(features: Tensor) -> Moments:
    """The Gaussian fit of features (N, d), N >= 2; the covariance divides by N - 1."""
    x = features.double() if features.device.type != "mps" else features.cpu().double()
    mean = x.mean(0)
    x = x - mean
    return Moments(mean, x.T @ x / (len(x) - 1), len(x))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): the FID, where the features are Inception's (Heusel et al. 2017).

    Biased upwards by small sets: compare equal counts only. The root's trace is that of the
    symmetric C_a^(1/2) C_b C_a^(1/2), which stays real where covariances are singular.
    """
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross)


def kernel_distance(fake: Tensor, real: Tensor, block: int = 1000) -> Interval:
    """Unbiased MMD^2 with the kernel (x.y / d + 1)^3: the KID, where the features are Inception's (Binkowski et al. 2018).

    The mean over disjoint blocks of `block` features of each set, which are independent, so that
    their spread gives an honest confidence interval (infinite where there is one block only). May
    be slightly negative for equal distributions.
    """
    block = min(block, len(fake), len(real))
    count = min(len(fake), len(real)) // block
    values = torch.stack(
        [_mmd2(fake[i * block :][:block], real[i * block :][:block]) for i in range(count)]
    )
    spread = 1.96 * float(values.std()) / math.sqrt(count) if count > 1 else math.inf
    return Interval(float(values.mean()), spread)


def _mmd2(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.float(), y.float()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, xx, yy = len(x), kernel(x, x), kernel(y, y)
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return within - 2 * kernel(x, y).mean()


def inception_score(logits: Tensor, splits: int = 10) -> Interval:
    """exp E KL(p(y|x) || p(y)) of a classifier's logits (N, classes): mean over `splits` parts (Salimans et al. 2016).

    The interval is of the mean over the parts; papers print the parts' standard deviation.
    """
    p = logits.double().log_softmax(1)
    parts = [part for part in p.tensor_split(splits) if len(part)]
    scores = torch.stack(
        [((q := part.exp()) * (part - q.mean(0).log())).sum(1).mean().exp() for part in parts]
    )
    return Interval(
        float(scores.mean()),
        1.96 * float(scores.std()) / math.sqrt(len(parts)) if len(parts) > 1 else math.inf,
    )


def precision_recall(fake: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """The share of fakes that lie among the reals, and of reals among the fakes (Kynkaanniemi et al. 2019).

    A point lies among a set if it is no further from one of its points than that point's k-th
    neighbour in the set.
    """
    return _covered(fake, real, neighbours), _covered(real, fake, neighbours)


def _covered(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    radius = torch.cat(
        [
            torch.cdist(rows, manifold).kthvalue(neighbours + 1).values
            for rows in manifold.split(_ROWS)
        ]
    )
    inside = [(torch.cdist(rows, manifold) <= radius).any(1) for rows in points.split(_ROWS)]
    return float(torch.cat(inside).float().mean())


def nearest(features: Tensor, among: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Cosine similarities (N, count) of each feature (N, d) to its nearest in `among` (M, d), and which these are (N, count)."""
    unit = F.normalize(among.float(), dim=1)
    parts = [
        (F.normalize(rows.float(), dim=1) @ unit.T).topk(count) for rows in features.split(_ROWS)
    ]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def mean_pairwise_distance(features: Tensor) -> float:
    """The mean Euclidean distance between two of N >= 2 features (N, d): how varied they are."""
    n = len(features)
    total = sum(
        float(torch.cdist(rows.float(), features.float()).sum(dtype=torch.float64))
        for rows in features.split(_ROWS)
    )
    return total / (n * (n - 1))
