"""Evaluation of generators by a stated protocol.

Values are comparable only under the same protocol. Every result therefore contains its protocol.
"""

import contextlib
import hashlib
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgan.data.packed import default_cache_dir
from vgan.data.source import Dataset
from vgan.evaluation.features import Extractor, build_features
from vgan.evaluation.metrics import (
    Interval,
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_pairwise_distance,
    moments,
    nearest,
    precision_recall,
)
from vgan.inference.latents import draw
from vgan.models.generator import GeneratorBase
from vgan.runtime.console import progress_bar
from vgan.runtime.distributed import print0
from vgan.runtime.errors import UserError
from vgan.runtime.files import load_cached, save_cached, write_png
from vgan.runtime.images import enlarge, format_px, grid, zoom_for
from vgan.runtime.rng import permute

REAL_ROWS = 50_000  # real features kept for all metrics but fid
PR_ROWS = 10_000  # of each set; the cost of precision and recall is quadratic
DIVERSITY_ROWS = 4_000  # of each set; the cost of diversity is quadratic too
CLASS_ROWS = 500  # of each set and class, for the diversity within classes
NEAREST = 8  # rows and columns of the grid of nearest training images
# Whether smaller values are better, for the metrics that can choose the best checkpoint.
SMALLER_IS_BETTER = {"fid": True, "kid": True, "is": False, "precision": False, "recall": False}
# Formats of the values that are printed, in this order.
SHOWN = {
    "fid": "{:.3f}",
    "kid": "{:.5f}",
    "is": "{:.3f}",
    "precision": "{:.3f}",
    "recall": "{:.3f}",
    "diversity": "{:.3f}",
    "diversity_least": "{:.3f}",
    "class_accuracy": "{:.1%}",
    "classes_covered": "{:.0f}",
    "nearest": "{:.3f}",
    "nearest_reals": "{:.3f}",
    "copy_rate": "{:.1%}",
}


@dataclass(frozen=True)
class Reals:
    """Features of the real images."""

    moments: Moments
    rows: Tensor  # (min(count, REAL_ROWS), d), shuffled
    held_out: Tensor  # (holdout, d)


@dataclass(frozen=True)
class Result:
    """Values by name, such as fid, fid_std and kid_ci, and the protocol that they were measured by.

    nearest: uint8 (N, C, H, W), the fakes most similar to a training image. In each row of NEAREST
    images, a fake is followed by its nearest training images.
    """

    values: dict[str, float]
    protocol: dict[str, Any]
    nearest: Tensor | None = None

    def comparable(self, other: "Result") -> bool:
        """Return whether both results have the same protocol."""
        return self.protocol == other.protocol


