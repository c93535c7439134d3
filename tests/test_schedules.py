import pytest
import torch

from vgan.training.schedules import (
    TYPICAL_PENALTY,
    AdaptiveStrength,
    HyperParameters,
    cosine,
    default_gamma,
    ema_decay,
)

HP = HyperParameters(lr_G=1e-3, lr_D=1e-3, beta2=0.9, gamma=0.2, augment_p=0.25)


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


def see_sign(strength: AdaptiveStrength, sign: float, nimg: int) -> None:
    strength.update({"logits/real_sign": torch.tensor(sign)}, nimg, 0)


def see_penalty(strength: AdaptiveStrength, penalty: float, nimg: int) -> None:
    scalars = {"loss/penalty": torch.tensor(penalty), "logits/real_sign": torch.tensor(0.0)}
    strength.update(scalars, nimg, 1)


def gamma_of(strength: AdaptiveStrength) -> float:
    return strength.scalars(HP)["gamma"]


def test_augmentation_follows_the_certainty_of_the_discriminator() -> None:
    strength = AdaptiveStrength(target=0.6, adapt_kimg=1)
    for _ in range(20):  # 600 images until the average passes the target
        see_sign(strength, 0.9, 100)
    assert 0 < float(strength.augment_p) < 1
    for _ in range(100):
        see_sign(strength, 0.9, 100)
    assert strength.augment_p == 1  # and no further
    for _ in range(100):
        see_sign(strength, 0.1, 100)
    assert strength.augment_p == 0


def test_without_a_target_the_schedule_holds() -> None:
    strength = AdaptiveStrength()
    see_sign(strength, 1.0, 10**6)
    see_penalty(strength, 9.0, 10**6)
    assert strength.scalars(HP) == {"gamma": 0.2, "augment_p": 0.25}
    gamma, augment_p = strength.tensors(HP, torch.device("cpu"))
    assert (gamma.item(), augment_p.item()) == pytest.approx((0.2, 0.25))


def test_gamma_leads_to_the_gradient_norm_that_was_meant() -> None:
    """Where gamma r settles at c, the corrected gamma gives r = 0.09 / gamma, for c to 0.36."""
    for c in (0.09, 0.2, 0.3):
        strength = AdaptiveStrength(correct_gamma=True)
        assert gamma_of(strength) == pytest.approx(0.2)
        for _ in range(200):
            r = c / gamma_of(strength)
            see_penalty(strength, gamma_of(strength) * r, 640)
        assert r == pytest.approx(TYPICAL_PENALTY / 0.2, rel=0.01)
    see_penalty(strength, 1e6, 10**6)
    assert gamma_of(strength) == pytest.approx(4 * 0.2)  # bounded
    see_penalty(strength, 0.01, 10**6)
    assert gamma_of(strength) == pytest.approx(0.2)  # never lowered


def test_adaptive_strength_is_part_of_checkpoints() -> None:
    strength, other = AdaptiveStrength(0.6, 1, True), AdaptiveStrength(0.6, 1, True)
    see_sign(strength, 0.9, 5000)
    scalars = {"loss/penalty": torch.tensor(0.5), "logits/real_sign": torch.tensor(0.9)}
    strength.update(scalars, 100, 1)
    other.load_state_dict(strength.state_dict())
    assert other.augment_p == strength.augment_p > 0
    assert other.scalars(HP) == strength.scalars(HP)


def test_default_gamma_of_cifar10() -> None:
    assert default_gamma(32, 256) == pytest.approx((0.2, 0.1))
    assert default_gamma(64, 16) == pytest.approx((6.4, 3.2))
