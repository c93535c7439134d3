from pathlib import Path

import pytest
import torch
from runs import assert_same_run, train_in_process
from torch import Tensor

from vgan.runs import checkpoint
from vgan.runtime.errors import UserError
from vgan.training.soap import SOAP


def spd(n: int, condition: float) -> Tensor:
    """Return a symmetric matrix with eigenvalues from 1 to 1 / condition, in a random basis."""
    q = torch.linalg.qr(torch.randn(n, n))[0]
    return q @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10().item(), n)) @ q.T


def distance(make: type, shape: tuple[int, ...], steps: int = 600) -> float:
    """Return how far from its minimum a rotated quadratic is after `steps` of an optimizer."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(shape))
    rows, columns = w.flatten(1).shape
    a, b = spd(rows, 100), spd(columns, 100)
    optimizer = make([w], lr=0.02, betas=(0.0, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / steps)
        optimizer.zero_grad()
        x = w.flatten(1)
        (0.5 * (x * (a @ x @ b)).sum()).backward()
        optimizer.step()
    return float(w.detach().norm())


@pytest.mark.parametrize("shape", [(12, 8), (8, 12, 1, 1), (6, 2, 3, 3)])
def test_rotated_valleys_are_no_obstacle(shape: tuple[int, ...]) -> None:
    assert distance(SOAP, shape) < 0.5 * distance(torch.optim.Adam, shape)


def test_the_basis_becomes_the_eigenvectors_of_the_gradients() -> None:
    torch.manual_seed(0)
    out, inner = spd(6, 30), spd(4, 30)
    w = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = SOAP([w], lr=0.0, basis_beta=0.999)
    for _ in range(1000):
        w.grad = out @ torch.randn(6, 4) @ inner
        optimizer.step()
    for side, factor in (("out", out), ("in", inner)):
        basis = optimizer.state[w][f"basis_{side}"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)), atol=1e-5, rtol=0)
        expected = torch.linalg.eigh(factor)[1].flip(1)  # the largest first
        assert (basis * expected).sum(0).abs().min() > 0.95


def test_biases_take_the_step_of_adam() -> None:
    w, v = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    soap, adam = SOAP([w], lr=0.1), torch.optim.Adam([v], lr=0.1, betas=(0.0, 0.99))
    w.grad = v.grad = torch.tensor([1e-3, -2.0, 3.0, 0.0, -5.0])
    soap.step()
    adam.step()
    torch.testing.assert_close(w, v)


def test_a_side_without_use_gets_no_basis() -> None:
    shapes = {"depthwise": (8, 1, 3, 3), "mix": (8, 6, 1, 1), "wide": (40, 6), "bias": (8,)}
    weights = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = SOAP(list(weights.values()), max_size=32)
    for w in weights.values():
        w.grad = torch.ones_like(w)
    optimizer.step()
    bases = {n: {k for k in optimizer.state[w] if "basis" in k} for n, w in weights.items()}
    assert bases == {
        "depthwise": {"basis_in"}, "mix": {"basis_out", "basis_in"}, "wide": {"basis_in"},
        "bias": set(),
    }  # fmt: skip


def test_a_gradient_of_zero_moves_nothing() -> None:
    w = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = SOAP([w], lr=1.0)
    for _ in range(25):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert torch.equal(w, torch.ones(4, 3))


def test_what_is_not_finite_is_left_to_the_watchdog() -> None:
    w = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = SOAP([w])
    for value in (*range(8), float("nan"), float("inf"), *range(12)):
        w.grad = torch.full_like(w, value)
        optimizer.step()
    assert not w.isfinite().any()


def test_a_run_resumes_to_the_last_bit(tmp_path: Path) -> None:
    options = ("optimizer=soap", "schedule_kimg=0.24", "snapshot_kimg=0.12")
    train_in_process(tmp_path / "a", *options, "total_kimg=0.24")
    train_in_process(tmp_path / "b", *options, "total_kimg=0.12")
    train_in_process(tmp_path / "b", *options, "total_kimg=0.24")
    state = checkpoint.load(checkpoint.find(tmp_path / "a"))["opt_G"]["state"]
    assert any("basis_out" in entries for entries in state.values())
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_run_of_adam_is_not_resumed_with_it(tmp_path: Path) -> None:
    train_in_process(tmp_path, "total_kimg=0.016", "optimizer=adam")
    with pytest.raises(UserError, match=r"optimizer._target_ was .*; give optimizer=adam, or use"):
        train_in_process(tmp_path, "total_kimg=0.032")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("optim.beta1=0.5", "beta1=0.5: SOAP has no momentum; use 0"),
        ("+optim.optimizer.basis_every=0", "basis_every=0: must be at least 1"),
        ("optim.optimizer.eps=-1", "must not be negative"),
        ("parallel=fsdp", "parallel=fsdp: shards weights, and optimizer=soap needs whole ones"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, option: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_in_process(tmp_path / "run", "optimizer=soap", option)
    assert not (tmp_path / "run").exists()
