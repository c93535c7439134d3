import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import seams
import torch
import torchvision
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from vgan.data.folder import Folder
from vgan.data.packed import pack
from vgan.data.shapes import Shapes
from vgan.data.source import Dataset
from vgan.evaluation.features import (
    ClassifierFeatures,
    DINOv2,
    ImageNetFeatures,
    Inception,
    quarter_turns,
    sha256,
)
from vgan.runtime.errors import UserError
from vgan.runtime.extras import install_extra


@pytest.fixture
def shapes(tmp_path: Path) -> Dataset:
    return pack(Shapes(16, 400), tmp_path)


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")


def test_learned_features_are_white_on_the_reals(
    shapes: Dataset, cpu: torch.device, tmp_path: Path
) -> None:
    extractor = ClassifierFeatures(train_kimg=1, widths=(16, 8))
    before = torch.random.get_rng_state()
    extractor.prepare(shapes, cpu, tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    reals = torch.from_numpy(np.array(shapes.images)).permute(0, 3, 1, 2)
    rows, logits = extractor(reals)
    assert rows.shape == (400, 24)
    assert logits is not None
    assert logits.shape == (400, 8)
    assert rows.mean(0).abs().max() < 0.1
    covariance = torch.cov(rows.T)
    assert torch.linalg.eigvalsh(covariance).max() < 1.2
    assert covariance.trace() > 12  # a few directions may be noise
    # changed pictures are seen
    assert (extractor(255 - reals)[0].mean(0) ** 2).sum() > 10


def test_learned_learns(shapes: Dataset, cpu: torch.device, tmp_path: Path) -> None:
    extractor = ClassifierFeatures(train_kimg=6, widths=(32, 24))
    extractor.prepare(shapes, cpu, tmp_path)
    assert extractor.accuracy > 0.25  # by chance: 0.125


def test_learned_is_kept(
    shapes: Dataset, cpu: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, other = (
        ClassifierFeatures(train_kimg=k, widths=(16, 8)) for k in (0.2, 0.2, 0.3)
    )
    for extractor in (first, second, other):
        extractor.prepare(shapes, cpu, tmp_path)
    assert first.protocol == second.protocol != other.protocol
    assert second.accuracy == first.accuracy
    assert capsys.readouterr().out.count("training a classifier") == 2
    for path in tmp_path.glob("features-*.pt"):
        path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(UserError, match=r"damaged cache; delete this file"):
        ClassifierFeatures(train_kimg=0.2, widths=(16, 8)).prepare(shapes, cpu, tmp_path)


def test_learned_without_classes_tells_turns_apart(
    pictures_npy: Path, cpu: torch.device, tmp_path: Path
) -> None:
    dataset = pack(Folder(str(pictures_npy), 16, labels="none"), tmp_path)
    extractor = ClassifierFeatures(train_kimg=0.2, widths=(16, 8))
    extractor.prepare(dataset, cpu, tmp_path)
    logits = extractor(torch.zeros(3, 3, 16, 16, dtype=torch.uint8))[1]
    assert logits is not None
    assert logits.shape == (3, 4)
    assert "quarter turns" in extractor.protocol
    assert not math.isnan(extractor.accuracy)


def test_quarter_turns_are_what_they_say(generator: torch.Generator) -> None:
    images = torch.randn(4, 3, 8, 8, generator=generator)
    turned, turns = quarter_turns(images, torch.tensor([0.0, 0.3, 0.6, 0.9]))
    assert turns.tolist() == [0, 1, 2, 3]
    for i in range(4):
        assert torch.equal(turned[i], torch.rot90(images[i], i, (1, 2)))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of the right shape with random weights."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
            lambda *_, **__: None,
        )
        network = FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def test_inception_of_another_file_is_refused(inception_file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"not the Inception weights of FID .sha256 \w{8}, not 6726825d"
    ):
        Inception(str(inception_file))
    with pytest.raises(UserError, match=r"features.weights=.*nowhere.*cannot be read"):
        Inception(str(tmp_path / "nowhere"))


def test_inception_from_a_file(
    inception_file: Path, monkeypatch: pytest.MonkeyPatch, cpu: torch.device
) -> None:
    digest = sha256(inception_file.read_bytes())[:8]
    seams.accept_inception_weights(digest, monkeypatch)
    extractor = Inception(str(inception_file)).to(cpu)
    colour = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    rows, logits = extractor(colour)
    reference = FeatureExtractorInceptionV3("i", ["2048", "logits_unbiased"], str(inception_file))(
        colour
    )
    assert torch.equal(rows, reference[0])
    assert torch.equal(logits, reference[1])
    assert digest in extractor.protocol
    assert torch.equal(
        extractor(colour[:, :1])[0], extractor(colour[:, :1].repeat(1, 3, 1, 1))[0]
    )  # grey in all channels


def test_inception_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(
        UserError, match=r"cannot be had .Name or.*features.weights=PATH, or use features=learned"
    ):
        Inception()


def test_inception_without_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    fix = re.escape(install_extra("eval"))
    with pytest.raises(UserError, match=f"needs torch-fidelity; {fix}, or use features=learned"):
        Inception()


def test_imagenet_features_are_the_pooled_maps_of_torchvision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    features = ImageNetFeatures(weights=str(tmp_path / "weights.pth"))
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = network.features(x).mean((2, 3))
        values, logits = features(images)
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-5)
    assert logits is None
    assert "digest" in features.protocol


def test_imagenet_weights_that_are_missing_are_named() -> None:
    with pytest.raises(UserError, match=r"features.weights=nowhere.pth: cannot be read"):
        ImageNetFeatures(weights="nowhere.pth")


def test_dinov2_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.load", offline)
    with pytest.raises(UserError, match=r"features=dinov2: cannot be had .Name.*features=learned"):
        DINOv2()
