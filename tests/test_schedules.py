import pytest

from vgan.training.schedules import cosine, ema_decay


def test_cosine_runs_from_start_to_end_and_stays() -> None:
    value = cosine(3.0, 1.0, 10)
    assert value(0) == 3
    assert value(5_000) == pytest.approx(2)
    assert value(2_500) == pytest.approx(2 + 0.5**0.5)
    assert value(10_000) == value(99_000) == 1


def test_ema_half_life() -> None:
    assert ema_decay(1, 0, 10**6, 64) ** (1000 / 64) == pytest.approx(0.5)
    early = ema_decay(1000, 0.05, 2000, 64)  # the ramp allows 100 images here
    assert early ** (100 / 64) == pytest.approx(0.5)
    assert ema_decay(0, 0, 64, 64) == 0
