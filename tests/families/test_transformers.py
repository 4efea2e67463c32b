"""Transformer families from the files that ComfyUI users have, held against diffusers' classes and pipelines."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import models
import numpy as np
import packed_files
import pytest
import torch
from original_models import save
from safetensors.torch import load_file
from torch import Tensor
from transformer_models import TINY, Case

from lorasmith.adapters.packed_layers import packed_layers
from lorasmith.core.errors import ModelError
from lorasmith.core.placement import placed
from lorasmith.families.base import FAMILIES, Conditioning, Encoding
from lorasmith.families.files.checkpoint import OriginalCheckpoint
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.parts.autoencoders import AUTOENCODERS
from lorasmith.families.parts.encoders import ENCODERS
from lorasmith.families.parts.tokenizers import EMBEDDED
from lorasmith.sampling.generate import generate
from lorasmith.sampling.sample import prepare_noise
from lorasmith.sampling.sigmas import sigmas_for
from tests.covering import slow_except

SIDE = 64


def test_every_tensor_is_that_of_the_part(case: Case) -> None:
    parts, ours = case.tiny.parts(), case.ours.components
    loaded = {"transformer": ours.denoiser, "vae": ours.vae, **ours.text_encoders}

    assert case.ours.family.name == case.name
    assert case.ours.files == {"denoiser" if part == "transformer" else part: path for part, path in case.files.items()}
    for part, module in loaded.items():
        state, expected = module.state_dict(), parts[part].state_dict()
        assert state.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(state[name], tensor)] == []


def test_diffusers_reads_the_same_file(case: Case, tmp_path: Path) -> None:
    """Its converters know the names and the rows of the released files."""
    part = case.tiny.parts()["transformer"]
    if case.name == "flux1":
        pytest.skip("diffusers' converter has the released widths written into it")
    part.save_config(tmp_path)
    theirs = type(part).from_single_file(
        load_file(case.files["transformer"]), config=str(tmp_path), local_files_only=True
    )
    state = case.ours.components.denoiser.state_dict()
    assert [name for name, tensor in theirs.state_dict().items() if not torch.equal(state[name], tensor)] == []


@pytest.mark.slow
def test_a_diffusers_folder_is_the_same_model(case: Case, tmp_path: Path) -> None:
    if case.name == "flux2":
        pytest.skip("its processor stands in for the released one, which cannot be saved without its vocabulary")
    case.tiny.made().save_pretrained(tmp_path / "folder")
    model = load_model(tmp_path / "folder")

    assert model.family is case.ours.family
    for part, module in case.ours.components.modules().items():
        state = model.components.modules()[part].state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    texts = [one.text_encoder.encode("a fox, 日本語").tensors for one in (model, case.ours)]
    assert all(torch.equal(texts[0][key], tensor) for key, tensor in texts[1].items())


PROMPTS = ["a fox", "", "a (red:1.3) fox, 日本語 " * 12]


@pytest.mark.parametrize("text", slow_except(PROMPTS, PROMPTS[2]), ids=["short", "empty", "long"])
def test_prompts_are_encoded_as_in_diffusers(case: Case, text: str) -> None:
    if case.name == "flux1":
        text = text.replace("(red:1.3)", "red")  # weights are ComfyUI's, and syntax for this family
    ours, theirs = encoded(case.ours, text), pipeline_encoding(case, text)
    assert ours.tensors.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours.tensors[key], tensor, rtol=1e-4, atol=1e-5)


def encoded(model: Model, text: str) -> Conditioning:
    return replace(model.text_encoder, encoding=Encoding(lengths="diffusers")).encode(text)


@torch.no_grad()
def pipeline_encoding(case: Case, text: str) -> dict[str, Tensor]:
    """What diffusers' pipeline conditions on, without its padding where a mask hides that."""
    pipeline = case.tiny.made()
    match case.name:
        case "flux1":
            context, pooled, _ = pipeline.encode_prompt(text, None)
            return {"context": context, "pooled": pooled}
        case "z-image":
            (context,), _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
            return {"context": context[None]}
        case "flux2-klein" | "flux2":
            return {"context": pipeline.encode_prompt(text)[0]}
        case _:
            with text_only(pipeline):
                context, mask = pipeline.encode_prompt(text)
            return {"context": context[mask][None].flatten(2)}


