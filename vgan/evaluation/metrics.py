"""Metrics of sets of images, computed from features (N, d) or logits on any device.

The functions know nothing of images and feature networks. Those belong to the protocol that makes
two results comparable; see `vgan.evaluation.evaluator`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 2048  # of a distance matrix that are in memory at once


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of n features, in float64."""

    mean: Tensor
    cov: Tensor
    n: int

    def to(self, device: torch.device) -> "Moments":
        """Return the moments on a device."""
        return Moments(self.mean.to(device), self.cov.to(device), self.n)


class Interval(NamedTuple):
    """A value and the half width of its 95 % confidence interval."""

    value: float
    half_width: float


def moments(features: Tensor) -> Moments:
    """Fit a Gaussian to features (N, d), N >= 2. The covariance is divided by N - 1."""
    if features.device.type == "mps":  # has no float64
        features = features.cpu()
    x = features.double()
    mean = x.mean(0)
    x = x - mean
    return Moments(mean, x.T @ x / (len(x) - 1), len(x))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    With Inception features it is the FID (Heusel et al. 2017). Small sets bias it upwards: compare
    only equal counts. The trace of the root is computed from the symmetric C_a^(1/2) C_b C_a^(1/2),
    whose root stays real for singular covariances.
    """
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross)


def kernel_distance(fake: Tensor, real: Tensor, block: int = 1000) -> Interval:
    """Return the unbiased MMD^2 with the kernel (x.y / d + 1)^3.

    With Inception features it is the KID (Binkowski et al. 2018). It is the mean over disjoint
    blocks of `block` features of each set. These are independent, so that the confidence interval
    follows from their spread; it is infinite for a single block. The value may be slightly negative
    for equal distributions.
    """
    block = min(block, len(fake), len(real))
    count = min(len(fake), len(real)) // block
    pairs = list(zip(fake.split(block), real.split(block)))[:count]
    return _mean_of(torch.stack([_mmd2(x, y) for x, y in pairs]))


def _mean_of(values: Tensor) -> Interval:
    """Return the mean of independent values (n,)."""
    n = len(values)
    half_width = 1.96 * float(values.std()) / math.sqrt(n) if n > 1 else math.inf
    return Interval(float(values.mean()), half_width)


def _mmd2(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.float(), y.float()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, xx, yy = len(x), kernel(x, x), kernel(y, y)
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return within - 2 * kernel(x, y).mean()


def inception_score(logits: Tensor, splits: int = 10) -> Interval:
    """Return exp E KL(p(y|x) || p(y)) of logits (N, classes), as the mean over `splits` parts.

    Source: Salimans et al. 2016. The interval is that of the mean; papers give the standard
    deviation of the parts.
    """
    scores = []
    for log_p in logits.double().log_softmax(1).tensor_split(splits):
        if len(log_p):
            p = log_p.exp()
            divergence = (p * (log_p - p.mean(0).log())).sum(1)
            scores.append(divergence.mean().exp())
    return _mean_of(torch.stack(scores))


def precision_recall(fake: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Return the share of fakes that lie among the reals, and of reals that lie among the fakes.

    A point lies among a set if it is at least as close to one of its points as the k-th neighbour
    of that point in the set (Kynkaanniemi et al. 2019).
    """
    return _covered(fake, real, neighbours), _covered(real, fake, neighbours)


def _covered(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    radii, inside = [], []
    for rows in manifold.split(_ROWS):
        radii.append(torch.cdist(rows, manifold).kthvalue(neighbours + 1).values)
    radius = torch.cat(radii)
    for rows in points.split(_ROWS):
        inside.append((torch.cdist(rows, manifold) <= radius).any(1))
    return float(torch.cat(inside).float().mean())


def nearest(features: Tensor, among: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Return cosine similarity and index (N, count) of the nearest of (M, d) to each of (N, d)."""
    unit = F.normalize(among.float(), dim=1)
    similarities, indices = [], []
    for rows in features.split(_ROWS):
        best = (F.normalize(rows.float(), dim=1) @ unit.T).topk(count)
        similarities.append(best.values)
        indices.append(best.indices)
    return torch.cat(similarities), torch.cat(indices)


def mean_pairwise_distance(features: Tensor) -> float:
    """Return the mean Euclidean distance between two of N >= 2 features (N, d)."""
    n = len(features)
    total = 0.0
    for rows in features.split(_ROWS):
        distances = torch.cdist(rows.float(), features.float())
        total += float(distances.sum(dtype=torch.float64))
    return total / (n * (n - 1))
