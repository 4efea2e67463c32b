"""Keyed random numbers: functions of their key alone."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.random import keyed_generator, keyed_normal, keyed_permutation, keyed_uniform

SEEDS = st.integers(0, 2**64 - 1)
INDICES = st.one_of(st.integers(0, 10**9), st.text(max_size=8))


def test_values_do_not_depend_on_what_was_drawn_before() -> None:
    alone = keyed_normal((2, 3), 5, "noise", 7)
    for index in range(7):
        keyed_normal((2, 3), 5, "noise", index)
    torch.manual_seed(1)

    assert torch.equal(keyed_normal((2, 3), 5, "noise", 7), alone)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    keyed_normal((4,), 0, "noise")
    keyed_uniform(0, "timestep")
    keyed_permutation(9, 0, "order")

    assert torch.equal(torch.get_rng_state(), before)


def test_seed_purpose_and_index_all_count() -> None:
    for other in [
        (6, "noise", 7),
        (5, "timestep", 7),
        (5, "noise", 8),
        (5, "noise/7", ""),
        (2**64 - 1, "noise", 7),
        (2**63, "noise", 7),
        (2**32 + 5, "noise", 7),
    ]:
        assert not torch.equal(keyed_normal((8,), 5, "noise", 7), keyed_normal((8,), *other))


@given(SEEDS, INDICES)
def test_every_seed_works_and_repeats(seed: int, index: int | str) -> None:
    first, second = (keyed_generator(seed, "noise", index).initial_seed() for _ in range(2))

    assert first == second
    assert 0 <= first < 2**63


@given(SEEDS)
def test_neighbouring_seeds_differ_up_to_the_last(seed: int) -> None:
    assert keyed_uniform(seed, "x") != keyed_uniform((seed + 1) % 2**64, "x")


@given(SEEDS, INDICES)
def test_uniform_values_are_in_the_unit_interval(seed: int, index: int | str) -> None:
    assert 0 <= keyed_uniform(seed, "timestep", index) < 1


def test_uniform_values_of_successive_indices_are_spread_evenly() -> None:
    values = sorted(keyed_uniform(0, "timestep", index) for index in range(2000))

    # Kolmogorov-Smirnov: beyond 2/√n lies less than one sample in a thousand.
    assert max(abs(value - (i + 0.5) / 2000) for i, value in enumerate(values)) < 2 / math.sqrt(2000)


def test_normal_values_are_standard() -> None:
    values = keyed_normal((100, 100), 3, "noise")

    assert values.dtype == torch.float32
    assert values.mean().abs() < 0.05
    assert (values.std() - 1).abs() < 0.05


@given(st.integers(0, 40), SEEDS)
def test_a_permutation_has_every_index_once(n: int, seed: int) -> None:
    assert sorted(keyed_permutation(n, seed, "order", 1)) == list(range(n))


def test_epochs_have_permutations_of_their_own() -> None:
    assert keyed_permutation(20, 0, "order", 0) != keyed_permutation(20, 0, "order", 1)


def test_the_seed_of_a_stream_is_still_the_recorded_one() -> None:
    # A run resumed under a later version must see the numbers that it began with.
    assert keyed_generator(0, "noise", 0).initial_seed() == 0x7EE819E520B7CE51
