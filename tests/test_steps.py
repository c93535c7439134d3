"""One step of each network does what the algorithm says."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vgan.data.augment import TRANSFORMS, Augment
from vgan.data.loader import Batch, Loader
from vgan.data.source import Dataset
from vgan.models.discriminator import Discriminator
from vgan.models.generator import Generator
from vgan.models.layers import PointwiseConv2d, select_pointwise
from vgan.runtime.device import missing_compiler
from vgan.runtime.rng import Streams, signs, words
from vgan.training.losses import LOSSES, PENALTIES, RELATIVISTIC
from vgan.training.optimize import MicroBatches, Scalars
from vgan.training.schedules import HyperParameters
from vgan.training.setup import compile_objective
from vgan.training.state import Stats, TrainState, ema_copy, update_ema
from vgan.training.step import (
    Objective,
    d_objective,
    d_step,
    g_objective,
    g_step,
    train_step,
)

CPU = torch.device("cpu")
HP = HyperParameters(lr_G=1e-2, lr_D=2e-2, beta2=0.95, gamma=3.0, augment_p=0.0)
REAL = torch.linspace(-1, 1, 4 * 3 * 16 * 16).view(4, 3, 16, 16)
C = torch.eye(2).repeat(2, 1)


def make_state(
    device: torch.device = CPU, precision: str = "fp32", patch_size: int = 1
) -> TrainState:
    torch.manual_seed(0)
    G = Generator(8, 16, [8, 8, 8], label_dim=2, patch_size=patch_size).to(device)
    D = Discriminator(16, [8, 8, 8], label_dim=2).to(device)
    fused = True if device.type == "cuda" else None
    adam = [torch.optim.Adam(n.parameters(), betas=(0.0, 0.9), fused=fused) for n in (G, D)]
    is_fp16 = precision == "fp16"
    scalers = [torch.amp.GradScaler(device.type, enabled=is_fp16) for _ in range(2)]
    return TrainState(G, D, ema_copy(G), *adam, *scalers)


def make_objective(loss: str = "rpgan") -> Objective:
    return Objective(*LOSSES[loss], loss in RELATIVISTIC, Augment(), CPU, "fp32")


def make_batch(first: int = 0, device: torch.device = CPU, seed: int = 0) -> Batch:
    return Batch(REAL.to(device), C.to(device), Streams(seed, first, 4, device))


def weights(net: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def step_d(state: TrainState, how: Objective, weight: int = 1, seed: int = 0) -> Scalars:
    batch = make_batch(device=how.device, seed=seed)
    return d_step(state, how, batch, replace(HP, penalty_weight=weight))


def step_g(state: TrainState, how: Objective) -> Scalars:
    return g_step(state, how, make_batch(device=how.device), HP)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_step_trains_its_own_network_and_the_loss_falls(loss: str) -> None:
    state, how = make_state(), make_objective(loss)
    G, D = weights(state.G), weights(state.D)
    first = step_d(state, how)["loss/D"]
    assert all(torch.equal(a, b) for a, b in zip(G, weights(state.G)))
    assert any(not torch.equal(a, b) for a, b in zip(D, weights(state.D)))
    for _ in range(3):
        last = step_d(state, how)["loss/D"]
    assert last < first
    D = weights(state.D)
    first = step_g(state, how)["loss/G"]
    assert all(torch.equal(a, b) for a, b in zip(D, weights(state.D)))
    assert any(not torch.equal(a, b) for a, b in zip(G, weights(state.G)))
    for _ in range(3):
        last = step_g(state, how)["loss/G"]
    assert last < first
    assert all(p.requires_grad for p in state.D.parameters())


def test_a_training_step_is_one_of_d_one_of_g_and_one_of_the_average() -> None:
    whole, parts, how = make_state(), make_state(), make_objective()
    hp = replace(HP, ema_decay=0.75)
    train_step(whole, how, make_batch(), hp)
    step_d(parts, how)
    step_g(parts, how)
    update_ema(parts.G_ema, parts.G, 0.75)
    for name in ("G", "D", "G_ema"):
        ours, theirs = weights(getattr(whole, name)), weights(getattr(parts, name))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert whole.cur_nimg == 4


def test_the_average_follows_without_gradients() -> None:
    G = torch.nn.Linear(1, 1, bias=False)
    G.register_buffer("count", torch.tensor(0.0))
    torch.nn.init.zeros_(G.weight)
    average = ema_copy(G)
    torch.nn.init.ones_(G.weight)
    G.count.fill_(5.0)
    for expected in (0.25, 0.4375):
        update_ema(average, G, 0.75)
        assert average.weight.item() == expected
    assert average.count == 5
    assert not any(p.requires_grad for p in average.parameters())
    assert G.weight.item() == 1


@pytest.mark.parametrize("count", [2, 3, 4])
def test_micro_batches_have_the_gradient_of_the_whole(count: int) -> None:
    grads, scalars = [], []
    for parts in (1, count):
        state = make_state()
        how = replace(make_objective(), micro_batches=MicroBatches(parts))
        with torch.no_grad():
            for p in state.D.parameters():
                p.add_(0.05 * torch.linspace(-1, 1, p.numel()).view_as(p))
        scalars.append(step_d(state, how))
        grads.append([p.grad for p in state.D.parameters()])
        # Adam's step magnifies rounding; G shall see the same D.
        state.D.load_state_dict(make_state().D.state_dict())
        scalars[-1] |= step_g(state, how)
        grads[-1] += [p.grad for p in state.G.parameters()]
    for whole, split in zip(*grads):
        assert whole is not None
        assert torch.allclose(whole, split, rtol=1e-4, atol=1e-5)
    assert scalars[0].keys() == scalars[1].keys()
    for name, value in scalars[0].items():
        assert scalars[1][name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


def test_schedules_reach_the_optimizers() -> None:
    state = make_state()
    train_step(state, make_objective(), make_batch(), replace(HP, penalty_weight=0))
    assert (state.opt_D.param_groups[0]["lr"], state.opt_G.param_groups[0]["lr"]) == (2e-2, 1e-2)
    assert state.opt_D.param_groups[0]["betas"] == (0.0, 0.95)


def test_gradient_is_of_loss_plus_half_gamma_times_penalties() -> None:
    """Against D's gradient built by hand from torch.func and the same random numbers."""
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
    scalars = step_d(state, make_objective(), weight=4, seed=5)
    assert scalars["loss/penalty"].item() == pytest.approx((3.0 / 2 * (r1 + r2)).item(), rel=1e-5)
    assert scalars["penalty/r1"].item() == pytest.approx(r1.item(), rel=1e-5)
    assert scalars["penalty/r2"].item() == pytest.approx(r2.item(), rel=1e-5)
    for p, g in zip(state.D.parameters(), expected):
        assert p.grad is not None
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-5)
    assert "penalty/r1" not in step_d(state, make_objective(), weight=0)


