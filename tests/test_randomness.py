import pytest
import torch

from vgan.runtime import rng as randomness
from vgan.runtime.rng import Streams, permute


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]),
        (0xFFFFFFFF, ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]),
    ],
)
def test_philox_gives_the_published_answers(word: int, expected: list[str]) -> None:
    counter = tuple(torch.full((1,), word) for _ in range(4))
    assert [hex(int(x)) for x in randomness._philox(counter, (word, word))] == expected


def test_an_image_draws_the_same_in_any_batch() -> None:
    whole, part = Streams(7, 0, 10), Streams(7, 6, 2)
    for draw in ("normal", "uniform", "signs"):
        assert torch.equal(getattr(whole, draw)("z", 33)[6:8], getattr(part, draw)("z", 33))
    assert torch.equal(whole.integers("label", 10)[6:8], part.integers("label", 10))


def test_seeds_streams_and_images_differ() -> None:
    draws = [
        Streams(1, 0, 1).uniform("a", 8),
        Streams(2, 0, 1).uniform("a", 8),
        Streams(1, 0, 1).uniform("b", 8),
    ]
    draws += [Streams(1, 1, 1).uniform("a", 8), Streams(1, 2**32, 1).uniform("a", 8)]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == len(draws)


def test_distributions() -> None:
    s = Streams(3, 0, 20_000)
    z = s.normal("z", 5)
    assert abs(float(z.mean())) < 0.02
    assert abs(float(z.std()) - 1) < 0.02
    assert abs(float(z.pow(4).mean()) - 3) < 0.1
    u = s.uniform("u", 5)
    assert 0 <= float(u.min()) < 0.001
    assert 0.999 < float(u.max()) < 1
    assert abs(float(s.signs("v", 40).mean())) < 0.01
    counts = torch.bincount(s.integers("i", 7), minlength=7)
    assert counts.min() > 2600
    assert len(counts) == 7


@pytest.mark.parametrize("n", [1, 2, 3, 10, 257, 5000])
def test_permute_is_a_bijection_that_depends_on_seed_and_epoch(n: int) -> None:
    index = torch.arange(n)
    order = permute(index, n, 3, 7)
    assert torch.equal(order.sort().values, index)
    if n > 100:
        assert not torch.equal(order, permute(index, n, 3, 8))
        assert not torch.equal(order, permute(index, n, 4, 7))
        assert torch.equal(order[5:9], permute(index[5:9], n, 3, torch.full((4,), 7)))
        assert abs(float(torch.corrcoef(torch.stack([index.float(), order.float()]))[0, 1])) < 0.2