class Evaluator:
    """Comparison of generated images with a data set. Real features are computed once and cached.

    metrics: some of fid, kid, is, pr, diversity, classes, copies. n: number of fakes. fid uses all
    training images; kid and pr use as many as there are fakes. repeats: evaluations with seeds
    seed, seed + 1, ...; values are their means. holdout: number of images not used for training.

    diversity is the mean distance between two fakes divided by that between two reals, and
    diversity_least the same within the least diverse class. class_accuracy is the share of fakes
    that the classifier of the features assigns to their class, classes_covered the number of
    classes among those.

    nearest is the median cosine similarity of a fake to its nearest training image. nearest_reals
    is that of held-out images; without any, of training images to their nearest other one.
    copy_rate is the share of fakes that are more similar than 99 % of these: by chance 1 %.
    """

    def __init__(
        self,
        dataset: Dataset,
        extractor: Extractor,
        metrics: Sequence[str],
        n: int,
        repeats: int,
        seed: int,
        batch_size: int,
        holdout: int = 0,
    ) -> None:
        self._dataset, self._extractor, self._metrics = dataset, extractor, tuple(metrics)
        self._n, self._seeds, self._batch_size = n, range(seed, seed + repeats), batch_size
        self._items, self._held_out = dataset.split(holdout)
        # Shuffled, because folders are sorted.
        count = len(self._items)
        rows = torch.arange(min(REAL_ROWS, count))
        self._order = permute(rows, count, 0, torch.zeros((), dtype=torch.int64))
        self._reals: Reals | None = None

    def protocol(self, precision: str) -> dict[str, Any]:
        """Return everything besides the generator that the values depend on."""
        data = self._dataset
        reals = f"{len(self._items)} training pictures of {format_px(data.img_resolution)}"
        drawn = f"drawn in {precision}, as uint8, no truncation"
        return {
            "features": self._extractor.protocol,
            "reals": f"{data.name}, {reals}, digest {data.digest[:8]}",
            "fakes": f"{self._n} of the averaged weights (EMA), {drawn}",
            "labels": "in the data's proportions" if data.label_dim else "none",
            "seeds": list(self._seeds),
        }

    def __call__(self, G: GeneratorBase, precision: str, cache_dir: Path) -> Result:
        """Evaluate a generator in evaluation mode, on the device of the extractor."""
        if self._reals is None:
            self._reals = self._real_features(next(G.parameters()).device, cache_dir)
        rounds, grids = [], []
        for seed in self._seeds:
            values, images = self._evaluate(G, self._reals, seed, precision)
            rounds.append(values)
            grids.append(images)
        values = {name: statistics.fmean(r[name] for r in rounds) for name in rounds[0]}
        if len(rounds) > 1:
            for name in [name for name in SHOWN if name in values]:
                values[f"{name}_std"] = statistics.stdev(r[name] for r in rounds)
        return Result(values, self.protocol(precision), grids[0])

    def _evaluate(
        self, G: GeneratorBase, reals: Reals, seed: int, precision: str
    ) -> tuple[dict[str, float], Tensor | None]:
        """Return the values of one seed, and the images nearest to training images for `copies`."""
        fakes = (
            self.draw(G, index, seed, precision)
            for index in torch.arange(self._n).split(self._batch_size)
        )
        features, logits = self._features(fakes, self._n, "fakes")
        rows = reals.rows.to(features.device)
        values: dict[str, float] = {}
        images = None
        if "fid" in self._metrics:
            fake = moments(features)
            values["fid"] = frechet_distance(fake, reals.moments.to(fake.mean.device))
        if "kid" in self._metrics:
            values |= _with_interval("kid", kernel_distance(features, rows))
        if "is" in self._metrics:
            if logits is None:
                fix = "leave it out or use features=inception"
                raise UserError(f"metrics=is: these features come without a classifier; {fix}")
            values |= _with_interval("is", inception_score(logits))
        if "pr" in self._metrics:
            n = min(PR_ROWS, len(features), len(rows))
            values["precision"], values["recall"] = precision_recall(features[:n], rows[:n])
        if "diversity" in self._metrics:
            values |= self._diversity(features, rows, seed)
        if "classes" in self._metrics:
            values |= self._classes(logits, seed)
        if "copies" in self._metrics:
            similarity, neighbours = nearest(features, rows, min(NEAREST - 1, len(rows)))
            values |= _copies(similarity[:, 0], rows, reals.held_out)
            worst = similarity[:, 0].topk(min(NEAREST, len(features))).indices
            images = self._beside(self.draw(G, worst.cpu(), seed, precision), neighbours[worst])
        return values, images

    def _diversity(self, features: Tensor, rows: Tensor, seed: int) -> dict[str, float]:
        n = min(DIVERSITY_ROWS, len(features), len(rows))
        ratio = mean_pairwise_distance(features[:n]) / mean_pairwise_distance(rows[:n])
        values = {"diversity": ratio}
        if not self._dataset.label_names:
            return values
        fake_labels = self.labels(torch.arange(len(features)), seed).to(features.device)
        real_labels = torch.from_numpy(self._dataset.labels[self._items])[self._order]
        real_labels = real_labels.to(features.device)
        ratios = []
        for label in range(len(self._dataset.label_names)):
            fakes = features[fake_labels == label][:CLASS_ROWS]
            reals = rows[real_labels == label][:CLASS_ROWS]
            if min(len(fakes), len(reals)) > 1:
                spread = max(mean_pairwise_distance(reals), 1e-12)
                ratios.append(mean_pairwise_distance(fakes) / spread)
        if ratios:
            values["diversity_least"] = min(ratios)
        return values

    def _classes(self, logits: Tensor | None, seed: int) -> dict[str, float]:
        if logits is None or logits.shape[1] != len(self._dataset.label_names):
            problem, fix = "these features do not know the classes", "use features=learned"
            if not self._dataset.label_names:
                problem, fix = "the data have no classes", "use data with some"
            raise UserError(f"metrics=classes: {problem}; leave it out or {fix}")
        labels = self.labels(torch.arange(len(logits)), seed).to(logits.device)
        right = logits.argmax(1) == labels
        return {
            "class_accuracy": float(right.float().mean()),
            "classes_covered": float(len(labels[right].unique())),
        }

    def _beside(self, fakes: Tensor, neighbours: Tensor) -> Tensor:
        """Return each fake (N, C, H, W) followed by its nearest training images, by row (N, k)."""
        items = self._items[self._order.numpy()[neighbours.cpu().numpy()]]
        reals = torch.from_numpy(self._dataset.images[items]).permute(0, 1, 4, 2, 3)
        return torch.cat([fakes.cpu()[:, None], reals], dim=1).flatten(0, 1)

    def labels(self, index: Tensor, seed: int) -> Tensor:
        """Return the labels (N,) of the fakes `index` (N,): the data's, shuffled by seed."""
        labels = torch.from_numpy(self._dataset.labels)
        return labels[permute(index % len(labels), len(labels), seed, index // len(labels))]

    def draw(self, G: GeneratorBase, index: Tensor, seed: int, precision: str) -> Tensor:
        """Return the fakes `index` (N,) as uint8 (N, C, H, W) on G's device."""
        labels = self.labels(index, seed) if G.label_dim else None
        if labels is not None and self._dataset.conditions:
            scale = G.conditions or self._dataset.conditions  # a model keeps that of its training
            labels = scale.standardize(self._dataset.conditions.values[labels])
        return draw(G, index, seed, labels, precision=precision)

    @torch.no_grad()
    def _features(
        self, batches: Iterable[Tensor], n: int, name: str
    ) -> tuple[Tensor, Tensor | None]:
        features, logits = [], []
        with progress_bar(n, f"features of {name}") as bar, _full_precision():
            for images in batches:
                rows, scores = self._extractor(images)
                features.append(rows)
                if scores is not None:
                    logits.append(scores)
                bar.update(len(images))
        return torch.cat(features), torch.cat(logits) if logits else None

    def _real_features(self, device: torch.device, cache_dir: Path) -> Reals:
        data, extractor = self._dataset.digest, self._extractor.protocol
        key = f"{data} {extractor} {REAL_ROWS} {len(self._held_out)}"
        path = cache_dir / f"reals-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        cached = load_cached(path, "mean", "cov", "n", "rows", "held_out")
        if cached:
            return Reals(Moments(*cached[:3]), *cached[3:])
        items, held_out = self._items, self._held_out
        features, _ = self._features(self._images(items, device), len(items), "reals")
        reals = Reals(moments(features), features[self._order.to(device)], features[:0])
        if len(held_out):
            batches = self._images(held_out, device)
            unseen, _ = self._features(batches, len(held_out), "held-out reals")
            reals = Reals(reals.moments, reals.rows, unseen)
        rows = {"rows": reals.rows, "held_out": reals.held_out}
        save_cached(path, {**vars(reals.moments), **rows})
        return reals

    def _images(self, items: np.ndarray, device: torch.device) -> Iterator[Tensor]:
        for i in range(0, len(items), self._batch_size):
            pixels = torch.from_numpy(self._dataset.images[items[i : i + self._batch_size]])
            yield pixels.to(device).permute(0, 3, 1, 2)


def _copies(similarity: Tensor, rows: Tensor, held_out: Tensor) -> dict[str, float]:
    """Compare the similarity (N,) of fakes to their nearest training image with that of reals."""
    if len(held_out):
        baseline = nearest(held_out.to(rows.device), rows)[0][:, 0]
    else:  # the nearest one is the image itself
        baseline = nearest(rows[:DIVERSITY_ROWS], rows, 2)[0][:, 1]
    return {
        "nearest": float(similarity.median()),
        "nearest_reals": float(baseline.median()),
        "copy_rate": float((similarity > baseline.float().quantile(0.99)).float().mean()),
    }


def _with_interval(name: str, interval: Interval) -> dict[str, float]:
    if math.isinf(interval.half_width):
        return {name: interval.value}
    return {name: interval.value, f"{name}_ci": interval.half_width}


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Disable TF32, so that features do not depend on the precision of training."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def make_evaluator(
    dataset: Dataset,
    device: torch.device,
    features: Mapping[str, Any],
    metrics: Sequence[str],
    n: int,
    repeats: int,
    seed: int,
    batch_size: int,
    holdout: int = 0,
) -> Evaluator:
    """Build an Evaluator. features: a config node with `_target_`."""
    extractor = build_features(features, dataset, device, default_cache_dir())
    if "is" in metrics and dataset.img_channels == 1:
        print0("metrics=is: the Inception score of grey images means little")
    return Evaluator(dataset, extractor, metrics, n, repeats, seed, batch_size, holdout)


def write_nearest(path: Path, result: Result) -> None:
    """Write the grid of fakes and their nearest training images, if `copies` was measured."""
    if result.nearest is not None:
        zoom = zoom_for(min(result.nearest.shape[2:]))
        write_png(path, enlarge(grid(result.nearest, NEAREST), zoom))


def shown_values(values: Mapping[str, float]) -> list[str]:
    """Format values, as in ['fid 12.34', 'kid 0.0123 +- 0.0004']."""
    texts = []
    for name, number in SHOWN.items():
        if name in values:
            text = f"{name} {number.format(values[name])}"
            spread = values.get(f"{name}_ci", values.get(f"{name}_std"))
            texts.append(text if spread is None else f"{text} +- {number.format(spread)}")
    return texts
