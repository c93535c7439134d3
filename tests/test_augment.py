import pytest
import torch

from vgan.augment import TRANSFORMS, Augment, cutout, flip, translation
from vgan.randomness import Streams

ON, OFF = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
RAMP = torch.arange(64.0).view(1, 1, 8, 8) / 64 - 0.5


def test_flip_is_left_right() -> None:
    assert torch.equal(flip(RAMP, ON, torch.tensor([[0.2, 0, 0]])), RAMP.flip(3))
    assert torch.equal(flip(RAMP, ON, torch.tensor([[0.7, 0, 0]])), RAMP)


def test_translation_moves_whole_pixels_and_fills_with_grey() -> None:
    moved = translation(RAMP, ON, torch.tensor([[0.99, 0.0, 0]]))  # one row down, one column left
    expected = torch.zeros_like(RAMP)
    expected[:, :, 1:, :-1] = RAMP[:, :, :-1, 1:]
    assert torch.equal(moved, expected)


def test_cutout_hides_a_square_of_half_the_width() -> None:
    out = cutout(RAMP + 1, ON, torch.tensor([[0.5, 0.5, 0]]))
    hidden = out[0, 0] == 0
    assert hidden[2:6, 2:6].all()
    assert hidden.sum() == 16


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_can_be_off_and_passes_gradients(name: str) -> None:
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    u = torch.tensor([[0.3, 0.6, 0.8]])
    assert torch.allclose(TRANSFORMS[name](x, OFF, u), x, atol=1e-6)
    out = TRANSFORMS[name](x, ON, u)
    assert not torch.allclose(out, x)
    out.square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).sum() > 32


def test_probability_is_a_share_of_pictures_and_draws_belong_to_the_image() -> None:
    augment, x = Augment(["cutout"]), torch.ones(4000, 1, 8, 8)
    changed = (augment(x, 0.3, Streams(0, 0, 4000), "real") != 1).flatten(1).any(1)
    assert abs(float(changed.float().mean()) - 0.3) < 0.03
    part = augment(x[:10], 0.3, Streams(0, 100, 10), "real")
    assert torch.equal(part, augment(x, 0.3, Streams(0, 0, 4000), "real")[100:110])
    assert torch.equal(augment(x, 0.0, Streams(0, 0, 4000), "real"), x)
    assert torch.equal(augment(x, torch.tensor(0.3), Streams(0, 0, 4000), "real")[100:110], part)


def test_unknown_transform_is_named() -> None:
    with pytest.raises(ValueError, match="swirl"):
        Augment(["swirl"])
