"""Parameterizations: a perfect prediction gives the clean sample back, and ours are diffusers' targets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import OptionError
from lorasmith.diffusion.schedule import PARAMETERIZATIONS, DiscreteSchedule, FlowSchedule, NoiseLevel, NoiseSchedule

SD = DiscreteSchedule.scaled_linear()
FLOW = FlowSchedule(3.0)
PAIRS: dict[str, tuple[str, NoiseSchedule]] = {
    "epsilon": ("epsilon", SD),
    "v": ("v", SD),
    "flow": ("flow", FLOW),
}


@given(
    which=st.sampled_from(sorted(PAIRS)),
    quantiles=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_the_clean_sample_of_the_target_is_the_sample(
    which: str, quantiles: list[float], seed: int, spread: float
) -> None:
    name, schedule = PAIRS[which]
    kind = PARAMETERIZATIONS[name]
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(len(quantiles), 2, 3, generator=generator) for _ in range(2))
    clean = clean * spread
    level = schedule.at(torch.tensor(quantiles))
    found = kind.clean(kind.target(clean, noise, level), level.noised(clean, noise), level)

    # Where noise drowns the sample (up to 15:1), so does rounding.
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)


def test_the_clean_sample_is_linear_in_the_prediction() -> None:
    for name in ["epsilon", "v", "flow"]:
        kind, schedule = PARAMETERIZATIONS[name], PAIRS[name][1]
        generator = torch.Generator().manual_seed(0)
        noised, one, two = (torch.randn(5, 4, generator=generator) for _ in range(3))
        level = schedule.at(torch.linspace(0.05, 0.95, 5))
        middle = kind.clean((one + two) / 2, noised, level)

        torch.testing.assert_close(middle, (kind.clean(one, noised, level) + kind.clean(two, noised, level)) / 2)


def test_targets_are_the_formulas() -> None:
    clean, noise = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    level = SD.at(torch.tensor([0.1, 0.5, 0.9]))
    alpha, sigma = (t.reshape(3, 1, 1) for t in (level.alpha, level.sigma))

    assert torch.equal(PARAMETERIZATIONS["epsilon"].target(clean, noise, level), noise)
    torch.testing.assert_close(PARAMETERIZATIONS["v"].target(clean, noise, level), alpha * noise - sigma * clean)
    torch.testing.assert_close(PARAMETERIZATIONS["flow"].target(clean, noise, level), noise - clean)


def test_the_clean_samples_error_is_the_predictions_scaled() -> None:
    for name in ["epsilon", "v", "flow"]:
        kind, schedule = PARAMETERIZATIONS[name], PAIRS[name][1]
        noised, one, two = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
        level = schedule.at(torch.linspace(0.05, 0.95, 5))
        error = (kind.clean(one, noised, level) - kind.clean(two, noised, level)).square().mean(1)

        torch.testing.assert_close(error.float(), kind.clean_scale(level) * (one - two).square().mean(1).float())


def test_each_sample_has_its_own_level() -> None:
    for name in ["epsilon", "v", "flow"]:
        for shape in [(3,), (3, 4), (3, 4, 2, 2), (3, 4, 2, 2, 2)]:
            kind, schedule = PARAMETERIZATIONS[name], PAIRS[name][1]
            prediction, noised = torch.randn(shape), torch.randn(shape)
            level = schedule.at(torch.tensor([0.1, 0.4, 0.8]))
            together = kind.clean(prediction, noised, level)

            for i in range(3):
                one = NoiseLevel(level.alpha[i : i + 1], level.sigma[i : i + 1], level.time[i : i + 1])
                torch.testing.assert_close(
                    together[i : i + 1], kind.clean(prediction[i : i + 1], noised[i : i + 1], one)
                )


def test_diffusers_names_are_aliases() -> None:
    assert PARAMETERIZATIONS.canonical("v_prediction") == "v"
    assert PARAMETERIZATIONS.canonical("eps") == "epsilon"
    with pytest.raises(OptionError, match=r"^unknown parameterization 'sample'; known are epsilon, v, flow$"):
        PARAMETERIZATIONS["sample"]
