"""Transformer families from their files: prompts, predictions, LoRAs, pictures and sigmas are ComfyUI's.

The golden file was recorded by `tests/peers/record_comfyui_families.py`, which says what each number is.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_cases
import models
import pytest
import torch
from original_models import save
from safetensors.torch import load_file
from torch import Tensor
from transformer_models import TINY, Case

from lorasmith.diffusion.schedule import NoiseSchedule
from lorasmith.families.conditionings import CONTROL_METHODS, Conditioning
from lorasmith.families.loading import load_model
from lorasmith.sampling.samplers import SIGMA_SCHEDULES, sigmas_for
from tests.covering import slow_except

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "comfyui_families.json").read_text(encoding="utf-8"))
AGREEMENT = 5e-5
"""Largest difference of two fingerprints, relative to the tensor's norm; instruction sets differ by up to 1.3e-5."""


@pytest.fixture(scope="module")
def recorded(case: Case) -> dict[str, Any]:
    case.skip("ComfyUI")
    found: dict[str, Any] = GOLDEN["families"][case.name]
    return found


def assert_same(key: str, ours: Tensor, expected: dict[str, list[float]]) -> None:
    assert list(ours.shape) == expected["shape"]
    theirs = torch.tensor(expected["fingerprint"])
    difference = (models.fingerprint(key, ours) - theirs).abs().max() / theirs[0].clamp(min=1e-10)
    assert difference < AGREEMENT, f"{key}: {difference:.1e}"


@pytest.mark.parametrize("prompt", slow_except(family_cases.PROMPTS, "short"))
def test_prompts_are_encoded_as_in_comfyui(case: Case, recorded: dict[str, Any], prompt: str) -> None:
    ours = case.ours.text_encoder.encode(family_cases.PROMPTS[prompt]).tensors
    expected = recorded["conditioning"][prompt]
    for key, tensor in ours.items():
        assert_same(key, tensor, expected[key])


def prediction(case: Case, conditioning: Conditioning, *, changed: bool = False, frames: int = 1) -> Tensor:
    denoiser = family_cases.lora(case.ours).applied_to(case.ours.denoiser) if changed else case.ours.denoiser
    time = case.ours.components.schedule.at_sigma(torch.tensor([family_cases.SIGMA])).time
    with denoiser.active(), torch.no_grad():
        return denoiser.predict(family_cases.noisy(case.ours, frames), time, conditioning)


def test_predictions_are_comfyuis(case: Case, recorded: dict[str, Any]) -> None:
    """Plain, with a LoRA, of clips, and with controls by each method that the family has."""
    conditioning = case.ours.text_encoder.encode(family_cases.PROMPTS["short"])
    plain, changed = (prediction(case, conditioning, changed=one) for one in (False, True))
    assert_same("prediction", plain, recorded["prediction"])
    assert (changed - plain).norm() > 0.02 * plain.norm()
    assert_same("with_lora", changed, recorded["with_lora"])
    if case.ours.components.latent.time_downscale:
        assert_same("clip", prediction(case, conditioning, frames=family_cases.FRAMES), recorded["clip"])
    taken = {one for one, (method, _) in family_cases.CONTROLS.items() if family_cases.has_method(case.ours, method)}
    assert taken == recorded.get("controls", {}).keys()
    for which in taken:
        method = family_cases.CONTROLS[which][0]
        name = CONTROL_METHODS["uxo/uno" if method == "uxo" else method] if method else ""
        told = replace(conditioning, tensors=conditioning.tensors | ({name: torch.zeros(1)} if name else {}))
        controls = [case.ours.components.latent.to_model(one) for one in family_cases.controls(case.ours, which)]
        assert_same(which, prediction(case, told.with_controls(controls)), recorded["controls"][which])


def test_prompts_with_pictures_are_encoded_as_in_comfyui(case: Case, recorded: dict[str, Any]) -> None:
    """From patches: programs scale pictures to the size of patches by different kernels."""
    for which, expected in recorded.get("seen", {}).items():
        form = case.ours.family.controls[-1 if which == "edit" else 0]
        pictures = family_cases.seen(case.ours, "one" if which == "edit" else which)
        encoded = case.ours.text_encoder.encode(family_cases.INSTRUCTION, pictures, sight=form.sight)
        assert_same(which, encoded.tensors["context"], expected)


def test_pictures_are_encoded_and_decoded_as_in_comfyui(case: Case, recorded: dict[str, Any]) -> None:
    latents = case.ours.autoencoder.encode(family_cases.picture())
    assert_same("latents", latents, recorded["latents"])
    assert_same("normalised", case.ours.components.latent.to_model(latents), recorded["normalised"])
    assert_same("picture", case.ours.autoencoder.decode(latents), recorded["picture"])


def test_the_shift_is_comfyuis(case: Case, recorded: dict[str, Any]) -> None:
    assert_same_sampling(case.ours.components.schedule, recorded)


def test_schnell_has_no_shift(tmp_path: Path) -> None:
    tensors = load_file(TINY["flux1"].saved(tmp_path)["transformer"])
    schnell = {name: tensor for name, tensor in tensors.items() if not name.startswith("guidance_in.")}
    model = load_model(save(tmp_path / "schnell.safetensors", schnell))
    assert_same_sampling(model.components.schedule, GOLDEN["families"]["flux1-schnell"])


def assert_same_sampling(schedule: NoiseSchedule, expected: dict[str, Any]) -> None:
    """Sigma at parts of diffusion time, as ComfyUI's trainer draws them, and the sigmas of KSampler's schedulers."""
    ours = schedule.at(1 - torch.tensor(family_cases.PERCENTS)).sigma
    torch.testing.assert_close(ours, torch.tensor(expected["percents"]), rtol=1e-5, atol=0)
    assert expected["sigmas"].keys() <= set(SIGMA_SCHEDULES)
    for scheduler, runs in expected["sigmas"].items():
        for steps, sigmas in runs.items():
            stepped = sigmas_for(schedule, scheduler, int(steps))
            torch.testing.assert_close(stepped, torch.tensor(sigmas), rtol=1e-5, atol=1e-7)
