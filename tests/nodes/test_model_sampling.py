from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorasmith.core.errors import ModelError, OptionError
from lorasmith.diffusion.schedule import FlowSchedule
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Denoiser, Model


@pytest.fixture
def flow(tiny: Model) -> Denoiser:
    """The tiny network in the place of one whose own schedule is a flow with time up to 1."""
    components = replace(tiny.components, schedule=FlowSchedule(3.0), parameterization="flow")
    return replace(tiny, components=components).denoiser


@pytest.mark.parametrize("node", ["ModelSamplingSD3", "ModelSamplingAuraFlow"])
def test_a_shift_replaces_the_schedule_and_the_wrong_node_is_named(bench: Any, flow: Denoiser, node: str) -> None:
    shifted = bench.one(node, model=flow, shift=6.0)
    assert flow.noising is None
    schedule = shifted.diffusion.schedule
    assert schedule.shift == 6.0
    assert schedule.at_sigma(torch.tensor([0.5])).time.item() == 0.5
    assert schedule.sigmas[499].item() == pytest.approx(6 * 0.5 / (1 + 5 * 0.5))
    warnings = bench.messages("warning")
    assert len(warnings) == (node == "ModelSamplingSD3")
    assert all("use ModelSamplingAuraFlow instead" in one for one in warnings)


def test_networks_of_discrete_steps_keep_their_unit_of_time(bench: Any, tiny: Model) -> None:
    right = bench.one("ModelSamplingSD3", model=tiny.denoiser, shift=3.0)
    assert bench.messages("warning") == []
    wrong = bench.one("ModelSamplingAuraFlow", model=tiny.denoiser, shift=3.0)
    assert len(bench.messages("warning")) == 1
    for model in (right, wrong):
        assert model.diffusion.parameterization == "flow"
        assert model.diffusion.schedule.at_sigma(torch.tensor([0.25])).time.item() == 250


def test_flux_shifts_by_the_size_of_the_picture(bench: Any, flow: Denoiser) -> None:
    def shift(**changes: float) -> float:
        result: float = bench.one("ModelSamplingFlux", model=flow, **changes).diffusion.schedule.shift
        return result

    assert shift() == pytest.approx(math.exp(1.15))
    assert shift(width=256, height=256) == pytest.approx(math.exp(0.5))
    assert shift(width=1000, height=1000) == pytest.approx(math.exp(0.5 + 0.65 * (3906.25 - 256) / 3840))
    schedule = bench.one("ModelSamplingFlux", model=flow, max_shift=2.0, base_shift=1.0).diffusion.schedule
    assert len(schedule.sigmas) == 10_000
    assert schedule.resolution_shift(128, 128) == pytest.approx(math.exp(2.0))


def test_a_discrete_models_prediction_is_chosen(bench: Any, tiny: Model) -> None:
    def chosen(sampling: str, zsnr: bool = False) -> Any:
        return bench.one("ModelSamplingDiscrete", model=tiny.denoiser, sampling=sampling, zsnr=zsnr).diffusion

    own = tiny.components.schedule
    assert chosen("eps").parameterization == "epsilon"
    assert torch.equal(chosen("eps").schedule.sigmas, own.sigmas)
    zero = chosen("v_prediction", zsnr=True)
    assert zero.parameterization == "v"
    assert zero.schedule.sigmas[-1] > 4000
    few = chosen("lcm").schedule
    assert len(few.sigmas) == 50
    assert few.sigmas[[0, -1]].tolist() == own.sigmas[[19, -1]].tolist()
    assert few.timestep(few.sigmas[[0, 1, -1]]).tolist() == [19, 39, 999]
    assert few.sigma(few.timestep(few.sigmas)).tolist() == pytest.approx(few.sigmas.tolist())


def test_what_does_not_fit_is_refused(bench: Any, tiny: Model, flow: Denoiser) -> None:
    with pytest.raises(OptionError, match="must be one of eps, v_prediction, lcm here, got 'img_to_img'"):
        bench.call("ModelSamplingDiscrete", model=tiny.denoiser, sampling="img_to_img")
    with pytest.raises(ModelError, match="is for models with discrete timesteps, but lorasmith-tiny is a flow"):
        bench.call("ModelSamplingDiscrete", model=flow, sampling="eps")
    with pytest.raises(OptionError, match="shift must be greater than 0, got 0; 1 is none"):
        bench.call("ModelSamplingAuraFlow", model=flow, shift=0.0)


def test_sampling_follows(bench: Any, tiny: Model, captions: list[Conditioning]) -> None:
    def sample(model: Denoiser) -> torch.Tensor:
        empty = bench.one("EmptyLatentImage", width=64, height=64)
        values = {"steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "latent_image": empty}
        result: torch.Tensor = bench.one(
            "KSampler", model=model, **values, positive=captions[:1], negative=captions[1:2]
        )["samples"]
        return result

    noise = bench.one("ModelSamplingDiscrete", model=tiny.denoiser, sampling="eps")
    assert not torch.allclose(sample(noise), sample(tiny.denoiser))
