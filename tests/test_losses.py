import math

import pytest
import torch

from vgan.training.losses import LOSSES

R, F = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 1.0]])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


EXPECTED = {
    "rpgan": (
        (softplus(0.5 - 2) + softplus(1 + 1)) / 2,
        (softplus(2 - 0.5) + softplus(-1 - 1)) / 2,
    ),
    "nonsaturating": (
        (softplus(-2) + softplus(1)) / 2 + (softplus(0.5) + softplus(1)) / 2,
        (softplus(-0.5) + softplus(-1)) / 2,
    ),
    "hinge": ((0 + 2) / 2 + (1.5 + 2) / 2, -0.75),
    "lsgan": (0.5 * (1 + 4) / 2 + 0.5 * (0.25 + 1) / 2, 0.5 * (0.25 + 0) / 2),
    "wgan": (0.75 - 0.5, -0.75),
}


@pytest.mark.parametrize("name", LOSSES)
def test_closed_forms(name: str) -> None:
    d_loss, g_loss = LOSSES[name]
    assert float(d_loss(R, F)) == pytest.approx(EXPECTED[name][0])
    assert float(g_loss(R, F)) == pytest.approx(EXPECTED[name][1])


@pytest.mark.parametrize("name", LOSSES)
def test_the_players_pull_a_fakes_logit_apart(name: str) -> None:
    d_loss, g_loss = LOSSES[name]
    fake = torch.zeros(1, 1, 2, 2, requires_grad=True)
    real = torch.zeros_like(fake)
    assert (
        torch.autograd.grad(d_loss(real, fake), fake)[0] > 0
        if name != "lsgan"
        else torch.tensor(True)
    ).all()
    assert (torch.autograd.grad(g_loss(real, fake), fake)[0] < 0).all()
