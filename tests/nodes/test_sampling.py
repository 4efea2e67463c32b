from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.errors import CancelledError, DataError, GraphError
from lorasmith.core.folders import Folders
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.nodes import load_nodes
from lorasmith.nodes.sampling import SAMPLER_NAME, SCHEDULER
from lorasmith.sampling.sample import prepare_noise, sample_latents
from lorasmith.sampling.samplers import SAMPLERS, SIGMA_SCHEDULES, sigmas_for
from lorasmith.workflow import validate
from lorasmith.workflow.execution_events import NodeProgress

Make = Callable[..., Any]


@pytest.fixture
def sample(bench: Any, tiny: Model, captions: list[Conditioning]) -> Callable[..., torch.Tensor]:
    empty = bench.one("EmptyLatentImage", width=64, height=64, batch_size=1)

    def run(**changes: Any) -> torch.Tensor:
        values = {
            "model": tiny.denoiser,
            "seed": 3,
            "steps": 3,
            "cfg": 2.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "positive": captions[:1],
            "negative": captions[1:2],
            "latent_image": empty,
            "denoise": 1.0,
        }
        samples: torch.Tensor = bench.one("KSampler", **(values | changes))["samples"]
        return samples

    return run


def test_latents_are_unscaled_and_as_large_as_the_model_needs(
    sample: Make, bench: Any, tiny: Model, captions: list[Conditioning]
) -> None:
    # 64 px are 8 latents for the node that makes them, and 16 for this model.
    shape = (1, 4, 16, 16)
    components = tiny.components
    expected = sample_latents(
        tiny.denoiser.predict,
        schedule=components.schedule,
        parameterization=components.parameterization,
        positive=captions[:1],
        negative=captions[1:2],
        latents=torch.zeros(shape),
        noise=prepare_noise(3, shape),
        sigmas=sigmas_for(components.schedule, "normal", 3),
        sampler="euler",
        cfg=2.0,
        seed=3,
    )
    torch.testing.assert_close(sample(), expected / 0.18215, atol=1e-3, rtol=1e-4)
    assert [(e.value, e.maximum) for e in bench.events if isinstance(e, NodeProgress)] == [(1, 3), (2, 3), (3, 3)]


def test_a_picture_survives_a_little_denoising(sample: Make, latents: Make) -> None:
    given = latents()
    start = given["samples"].clone()
    little, much = (sample(latent_image=given, denoise=d) for d in (0.1, 1.0))
    assert (little - start).abs().mean() < 0.5 * (much - start).abs().mean()
    assert torch.allclose(sample(latent_image=given, denoise=0.0), start, atol=1e-5)
    assert torch.equal(given["samples"], start)


def test_the_seed_has_its_full_range(sample: Make) -> None:
    assert not torch.equal(sample(seed=2**64 - 1, steps=1), sample(seed=0, steps=1))


def test_latents_of_another_model_are_refused(sample: Make) -> None:
    with pytest.raises(DataError, match=r"must be \(batch, 4, height, width\).*got \(1, 16, 8, 8\)"):
        sample(latent_image={"samples": torch.ones(1, 16, 8, 8)})


def test_cancelling_stops_between_evaluations(sample: Make, bench: Any) -> None:
    bench.context = replace(bench.context, report=lambda event: bench.context.cancel.set())
    with pytest.raises(CancelledError):
        sample()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("sampler_name", "dpm_2", "the sampler dpm_2 of ComfyUI is not available here; use one of euler, "),
        ("scheduler", "bta", "no such scheduler: 'bta' (did you mean 'beta'?); use one of simple, "),
        ("sampler_name", "euller", "no such sampler: 'euller' (did you mean 'euler'?); use one of euler, "),
    ],
)
def test_what_is_not_available_is_refused_by_name_before_anything_runs(
    tmp_path: Path, name: str, value: str, sentence: str
) -> None:
    load_nodes()
    inputs = {"seed": 0, "steps": 1, "cfg": 1.0, "sampler_name": "Euler", "scheduler": "normal", "denoise": 1.0}
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "lorasmith-tiny.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {
            "class_type": "KSampler",
            "inputs": {
                **inputs,
                name: value,
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["2", 0],
                "latent_image": ["3", 0],
            },
        },
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
    }
    with pytest.raises(GraphError) as caught:
        validate(prompt, Folders(tmp_path))
    (finding,) = caught.value.findings
    assert sentence in finding
    prompt["4"]["inputs"][name] = {"sampler_name": "Euler", "scheduler": "Karras"}[name]
    assert validate(prompt, Folders(tmp_path)).nodes["4"].inputs[name] in ("euler", "karras")


