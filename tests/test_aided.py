"""The discriminator with a judge on frozen features. The weights here are random and small."""

from pathlib import Path

import pytest
import torch
import torchvision
from checkpoints import compose_as
from runs import train_in_process
from safetensors.torch import load_file, save_file

from vgan.config import SampleConfig
from vgan.inference.sample import sample
from vgan.models.aided import AidedDiscriminator, Head
from vgan.runs import checkpoint
from vgan.runtime.errors import UserError
from vgan.runtime.rng import Streams
from vgan.training.losses import LOSSES


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mobilenet.safetensors"
    torch.manual_seed(0)
    save_file(torchvision.models.mobilenet_v2(weights=None).state_dict(), path)
    return path


def aided(weights: Path | str, *more: str) -> list[str]:
    words = ["model/discriminator=aided", f"model.discriminator.weights={weights}"]
    return [*words, "model.discriminator.judge_px=32", "model.discriminator.judge_width=8", *more]


def make(weights: Path, **changes: object) -> AidedDiscriminator:
    arguments = {"judge_px": 32, "judge_width": 8, "weights": str(weights), **changes}
    torch.manual_seed(1)
    D = AidedDiscriminator(16, [8, 8, 8], label_dim=3, **arguments)  # type: ignore[arg-type]
    D.load_backbone(torch.rand(16, 3, 16, 16) * 2 - 1)
    return D


def test_the_backbone_is_frozen_and_in_no_checkpoint(weights: Path) -> None:
    D = make(weights)
    names = set(D.state_dict()) | {name for name, _ in D.named_parameters()}
    assert not any("backbone" in name for name in names)
    assert sum(p.numel() for p in D.parameters()) < 30_000
    before = [b.clone() for b in D.buffers()]
    x = torch.rand(4, 3, 16, 16, requires_grad=True)
    sum(logits.sum() for logits in D.train().judge(x, torch.eye(3)[[0, 1, 2, 0]]).logits).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, D.buffers(), strict=True))


def test_the_frozen_features_are_those_of_torchvision(weights: Path) -> None:
    """Batch normalisation is folded into the convolutions, which must not change the maps."""
    D = make(weights)
    network = torchvision.models.mobilenet_v2(weights=None).eval()
    assert D._backbone is not None
    network.load_state_dict(load_file(weights))
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = network.features[:18]((x - mean[:, None, None]) / std[:, None, None])
        maps = D._backbone(x * 2 - 1)
    torch.testing.assert_close(maps[-1], expected, rtol=1e-3, atol=1e-5)
    assert [m.shape[-1] for m in maps] == [8, 4, 2, 1]


def test_every_pixel_of_a_large_image_counts(weights: Path) -> None:
    arguments = {"judge_px": 32, "judge_width": 8, "weights": str(weights)}
    D = AidedDiscriminator(256, [8] * 7, **arguments)  # type: ignore[arg-type]
    D.load_backbone(torch.rand(4, 3, 256, 256) * 2 - 1)
    x = torch.rand(1, 3, 256, 256, requires_grad=True)
    sum(logits.sum() for logits in D.judge(x, None).logits).backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(1) > 0).float().mean() > 0.99


def test_the_tangents_of_a_head_are_its_derivative() -> None:
    torch.manual_seed(0)
    head = Head(8, 3, 4)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn_like(p))
    f, v, c = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8), torch.eye(3)[:2]
    value, tangent = head(torch.cat([f, v]), c, pairs=True).chunk(2)
    expected = torch.func.jvp(lambda x: head(x, c), (f,), (v,))
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(tangent, expected[1])