def test_half_precision_scales_the_loss_and_skips_a_step_that_overflows() -> None:
    """In fp16 on the CPU: the gradients of fp32, then a scale that is too large for them."""
    full, half = make_state(), make_state(precision="fp16")
    with torch.no_grad():
        for state in (full, half):
            for i, p in enumerate([*state.G.parameters(), *state.D.parameters()]):
                p.add_(0.1 * signs(1, "shake", torch.tensor([i]), p.numel()).view_as(p))
    how = replace(make_objective(), precision="fp16")
    step_d(full, make_objective()), step_d(half, how)
    full.D.load_state_dict(half.D.state_dict())  # Adam's step magnifies rounding
    step_g(full, make_objective()), step_g(half, how)
    for name in ("D", "G"):
        networks = getattr(full, name), getattr(half, name)
        a, b = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in networks)
        assert (a - b).norm() < 0.05 * a.norm()
    before = weights(half.D)
    half.scaler_D.load_state_dict({**half.scaler_D.state_dict(), "scale": 2.0**40})
    scalars = step_d(half, how)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(half.D)))
    assert half.scaler_D.get_scale() == 2.0**39
    assert scalars["broken/D"] == 0  # not a failure of the run


# Raise under deterministic=true on a GPU. F.interpolate replaces its own backward pass there.
NOT_DETERMINISTIC = (
    "grid_sampler", "reflection_pad", "replication_pad", "cumsum", "put_", "scatter_reduce",
    "adaptive_max_pool", "median", "kthvalue", "histc", "bincount", "embedding_bag",
)  # fmt: skip


