"""What pictures are compared by: networks that turn them into features.

An extractor is called with uint8 (N, C, H, W) on its device and returns features (N, d) and a
classifier's logits (N, classes), or None where it has none; `protocol` says all that makes its
numbers what they are. Any class of this shape can be named by `features._target_`.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgan.data.augment import Augment
from vgan.data.loader import Loader
from vgan.data.source import Dataset
from vgan.evaluation.metrics import moments
from vgan.models.layers import ResidualBlock, count_stages, init_conv
from vgan.runtime.distributed import print0
from vgan.runtime.errors import UserError
from vgan.runtime.files import load_cached, save_cached
from vgan.runtime.images import to_float
from vgan.runtime.instantiate import construct
from vgan.runtime.rng import Streams

# sha256 of torch-fidelity's file of the weights that FID was defined with (2015-12-05, from TensorFlow), first 8 digits
INCEPTION_SHA256 = "6726825d"
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


class Extractor(Protocol):
    """What evaluation needs of a feature network."""

    protocol: str

    def to(self, device: torch.device) -> Any: ...

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...


class Inception(nn.Module):
    """The network that defines FID, KID and IS, through torch-fidelity: 2048 features and 1008 logits.

    Pictures of any size are resized to 299 px as TensorFlow did; grey ones are shown in all three
    channels. weights: a file of torch-fidelity's weights for machines without a network; None
    downloads it once into torch's cache. Raises UserError where torch-fidelity or the weights
    cannot be had, or where the file is another.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (
                URL_INCEPTION_V3,
                FeatureExtractorInceptionV3,
            )
        except ModuleNotFoundError as e:
            raise UserError(
                "features=inception: needs torch-fidelity; pip install vgan[eval], or use features=learned"
            ) from e
        path = Path(weights).expanduser() if weights else _download(URL_INCEPTION_V3)
        digest = _sha256(path)
        if not digest.startswith(INCEPTION_SHA256):
            raise UserError(
                f"features.weights={path}: not the Inception weights of FID (sha256 {digest[:8]}, not {INCEPTION_SHA256}); "
                f"use torch-fidelity's {_INCEPTION_FILE}"
            )
        self.network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], str(path)
        )
        self.protocol = f"inception-2015-12-05 sha256 {digest[:8]}, 2048 features, resized to 299 px as in TensorFlow 1"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits


def _download(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as e:  # no network; a wrong digest
            raise UserError(
                f"features=inception: {url} cannot be had ({str(e).splitlines()[0]}); "
                "give the file as features.weights=PATH, or use features=learned"
            ) from e
    return path


def _sha256(path: Path) -> str:
    try:
        return _digest(path.read_bytes())
    except OSError as e:
        raise UserError(
            f"features.weights={path}: cannot be read ({e.strerror}); give the path of {_INCEPTION_FILE}"
        ) from e


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class ClassifierFeatures(nn.Module):
    """A small classifier trained on the data set itself: features where no pretrained network can be had, and for watching a run.

    It learns the classes where there are any, else by how many quarter turns a picture was rotated
    (Gidaris et al. 2018). The features are the means of every stage's maps, since a classifier's
    last stage forgets what its classes do not depend on, such as colours; they are whitened by the
    reals, so that no direction drowns the others: real features have mean 0 and variance 1. What
    was learned is kept in the cache folder under the data's digest, since another machine would
    learn slightly other weights: numbers compare only under the same digest in `protocol`, and with
    no published FID.

    train_kimg: thousands of pictures it sees, in batches of 64. widths: channels at 4, 8, 16, ...
    px, as for the generator.
    """

    BATCH = 64
    mean: Tensor
    whiten: Tensor

    def __init__(
        self, train_kimg: float = 30, widths: Sequence[int] = (96, 96, 64, 48, 32, 24)
    ) -> None:
        super().__init__()
        self.train_kimg, self.widths = train_kimg, tuple(widths)
        self.protocol = "learned, untrained"
        self.accuracy = (
            math.nan
        )  # on the last tenth of the pictures that it was trained on, before it learned from them

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self._features(to_float(images))
        return (features - self.mean) @ self.whiten, self.head(features)

    def _features(self, x: Tensor) -> Tensor:
        """float (N, C, H, W) in [-1, 1] -> (N, sum of the widths)."""
        x, pooled = self.stem(x.contiguous(memory_format=torch.channels_last)), []
        for stage, narrow in zip(self.stages, self.transitions):
            x = stage(x)
            pooled.append(F.leaky_relu(x, 0.2).mean((2, 3)))
            x = narrow(x)
        return torch.cat(pooled, 1)

    def prepare(self, dataset: Dataset, device: torch.device, cache_dir: Path) -> None:
        """Read what was learned about this data before, or learn it now. Leaves the global random state alone."""
        self._build(dataset)
        self.to(device)
        about = f"{dataset.digest} {self.train_kimg:g} {self.widths} 1"  # the last: this algorithm
        path = cache_dir / f"features-{_digest(about.encode())[:16]}.pt"
        kept = load_cached(path, "network", "accuracy")
        if kept:
            self.load_state_dict(kept[0])
            self.accuracy = float(kept[1])
        else:
            self._learn(dataset, device)
            self._whiten(dataset, device)
            save_cached(path, {"network": self.state_dict(), "accuracy": self.accuracy})
        content = b"".join(v.cpu().numpy().tobytes() for v in self.state_dict().values())
        what = "classes" if dataset.label_dim else "quarter turns"
        self.protocol = f"learned from the data's {what}, {len(self.mean)} whitened features, digest {_digest(content)[:8]}"
        self.requires_grad_(False).eval()

    def _build(self, dataset: Dataset) -> None:
        count = count_stages(dataset.img_resolution, dataset.img_channels, self.widths, 2)
        widths = self.widths[:count][::-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stem = nn.Conv2d(4 * dataset.img_channels, widths[0], 3, padding=1)
            self.stem = nn.Sequential(nn.PixelUnshuffle(2), init_conv(stem, gain=1))
            self.stages = nn.ModuleList(ResidualBlock(w, "separable", 2, count) for w in widths)
            narrow = (
                nn.Sequential(nn.AvgPool2d(2), init_conv(nn.Conv2d(a, b, 1), gain=1))
                for a, b in pairwise(widths)
            )
            self.transitions = nn.ModuleList([*narrow, nn.Identity()])
            self.head = nn.Linear(sum(widths), dataset.label_dim or 4)
        self.register_buffer("mean", torch.zeros(sum(widths)))
        self.register_buffer("whiten", torch.eye(sum(widths)))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _learn(self, dataset: Dataset, device: torch.device) -> None:
        augment, steps = (
            Augment(["flip", "translation"]),
            max(1, round(self.train_kimg * 1000 / self.BATCH)),
        )
        print0(
            f"features=learned: training a classifier on {steps * self.BATCH:,} pictures, once for this data"
        )
        optimizer = torch.optim.AdamW(self.parameters(), betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
        feed, right = Loader(dataset, self.BATCH, 0, device), []
        try:
            for step in range(steps):
                images, c = feed.batch(step * self.BATCH)
                streams = Streams(0, step * self.BATCH, self.BATCH, device)
                images, target = (
                    augment(images, 1.0, streams, "features"),
                    c.argmax(1) if dataset.label_dim else None,
                )
                if target is None:
                    images, target = _quarter_turns(images, streams)
                logits = self.head(self._features(images))
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(logits, target).backward()
                optimizer.step()
                schedule.step()
                if step >= min(0.9 * steps, steps - 1):
                    right.append((logits.argmax(1) == target).float().mean())
        finally:
            feed.close()
        self.accuracy = float(torch.stack(right).mean()) if right else math.nan
        print0(f"features=learned: {self.accuracy:.1%} right")

    @torch.no_grad()
    def _whiten(self, dataset: Dataset, device: torch.device) -> None:
        """Mean 0 and covariance I of the reals, but for directions of a thousandth of the mean variance, taken as noise."""
        feed, rows = Loader(dataset, self.BATCH, 0, device), []
        try:
            for i in range(0, min(len(dataset), 10_000), self.BATCH):
                rows.append(self._features(feed.batch(i)[0]).double().cpu())
        finally:
            feed.close()
        fit = moments(torch.cat(rows))
        values, vectors = torch.linalg.eigh(fit.cov)
        scale = (values.clamp(min=0) + 1e-3 * values.mean()).rsqrt()
        self.mean.copy_(fit.mean)
        self.whiten.copy_((vectors * scale) @ vectors.T)


def _quarter_turns(images: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
    """Each picture turned by 0 to 3 right angles, and how many."""
    turns = (streams.uniform("turns", 1)[:, 0] * 4).long()
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)])
    return turned[turns, torch.arange(len(images), device=images.device)], turns


def build_features(
    node: Mapping[str, Any], dataset: Dataset, device: torch.device, cache_dir: Path
) -> Any:
    """The feature network of a `features` node, on the device; one that learns from the data does so here."""
    if not node.get("_target_"):
        raise UserError(
            "features=auto: is for vgan-eval; use features=inception or features=learned"
        )
    extractor = construct(node, "features")
    if not (hasattr(extractor, "protocol") and callable(extractor) and hasattr(extractor, "to")):
        raise UserError(
            f"features._target_={node['_target_']}: needs `protocol`, `to(device)` and to be callable with pictures"
        )
    extractor = extractor.to(device)
    if hasattr(extractor, "prepare"):
        extractor.prepare(dataset, device, cache_dir)
    return extractor