def test_the_penalty_is_a_squared_norm_of_features(weights: Path) -> None:
    """Multiplying the logits by 3 multiplies it by 9."""
    D = make(weights)
    x, c, rng = torch.rand(4, 3, 16, 16), torch.eye(3)[[0, 1, 0, 1]], Streams(0, 0, 2)
    before = D.judge(x, c, rng).grad_norm_sq
    with torch.no_grad():
        for head in D.heads:
            head.to_logit.weight.mul_(3)
            head.to_embed.weight.mul_(3)
    after = D.judge(x, c, rng).grad_norm_sq
    assert before is not None
    assert before.shape == (4,)
    torch.testing.assert_close(after, 9 * before)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_both_networks_learn_from_the_judge(tmp_path: Path, weights: Path, loss: str) -> None:
    train_in_process(tmp_path, *aided(weights, f"loss={loss}", "total_kimg=0.016"))
    first = checkpoint.load(checkpoint.find(tmp_path))
    train_in_process(tmp_path, *aided(weights, f"loss={loss}", "total_kimg=0.032"))
    last = checkpoint.load(checkpoint.find(tmp_path))
    assert not torch.equal(
        first["D"]["heads.0.to_logit.weight"], last["D"]["heads.0.to_logit.weight"]
    )
    assert torch.equal(first["D"]["mixer.across_0"], last["D"]["mixer.across_0"])
    assert not torch.equal(first["G"]["input.basis"], last["G"]["input.basis"])


def test_resume_is_exact_and_needs_the_same_weights(tmp_path: Path, weights: Path) -> None:
    train_in_process(tmp_path / "a", *aided(weights, "total_kimg=0.12"))
    train_in_process(tmp_path / "b", *aided(weights, "total_kimg=0.08", "schedule_kimg=0.12"))
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(weights.read_bytes())
    others = tmp_path / "others.safetensors"
    save_file(torchvision.models.mobilenet_v2(weights=None).state_dict(), others)
    with pytest.raises(UserError, match="other frozen weights"):
        train_in_process(tmp_path / "b", *aided(others, "total_kimg=0.12"))
    train_in_process(tmp_path / "b", *aided(weights, "total_kimg=0.12", "schedule_kimg=0.12"))
    finals = [checkpoint.load(checkpoint.find(tmp_path / name)) for name in "ab"]
    for network in ("G", "D"):
        for name, value in finals[0][network].items():
            assert torch.equal(value, finals[1][network][name]), name
    train_in_process(tmp_path / "b", *aided(moved, "total_kimg=0.16"))  # the path does not count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weights=missing.pth", "cannot be read"),
        ("weights={page}", "not a file of weights; give a .pth"),
        ("backbone=vgg16", "backbone=vgg16: unknown; use one of mobilenet_v2"),
        ("backbone=efficientnet_b0", "does not fit efficientnet_b0"),
        ("judge_px=40", "must be a multiple of 32"),
        ("judge_weight=0", "must be above 0"),
    ],
)
def test_bad_input_begins_nothing(tmp_path: Path, weights: Path, change: str, message: str) -> None:
    page = tmp_path / "page.pth"
    page.write_text("<html>not found</html>")
    change = change.format(page=page)
    with pytest.raises(UserError, match=message):
        train_in_process(tmp_path / "run", *aided(weights, f"model.discriminator.{change}"))
    assert not (tmp_path / "run").exists()


def test_patch_logits_need_no_backbone(tmp_path: Path, weights: Path) -> None:
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(weights.read_bytes())
    train_in_process(tmp_path / "run", *aided(moved, "total_kimg=0.016"))
    moved.unlink()
    words = (f"ckpt={tmp_path / 'run'}", "show=patches", f"out={tmp_path / 'patches.png'}", "n=2")
    sample(compose_as(SampleConfig, "sample", *words))
    assert (tmp_path / "patches.png").stat().st_size > 0


@pytest.mark.parametrize("backbone", ["efficientnet_b0", "convnext_tiny"])
def test_other_backbones(tmp_path: Path, backbone: str) -> None:
    network = torchvision.models.get_model(backbone, weights=None)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    D = make(tmp_path / "weights.pth", backbone=backbone)
    verdict = D.judge(torch.rand(2, 3, 16, 16), torch.eye(3)[:2], Streams(0, 0, 1))
    assert [tuple(x.shape) for x in verdict.logits] == [
        (2, 1, 4, 4), (2, 1, 4, 4), (2, 1, 2, 2), (2, 1, 1, 1),
    ]  # fmt: skip
