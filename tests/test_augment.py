import pytest
import torch

from vgan.data.augment import (
    COLOURS,
    TRANSFORMS,
    Augment,
    _grid_sample,
    cutout,
    flip,
    quarter_turns,
    recolour,
    resample,
    rotation,
    scale,
    stretch,
    translation,
)
from vgan.runtime.rng import Streams

ON = torch.ones(1)
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
    x = torch.randn(40, 3, 8, 8, requires_grad=True)
    augment, streams = Augment([name]), Streams(0, 0, 40)
    assert torch.allclose(augment(x, 0.0, streams, "real"), x, atol=1e-6)
    out = augment(x, 1.0, streams, "real")
    assert out.shape == x.shape
    changed = (out != x).flatten(1).any(1).float().mean()
    assert changed > 0.3  # flips and turns leave some as they are
    out.square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).sum() > 0.3 * x.numel()


def test_quarter_turns_are_rotations() -> None:
    x = torch.randn(4, 3, 6, 6)
    turned = quarter_turns(
        x, torch.ones(4), torch.tensor([[0.1, 0, 0], [0.3, 0, 0], [0.6, 0, 0], [0.9, 0, 0]])
    )
    for i in range(4):
        assert torch.equal(turned[i], torch.rot90(x[i], i, (1, 2)))


def test_geometry_in_one_resampling_is_what_the_matrices_say() -> None:
    """Rotation by a right angle is a quarter turn; a shift by a pixel a roll; order is kept."""
    x, one = torch.randn(1, 3, 8, 8), torch.ones(1)
    right_angle = rotation(one, torch.tensor([[0.75, 0, 0]]))
    assert torch.allclose(resample(x, [right_angle]), torch.rot90(x, 1, (2, 3)), atol=1e-5)
    by_a_pixel = torch.eye(3)[None].clone()
    by_a_pixel[0, 0, 2] = -2 / 8  # from the left: the picture moves right
    moved = resample(x, [by_a_pixel])
    assert torch.allclose(moved[..., 1:], x[..., :-1], atol=1e-5)
    assert torch.allclose(moved[..., 0], x[..., 0], atol=1e-5)  # mirrored
    both = resample(x, [by_a_pixel, right_angle])
    assert torch.allclose(both, torch.rot90(moved, 1, (2, 3)), atol=1e-5)
    assert torch.equal(resample(x, [torch.eye(3)[None]]), x)


def test_deterministic_resampling_is_the_same(generator: torch.Generator) -> None:
    x = torch.randn(3, 2, 8, 6, generator=generator, requires_grad=True)
    grid = 3 * (2 * torch.rand(3, 8, 6, 2, generator=generator) - 1)
    ours = _grid_sample(x, grid)
    how = {"mode": "bilinear", "padding_mode": "reflection", "align_corners": False}
    theirs = torch.nn.functional.grid_sample(x, grid, **how)  # type: ignore[arg-type]
    assert torch.allclose(ours, theirs, atol=1e-5)
    weight = torch.randn(ours.shape, generator=generator)
    gradients = [torch.autograd.grad(y, x, weight)[0] for y in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-4)


def test_scale_and_stretch_keep_what_they_should() -> None:
    draws = torch.rand(200, 3)
    areas = torch.linalg.det(stretch(torch.ones(200), draws))
    assert torch.allclose(areas, torch.ones(200), atol=1e-5)
    factors = scale(torch.ones(200), draws)[:, 0, 0].log2()
    assert abs(float(factors.std()) - 0.2) < 0.04


@pytest.mark.parametrize("name", COLOURS)
def test_colours_act_as_their_names_say(name: str) -> None:
    grey, red = (
        torch.full((100, 3, 4, 4), 0.4),
        torch.tensor([0.8, -0.2, -0.6]).view(1, 3, 1, 1).expand(100, 3, 4, 4),
    )
    draws, on = torch.rand(100, 3, generator=torch.Generator().manual_seed(0)), torch.ones(100)
    matrix = COLOURS[name](on, draws)
    to_grey, to_red = recolour(grey, [matrix]), recolour(red, [matrix])
    spread = lambda x: (x - x.mean(1, keepdim=True)).norm(dim=1).mean((1, 2))  # noqa: E731
    luma = lambda x: x.mean((1, 2, 3))  # noqa: E731
    assert torch.allclose(spread(to_grey), torch.zeros(100), atol=1e-5)  # greys stay grey
    kept = {
        "luma": name in ("hue", "saturation"),
        "spread": name in ("hue", "luma_flip", "brightness"),
    }
    assert torch.allclose(luma(to_grey), luma(grey), atol=1e-5) == kept["luma"]
    assert torch.allclose(spread(to_red), spread(red), atol=1e-5) == kept["spread"]
    # the same matrices on pictures with one channel: what happens to grey
    assert torch.allclose(recolour(grey[:, :1], [matrix]), to_grey[:, :1], atol=1e-5)


def test_order_of_naming_does_not_matter() -> None:
    x, streams = torch.randn(8, 3, 8, 8), Streams(0, 0, 8)
    a, b = (
        Augment(names)(x, 1.0, streams, "real")
        for names in (["cutout", "flip"], ["flip", "cutout"])
    )
    assert torch.equal(a, b)


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
