import torch
from torch import nn

from vgan.training.ema import ema_copy, update_ema


def test_average_follows_without_gradients() -> None:
    G = nn.Linear(1, 1, bias=False)
    G.register_buffer("count", torch.tensor(0.0))
    nn.init.zeros_(G.weight)
    average = ema_copy(G)
    nn.init.ones_(G.weight)
    G.count.fill_(5.0)
    for expected in (0.25, 0.4375):
        update_ema(average, G, 0.75)
        assert average.weight.item() == expected
    assert average.count == 5
    assert not any(p.requires_grad for p in average.parameters())
    assert G.weight.item() == 1
