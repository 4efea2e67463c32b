"""Distributions of diffusion time as maps from uniform numbers."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.diffusion.timesteps import TIMESTEP_DISTRIBUTIONS


@given(st.floats(0, 1, width=32))
def test_every_distribution_stays_within_diffusion_time(u: float) -> None:
    for name in TIMESTEP_DISTRIBUTIONS:
        assert 0 <= TIMESTEP_DISTRIBUTIONS[name](torch.tensor([u])).item() <= 1


@pytest.mark.parametrize("name", TIMESTEP_DISTRIBUTIONS)
def test_every_distribution_is_monotonous(name: str) -> None:
    """So that stratified uniform numbers stay stratified."""
    mapped = TIMESTEP_DISTRIBUTIONS[name](torch.linspace(0, 1, 1001, dtype=torch.float64))

    assert bool((mapped.diff() >= 0).all())


def test_uniform_is_the_identity() -> None:
    u = torch.rand(7)

    assert torch.equal(TIMESTEP_DISTRIBUTIONS["uniform"](u), u)


@pytest.mark.parametrize("u", [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
def test_logit_normal_quantiles_are_those_of_its_definition(u: float) -> None:
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
