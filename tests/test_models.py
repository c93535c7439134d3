import pytest
import torch

from vgan.models.attention import AdaptiveAttention2d, SelfAttention2d
from vgan.models.discriminator import Discriminator
from vgan.models.generator import Generator, PlainGenerator
from vgan.models.layers import (
    BiasLeakyReLU,
    ConvToPixels,
    SeparableConv2d,
    conv3x3,
    upsample2x,
)
from vgan.training.summary import count_multiply_adds, count_parameters

WIDTHS = [16, 16, 16, 8, 8, 8, 8]


@pytest.mark.parametrize("resolution", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_generator_and_discriminator_at_every_size(resolution: int, channels: int) -> None:
    G = Generator(8, resolution, WIDTHS, channels, label_dim=3, attention="self")
    D = Discriminator(resolution, WIDTHS, channels, label_dim=3)
    c = torch.eye(3)[:2]
    images = G(torch.randn(2, 8), c)
    assert images.shape == (2, channels, resolution, resolution)
    assert D(images, c).shape == (2, 1, 4, 4)


def test_separable_convolution_is_depthwise_then_pointwise() -> None:
    layer = SeparableConv2d(4, 6, kernel_size=5, stride=2, padding=2).double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    dense = layer.pointwise.weight[:, :, 0, 0, None, None] * layer.depthwise.weight[:, 0][None]
    expected = torch.nn.functional.conv2d(x, dense, layer.pointwise.bias, stride=2, padding=2)
    assert torch.allclose(layer(x), expected)
    assert layer(x).shape == (2, 6, 5, 5)
    assert count_parameters(layer) == 4 * 25 + 4 * 6 + 6


def test_self_attention_is_softmax_over_positions() -> None:
    layer = SelfAttention2d(8, 5, num_heads=2).double()
    x = torch.randn(1, 8, 3, 4, dtype=torch.float64)
    q, k, v = layer.to_qkv(x).flatten(2)[0].view(3, 2, 4, 12)  # (3, heads, d, positions)
    q, k = (
        t / (t.square().mean(1, keepdim=True) + torch.finfo(t.dtype).eps).sqrt() for t in (q, k)
    )
    weights = torch.softmax(torch.einsum("hdi,hdj->hij", q, k) / 4**0.5, dim=-1)
    mixed = torch.einsum("hij,hdj->hdi", weights, v).reshape(1, 8, 3, 4)
    assert torch.allclose(layer(x), layer.to_out(mixed))
    assert layer(x).shape == (1, 5, 3, 4)


def test_self_attention_sees_the_whole_map() -> None:
    layer, x = SelfAttention2d(8, 8), torch.randn(1, 8, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0, :, 0, 0].sum(), x)
    assert (grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("out_channels", [8, 12])
def test_adaptive_attention_starts_closed_and_learns_to_open(out_channels: int) -> None:
    layer, x = AdaptiveAttention2d(8, out_channels), torch.randn(2, 8, 4, 4)
    assert torch.equal(layer(x), layer.project(x))
    layer(x).square().sum().backward()
    assert layer.to_gate.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
    with torch.no_grad():
        layer.to_gate.weight.normal_()
    assert not torch.equal(layer(x), layer.project(x))


def test_pairs_activation_multiplies_tangents_by_the_slope() -> None:
    act = BiasLeakyReLU(1)
    with torch.no_grad():
        act.bias.fill_(1.0)
    values, tangents = torch.tensor([2.0, -3.0]), torch.tensor([5.0, 7.0])
    x = torch.cat([values, tangents]).view(4, 1, 1, 1)
    assert torch.allclose(act(x, pairs=True).flatten(), torch.tensor([3.0, -0.4, 5.0, 1.4]))


def test_upsampling_keeps_a_constant_and_passes_no_checkerboard() -> None:
    assert torch.allclose(upsample2x(torch.ones(1, 2, 4, 4)), torch.ones(1, 2, 8, 8))
    impulse = torch.zeros(1, 1, 5, 5)
    impulse[0, 0, 2, 2] = 1
    assert torch.allclose(
        upsample2x(impulse)[0, 0, 4, 3:7] * 16 / 3, torch.tensor([1.0, 3.0, 3.0, 1.0])
    )


@pytest.mark.parametrize(("patch_px", "grid"), [(16, 16), (20, 8), (32, 4)])
def test_patch_size_bounds_what_a_logit_sees(patch_px: int, grid: int) -> None:
    torch.manual_seed(0)
    D = Discriminator(32, WIDTHS, patch_px=patch_px)
    with torch.no_grad():
        for p in D.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert D.receptive_field_px <= patch_px
    assert D(torch.zeros(1, 3, 32, 32)).shape[-1] == grid
    x = torch.randn(1, 3, 96, 96, requires_grad=True)
    logits = D(x)
    middle = logits.shape[-1] // 2
    (grad,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
    rows = grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == D.receptive_field_px


def test_whole_image_receptive_field_and_single_logit() -> None:
    D = Discriminator(32, WIDTHS, logits_px=1)
    assert D(torch.randn(2, 3, 32, 32)).shape == (2, 1, 1, 1)
    assert D.receptive_field_px > 32
    assert Discriminator(32, WIDTHS)(torch.randn(1, 3, 64, 48)).shape == (
        1,
        1,
        8,
        6,
    )  # fully convolutional


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_patches_give_the_same_picture_and_grid_with_fewer_stages(patch_size: int) -> None:
    G = Generator(8, 32, WIDTHS, patch_size=patch_size)
    D = Discriminator(32, WIDTHS, patch_size=patch_size)
    assert len(G.stages) == len(D.stages) == 4 - [1, 2, 4, 8].index(patch_size)
    images = G(torch.randn(2, 8))
    assert images.shape == (2, 3, 32, 32)
    assert D(images).shape == (2, 1, 4, 4)


def test_patch_size_none_has_16_cells_at_every_resolution() -> None:
    for resolution, patch_size in ((16, 1), (32, 2), (64, 4), (128, 8)):
        G = Generator(8, resolution, WIDTHS, patch_size=None)
        D = Discriminator(resolution, WIDTHS, patch_size=None)
        assert len(G.stages) == len(D.stages) == 3  # 4, 8 and 16 px
        same = Generator(8, resolution, WIDTHS, patch_size=patch_size)
        assert G.state_dict().keys() == same.state_dict().keys()


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_last_layers_cannot_make_a_checkerboard_inside(patch_size: int) -> None:
    layer = ConvToPixels(12, 3, patch_size)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    images = layer(torch.randn(1, 12, 1, 1).expand(1, 12, 8, 8))
    images = images[..., 2 * patch_size : -2 * patch_size, 2 * patch_size : -2 * patch_size]
    assert images.std((2, 3)).max() < 1e-5


def test_modulation_starts_as_nothing_and_then_reaches_every_stage() -> None:
    torch.manual_seed(0)
    plain = Generator(8, 16, WIDTHS, label_dim=2, embed_dim=4)
    G = Generator(8, 16, WIDTHS, label_dim=2, embed_dim=4, modulation=True)
    missing = G.load_state_dict(plain.state_dict(), strict=False).missing_keys
    z, c = torch.randn(2, 8), torch.eye(2)
    assert torch.equal(G(z, c), plain(z, c))
    assert {name.split(".")[1] for name in missing} == {"0", "1"}  # at 8 and 16 px

    G(z, c).square().sum().backward()
    for modulation in G.modulations:
        assert modulation.weight.grad is not None
        assert (modulation.weight.grad != 0).all()  # from z and from the class


def test_conditioning_reaches_both_networks() -> None:
    torch.manual_seed(0)
    z, c = torch.randn(1, 8).expand(2, 8), torch.eye(2)
    for G in (Generator(8, 16, WIDTHS, label_dim=2), PlainGenerator(8, 16, WIDTHS, label_dim=2)):
        a, b = G(z, c)
        assert not torch.allclose(a, b)
    D = Discriminator(16, WIDTHS, label_dim=2)
    a, b = D(torch.randn(1, 3, 16, 16).expand(2, 3, 16, 16), c)
    assert not torch.allclose(a, b)
    with pytest.raises(ValueError, match="c=None"):
        D(torch.randn(1, 3, 16, 16))


def test_plain_generator_ends_in_tanh() -> None:
    G = PlainGenerator(8, 16, WIDTHS)
    with torch.no_grad():
        G.to_rgb[0].weight.mul_(100)
    images = G(torch.randn(4, 8), None)
    assert images.abs().max() <= 1
    assert images.abs().max() > 0.9


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"img_resolution": 50}, "power of two"),
        ({"img_resolution": 16, "patch_size": 8}, "too large"),
        ({"img_channels": 2}, "must be 1"),
        ({"widths": [8, 8]}, "needs 3 of them"),
        ({"conv": "magic"}, "conv=magic"),
        ({"attention": "magic"}, "attention=magic"),
    ],
)
def test_generator_refuses(kw: dict[str, object], message: str) -> None:
    arguments = {"z_dim": 8, "img_resolution": 16, "widths": WIDTHS} | kw
    with pytest.raises(ValueError, match=message):
        Generator(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kw", "message"), [({"patch_px": 8}, "patch_px=8"), ({"logits_px": 2}, "logits_px=2")]
)
def test_discriminator_refuses(kw: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Discriminator(32, WIDTHS, **kw)  # type: ignore[arg-type]


def test_multiply_adds_of_known_layers() -> None:
    x = torch.zeros(1, 4, 8, 8)
    assert count_multiply_adds(conv3x3("dense", 4, 6), x) == 64 * 4 * 6 * 9
    assert count_multiply_adds(conv3x3("separable", 4, 6), x) == 64 * (4 * 9 + 4 * 6)
    assert count_multiply_adds(SelfAttention2d(4, 4), x) == 64 * 4 * 16 + 2 * 64**2 * 4


def test_backward_of_upsampling_is_the_same_for_the_compiler(generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    grad = torch.randn(2, 3, 8, 12, dtype=torch.float64, generator=generator)
    compiled = torch.compile(upsample2x, fullgraph=True, backend="aot_eager")
    for y in (upsample2x(x), compiled(x)):
        assert torch.allclose(y[0, 0, 2, 0], 0.25 * x[0, 0, 0, 0] + 0.75 * x[0, 0, 1, 0])
        (result,) = torch.autograd.grad(y, x, grad)
        (expected,) = torch.autograd.grad(
            torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear"), x, grad
        )
        assert torch.allclose(result, expected)


@pytest.mark.parametrize("attention", ["self", "adaptive"])
def test_under_autocast_every_layer_works_in_bf16_and_channels_last(attention: str) -> None:
    G = Generator(16, 32, [64, 32, 16, 8], label_dim=3, attention=attention, blocks=2).to(
        memory_format=torch.channels_last
    )
    D = Discriminator(32, [64, 32, 16, 8], label_dim=3, blocks=2).to(
        memory_format=torch.channels_last
    )
    seen = []

    def check(module: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen.append(module)
        for x in (out,) if module is D.from_rgb else (args[0], out):  # pictures come in float32
            assert x.dtype == torch.bfloat16
            assert x.is_contiguous(memory_format=torch.channels_last)

    layers = [
        m
        for net in (G, D)
        for m in net.modules()
        if isinstance(m, (torch.nn.Conv2d, BiasLeakyReLU, SelfAttention2d))
    ]
    layers = [m for m in layers if m not in (D.to_logit,)]  # its bias is added apart, in float32
    for layer in layers:
        layer.register_forward_hook(check)
    c = torch.eye(3)[[0, 1, 2, 0]]
    with torch.autocast("cpu", torch.bfloat16):
        images = G(torch.randn(4, 16), c).float()
        D.jvp(images, c, torch.randn_like(images))
    assert set(seen) == set(layers)


def test_attention_fits_every_width() -> None:
    for channels in range(8, 520, 8):
        heads = SelfAttention2d(channels, channels).num_heads
        assert channels % heads == 0
        assert heads <= max(1, channels // 64)
    assert [SelfAttention2d(c, c).num_heads for c in (96, 256, 384, 512)] == [1, 4, 6, 8]


def test_checkpointed_features_give_the_same_gradients() -> None:
    grads = []
    for gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        G = Generator(
            8,
            16,
            [8, 16, 8],
            label_dim=2,
            blocks=2,
            attention="adaptive",
            attention_resolutions=[8],
            gradient_checkpointing=gradient_checkpointing,
        )
        D = Discriminator(
            16, [8, 16, 8], label_dim=2, blocks=2, gradient_checkpointing=gradient_checkpointing
        )
        c = torch.eye(2)
        logits, slopes = D.jvp(G(torch.ones(2, 8), c), c, torch.ones(2, 3, 16, 16))
        (logits.mean() + slopes.square().mean()).backward()
        grads.append([p.grad for net in (G, D) for p in net.parameters()])
    for plain, again in zip(*grads):
        assert (plain is None) == (again is None)
        assert plain is None or torch.equal(plain, again)