def text_only(pipeline: Any) -> Any:
    """Krea 2's pipeline gives positions for three axes, which text alone has one of."""
    forward = pipeline.text_encoder.forward

    def one_axis(*args: Any, position_ids: Tensor, **rest: Any) -> Any:
        return forward(*args, position_ids=position_ids[0], **rest)

    return mock.patch.object(pipeline.text_encoder, "forward", one_axis)


@pytest.mark.parametrize("guidance", [1.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_pictures_are_those_of_diffusers(case: Case, guidance: float) -> None:
    if case.name == "flux2" and guidance != 1:
        pytest.skip("its pipeline has no second pass")
    model, pipeline, steps = case.ours, case.tiny.made(), 3
    schedule = model.components.schedule
    sigmas = sigmas_for(schedule, "simple", steps)
    ours = generate(
        model,
        "a fox",
        text_encoder=replace(model.text_encoder, encoding=Encoding(lengths="diffusers")),
        steps=steps,
        scheduler="simple",
        cfg=guidance,
        width=SIDE,
        height=SIDE,
        seed=3,
    )[0]
    noise = prepare_noise(3, (1, *model.components.latent.shape(SIDE, SIDE)))
    theirs = drawn(case, pipeline, noise, sigmas[:-1].tolist(), guidance)
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1
    assert np.asarray(ours).std() > 1, "a picture, and no plain surface"


def drawn(case: Case, pipeline: Any, noise: Tensor, sigmas: list[float], guidance: float) -> Any:
    packed = {
        "flux1": lambda: pipeline._pack_latents(noise, *noise.shape),
        "krea2": lambda: pipeline._pack_latents(noise[:, :, 0], *noise[:, :, 0].shape),
    }
    arguments = {
        "latents": packed[case.name]() if case.name in packed else noise,
        "sigmas": sigmas,
        "num_inference_steps": len(sigmas),
        "height": SIDE,
        "width": SIDE,
        "prompt": "a fox",
    }
    if case.name == "flux2":  # guidance is an input, and there is no negative prompt
        return pipeline(**arguments, guidance_scale=4.0).images[0]
    if case.name == "flux1":
        if guidance != 1:
            return pipeline(**arguments, negative_prompt="", true_cfg_scale=guidance).images[0]
        return pipeline(**arguments).images[0]
    scale = {"z-image": guidance - 1, "krea2": guidance - 1}.get(case.name, guidance)
    if case.name == "krea2":
        with text_only(pipeline):
            return pipeline(**arguments, guidance_scale=scale).images[0]
    return pipeline(**arguments, guidance_scale=scale).images[0]


def test_a_batch_is_its_samples_one_by_one(case: Case) -> None:
    model = case.ours
    family, denoiser = model.family, model.components.denoiser
    captions = [model.text_encoder.encode(text) for text in ("a fox", "a penguin on a pink background " * 40, "")]
    latents = models.seeded("latents", (3, *model.components.latent.shape(SIDE, 2 * SIDE)), seed=0)
    time = model.components.schedule.at(torch.tensor([0.2, 0.5, 0.9])).time
    with torch.no_grad():
        together = family.predict(denoiser, latents, time, family.join(captions))
        alone = [family.predict(denoiser, latents[i : i + 1], time[i : i + 1], one) for i, one in enumerate(captions)]
    assert together.shape == latents.shape
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_latents_go_there_and_back(case: Case) -> None:
    model = case.ours
    pixels = models.seeded("pixels", (2, 3, SIDE, 2 * SIDE), seed=0, std=0.3)
    latents = model.autoencoder.encode(pixels)
    form = model.components.latent
    assert tuple(latents.shape[1:]) == form.shape(SIDE, 2 * SIDE)
    assert (model.autoencoder.latent.channels, model.autoencoder.latent.downscale) == (form.channels, form.downscale)
    assert model.autoencoder.decode(latents).shape == pixels.shape


def test_each_family_recognises_its_own_alone(case: Case) -> None:
    shapes = OriginalCheckpoint(case.files["transformer"]).denoiser_shapes
    assert [name for name, family in FAMILIES.items() if family.recognises(shapes)] == [case.name]


def test_parts_of_other_families_are_refused(tmp_path: Path) -> None:
    files = {name: TINY[name].saved(tmp_path / name) for name in ("flux1", "z-image", "krea2")}
    flux, image, krea = (files[name] for name in files)
    with pytest.raises(ModelError, match=r"is the text encoder qwen3, but Flux\.1 has clip_l .* and t5xxl"):
        load_model(flux["transformer"], text_encoders=[image["text_encoder"]])
    with pytest.raises(ModelError, match=r"is the text encoder qwen3, but Krea 2 has qwen3vl"):
        load_model(krea["transformer"], text_encoders=[image["text_encoder"]])
    with pytest.raises(ModelError, match=r"is an autoencoder of kind kl with 16 channels, but Krea 2 has .* wan21"):
        load_model(krea["transformer"], vae=image["vae"])
    with pytest.raises(ModelError, match=r"is the text encoder t5xxl, not a denoiser"):
        load_model(flux["text_encoder_2"])
    with pytest.raises(ModelError, match=r"must hold a text encoder, but is a model of the family Krea 2"):
        load_model(flux["transformer"], text_encoders=[krea["transformer"]])


def test_an_encoder_of_another_size_is_refused(tmp_path: Path) -> None:
    """Qwen3 comes in several sizes under names that say nothing."""
    files = TINY["z-image"].saved(tmp_path)
    wide = TINY["z-image"].parts()["text_encoder"]
    config = type(wide.config)(**{**wide.config.to_dict(), "hidden_size": 48})
    save(tmp_path / "wide.safetensors", {f"model.{n}": t for n, t in type(wide)(config).state_dict().items()})
    with pytest.raises(ModelError, match=r"is the text encoder qwen3 of width 48, .* needs one of width 32 .*qwen_3"):
        load_model(files["transformer"], text_encoders=[tmp_path / "wide.safetensors"])


def test_recognisers_of_encoders_and_autoencoders_take_their_own_alone(case: Case) -> None:
    shapes = {part: OriginalCheckpoint(path).shapes for part, path in case.files.items()}
    for part, found in shapes.items():
        encoders = [name for name, kind in ENCODERS.items() if kind.recognises(found)]
        autoencoders = [name for name, kind in AUTOENCODERS.items() if kind.recognises(found)]
        family = case.ours.family
        slots = family.text_encoders
        assert encoders == ([slots[part].kind] if part in slots else [])
        assert autoencoders == ([family.autoencoder.kind] if part == "vae" else [])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_halves_until_they_are_placed(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    model = case.tiny.loaded(case.tiny.saved(tmp_path, dtype))
    assert {p.dtype for module in model.components.modules().values() for p in module.parameters()} == {dtype}
    encoded = model.text_encoder.encode("a fox").tensors["context"]
    expected = case.ours.text_encoder.encode("a fox").tensors["context"]
    assert encoded.dtype == torch.float32
    error = (encoded - expected).norm() / expected.norm()
    assert error < 0.1


@torch.no_grad()
def predicted(model: Model) -> Tensor:
    """A prediction for a short prompt."""
    latents = models.seeded("latents", (1, *model.components.latent.shape(SIDE, SIDE)), seed=0)
    shapes = model.family.conditioning_shapes(model.components.denoiser)
    prompt = Conditioning({name: models.seeded(name, shape, seed=0) for name, shape in shapes.items()})
    with placed(model.components.denoiser, device=torch.device("cpu"), dtype=torch.float32):
        return model.denoiser.predict(latents, torch.tensor([0.6]), prompt)


@torch.no_grad()
def test_predictions_are_those_of_diffusers_own_call(case: Case) -> None:
    latents = models.seeded("latents", (1, *case.ours.components.latent.shape(SIDE, SIDE)), seed=0)
    shapes = case.ours.family.conditioning_shapes(case.ours.components.denoiser)
    given = {name: models.seeded(name, shape, seed=0) for name, shape in shapes.items()}
    denoiser, context, time = case.tiny.parts()["transformer"], given["context"], torch.tensor([0.6])
    side, tokens = SIDE // 8, context.shape[1]

    def positions(axes: int, rows: int) -> Tensor:
        grid = torch.cartesian_prod(*(torch.arange(float(size)) for size in (1, rows, rows)))
        return torch.cat((grid, torch.zeros(rows * rows, axes - 3)), dim=1)

    def patches(x: Tensor) -> Tensor:
        rows = x.reshape(1, 16, side // 2, 2, side // 2, 2)
        return rows.permute(0, 2, 4, 1, 3, 5).reshape(1, -1, 64)

    match case.name:
        case "flux1":
            expected = denoiser(
                patches(latents),
                context,
                given["pooled"],
                time,
                positions(3, side // 2),
                torch.zeros(tokens, 3),
                torch.tensor([3.5]),
            ).sample
        case "z-image":
            expected = -denoiser([latents[0].unsqueeze(1)], 1 - time, [context[0]]).sample[0].squeeze(1)[None]
        case "krea2":
            ids = torch.cat((torch.zeros(tokens, 3), positions(3, side // 2)))
            layers = context.reshape(1, tokens, 12, -1)
            expected = denoiser(patches(latents[:, :, 0]), layers, time, ids).sample
        case _:
            text = torch.cat((torch.zeros(tokens, 3), torch.arange(float(tokens))[:, None]), dim=1)
            guidance = torch.tensor([4.0]) if case.name == "flux2" else None
            tokens_of_picture = latents.flatten(2).transpose(1, 2)
            expected = denoiser(tokens_of_picture, context, time, positions(4, side // 2), text, guidance).sample
    ours = predicted(case.ours)
    if case.name in ("flux1", "krea2"):
        ours = patches(ours.reshape((*latents.shape[:2], side, side)))
    elif case.name.startswith("flux2"):
        ours = ours.flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", slow_except(packed_files.KINDS, "int8 with ConvRot", "nvfp4"))
def test_packed_denoisers_are_the_weights_they_stand_for(case: Case, kind: str, tmp_path: Path) -> None:
    file, meant = {}, {}
    for name, tensor in load_file(case.files["transformer"]).items():
        file[name] = meant[name] = tensor
        if tensor.ndim == 2 and name.endswith(".weight") and tensor.shape[1] % 32 == 0:
            packed, meant[name] = packed_files.pack(kind, tensor)
            file |= {f"{name.removesuffix('weight')}{leaf}": one.contiguous() for leaf, one in packed.items()}
    models_of = [load_model(save(tmp_path / f"{i}.safetensors", one)) for i, one in enumerate((file, meant))]
    assert packed_layers(models_of[0].components.denoiser)
    torch.testing.assert_close(predicted(models_of[0]), predicted(models_of[1]), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
def test_gguf_denoisers_are_the_weights_they_stand_for(case: Case, tmp_path: Path) -> None:
    import gguf
    import gguf_files

    tensors = load_file(case.files["transformer"])
    meant = gguf_files.write(tmp_path / "q8.gguf", tensors, gguf.GGMLQuantizationType.Q8_0)
    expected = load_model(save(tmp_path / "plain.safetensors", meant))
    found = load_model(tmp_path / "q8.gguf")
    assert packed_layers(found.components.denoiser)
    torch.testing.assert_close(predicted(found), predicted(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_everything_in_one_file_is_the_same_model(case: Case, tmp_path: Path) -> None:
    """An all-in-one checkpoint, with the prefixes that ComfyUI saves."""
    family = case.ours.family
    tensors = {f"model.diffusion_model.{name}": one for name, one in load_file(case.files["transformer"]).items()}
    tensors |= {f"vae.{name}": one for name, one in load_file(case.files["vae"]).items()}
    for component, slot in family.text_encoders.items():
        for name, one in load_file(case.files[component]).items():
            inside = "text_encoders." if name in EMBEDDED else slot.prefixes[-1]
            tensors[inside + name] = one
    model = load_model(save(tmp_path / "whole.safetensors", tensors))
    assert model.components.modules().keys() == case.ours.components.modules().keys()
    for part, module in case.ours.components.modules().items():
        state = model.components.modules()[part].state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    encoded = [one.text_encoder.encode("a fox").tensors["context"] for one in (model, case.ours)]
    assert torch.equal(*encoded)


@pytest.mark.slow
def test_a_cut_file_is_refused(case: Case, tmp_path: Path) -> None:
    for part, path in case.files.items():
        tensors = load_file(path)
        del tensors[max(name for name in tensors if ".0." in name and name.endswith("weight"))]
        cut = save(tmp_path / f"{part}.safetensors", tensors)
        with pytest.raises(ModelError, match=r"lacks|incomplete"):
            case.tiny.loaded({**case.files, part: cut})


def test_a_file_under_diffusers_names_is_the_same_denoiser(case: Case, tmp_path: Path) -> None:
    state = case.tiny.parts()["transformer"].state_dict()
    model = load_model(save(tmp_path / "diffusion_pytorch_model.safetensors", dict(state)))
    assert model.family is case.ours.family
    assert torch.equal(predicted(model), predicted(case.ours))
