"""Clips from their first or last frame in graphs: the nodes set, and the models predict, what ComfyUI's do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_cases
import frame_cases
import pytest
import tiny_wan
import torch
from frame_cases import CASES, FRAMES, SIZE
from torch import Tensor

from lorasmith.core.errors import DataError, ModelError
from lorasmith.core.folders import Folders
from lorasmith.data.dataset import places_of
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.nodes.training import _dataset
from lorasmith.nodes.values import first_frames, for_model
from tests.families.test_comfyui_families import assert_same

Loaded = Callable[[str], tuple[Model, Path]]

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "comfyui_frames.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A case's model, and ComfyUI's folders with its files."""
    made: dict[int, tuple[Model, Path]] = {}

    def of(name: str) -> tuple[Model, Path]:
        tiny = CASES[name].tiny
        if id(tiny) not in made:
            folder = tmp_path_factory.mktemp("comfyui")
            files = tiny.saved(folder)
            tiny_wan.save_clip_vision(folder)
            made[id(tiny)] = tiny.loaded(files), folder
        return made[id(tiny)]

    return of


def made(bench: Any, name: str, model: Model, folder: Path, **other: Any) -> tuple[Conditioning, dict[str, Any]]:
    """What the node of a case sets in a prompt's conditioning, and its latents."""
    case = CASES[name]
    pictures = {f"{which}_image": frame_cases.picture(which) for which in case.pictures}
    inputs = {"vae": model.autoencoder, **SIZE, "length": FRAMES, **pictures}
    if case.sees_pictures:
        bench = type(bench)(Folders(folder))
        encoder = bench.one("CLIPVisionLoader", clip_name="clip_vision_h.safetensors")
        for which, picture in pictures.items():
            key = "clip_vision_output" if case.node == "WanImageToVideo" else f"clip_vision_{which}"
            inputs[key] = bench.one("CLIPVisionEncode", clip_vision=encoder, image=picture, crop="none")
    prompt = [model.text_encoder.encode(family_cases.PROMPTS["short"])]
    if case.node == "Wan22ImageToVideoLatent":
        return prompt[0], bench.one(case.node, **{**inputs, **other})
    outputs = bench.call(case.node, positive=prompt, negative=prompt, **{**inputs, **other}).outputs
    assert outputs[0][0][0].tensors.keys() == outputs[1][0][0].tensors.keys()
    return outputs[0][0][0], outputs[2][0]


@pytest.mark.slow_after(3)
@pytest.mark.parametrize("name", CASES)
def test_nodes_and_predictions_are_comfyuis(bench: Any, loaded: Loaded, name: str) -> None:
    (model, folder), recorded = loaded(name), GOLDEN[name]
    given, latent = made(bench, name, model, folder)
    found: dict[str, Tensor] = {**given.tensors, **latent}
    if "clip_vision" in found:
        found["states"] = found["clip_vision"]
    for key in recorded.keys() - {"velocity"}:
        assert_same(key, found[key], recorded[key])
    x = frame_cases.noisy(latent["samples"].shape)
    first = first_frames(latent, model)
    assert (first is not None) == ("noise_mask" in recorded)
    ready = for_model(given, model, x, first)
    time = model.components.schedule.at_sigma(torch.tensor([family_cases.SIGMA])).time
    with torch.no_grad():
        velocity = model.denoiser.predict(x, time, ready)
    count = 0 if first is None else first.shape[2]
    assert_same("velocity", velocity[:, :, count:], recorded["velocity"])


