"""Distributions of diffusion time as maps from uniform numbers, and how evenly those numbers lie."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.random import keyed_permutation, keyed_uniform
from lorasmith.diffusion.schedule import (
    TIMESTEP_DISTRIBUTIONS,
    DiscreteSchedule,
    FlowSchedule,
    ResolutionShift,
    quantile_map,
    quantile_range,
    range_limited,
    uniform_numbers,
)
from tests.covering import slow_except

SD = DiscreteSchedule.scaled_linear()
FLUX = FlowSchedule(math.exp(1.15))
SIZE = (64, 64)


@given(st.floats(0, 1, width=32))
def test_every_distribution_stays_within_diffusion_time(u: float) -> None:
    for name in TIMESTEP_DISTRIBUTIONS:
        assert 0 <= TIMESTEP_DISTRIBUTIONS[name](torch.tensor([u])).item() <= 1


def test_every_distribution_is_monotonous() -> None:
    """So that stratified uniform numbers stay stratified."""
    for name in TIMESTEP_DISTRIBUTIONS:
        mapped = TIMESTEP_DISTRIBUTIONS[name](torch.linspace(0, 1, 1001, dtype=torch.float64))

        assert bool((mapped.diff() >= 0).all())


def test_uniform_is_the_identity() -> None:
    u = torch.rand(7)

    assert torch.equal(TIMESTEP_DISTRIBUTIONS["uniform"](u), u)


def test_logit_normal_quantiles_are_those_of_its_definition() -> None:
    for u in [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]:
        found = TIMESTEP_DISTRIBUTIONS["sigmoid"](torch.tensor([u], dtype=torch.float64))
        logit = torch.logit(found).item()

        # logit(t) of a logit-normal t is normal: its quantiles are the normal distribution's.
        assert logit == pytest.approx(NormalDist().inv_cdf(u), abs=1e-9)


def test_logit_normal_samples_have_the_moments_of_a_sigmoid_of_normal_samples() -> None:
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    normal = torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, reference = TIMESTEP_DISTRIBUTIONS["logit_normal"](uniform), normal.sigmoid()

    assert ours.mean().item() == pytest.approx(0.5, abs=1e-6)
    assert ours.std().item() == pytest.approx(reference.std().item(), rel=0.02)


def test_with_no_shift_asked_for_the_schedule_keeps_its_own() -> None:
    for schedule in [SD, FLUX]:
        for name in [name for name in TIMESTEP_DISTRIBUTIONS if name != "shifted"]:
            u = torch.linspace(0, 1, 101)

            assert torch.equal(quantile_map(name, None, schedule)(u, SIZE), TIMESTEP_DISTRIBUTIONS[name](u))


@given(st.floats(0.1, 20), st.floats(0, 1, width=32))
def test_a_flows_own_shift_is_not_added_to_the_one_asked_for(shift: float, u: float) -> None:
    level = FLUX.at(quantile_map("uniform", shift, FLUX)(torch.tensor([u]), SIZE))

    assert level.sigma.item() == pytest.approx(shift * u / (1 + (shift - 1) * u), rel=1e-5, abs=1e-6)


def test_a_shift_moves_the_step_index_of_a_discrete_schedule() -> None:
    time = SD.at(quantile_map("uniform", 3.0, SD)(torch.tensor([0.25, 0.5]), SIZE)).time

    assert time.tolist() == [500.0, 750.0]


@pytest.mark.parametrize("name", ["uniform", "logit_normal"])
def test_a_shift_comes_after_the_distribution(name: str) -> None:
    """As in kohya's scripts, where `t = sigmoid(normal)` is shifted, not the normal."""
    u = torch.linspace(0.01, 0.99, 99)
    time = TIMESTEP_DISTRIBUTIONS[name](u)

    torch.testing.assert_close(FLUX.at(quantile_map(name, 2.2, FLUX)(u, SIZE)).sigma, 2.2 * time / (1 + 1.2 * time))