@pytest.mark.slow
def test_two_advanced_samplers_share_the_steps_of_one(
    bench: Any, tiny: Model, captions: list[Conditioning], sample: Make
) -> None:
    whole = sample(steps=5)
    values = {
        "model": tiny.denoiser,
        "noise_seed": 3,
        "steps": 5,
        "cfg": 2.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "positive": captions[:1],
        "negative": captions[1:2],
    }
    empty = bench.one("EmptyLatentImage", width=64, height=64, batch_size=1)

    def part(latent_image: Any, **changes: Any) -> Any:
        given = {"add_noise": "enable", "return_with_leftover_noise": "disable", **values, **changes}
        return bench.one("KSamplerAdvanced", **given, latent_image=latent_image)

    noisy = part(empty, end_at_step=2, return_with_leftover_noise="enable")
    rest = part(noisy, start_at_step=2, add_noise="disable")
    torch.testing.assert_close(rest["samples"], whole, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(part(empty)["samples"], whole)
    assert noisy["samples"].std() > 2 * whole.std()
    clean = part(empty, end_at_step=2)
    assert clean["samples"].std() < noisy["samples"].std() / 2
    assert torch.equal(part(noisy, start_at_step=5)["samples"], noisy["samples"])


@pytest.mark.slow
def test_a_prompt_for_a_part_of_sampling_counts_there_alone(
    bench: Any, captions: list[Conditioning], sample: Make
) -> None:
    def during(which: int, start: float, end: float) -> list[Conditioning]:
        prompt = captions[which : which + 1]
        ranged: list[Conditioning] = bench.one(
            "ConditioningSetTimestepRange", conditioning=prompt, start=start, end=end
        )
        return ranged

    whole = sample(steps=4)
    assert torch.equal(sample(steps=4, positive=during(0, 0.0, 1.0)), whole)
    halves = [*during(0, 0.0, 0.5), *during(0, 0.5, 1.0)]
    torch.testing.assert_close(sample(steps=4, positive=halves), whole, atol=1e-3, rtol=1e-3)
    changed = sample(steps=4, positive=[*during(0, 0.0, 0.5), *during(2, 0.5, 1.0)])
    assert not torch.allclose(changed, whole, atol=1e-2)


def test_prompts_of_another_models_encoders_are_refused(sample: Make, captions: list[Conditioning]) -> None:
    wide = Conditioning({"context": torch.zeros(1, 77, 4096)})
    with pytest.raises(
        DataError,
        match=r"the context of a conditioning for lorasmith-tiny \(Stable Diffusion 1\.x\) must have width 128, got "
        r"4096; encode prompts with its own text encoders \(clip_l, loaded with type stable_diffusion\)",
    ):
        sample(positive=[wide])
    with pytest.raises(DataError, match="must have width 128, got 4096"):
        sample(negative=[wide])
    sample(negative=[wide], cfg=1.0, steps=1)  # not used


def test_samplers_and_schedulers_are_of_comfyuis_list(tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    assert set(SAMPLERS) <= set(SAMPLER_NAME.choices(folders))
    assert set(SIGMA_SCHEDULES) == set(SCHEDULER.choices(folders))
