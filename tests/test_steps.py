"""One step of each network does what the algorithm says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vgan.data.augment import TRANSFORMS, Augment
from vgan.data.loader import Loader
from vgan.data.source import Dataset
from vgan.models.discriminator import Discriminator
from vgan.models.generator import Generator
from vgan.training.state import Stats
from vgan.runtime.device import missing_compiler
from vgan.runtime.rng import Streams, signs, words
from vgan.training.ema import ema_copy, update_ema
from vgan.training.losses import LOSSES, PENALTIES, RELATIVISTIC
from vgan.training.step import (
    Batch,
    HyperParameters,
    Objective,
    Scalars,
    Split,
    State,
    compiled,
    d_forward,
    d_step,
    g_forward,
    g_step,
    train_step,
)

CPU = torch.device("cpu")
NOW = HyperParameters(lr_G=1e-2, lr_D=2e-2, beta2=0.95, gamma=3.0, augment_p=0.0)


def make_state() -> State:
    torch.manual_seed(0)
    G, D = Generator(8, 16, [8, 8, 8], label_dim=2), Discriminator(16, [8, 8, 8], label_dim=2)
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), betas=(0.0, 0.9)) for net in (G, D))
    return State(
        G,
        D,
        ema_copy(G),
        opt_G,
        opt_D,
        *(torch.amp.GradScaler("cpu", enabled=False) for _ in range(2)),
    )


def recipe(loss: str = "rpgan") -> Objective:
    return Objective(*LOSSES[loss], loss in RELATIVISTIC, Augment(), CPU, "fp32")


def weights(net: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


REAL = torch.linspace(-1, 1, 4 * 3 * 16 * 16).view(4, 3, 16, 16)
C = torch.eye(2).repeat(2, 1)


def step_d(
    state: State, how: Objective, streams: Streams, weight: float, device: torch.device = CPU
) -> Scalars:
    batch = Batch(REAL.to(device), C.to(device), streams)
    return d_step(state, how, NOW, batch, weight)


def step_g(state: State, how: Objective, streams: Streams) -> Scalars:
    return g_step(state, how, NOW, Batch(REAL, C, streams))


@pytest.mark.parametrize("loss", LOSSES)
def test_each_step_trains_its_own_network_and_the_loss_falls(loss: str) -> None:
    state, streams = make_state(), Streams(0, 0, 4)
    G, D = weights(state.G), weights(state.D)
    first = step_d(state, recipe(loss), streams, 1)["loss/D"]
    assert all(torch.equal(a, b) for a, b in zip(G, weights(state.G)))
    assert any(not torch.equal(a, b) for a, b in zip(D, weights(state.D)))
    for _ in range(3):
        last = step_d(state, recipe(loss), streams, 1)["loss/D"]
    assert last < first
    D = weights(state.D)
    first = step_g(state, recipe(loss), streams)["loss/G"]
    assert all(torch.equal(a, b) for a, b in zip(D, weights(state.D)))
    assert any(not torch.equal(a, b) for a, b in zip(G, weights(state.G)))
    for _ in range(3):
        last = step_g(state, recipe(loss), streams)["loss/G"]
    assert last < first
    assert all(p.requires_grad for p in state.D.parameters())


def test_one_step_is_a_step_of_d_and_then_one_of_g() -> None:
    whole, parts, streams = make_state(), make_state(), Streams(0, 0, 4)
    train_step(whole, recipe(), NOW, REAL, C, streams, 1)
    step_d(parts, recipe(), streams, 1)
    step_g(parts, recipe(), streams)
    for ours, theirs in ((whole.G, parts.G), (whole.D, parts.D)):
        assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs)))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(count: int) -> None:
    grads, scalars = [], []
    for parts in (1, count):
        state, how, batch = (
            make_state(),
            replace(recipe(), split=Split(parts)),
            Batch(REAL, C, Streams(0, 0, 4)),
        )
        with torch.no_grad():
            for p in state.D.parameters():
                p.add_(0.05 * torch.linspace(-1, 1, p.numel()).view_as(p))
        scalars.append(d_step(state, how, NOW, batch, 1))
        grads.append([p.grad for p in state.D.parameters()])
        state.D.load_state_dict(
            make_state().D.state_dict()
        )  # Adam's step makes much of a rounding; G shall see the same D
        scalars[-1] |= g_step(state, how, NOW, batch)
        grads[-1] += [p.grad for p in state.G.parameters()]
    for whole, split in zip(*grads):
        assert whole is not None
        assert torch.allclose(whole, split, rtol=1e-4, atol=1e-5)
    assert scalars[0].keys() == scalars[1].keys()
    for name, value in scalars[0].items():
        assert scalars[1][name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


def test_schedules_reach_the_optimizers() -> None:
    state, streams = make_state(), Streams(0, 0, 4)
    train_step(state, recipe(), NOW, REAL, C, streams, 0)
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
    scalars = step_d(state, recipe(), streams, 4)
    assert scalars["penalty/r1"].item() == pytest.approx(r1.item(), rel=1e-5)
    assert scalars["penalty/r2"].item() == pytest.approx(r2.item(), rel=1e-5)
    for p, g in zip(state.D.parameters(), expected):
        assert p.grad is not None
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-5)
    assert "penalty/r1" not in step_d(state, recipe(), streams, 0)


def test_compiled_steps_are_whole_graphs_that_no_schedule_makes_anew() -> None:
    """Same statistics as plain steps; one graph for G and two for D, then none whatever changes."""
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    plain = replace(recipe(), augment=Augment(list(TRANSFORMS)))
    options = {"fullgraph": True, "dynamic": False, "backend": count}
    parts = {f.__name__: torch.compile(f, **options) for f in (d_forward, g_forward)}
    whole = replace(plain, **parts)
    ours, theirs = make_state(), make_state()
    for step in range(6):
        now = HyperParameters(
            1e-3 / (step + 1), 2e-3 / (step + 1), 0.9 + 0.01 * step, 3.0 - 0.3 * step, 0.1 * step
        )
        scalars = []
        for state, how in ((ours, plain), (theirs, whole)):
            streams, weight = Streams(0, 4 * step, 4), 2 * (step % 2)
            scalars.append(train_step(state, how, now, REAL * (1 - 0.1 * step), C, streams, weight))
        plain_values, values = ({k: v.item() for k, v in s.items()} for s in scalars)
        assert values == pytest.approx(plain_values, rel=1e-3, abs=1e-3)
        assert len(graphs) == (2 if step == 0 else 3)


@pytest.mark.skipif(missing_compiler(CPU) is not None, reason="needs a C++ compiler")
def test_compiled_random_numbers_are_the_same_to_the_last_bit() -> None:
    torch._dynamo.reset()
    index = torch.arange(2**33, 2**33 + 5)
    draw = torch.compile(lambda i: (words(7, "z", i, 9), signs(7, "z", i, 40)), fullgraph=True)
    for ours, plain in zip(draw(index), (words(7, "z", index, 9), signs(7, "z", index, 40))):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_every_penalty_trains(penalty: str) -> None:
    state = make_state()
    how = replace(recipe(), penalty=penalty)
    scalars = train_step(state, how, NOW, REAL, C, Streams(0, 0, 4), 1)
    assert scalars["penalty/r1"] > 0
    assert scalars["grad_norm/D"] > 0


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
    there = Objective(*LOSSES["rpgan"], True, Augment(), device, precision)
    a = step_d(on_cpu, recipe(), Streams(0, 0, 4), 1)
    b = step_d(on_gpu, there, Streams(0, 0, 4, device), 1, device)
    for name in ("loss/D", "logits/real", "penalty/r1"):
        assert b[name].item() == pytest.approx(a[name].item(), rel=0.05, abs=0.02)
    scalars = train_step(
        on_gpu, there, NOW, REAL.to(device), C.to(device), Streams(0, 0, 4, device), 1
    )
    assert torch.isfinite(scalars["loss/G"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("hold", [True, False])
def test_the_loop_never_waits_for_the_gpu(hold: bool) -> None:
    """Loader, both steps, running average and statistics, with every synchronisation an error."""
    device = torch.device("cuda")
    state = make_state()
    G, D = (net.to(device) for net in (state.G, state.D))
    opts = [torch.optim.Adam(net.parameters(), betas=(0.0, 0.9), fused=True) for net in (G, D)]
    state = State(G, D, ema_copy(G), *opts, state.scaler_G, state.scaler_D)
    how = replace(recipe(), augment=Augment(list(TRANSFORMS)), device=device, precision="bf16")
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    feed = Loader(
        Dataset("x", images, np.arange(40) % 2, ("a", "b"), ""), 4, 0, device, hold_on_device=hold
    )
    stats = Stats()
    for step in range(4):
        torch.cuda.set_sync_debug_mode(
            "error" if step > 1 else "default"
        )  # allocations of the first steps may wait
        try:
            streams = Streams(0, 4 * step, 4, device)
            real, c = feed.batch(4 * step)
            stats.add(train_step(state, how, NOW, real, c, streams, 1))
            update_ema(state.G_ema, state.G, 0.9)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    feed.close()
    assert all(torch.isfinite(torch.tensor(x)) for x in stats.means().values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_compiled_steps_on_a_gpu_agree_with_plain_ones(cuda_graphs: bool) -> None:
    torch._dynamo.reset()
    device = torch.device("cuda")
    plain = replace(recipe(), device=device)
    states = [make_state() for _ in range(2)]
    for state in states:
        for net in (state.G, state.D, state.G_ema):
            net.to(device)
    recipes = (plain, compiled(plain, cuda_graphs))
    for step in range(5):
        scalars = []
        for state, how in zip(states, recipes):
            streams = Streams(0, 4 * step, 4, device)
            values = train_step(state, how, NOW, REAL.to(device), C.to(device), streams, 1)
            scalars.append({k: v.item() for k, v in values.items()})
        assert scalars[1] == pytest.approx(scalars[0], rel=0.01, abs=1e-3)
