"""vgan-eval's room, and the same inside a run: how far what a generator draws lies from the data, by a stated protocol.

A number means something only beside others of the same protocol, so every result carries it, and nothing here compares
results whose protocols differ.
"""

import contextlib
import hashlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from vgan.config import validate_eval
from vgan.data.open import build_dataset
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
from vgan.inference.load import draw, drawing_precision, restore_generator
from vgan.runs import checkpoint
from vgan.runtime.console import in_lines, progress_bar, report_line
from vgan.runtime.device import pick_device, prepare_process
from vgan.runtime.distributed import print0
from vgan.runtime.errors import UserError
from vgan.runtime.files import append_line, load_cached, save_cached, write_png
from vgan.runtime.images import enlarge, grid, zoom_for
from vgan.runtime.instantiate import require_own
from vgan.runtime.rng import permute

KEPT_ROWS = 50_000  # real features that are kept, for all but fid
PR_ROWS = 10_000  # of each set, since the cost of precision and recall grows with the square
SHEET = 8  # rows and columns of the picture of nearest training pictures
VARIED_ROWS = 4_000  # of each set, likewise for diversity
# whether smaller is better, for the best checkpoint
SMALLER_IS_BETTER = {"fid": True, "kid": True, "is": False, "precision": False, "recall": False}
# everything that is printed, in this order, and how
SHOWN = dict.fromkeys(SMALLER_IS_BETTER, "{:.3f}") | {
    "kid": "{:.5f}",
    "diversity": "{:.3f}",
    "diversity_least": "{:.3f}",
}
SHOWN |= {
    "class_accuracy": "{:.1%}",
    "classes_covered": "{:.0f}",
    "nearest": "{:.3f}",
    "nearest_reals": "{:.3f}",
    "copies": "{:.1%}",
}


@dataclass(frozen=True)
class Reals:
    """What is kept of a data set's features."""

    moments: Moments
    rows: Tensor  # (min(count, KEPT_ROWS), d), shuffled
    held_out: Tensor  # (holdout, d)


@dataclass(frozen=True)
class Result:
    """Values by name, such as fid, fid_std, kid, kid_ci; the protocol they were measured by; the fakes most like a training
    picture (N, C, H, W) uint8 in rows of `SHEET`: the fake, then its nearest training pictures."""

    values: dict[str, float]
    protocol: dict[str, Any]
    nearest: Tensor | None = None

    def comparable(self, other: "Result") -> bool:
        return self.protocol == other.protocol