class Calls(TorchDispatchMode):
    """Notes the names of all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(f.overloadpacket.__name__)
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_deterministic_step_calls_nothing_that_cuda_cannot_repeat(penalty: str) -> None:
    state = make_state(patch_size=2)
    how = replace(make_objective(), augment=Augment(list(TRANSFORMS)), penalty=penalty)
    torch.use_deterministic_algorithms(True)
    try:
        with Calls() as calls:
            train_step(state, how, make_batch(), replace(HP, augment_p=0.5))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not [name for name in calls.names if name.startswith(NOT_DETERMINISTIC)]
    with Calls() as calls:
        train_step(state, how, make_batch(), replace(HP, augment_p=0.5))
    assert any(name.startswith("grid_sampler") for name in calls.names)  # the faster one


def test_compiled_steps_are_whole_graphs_that_no_schedule_makes_anew() -> None:
    """Same statistics as plain steps; one graph for G and two for D, then none whatever changes."""
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    plain = replace(make_objective(), augment=Augment(list(TRANSFORMS)))
    options = {"fullgraph": True, "dynamic": False, "backend": count}
    d, g = torch.compile(d_objective, **options), torch.compile(g_objective, **options)
    whole = replace(plain, d=d, g=g)
    ours, theirs = make_state(), make_state()
    for step in range(6):
        lr, beta2, gamma, p = 1e-3 / (step + 1), 0.9 + 0.01 * step, 3.0 - 0.3 * step, 0.1 * step
        hp = HyperParameters(lr, 2 * lr, beta2, gamma, p, penalty_weight=2 * (step % 2))
        batch = make_batch(4 * step)._replace(real=REAL * (1 - 0.1 * step))
        scalars = [train_step(ours, plain, batch, hp), train_step(theirs, whole, batch, hp)]
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
    how = replace(make_objective(), penalty=penalty)
    scalars = train_step(make_state(), how, make_batch(), HP)
    assert scalars["penalty/r1"] > 0
    assert scalars["grad_norm/D"] > 0


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda")


class SynchronizingCalls(TorchDispatchMode):
    """Notes the calls that make the host wait for a GPU, or copy a constant to it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f.overloadpacket.__name__
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        has_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if has_mask or name.startswith(waits):
            self.found.add(name)
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("attention", ["self", "adaptive"])
def test_no_call_of_a_step_waits_for_the_device(penalty: str, attention: str) -> None:
    """What the test with a GPU below asserts for one network, for the calls of every option."""
    state = make_state()
    size = {"label_dim": 2, "attention": attention, "modulation": True, "patch_size": 2}
    state.G = Generator(8, 16, [8, 8], **size)
    state.G_ema = ema_copy(state.G)
    for name in ("G", "D"):
        optimizer = torch.optim.Adam(getattr(state, name).parameters(), fused=True)
        setattr(state, f"opt_{name}", optimizer)
    how = replace(make_objective(), augment=Augment(list(TRANSFORMS)), penalty=penalty)
    hp = replace(HP, augment_p=0.5)
    stats = Stats()
    for step, weight in enumerate((1, 0, 4)):
        batch = make_batch(4 * step)
        with SynchronizingCalls() as calls:
            stats.add(train_step(state, how, batch, replace(hp, penalty_weight=weight)))
        assert not calls.found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests with a GPU say more")
