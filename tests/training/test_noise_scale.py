"""The gradient noise scale against gradients whose noise is known."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from lorasmith.core.typed_json import typed
from lorasmith.training.recovery import NoiseScale, noise_terms


def test_expected_lengths_give_the_terms_exactly() -> None:
    true_sq, variance = 3.0, 40.0
    small, big = 2, 16
    terms = noise_terms(true_sq + variance / small, true_sq + variance / big, small=small, big=big)
    assert terms == pytest.approx((true_sq, variance))


@pytest.mark.parametrize(("small", "big"), [(4, 8), (1, 4), (3, 7)])
def test_the_scale_of_known_noise_is_found(small: int, big: int) -> None:
    rng = np.random.default_rng(0)
    mean, deviation = np.full(50, 0.5), 1.5  # |G|² = 12.5, tr(Σ) = 50 · 2.25
    scale = NoiseScale(decay=0.999)
    for _ in range(4000):
        samples = mean + deviation * rng.normal(size=(big, len(mean)))
        lengths = [float((part.mean(axis=0) ** 2).sum()) for part in (samples[:small], samples)]
        scale.update(*lengths, small=small, big=big)
    assert scale.value == pytest.approx(50 * deviation**2 / 12.5, rel=0.1)


def test_one_micro_batch_and_estimates_that_make_no_sense_tell_nothing() -> None:
    for lengths, sizes in (((2.0, 2.0), (8, 8)), ((100.0, 1.0), (1, 2))):  # opposite gradients: |G|² would be negative
        scale = NoiseScale()
        scale.update(*lengths, small=sizes[0], big=sizes[1])
        assert scale.value is None


def test_the_state_survives_json() -> None:
    scale = NoiseScale(decay=0.9)
    scale.update(3.0, 2.5, small=2, big=4)
    again = typed(json.loads(json.dumps(asdict(scale))), NoiseScale)
    for one in (scale, again):
        one.update(4.0, 3.0, small=2, big=3)
    assert again.value == scale.value is not None
