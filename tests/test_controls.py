import pytest
import torch

from vgan.training.controls import TYPICAL_PENALTY, AdaptiveStrength, default_gamma


def test_augmentation_follows_the_certainty_of_the_discriminator() -> None:
    controls = AdaptiveStrength(target=0.6, adapt_kimg=1)
    for _ in range(20):  # 600 of them until the average passes the target
        controls.update_sign(torch.tensor(0.9), 100)
    rising = float(controls.augment_p)
    assert 0 < rising < 1
    for _ in range(100):
        controls.update_sign(torch.tensor(0.9), 100)
    assert controls.augment_p == 1  # and no further
    for _ in range(100):
        controls.update_sign(torch.tensor(0.1), 100)
    assert controls.augment_p == 0


def test_without_a_target_nothing_moves() -> None:
    controls = AdaptiveStrength()
    controls.update_sign(torch.tensor(1.0), 10**6)
    controls.update_penalty(torch.tensor(9.0), 10**6)
    assert controls.augment_p == 0
    assert controls.gamma_factor() == 1


def test_gamma_leads_to_the_gradient_norm_that_was_meant() -> None:
    """Where gradients settle so that gamma r = c, the corrected gamma gives r = 0.09 / gamma for every c from 0.09 to 0.36."""
    for c in (0.09, 0.2, 0.3):
        controls, gamma = AdaptiveStrength(correct_gamma=True), 0.2
        assert float(controls.gamma_factor()) == pytest.approx(1)
        for _ in range(200):
            r = c / (gamma * float(controls.gamma_factor()))
            controls.update_penalty(torch.tensor(gamma * float(controls.gamma_factor()) * r), 640)
        assert r == pytest.approx(TYPICAL_PENALTY / gamma, rel=0.01)
    controls.update_penalty(torch.tensor(1e6), 10**6)
    assert float(controls.gamma_factor()) == pytest.approx(4)  # bounded
    controls.update_penalty(torch.tensor(0.01), 10**6)
    assert float(controls.gamma_factor()) == 1  # never lowered


def test_controls_travel_in_checkpoints() -> None:
    controls, other = AdaptiveStrength(0.6, 1, True), AdaptiveStrength(0.6, 1, True)
    controls.update_sign(torch.tensor(0.9), 5000)
    controls.update_penalty(torch.tensor(0.5), 100)
    other.load_state_dict(controls.state_dict())
    assert other.augment_p == controls.augment_p > 0
    assert other.gamma_factor() == controls.gamma_factor()


def test_usual_gamma_of_cifar10() -> None:
    assert default_gamma(32, 256) == pytest.approx((0.2, 0.1))
    assert default_gamma(64, 64) == pytest.approx((1.6, 0.8))