@pytest.mark.parametrize("penalty", ["jvp", "finite_difference"])  # no backward pass inside
def test_both_losses_stay_on_a_gpu(penalty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes on tensors without data that claim to be on a GPU: a mix of devices fails."""
    mode, device = FakeTensorMode(), torch.device("cuda", 0)

    def on_gpu(x: torch.Tensor) -> FakeTensor:
        return FakeTensor(mode, x.detach().to("meta"), device)

    G = Generator(8, 16, [8, 8, 8], label_dim=2, attention="adaptive", modulation=True)
    D = Discriminator(16, [8, 8, 8], label_dim=2)
    for layer in (*G.modules(), *D.modules()):
        for name, p in layer.named_parameters(recurse=False):
            setattr(layer, name, torch.nn.Parameter(on_gpu(p)))
    for name, value in {
        "is_available": True,
        "is_bf16_supported": True,
        "_lazy_init": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    how = replace(make_objective(), augment=Augment(list(TRANSFORMS)), penalty=penalty)
    how = replace(how, device=device, precision="bf16")
    real, c = on_gpu(REAL), on_gpu(C)
    with mode:
        zero = torch.zeros((), device=device)
        batch = Batch(real, c, Streams(0, 0, 4, device))
        loss_D, _ = d_objective(G, D, how, zero, zero, 1, batch)
        loss_G, _ = g_objective(G, D, how, zero, batch)
    assert loss_D.device == loss_G.device == device


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_steps_on_a_gpu_agree_with_the_cpu(precision: str) -> None:
    on_cpu, on_gpu = make_state(), make_state(CUDA, precision)
    there = Objective(*LOSSES["rpgan"], True, Augment(), CUDA, precision)
    a, b = step_d(on_cpu, make_objective()), step_d(on_gpu, there)
    for name in ("loss/D", "logits/real", "penalty/r1"):
        assert b[name].item() == pytest.approx(a[name].item(), rel=0.05, abs=0.02)
    scalars = train_step(on_gpu, there, make_batch(device=CUDA), HP)
    assert torch.isfinite(scalars["loss/G"])


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("hold", [True, False])
def test_the_loop_never_waits_for_the_gpu(hold: bool) -> None:
    """Loader, steps, moving average and statistics, with every synchronisation an error."""
    state, augment = make_state(CUDA), Augment(list(TRANSFORMS))
    how = replace(make_objective(), augment=augment, device=CUDA, precision="bf16")
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    dataset = Dataset("x", images, np.arange(40) % 2, ("a", "b"), "")
    loader = Loader(dataset, 4, 0, CUDA, hold_on_device=hold)
    stats = Stats()
    for step in range(4):
        # Allocations of the first steps may wait.
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            batch = Batch(*loader.batch(4 * step), Streams(0, 4 * step, 4, CUDA))
            stats.add(train_step(state, how, batch, HP))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    loader.close()
    assert all(torch.isfinite(torch.tensor(x)) for x in stats.means().values())


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_compiled_steps_on_a_gpu_agree_with_plain_ones(cuda_graphs: bool) -> None:
    torch._dynamo.reset()
    plain = replace(make_objective(), device=CUDA)
    objectives = (plain, compile_objective(plain, cuda_graphs))
    states = [make_state(CUDA) for _ in range(2)]
    for step in range(5):
        scalars = []
        for state, how in zip(states, objectives):
            values = train_step(state, how, make_batch(4 * step, CUDA), HP)
            scalars.append({k: v.item() for k, v in values.items()})
        assert scalars[1] == pytest.approx(scalars[0], rel=0.01, abs=1e-3)


def test_pointwise_convolutions_as_matrix_products_change_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, how, zero = make_state(), make_objective(), torch.zeros(())
    for p in [*state.G.parameters(), *state.D.parameters()]:
        torch.nn.init.normal_(p, std=0.2)

    def gradients() -> list[torch.Tensor]:
        d_loss, _ = d_objective(state.G, state.D, how, zero + 3, zero, 1, make_batch())
        g_loss, _ = g_objective(state.G, state.D, how, zero, make_batch())
        found = torch.autograd.grad(d_loss, list(state.D.parameters()))
        return [*found, *torch.autograd.grad(g_loss, list(state.G.parameters()))]

    before = gradients()
    for network in (state.G, state.D):
        select_pointwise(network, as_matmul=True)
    monkeypatch.setattr(PointwiseConv2d, "_conv_forward", None)  # no convolution is left
    for a, b in zip(before, gradients()):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6
    layer, x = PointwiseConv2d(6, 10), torch.randn(2, 6, 4, 8)
    layer.as_matmul = True
    y = layer(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
