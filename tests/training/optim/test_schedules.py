"""Schedules: within their bounds, rising and falling where they should, and what their papers and torch say."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import OptionError
from lorasmith.training.optim.update_rules import SCHEDULES, check_schedule, rate_factor

NAMES = st.sampled_from(list(SCHEDULES))
FALLING = ["linear", "cosine", "polynomial", "rex"]


def factor_of(step: int, **settings: Any) -> float:
    usual = {"warmup_steps": 0, "final_rate": 0.0, "cycles": 3, "power": 2.0, "learning_rate": 1e-3}
    return rate_factor(step, **(usual | settings))


@given(
    name=NAMES,
    steps=st.integers(1, 5000),
    step=st.integers(0, 6000),
    warmup=st.integers(0, 5000),
    final=st.floats(0, 1),
    cycles=st.integers(1, 50),
    power=st.floats(0.1, 10),
)
def test_factors_are_shares(
    name: str, steps: int, step: int, warmup: int, final: float, cycles: int, power: float
) -> None:
    factor = factor_of(
        step,
        schedule=name,
        steps=steps,
        warmup_steps=min(warmup, steps),
        final_rate=final,
        cycles=cycles,
        power=power,
    )
    assert 0 <= factor <= 1 + 1e-12
    if step >= min(warmup, steps):
        assert factor >= final - 1e-12


@given(name=NAMES, warmup=st.integers(1, 200), more=st.integers(0, 200))
def test_warm_up_rises_evenly_to_the_full_rate(name: str, warmup: int, more: int) -> None:
    factors = [
        factor_of(step, schedule=name, steps=warmup + more, warmup_steps=warmup) for step in range(warmup + more)
    ]
    assert factors[:warmup] == pytest.approx([(n + 1) / warmup for n in range(warmup)])
    assert factors[warmup - 1] == 1
    if more:
        assert factors[warmup] == 1


@pytest.mark.parametrize("name", FALLING)
@given(steps=st.integers(100, 3000), warmup=st.integers(0, 50), final=st.floats(0, 1))
def test_falling_schedules_fall_to_the_final_rate(name: str, steps: int, warmup: int, final: float) -> None:
    factors = [
        factor_of(step, schedule=name, steps=steps, warmup_steps=warmup, final_rate=final)
        for step in range(warmup, steps + 1)
    ]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(factors))
    assert factors[-1] == pytest.approx(final, abs=1e-12)
    assert factors[-2] == pytest.approx(final, abs=0.05)  # the last step that is taken


@given(cycles=st.integers(1, 20), length=st.integers(2, 60))
def test_restarts_are_as_many_cosines(cycles: int, length: int) -> None:
    steps = cycles * length
    factors = [factor_of(step, schedule="cosine_restarts", steps=steps, cycles=cycles) for step in range(steps)]
    one = [factor_of(step, schedule="cosine", steps=length) for step in range(length)]
    for cycle in range(cycles):
        # Where a cycle begins, rounding may decide whether it is the end of the one before.
        assert factors[cycle * length + 1 : (cycle + 1) * length] == pytest.approx(one[1:], abs=1e-9)
    assert factor_of(steps, schedule="cosine_restarts", steps=steps, cycles=cycles) == pytest.approx(0)


def test_a_restart_has_the_full_rate() -> None:
    factors = [factor_of(step, schedule="cosine_restarts", steps=30, cycles=3) for step in (0, 9, 10, 19, 20, 29)]
    assert factors[0] == factors[2] == factors[4] == 1
    assert max(factors[1], factors[3], factors[5]) < 0.05


def test_shapes_are_those_of_the_papers_and_of_torch() -> None:
    assert SCHEDULES["rex"](0.5, 1, 1.0) == pytest.approx(0.5 / 0.75)
    assert SCHEDULES["cosine"](0.25, 1, 1.0) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    steps = 20
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    for name, settings, theirs in (
        ("cosine", {"final_rate": 0.1}, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.1)),
        ("polynomial", {"power": 3.0}, torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=3.0)),
    ):
        for step in range(steps):
            ours = factor_of(step, schedule=name, steps=steps, **settings)
            assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
            optimizer.step()
            theirs.step()
        optimizer.param_groups[0].update(lr=1.0, initial_lr=1.0)


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    check_schedule(steps=10, warmup_steps=10)
    with pytest.raises(OptionError, match=r"^warmup_steps must be at most the steps of the run, got 11 of 10; lower"):
        check_schedule(steps=10, warmup_steps=11)