def test_the_shift_by_size_is_diffusers() -> None:
    for height, width in [(32, 32), (64, 64), (128, 128), (96, 160), (64, 200), (160, 160)]:
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        mu = calculate_shift((height // 2) * (width // 2))
        u = torch.linspace(0.01, 1, 50)
        sigmas = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).time_shift(mu, 1.0, u)

        assert ResolutionShift()(height, width) == pytest.approx(math.exp(mu), rel=1e-9)
        for schedule in (FLUX, FlowSchedule(1.0), FlowSchedule(3.0)):
            found = schedule.at(quantile_map("shifted", None, schedule)(u, (height, width))).sigma
            torch.testing.assert_close(found, sigmas, rtol=1e-5, atol=1e-6)


def test_a_shift_may_be_a_power_of_the_size() -> None:
    by_side = ResolutionShift(mu=(0.0, math.log(2)), patches=(32**2, 64**2), patch=1, is_power=True)
    for height, width in [(32, 32), (64, 64), (32, 128), (16, 16), (128, 128)]:
        assert by_side(height, width) == pytest.approx(math.sqrt(height * width) / 32, rel=1e-9)


def test_a_number_fixes_the_shift_whatever_the_size() -> None:
    u = torch.linspace(0, 1, 11)
    fixed = quantile_map("shifted", 2.0, FLUX)

    assert torch.equal(fixed(u, (32, 32)), fixed(u, (128, 128)))
    assert torch.equal(fixed(u, SIZE), quantile_map("uniform", 2.0, FLUX)(u, SIZE))


@given(seed=st.integers(0, 2**64 - 1), draws=st.lists(st.integers(0, 2**40), max_size=5))
def test_without_strata_each_draw_has_its_own_keyed_number(seed: int, draws: list[int]) -> None:
    found = uniform_numbers(draws, seed=seed, stratified=False)

    assert torch.equal(found, torch.tensor([keyed_uniform(seed, "timestep", draw) for draw in draws]))


@given(seed=st.integers(0, 2**64 - 1), block=st.integers(0, 2**20), level=st.integers(0, 6))
def test_a_batch_has_one_draw_in_each_of_its_parts_of_the_range(seed: int, block: int, level: int) -> None:
    size = 2**level
    numbers = uniform_numbers(range(block * size, (block + 1) * size), seed=seed, stratified=True)

    assert sorted((numbers.double() * size).long().clamp(max=size - 1).tolist()) == list(range(size))


@given(seed=st.integers(0, 2**64 - 1), first=st.integers(0, 2**30), size=st.integers(1, 60))
def test_a_batch_of_any_size_leaves_no_part_out(seed: int, first: int, size: int) -> None:
    """Wherever it begins: n draws hold a whole run of more than n/4 that begins at a multiple of its length."""
    edges = torch.tensor([0.0, *sorted(uniform_numbers(range(first, first + size), seed=seed, stratified=True)), 1.0])

    assert edges.diff().max() <= min(1, 2 / (2 ** math.floor(math.log2((size + 1) / 2)))) + 1e-6


def test_numbers_do_not_depend_on_how_draws_are_batched() -> None:
    together = uniform_numbers(range(1000, 1050), seed=3, stratified=True)
    apart = torch.cat([uniform_numbers([draw], seed=3, stratified=True) for draw in range(1000, 1050)])

    assert torch.equal(together, apart)
    assert not torch.equal(together, uniform_numbers(range(1000, 1050), seed=4, stratified=True))


def test_each_draw_is_uniform_over_seeds() -> None:
    for draw in (0, 1, 7, 1023, 5000):
        numbers = torch.cat([uniform_numbers([draw], seed=seed, stratified=True) for seed in range(1000)])
        assert _distance_from_uniform(numbers) < 1.63 / math.sqrt(1000)  # Kolmogorov-Smirnov at 1 %


def test_the_draws_of_a_run_are_uniform() -> None:
    numbers = uniform_numbers(range(300, 1300), seed=0, stratified=True)

    assert _distance_from_uniform(numbers) < 0.01  # independent draws are about 0.03 away


@pytest.mark.parametrize("size", slow_except([2, 3, 4, 6, 8, 16], 3, 8))
def test_the_mean_over_a_batch_varies_less(size: int) -> None:
    """Of a loss that falls with the noise level, as that of epsilon does."""

    def variance(*, stratified: bool) -> float:
        numbers = torch.cat([uniform_numbers(range(60 * size), seed=s, stratified=stratified) for s in range(20)])
        losses = (-3 * numbers.double()).exp().reshape(-1, size).mean(1)
        return (losses - (1 - math.exp(-3)) / 3).square().mean().item()

    bound = {2: 0.5, 3: 0.6, 4: 0.2, 6: 0.3, 8: 0.06, 16: 0.03}[size]
    assert variance(stratified=True) < bound * variance(stratified=False)


@pytest.mark.parametrize("images", [1, 2, 3, 4, 5, 6, 8, 12, 13, 16, 32, 64, 100])
def test_every_image_meets_the_whole_range(images: int) -> None:
    """Over 64 epochs, whose orders and the sequence could be in step with one another."""
    epochs = 64
    numbers = uniform_numbers(range(images * epochs), seed=1, stratified=True).reshape(epochs, images)
    met = torch.empty(images, epochs)
    for epoch in range(epochs):
        met[keyed_permutation(images, 1, "order", epoch), epoch] = numbers[epoch]

    for numbers_of_one in met:
        # One of a hundred independent samples of 64 is beyond 0.25 once in thirty; a missing quarter is 0.25 by itself.
        assert _distance_from_uniform(numbers_of_one) < 0.27
    assert (met > 0.75).any(1).all()
    assert (met < 0.25).any(1).all()


def _distance_from_uniform(numbers: torch.Tensor) -> float:
    """Kolmogorov-Smirnov's."""
    ordered, n = numbers.double().sort().values, len(numbers)
    steps = torch.arange(n, dtype=torch.float64) / n
    return torch.maximum(ordered - steps, steps + 1 / n - ordered).max().item()


def test_the_quantile_of_a_level_is_the_inverse_of_the_schedule() -> None:
    for schedule in [SD, FLUX, FlowSchedule(8.0, time_scale=1000.0)]:
        for time in [0.0, 0.2, 0.875, 1.0]:
            level = schedule.at(torch.tensor([schedule.quantile(time)]))
            if isinstance(schedule, FlowSchedule):
                assert level.sigma.item() == pytest.approx(time, abs=1e-6)
            else:
                assert level.time.item() == pytest.approx(1000 * time, abs=1.001)


@pytest.mark.parametrize("name", TIMESTEP_DISTRIBUTIONS)
def test_two_ranges_have_together_the_whole_distribution(name: str) -> None:
    flow = FlowSchedule(5.0)
    whole = quantile_map(name, None, flow)  # type: ignore[arg-type]
    low = range_limited(whole, *quantile_range(flow, 0.0, 0.875))
    high = range_limited(whole, *quantile_range(flow, 0.875, 1.0))
    u = (torch.arange(20_000) + 0.5) / 20_000
    levels = flow.at(whole(u, SIZE)).sigma
    share = (levels < 0.875).float().mean().item()
    assert 0.02 < share < 0.98
    drawn = [flow.at(one(u, SIZE)).sigma for one in (low, high)]
    assert drawn[0].max() <= 0.875 + 1e-5 and drawn[1].min() >= 0.875 - 1e-5
    assert drawn[0].mean().item() == pytest.approx(levels[levels < 0.875].mean().item(), abs=2e-3)
    assert drawn[1].mean().item() == pytest.approx(levels[levels >= 0.875].mean().item(), abs=2e-3)


def test_a_range_keeps_numbers_in_order_and_apart() -> None:
    drawn = range_limited(quantile_map("logit_normal", None, FLUX), 0.3, 0.6)(torch.linspace(0, 1, 101), SIZE)
    assert bool((drawn.diff() > 0).all())
    assert drawn[0].item() == pytest.approx(0.3, abs=1e-5)
    assert drawn[-1].item() == pytest.approx(0.6, abs=1e-5)