def test_a_first_frame_stays_where_latents_are_sampled(bench: Any, loaded: Loaded) -> None:
    model, folder = loaded("wan2.2 5b")
    given, latent = made(bench, "wan2.2 5b", model, folder)
    inputs = {"seed": 3, "steps": 3, "cfg": 3.0, "scheduler": "simple", "positive": [given], "negative": [given]}
    seen = []
    predict = type(model.family).predict

    def watched(self: Any, denoiser: Any, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append(conditioning.tensors.get("first_frame"))
        return predict(self, denoiser, latents, time, conditioning)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.family), "predict", watched)
        for sampler in ("euler", "dpmpp_2m"):
            drawn = bench.one("KSampler", model=model.denoiser, latent_image=latent, sampler_name=sampler, **inputs)
            assert torch.allclose(drawn["samples"][:, :, :1], latent["samples"][:, :, :1], atol=1e-4), sampler
            assert not torch.allclose(drawn["samples"][:, :, 1:], latent["samples"][:, :, 1:], atol=0.1)
    assert all(one is not None and one.shape[2] == 1 for one in seen)


def test_a_mask_of_parts_of_frames_is_sampled_inside_of(bench: Any, loaded: Loaded) -> None:
    model, folder = loaded("wan2.2 5b")
    given, latent = made(bench, "wan2.2 5b", model, folder)
    mask = torch.ones_like(latent["noise_mask"])
    mask[:, :, 1, :, :2] = 0
    inputs = {"seed": 3, "steps": 2, "cfg": 1.0, "scheduler": "simple", "positive": [given], "negative": [given]}
    latent = {**latent, "noise_mask": mask}
    assert first_frames(latent, model) is None
    drawn = bench.one("KSampler", model=model.denoiser, latent_image=latent, sampler_name="euler", **inputs)["samples"]
    assert torch.allclose((drawn - latent["samples"]) * (1 - mask), torch.zeros(1), atol=1e-5)
    assert ((drawn - latent["samples"]) * mask).abs().mean() > 0.1


def test_what_does_not_fit_is_said(bench: Any, loaded: Loaded, tiny: Model) -> None:
    model, folder = loaded("wan2.1 i2v")
    prompt = [model.text_encoder.encode("a fox")]
    given, latent = made(bench, "wan2.1 i2v", model, folder, length=5)
    x = torch.zeros(1, 16, 3, 12, 8)
    with pytest.raises(DataError, match=r"^known of a conditioning must have .* 3×12×8, got 2×12×8; encode"):
        model.denoiser.predict(x, torch.tensor([500.0]), for_model(given, model, x))
    with pytest.raises(DataError, match=r"^the clip_vision of a conditioning for .* got none; encode the first frame"):
        model.denoiser.check_conditionings(prompt)
    flf2v, _ = loaded("wan2.1 flf2v")
    with pytest.raises(DataError, match=r"needs CLIP's states of two pictures .* got 257 rows; encode"):
        flf2v.denoiser.predict(latent["samples"], torch.tensor([500.0]), for_model(given, flf2v, latent["samples"]))
    sizes = {"width": 64, "height": 64, "length": 5}
    with pytest.raises(DataError, match=r"needs the VAE of a model of videos, but .* is of pictures"):
        bench.call("WanImageToVideo", positive=prompt, negative=prompt, vae=tiny.autoencoder, **sizes)
    bench = type(bench)(Folders(folder))
    with pytest.raises(ModelError, match=r"must hold an image encoder, but is an autoencoder of kind wan21"):
        (folder / "models" / "clip_vision" / "vae.safetensors").write_bytes(
            next((folder / "models" / "vae").glob("*.safetensors")).read_bytes()
        )
        bench.one("CLIPVisionLoader", clip_name="vae.safetensors")


def test_latents_with_a_kept_first_frame_train_5b_with_it(loaded: Loaded) -> None:
    model, _ = loaded("wan2.2 5b")
    samples = torch.randn(2, 48, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1, 3, 4, 4)
    mask[:, :, 0] = 0
    prompt = [model.text_encoder.encode("a fox")]
    latents: list[dict[str, Tensor]] = [{"samples": samples}, {"samples": samples, "noise_mask": mask}]
    plain, kept = (_dataset(model.denoiser, [one], [prompt]) for one in latents)  # type: ignore[list-item]
    assert not any(one.conditioning.pictures for one in plain.samples)
    for one in kept.samples:
        assert torch.equal(one.conditioning.tensors["first_frame"][0], one.latents[:, :1])
    assert places_of(kept.samples) is not None
