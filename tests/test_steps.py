"""One step of each network does what the algorithm says."""

import pytest
import torch

from vgan.augment import Augment
from vgan.ema import ema_copy
from vgan.losses import LOSSES, RELATIVISTIC
from vgan.models.discriminator import Discriminator
from vgan.models.generator import Generator
from vgan.randomness import Streams
from vgan.steps import Moment, Recipe, State, d_step, g_step

CPU = torch.device("cpu")
NOW = Moment(lr_G=1e-2, lr_D=2e-2, beta2=0.95, gamma=3.0, augment_p=0.0)


def make_state() -> State:
    torch.manual_seed(0)
    G, D = Generator(8, 16, [8, 8, 8], label_dim=2), Discriminator(16, [8, 8, 8], label_dim=2)
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), betas=(0.0, 0.9)) for net in (G, D))
    return State(G, D, ema_copy(G), opt_G, opt_D, *(torch.amp.GradScaler("cpu", enabled=False) for _ in range(2)))


def recipe(loss: str = "rpgan") -> Recipe:
    return Recipe(*LOSSES[loss], loss in RELATIVISTIC, Augment(), CPU, "fp32")


def weights(net: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


REAL = torch.linspace(-1, 1, 4 * 3 * 16 * 16).view(4, 3, 16, 16)
C = torch.eye(2).repeat(2, 1)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_step_trains_its_own_network_and_the_loss_falls(loss: str) -> None:
    state, streams = make_state(), Streams(0, 0, 4)
    G, D = weights(state.G), weights(state.D)
    first = d_step(state, recipe(loss), NOW, REAL, C, streams, 1)["loss/D"]
    assert all(torch.equal(a, b) for a, b in zip(G, weights(state.G)))
    assert any(not torch.equal(a, b) for a, b in zip(D, weights(state.D)))
    for _ in range(3):
        last = d_step(state, recipe(loss), NOW, REAL, C, streams, 1)["loss/D"]
    assert last < first
    D = weights(state.D)
    first = g_step(state, recipe(loss), NOW, REAL, C, streams)["loss/G"]
    assert all(torch.equal(a, b) for a, b in zip(D, weights(state.D)))
    assert any(not torch.equal(a, b) for a, b in zip(G, weights(state.G)))
    for _ in range(3):
        last = g_step(state, recipe(loss), NOW, REAL, C, streams)["loss/G"]
    assert last < first
    assert all(p.requires_grad for p in state.D.parameters())


def test_schedules_reach_the_optimizers() -> None:
    state, streams = make_state(), Streams(0, 0, 4)
    d_step(state, recipe(), NOW, REAL, C, streams, 0)
    g_step(state, recipe(), NOW, REAL, C, streams)
    assert (state.opt_D.param_groups[0]["lr"], state.opt_G.param_groups[0]["lr"]) == (2e-2, 1e-2)
    assert state.opt_D.param_groups[0]["betas"] == (0.0, 0.95)


def test_gradient_is_of_loss_plus_half_gamma_times_penalties() -> None:
    """The discriminator's gradient against one built by hand from torch.func and the same random numbers."""
    state, streams = make_state(), Streams(5, 0, 4)
    with torch.no_grad():
        for p in state.D.parameters():
            p.add_(0.05 * torch.randn_like(p))
        fake = state.G(streams.normal("z_d", 8), C)
    v = torch.cat(streams.signs("tangent", 2 * 768).chunk(2, dim=1)).view(8, 3, 16, 16)
    images, c = torch.cat([REAL, fake]), torch.cat([C, C])
    logits, slope = torch.func.jvp(lambda x: state.D(x, c), (images,), (v,))
    real, fake_logits = logits.chunk(2)
    r1, r2 = (s.square().mean() for s in slope.chunk(2))
    loss = torch.nn.functional.softplus(fake_logits - real).mean() + 4 * 3.0 / 2 * (r1 + r2)
    expected = torch.autograd.grad(loss, list(state.D.parameters()))
    scalars = d_step(state, recipe(), NOW, REAL, C, streams, 4)
    assert scalars["penalty/r1"].item() == pytest.approx(r1.item(), rel=1e-5)
    assert scalars["penalty/r2"].item() == pytest.approx(r2.item(), rel=1e-5)
    for p, g in zip(state.D.parameters(), expected):
        assert p.grad is not None
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-5)
    assert "penalty/r1" not in d_step(state, recipe(), NOW, REAL, C, streams, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_steps_on_a_gpu_agree_with_the_cpu(precision: str) -> None:
    device = torch.device("cuda")
    on_cpu, on_gpu = make_state(), make_state()
    G, D = (net.to(device) for net in (on_gpu.G, on_gpu.D))
    opts = [torch.optim.Adam(net.parameters(), betas=(0.0, 0.9), fused=True) for net in (G, D)]
    scalers = [torch.amp.GradScaler("cuda", enabled=precision == "fp16") for _ in range(2)]
    on_gpu = State(G, D, ema_copy(G), *opts, *scalers)
    there = Recipe(*LOSSES["rpgan"], True, Augment(), device, precision)
    a = d_step(on_cpu, recipe(), NOW, REAL, C, Streams(0, 0, 4), 1)
    b = d_step(on_gpu, there, NOW, REAL.to(device), C.to(device), Streams(0, 0, 4, device), 1)
    for name in ("loss/D", "logits/real", "penalty/r1"):
        assert b[name].item() == pytest.approx(a[name].item(), rel=0.05, abs=0.02)
    assert torch.isfinite(g_step(on_gpu, there, NOW, REAL.to(device), C.to(device), Streams(0, 0, 4, device))["loss/G"])
