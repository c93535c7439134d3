"""Feature networks, by which images are compared.

An extractor is called with uint8 images (N, C, H, W) on its device. It returns features (N, d) and
the logits (N, classes) of a classifier, or None if it has none. Its `protocol` names everything
that its values depend on. Any such class can be used as `features._target_`.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
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
from vgan.models.backbone import Backbone
from vgan.models.layers import ResidualBlock, init_conv
from vgan.models.sizes import count_stages
from vgan.runtime.distributed import print0
from vgan.runtime.errors import UserError, first_line
from vgan.runtime.extras import install_extra
from vgan.runtime.files import load_cached, save_cached
from vgan.runtime.images import height_width, to_float, to_rgb
from vgan.runtime.instantiate import construct
from vgan.runtime.rng import Streams

# First 8 digits of the SHA-256 of torch-fidelity's file of the weights that define FID.
INCEPTION_SHA256 = "6726825d"
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


class Extractor(Protocol):
    """The interface of a feature network."""

    protocol: str

    def to(self, device: torch.device) -> Any: ...

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...


class Inception(nn.Module):
    """The network that defines FID, KID and IS, from torch-fidelity: 2048 features and 1008 logits.

    Images of any size are resized to 299 px as in TensorFlow 1. Grey images are repeated in three
    channels, transparent ones are laid on white. weights: a file of torch-fidelity's weights, for
    machines without a network; None downloads it once into torch's cache.

    Raises UserError if torch-fidelity or the weights are missing, or the file is a different one.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (
                URL_INCEPTION_V3,
                FeatureExtractorInceptionV3,
            )
        except ModuleNotFoundError as e:
            fix = f"{install_extra('eval')}, or use features=learned"
            raise UserError(f"features=inception: needs torch-fidelity; {fix}") from e
        path = Path(weights).expanduser() if weights else _download(URL_INCEPTION_V3)
        digest = _sha256_of_file(path)[:8]
        if digest != INCEPTION_SHA256:
            problem = f"not the Inception weights of FID (sha256 {digest}, not {INCEPTION_SHA256})"
            fix = f"use torch-fidelity's {_INCEPTION_FILE}"
            raise UserError(f"features.weights={path}: {problem}; {fix}")
        layers = ["2048", "logits_unbiased"]
        self.network = FeatureExtractorInceptionV3("inception", layers, str(path))
        resized = "2048 features, resized to 299 px as in TensorFlow 1"
        self.protocol = f"inception-2015-12-05 sha256 {digest}, {resized}"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network(to_rgb(images))
        return features, logits