class Evaluator:
    """Compares what generators draw with a data set. Real features are worked out once and kept in the cache folder.

    metrics: some of fid, kid, is, pr, diversity, classes, copies. n: fakes drawn; fid counts all training pictures, kid
    and pr as many as there are fakes. repeats: evaluations with the seeds seed, seed + 1, ...; values are their means.
    holdout: pictures that were not trained on, which then serve as the measure of what is no copy.

    diversity is the mean distance between two fakes over that between two reals, diversity_least the same within the least varied
    class; class_accuracy the share of fakes in which the features' classifier sees the class asked for, classes_covered how many classes
    these make; nearest the median cosine of a fake to its nearest training picture, nearest_reals that of a picture that was
    not trained on (or, without any, of a training picture to its nearest other one), copies the share of fakes that are nearer
    than 99 % of these: 1 % is what chance gives.
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
        self._dataset, self._extractor = dataset, extractor
        self._metrics, self._n, self._seeds, self._batch_size = (
            tuple(metrics),
            n,
            range(seed, seed + repeats),
            batch_size,
        )
        self._items, self._held_out = dataset.split(holdout)
        # kept rows come in an order of their own: folders come sorted
        count = len(self._items)
        self._order = permute(
            torch.arange(min(KEPT_ROWS, count)), count, 0, torch.zeros((), dtype=torch.int64)
        )
        self._reals: Reals | None = None

    def protocol(self, precision: str) -> dict[str, Any]:
        """All that the numbers depend on besides the generator."""
        data = self._dataset
        return {
            "features": self._extractor.protocol,
            "reals": f"{data.name}, {len(self._items)} training pictures of {data.img_resolution} px, digest {data.digest[:8]}",
            "fakes": f"{self._n} of the averaged weights (EMA), drawn in {precision}, as uint8, no truncation",
            "labels": "in the data's proportions" if data.label_dim else "none",
            "seeds": list(self._seeds),
        }

    def __call__(self, G: nn.Module, precision: str, cache_dir: Path) -> Result:
        """Judge a generator in evaluation mode; it and the extractor are on the same device."""
        if self._reals is None:
            self._reals = self._real_features(next(G.parameters()).device, cache_dir)
        sheets: list[Tensor] = []
        rounds = [self._once(G, seed, precision, sheets) for seed in self._seeds]
        values = {name: statistics.fmean(r[name] for r in rounds) for name in rounds[0]}
        if len(rounds) > 1:
            values |= {
                f"{k}_std": statistics.stdev(r[k] for r in rounds) for k in SHOWN if k in values
            }
        return Result(values, self.protocol(precision), sheets[0] if sheets else None)

    def _once(
        self, G: nn.Module, seed: int, precision: str, sheets: list[Tensor]
    ) -> dict[str, float]:
        features, logits = self._collect(self._fakes(G, seed, precision), self._n, "fakes")
        assert self._reals is not None
        rows, values = self._reals.rows.to(features.device), {}
        if "fid" in self._metrics:
            real = self._reals.moments
            fake = moments(features)
            values["fid"] = frechet_distance(
                fake, Moments(real.mean.to(fake.mean), real.cov.to(fake.cov), real.n)
            )
        if "kid" in self._metrics:
            values |= _with_interval("kid", kernel_distance(features, rows))
        if "is" in self._metrics:
            if logits is None:
                raise UserError(
                    "metrics=is: these features come without a classifier; leave it out or use features=inception"
                )
            values |= _with_interval("is", inception_score(logits))
        if "pr" in self._metrics:
            most = min(PR_ROWS, len(features), len(rows))
            values["precision"], values["recall"] = precision_recall(features[:most], rows[:most])
        if "diversity" in self._metrics:
            values |= self._diversity(features, rows, seed)
        if "classes" in self._metrics:
            values |= self._classes(logits, seed)
        if "copies" in self._metrics:
            values |= self._copies(G, features, rows, seed, precision, sheets)
        return values

    def _diversity(self, features: Tensor, rows: Tensor, seed: int) -> dict[str, float]:
        most = min(VARIED_ROWS, len(features), len(rows))
        values = {
            "diversity": mean_pairwise_distance(features[:most])
            / mean_pairwise_distance(rows[:most])
        }
        if self._dataset.label_dim:
            real_labels = torch.from_numpy(self._dataset.labels[self._items])[self._order].to(
                features.device
            )
            fake_labels = self._labels(torch.arange(len(features)), seed).to(features.device)
            ratios = []
            for label in range(self._dataset.label_dim):
                fakes, reals = (
                    x[y == label][:500] for x, y in ((features, fake_labels), (rows, real_labels))
                )
                if min(len(fakes), len(reals)) > 1:
                    ratios.append(
                        mean_pairwise_distance(fakes) / max(mean_pairwise_distance(reals), 1e-12)
                    )
            values |= {"diversity_least": min(ratios)} if ratios else {}
        return values

    def _classes(self, logits: Tensor | None, seed: int) -> dict[str, float]:
        if logits is None or logits.shape[1] != self._dataset.label_dim:
            raise UserError(
                "metrics=classes: these features do not know the classes; leave it out or use features=learned"
            )
        asked = self._labels(torch.arange(len(logits)), seed).to(logits.device)
        right = logits.argmax(1) == asked
        return {
            "class_accuracy": float(right.float().mean()),
            "classes_covered": float(len(asked[right].unique())),
        }

    def _copies(
        self,
        G: nn.Module,
        features: Tensor,
        rows: Tensor,
        seed: int,
        precision: str,
        sheets: list[Tensor],
    ) -> dict[str, float]:
        """How near the fakes lie to training pictures, beside pictures that were not trained on."""
        assert self._reals is not None
        similarity, which = nearest(features, rows, min(SHEET - 1, len(rows)))
        if len(self._reals.held_out):
            baseline = nearest(self._reals.held_out.to(rows.device), rows)[0][:, 0]
        else:
            baseline = nearest(rows[:VARIED_ROWS], rows, 2)[0][
                :, 1
            ]  # the first is the picture itself
        worst = similarity[:, 0].topk(min(SHEET, len(features))).indices.cpu()
        fakes = draw(
            G, worst, seed, self._labels(worst, seed) if G.label_dim else None, precision=precision
        ).cpu()
        pixels = self._dataset.images[
            self._items[self._order.numpy()[which[worst.to(which.device)].cpu().numpy()]]
        ]
        reals = torch.from_numpy(pixels).permute(0, 1, 4, 2, 3)  # (SHEET, SHEET - 1, C, H, W)
        sheets.append(torch.cat([fakes[:, None], reals], 1).flatten(0, 1))
        return {
            "nearest": float(similarity[:, 0].median()),
            "nearest_reals": float(baseline.median()),
            "copies": float((similarity[:, 0] > baseline.float().quantile(0.99)).float().mean()),
        }

    def _labels(self, index: Tensor, seed: int) -> Tensor:
        """The classes of fakes number `index` (N,): the data's, in an order of their own."""
        labels = torch.from_numpy(self._dataset.labels)
        return labels[permute(index % len(labels), len(labels), seed, index // len(labels))]

    def _fakes(self, G: nn.Module, seed: int, precision: str) -> Iterator[Tensor]:
        for index in torch.arange(self._n).split(self._batch_size):
            yield draw(
                G,
                index,
                seed,
                self._labels(index, seed) if G.label_dim else None,
                precision=precision,
            )

    @torch.no_grad()
    def _collect(
        self, batches: Iterator[Tensor], n: int, what: str
    ) -> tuple[Tensor, Tensor | None]:
        features, logits = [], []
        with progress_bar(n, f"features of {what}") as bar, full_precision():
            for images in batches:
                f, y = self._extractor(images)
                features.append(f)
                logits.append(y)
                bar.update(len(images))
        return torch.cat(features), None if logits[0] is None else torch.cat(logits)  # type: ignore[arg-type]

    def _real_features(self, device: torch.device, cache_dir: Path) -> Reals:
        about = (
            f"{self._dataset.digest} {self._extractor.protocol} {KEPT_ROWS} {len(self._held_out)}"
        )
        path = cache_dir / f"reals-{hashlib.sha256(about.encode()).hexdigest()[:16]}.pt"
        if kept := load_cached(path, "mean", "cov", "n", "rows", "held_out"):
            return Reals(Moments(*kept[:3]), *kept[3:])
        features, _ = self._collect(self._pictures(self._items, device), len(self._items), "reals")
        held_out = features[:0]
        if len(self._held_out):
            held_out, _ = self._collect(
                self._pictures(self._held_out, device), len(self._held_out), "held-out reals"
            )
        reals = Reals(moments(features), features[self._order.to(device)], held_out)
        save_cached(path, {**vars(reals.moments), "rows": reals.rows, "held_out": held_out})
        return reals

    def _pictures(self, items: np.ndarray, device: torch.device) -> Iterator[Tensor]:
        for i in range(0, len(items), self._batch_size):
            pixels = torch.from_numpy(self._dataset.images[items[i : i + self._batch_size]])
            yield pixels.to(device).permute(0, 3, 1, 2)


def _with_interval(name: str, interval: Interval) -> dict[str, float]:
    """Without its width where one part alone says nothing about it."""
    return {name: interval.value} | (
        {f"{name}_ci": interval.half_width} if math.isfinite(interval.half_width) else {}
    )


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No tf32 inside: features must not depend on what training allows itself."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def make_evaluator(config: dict[str, Any], dataset: Dataset, device: torch.device) -> Evaluator:
    """The evaluator that a config with features, metrics, n, repeats, seed and batch_size describes."""
    extractor = build_features(config["features"], dataset, device, default_cache_dir())
    sizes = {k: config[k] for k in ("metrics", "n", "repeats", "seed", "batch_size", "holdout")}
    if "is" in sizes["metrics"] and dataset.img_channels == 1:
        print0("metrics=is: the Inception score of grey pictures means little")
    return Evaluator(dataset, extractor, **sizes)


def write_nearest(path: Path, result: Result) -> None:
    """The fakes most like training pictures, one a row, each followed by its nearest ones; nothing without `copies`."""
    if result.nearest is not None:
        write_png(path, enlarge(grid(result.nearest, SHEET), zoom_for(result.nearest.shape[-1])))


def record(
    run_dir: Path,
    name: str,
    cur_nimg: int,
    result: Result,
    more: Mapping[str, float | None] | None = None,
) -> None:
    """Add a line to the folder's metrics.jsonl."""
    line = {
        "ckpt": name,
        "cur_nimg": cur_nimg,
        **result.values,
        **(more or {}),
        "protocol": result.protocol,
    }
    append_line(run_dir / "metrics.jsonl", json.dumps(line))


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole."""
    path, lines = run_dir / "metrics.jsonl", []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # a line that a kill cut short
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def evaluate(cfg: DictConfig) -> list[Result]:
    """Judge one or several checkpoints as `cfg` (an EvalConfig) says; prints a table and adds to each folder's metrics.jsonl."""
    validate_eval(cfg)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    device = pick_device(config["device"])
    precision = drawing_precision(config["precision"], device)
    prepare_process(device, precision, threads=0)
    named = config["ckpt"] if isinstance(config["ckpt"], list) else [config["ckpt"]]
    for ckpt in named:
        checkpoint.find(ckpt)  # all of them are there, before the first takes its time
    paths: list[Path] = []
    results: list[Result] = []
    evaluator, described = None, None
    for ckpt in named:
        path, parts = checkpoint.load_newest(ckpt)
        paths.append(path)
        data, features = _data_of(parts, config["data"]), _features_of(parts, config)
        what = {**config, "features": features, "holdout": parts["config"].get("holdout", 0)}
        if evaluator is None or described != (data, what):
            dataset, described = build_dataset(data), (data, what)
            evaluator = make_evaluator(what, dataset, device)
        if parts["sizes"]["label_dim"] not in (0, dataset.label_dim):
            raise UserError(
                f"ckpt={path}: has {parts['sizes']['label_dim']} classes, the data has {dataset.label_dim}"
            )
        G = restore_generator(parts, device)
        results.append(evaluator(G, precision, default_cache_dir()))
        write_nearest(path.with_name(f"nearest-{path.stem}.png"), results[-1])
        record(path.parent, path.name, int(parts["cur_nimg"]), results[-1])
    print(table(paths, results))
    return results


def _data_of(parts: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The data node of the checkpoint's run, with what the command line changes."""
    data = {**parts["config"]["data"], **{k: v for k, v in overrides.items() if v is not None}}
    require_own(data, "data", "vgan.data", "evaluate in the run, with eval_kimg")
    return data


def _features_of(parts: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The features of the command line, else those of the checkpoint's run, which may name vgan's own only."""
    features = dict(config["features"] or {})
    if not features.get("_target_"):
        features = dict(
            parts["config"].get("features") or {"_target_": "vgan.evaluation.features.Inception"}
        )
        require_own(
            features, "features", "vgan.evaluation.features", "name yours with features._target_"
        )
    if config["weights"]:
        features["weights"] = config["weights"]
    return features


def table(paths: Sequence[Path], results: Sequence[Result]) -> str:
    """The results as text, under a heading for each protocol."""
    lines: list[str] = []
    left = list(zip(paths, results))
    while left:
        first = left[0][1]
        same = [(p, r) for p, r in left if r.comparable(first)]
        left = [(p, r) for p, r in left if not r.comparable(first)]
        if lines:
            lines += ["", "NOT comparable with the results above, as the protocol differs:"]
        lines += [in_lines(shown_values(r.values), f"{p.parent.name}/{p.name}   ") for p, r in same]
        lines += [report_line(f"  {k}", str(v)) for k, v in first.protocol.items()]
    return "\n".join(lines)


def shown_values(values: dict[str, float]) -> list[str]:
    """['fid 12.34', 'kid 0.0123 +- 0.0004']"""
    parts = []
    for name, text in SHOWN.items():
        if name in values:
            spread = values.get(f"{name}_ci", values.get(f"{name}_std"))
            parts.append(
                f"{name} {text.format(values[name])}"
                + ("" if spread is None else f" +- {text.format(spread)}")
            )
    return parts
