import pytest
import torch
from torch import nn

from vgan.models.discriminator import Discriminator
from vgan.runtime.rng import Streams
from vgan.training.losses import double_backward, finite_difference, jvp


def shaken_discriminator(**kw: object) -> Discriminator:
    """Double precision, with no weight left at zero."""
    torch.manual_seed(0)
    D = Discriminator(16, [16, 16, 8], label_dim=3, **kw)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in D.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return D.double()


@pytest.mark.parametrize("kw", [{}, {"logits_px": 1}, {"conv": "dense", "patch_px": 16}])
def test_hand_written_jvp_equals_torch_func(
    kw: dict[str, object], generator: torch.Generator
) -> None:
    D = shaken_discriminator(**kw)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=generator)
    v = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=generator)
    c = torch.eye(3, dtype=torch.float64)[:2]
    logits, slope = D.jvp(x, c, v)
    reference = torch.func.jvp(lambda x: D(x, c), (x,), (v,))
    assert torch.allclose(logits, reference[0], atol=1e-6)
    assert torch.allclose(slope, reference[1], atol=1e-6)
    # and the weights' gradients through the slope are right as well
    grads = torch.autograd.grad(slope.square().mean(), list(D.parameters()), allow_unused=True)
    expected = torch.autograd.grad(
        reference[1].square().mean(), list(D.parameters()), allow_unused=True
    )
    for a, b in zip(grads, expected):
        assert a is not None or b is None or float(b.abs().max()) == 0
        if a is not None and b is not None:
            assert torch.allclose(a, b, atol=1e-6)


def test_estimate_equals_the_exact_mean_over_patches(generator: torch.Generator) -> None:
    D = shaken_discriminator()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    c = torch.eye(3, dtype=torch.float64)[:1]
    patches = D(x, c).flatten()
    exact = sum(
        float(torch.autograd.grad(p, x, retain_graph=True)[0].square().sum()) for p in patches
    ) / len(patches)
    draws = 4000
    v = Streams(0, 0, draws).signs("tangent", x.numel()).double().view(draws, *x.shape[1:])
    with torch.no_grad():
        _, estimates = jvp(D, x.expand(draws, -1, -1, -1), c.expand(draws, -1), v)
    error = float(estimates.std()) / draws**0.5
    assert float(estimates.mean()) == pytest.approx(exact, abs=4 * error)
    assert error < 0.1 * exact


@pytest.mark.parametrize("kw", [{}, {"logits_px": 1}])
def test_exact_is_the_mean_over_patches_and_differentiates_once_more(
    kw: dict[str, object], generator: torch.Generator
) -> None:
    D = shaken_discriminator(**kw)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    c = torch.eye(3, dtype=torch.float64)[:2]
    patches = D(x, c).flatten(1)
    slopes = [torch.autograd.grad(p.sum(), x, create_graph=True)[0] for p in patches.unbind(1)]
    expected = torch.stack([s.square().sum((1, 2, 3)) for s in slopes]).mean(0)
    logits, penalty = double_backward(D, x.detach(), c, torch.zeros_like(x))
    assert torch.allclose(logits.flatten(1), patches)
    assert torch.allclose(penalty, expected.float())  # penalties are float32
    weights = [D.from_rgb.weight, D.to_logit.weight]
    for a, b in zip(
        torch.autograd.grad(penalty.sum(), weights), torch.autograd.grad(expected.sum(), weights)
    ):
        assert torch.allclose(a, b, rtol=1e-4)


def test_difference_comes_close_to_the_derivative(generator: torch.Generator) -> None:
    """In float32, under an autocast to bf16 in which the two logits would cancel."""
    D = shaken_discriminator().float()
    x, v = (torch.randn(8, 3, 16, 16, generator=generator) for _ in range(2))
    c = torch.eye(3).repeat(3, 1)[:8]
    with torch.autocast("cpu", torch.bfloat16):
        _, estimate = finite_difference(D, x, c, v)
    _, reference = jvp(D, x, c, v)
    assert torch.allclose(
        estimate, reference, rtol=0.1, atol=0.1 * float(reference.detach().mean())
    )


def test_linear_discriminator_has_its_weights_norm_as_penalty() -> None:
    """||d (w . x) / dx||^2 = ||w||^2, without an own jvp; one pixel, so that one sign is exact."""

    class Linear(nn.Module):
        def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            return 3 * x

    x = torch.zeros(2, 1, 1, 1)
    logits, penalty = jvp(
        Linear(), x + 5, torch.zeros(2, 0), torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    )
    assert logits.flatten().tolist() == [15, 15]
    assert penalty.tolist() == [9, 9]