def _download(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as e:  # no network, or another digest
            fix = "give the file as features.weights=PATH, or use features=learned"
            raise UserError(
                f"features=inception: {url} cannot be had ({first_line(e)}); {fix}"
            ) from e
    return path


def _sha256_of_file(path: Path) -> str:
    try:
        return sha256(path.read_bytes())
    except OSError as e:
        problem = f"cannot be read ({e.strerror})"
        raise UserError(
            f"features.weights={path}: {problem}; give the path of {_INCEPTION_FILE}"
        ) from e


def sha256(content: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


class ImageNetFeatures(nn.Module):
    """Features of an ImageNet classifier of torchvision: the means of its last maps.

    backbone: mobilenet_v2, efficientnet_b0 or convnext_tiny. weights: auto downloads torchvision's
    once; else a file of them. Images are resized to 224 px. Distances compare with each other only,
    never with a published FID.
    """

    SIZE = 224

    def __init__(self, backbone: str = "mobilenet_v2", weights: str | None = None) -> None:
        super().__init__()
        last = {"mobilenet_v2": 18, "efficientnet_b0": 8}.get(backbone, 7)
        network = Backbone(backbone, taps=[last])
        digest = network.load(weights or "auto", "features.weights")
        self.network = network.fold()
        self.protocol = f"{backbone} of torchvision, digest {digest}, resized to {self.SIZE} px"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = to_float(to_rgb(images))
        x = F.interpolate(x, (self.SIZE, self.SIZE), mode="bilinear", antialias=True)
        return self.network(x)[0].mean((2, 3)), None


class DINOv2(nn.Module):
    """The 384 features of DINOv2's ViT-S/14, through torch-fidelity and torch.hub.

    They were learned without labels (Oquab et al. 2023), so they do not favour a generator that was
    trained with a judge on ImageNet's classes (Kynkaanniemi et al. 2022).
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
        except ModuleNotFoundError as e:
            fix = f"{install_extra('eval')}, or use features=learned"
            raise UserError(f"features=dinov2: needs torch-fidelity 0.4; {fix}") from e
        try:
            self.network = FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
        except (OSError, RuntimeError) as e:  # no network, or no space
            fix = "use features=learned where there is no network"
            raise UserError(f"features=dinov2: cannot be had ({first_line(e)}); {fix}") from e
        self.protocol = "DINOv2 ViT-S/14 of torch-fidelity, 384 features, resized to 224 px"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network(to_rgb(images))[0], None


class ClassifierFeatures(nn.Module):
    """Features of a small classifier trained on the data set itself.

    They need no pretrained network and suit comparisons within a project. The classifier learns the
    classes, or without any the quarter turns of rotated images (Gidaris et al. 2018). The features
    are the mean feature maps of every stage, because the last stage of a classifier loses what its
    classes do not depend on, such as colours. They are whitened by the reals, so that no direction
    dominates: real features have mean 0 and variance 1.

    The classifier is cached under the digest of the data. Another machine would learn slightly
    different weights: values are comparable only under the same digest in `protocol`, and never
    with a published FID.

    train_kimg: thousands of training images, in batches of 64. widths: channels at 4, 8, ... px.
    Above 256 px the first layer takes larger patches of pixels.
    """

    BATCH = 64
    mean: Tensor
    whiten: Tensor

    def __init__(
        self, train_kimg: float = 30, widths: Sequence[int] = (96, 96, 64, 48, 32, 24)
    ) -> None:
        super().__init__()
        if train_kimg <= 0:
            raise ValueError(f"train_kimg={train_kimg:g}: must be above 0")
        self.train_kimg, self.widths = train_kimg, tuple(widths)
        self.protocol = "learned, untrained"
        self.accuracy = math.nan  # in the last tenth of the training, before each update

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self._features(to_float(images))
        return (features - self.mean) @ self.whiten, self.head(features)

    def _features(self, x: Tensor) -> Tensor:
        """Compute (N, sum of the widths) from images (N, C, H, W) in [-1, 1]."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        pooled = []
        for stage, transition in zip(self.stages, self.transitions):
            x = stage(x)
            pooled.append(F.leaky_relu(x, 0.2).mean((2, 3)))
            x = transition(x)
        return torch.cat(pooled, 1)

    def prepare(self, dataset: Dataset, device: torch.device, cache_dir: Path) -> None:
        """Load the classifier of this data from the cache, or train it. Keeps the global RNG."""
        self._build(dataset)
        self.to(device)
        version = 1  # of the training algorithm
        key = f"{dataset.digest} {self.train_kimg:g} {self.widths} {version}"
        path = cache_dir / f"features-{sha256(key.encode())[:16]}.pt"
        cached = load_cached(path, "network", "accuracy")
        if cached:
            self.load_state_dict(cached[0])
            self.accuracy = float(cached[1])
        else:
            self._train_classifier(dataset, device)
            self._fit_whitening(dataset, device)
            save_cached(path, {"network": self.state_dict(), "accuracy": self.accuracy})
        content = b"".join(v.cpu().numpy().tobytes() for v in self.state_dict().values())
        task = "classes" if dataset.label_names else "quarter turns"
        size = f"{len(self.mean)} whitened features, digest {sha256(content)[:8]}"
        self.protocol = f"learned from the data's {task}, {size}"
        self.requires_grad_(False).eval()

    def _build(self, dataset: Dataset) -> None:
        side = min(height_width(dataset.img_resolution))
        patch_size = max(2, side >> (len(self.widths) + 1))
        patch_size = 1 << (patch_size.bit_length() - 1)
        count = count_stages(dataset.img_resolution, dataset.img_channels, self.widths, patch_size)
        widths = self.widths[:count][::-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stem = nn.Conv2d(patch_size**2 * dataset.img_channels, widths[0], 3, padding=1)
            self.stem = nn.Sequential(nn.PixelUnshuffle(patch_size), init_conv(stem, gain=1))
            self.stages = nn.ModuleList(ResidualBlock(w, "separable", 2, count) for w in widths)
            self.transitions = nn.ModuleList()
            for width, next_width in pairwise(widths):
                conv = init_conv(nn.Conv2d(width, next_width, 1), gain=1)
                self.transitions.append(nn.Sequential(nn.AvgPool2d(2), conv))
            self.transitions.append(nn.Identity())
            self.head = nn.Linear(sum(widths), len(dataset.label_names) or 4)
        self.register_buffer("mean", torch.zeros(sum(widths)))
        self.register_buffer("whiten", torch.eye(sum(widths)))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _train_classifier(self, dataset: Dataset, device: torch.device) -> None:
        augment = Augment(["flip", "translation"])
        steps = max(1, round(self.train_kimg * 1000 / self.BATCH))
        shown = f"{steps * self.BATCH:,} images, once for this data"
        print0(f"features=learned: training a classifier on {shown}")
        optimizer = torch.optim.AdamW(self.parameters(), betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
        correct = []
        for step, (images, c) in enumerate(self._batches(dataset, device, steps)):
            streams = Streams(0, step * self.BATCH, self.BATCH, device)
            images = augment(images, 1.0, streams, "features")
            if dataset.label_names:
                target = c.argmax(1)
            else:
                images, target = quarter_turns(images, streams.uniform("turns", 1)[:, 0])
            logits = self.head(self._features(images))
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits, target).backward()
            optimizer.step()
            schedule.step()
            if step >= min(0.9 * steps, steps - 1):
                correct.append((logits.argmax(1) == target).float().mean())
        self.accuracy = float(torch.stack(correct).mean())
        print0(f"features=learned: accuracy {self.accuracy:.1%}")

    @torch.no_grad()
    def _fit_whitening(self, dataset: Dataset, device: torch.device) -> None:
        """Give the reals mean 0 and covariance I.

        Directions of less than a thousandth of the mean variance are taken as noise.
        """
        batches = self._batches(dataset, device, math.ceil(min(len(dataset), 10_000) / self.BATCH))
        fit = moments(torch.cat([self._features(images).double().cpu() for images, _ in batches]))
        values, vectors = torch.linalg.eigh(fit.cov)
        scale = (values.clamp(min=0) + 1e-3 * values.mean()).rsqrt()
        self.mean.copy_(fit.mean)
        self.whiten.copy_((vectors * scale) @ vectors.T)

    def _batches(
        self, dataset: Dataset, device: torch.device, count: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader = Loader(dataset, self.BATCH, 0, device)
        try:
            for i in range(count):
                batch = loader.batch(i * self.BATCH)
                yield batch[0], batch[1]
        finally:
            loader.close()


def quarter_turns(images: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each image by 0 to 3 right angles, by u (N,) in [0, 1). Returns images and turns.

    Of oblong images the middle square is taken.
    """
    turns, side = (u * 4).long(), min(images.shape[2:])
    top, left = ((size - side) // 2 for size in images.shape[2:])
    images = images[:, :, top : top + side, left : left + side]
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)])
    return turned[turns, torch.arange(len(images), device=images.device)], turns


def build_features(
    node: Mapping[str, Any], dataset: Dataset, device: torch.device, cache_dir: Path
) -> Extractor:
    """Build the feature network of a config node on the device. Train it if it needs the data."""
    if not node.get("_target_"):
        fix = "use features=inception or features=learned"
        raise UserError(f"features=auto: is for vgan-eval; {fix}")
    extractor = construct(node, "features")
    if not (hasattr(extractor, "protocol") and callable(extractor) and hasattr(extractor, "to")):
        rule = "needs `protocol`, `to(device)` and to be callable with images"
        raise UserError(f"features._target_={node['_target_']}: {rule}")
    extractor = extractor.to(device)
    if hasattr(extractor, "prepare"):
        extractor.prepare(dataset, device, cache_dir)
    return extractor
