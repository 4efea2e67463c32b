"""Transformer families from the files that ComfyUI users have, held against diffusers' classes and pipelines."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import packed_files
import pytest
import torch
from original_models import save
from safetensors.torch import load_file
from torch import Tensor
from transformer_models import TINY, Case

from lorasmith.adapters.frozen_layer import packable_layers, packed_layers
from lorasmith.adapters.weight_stream import StreamedWeight
from lorasmith.core.errors import ModelError
from lorasmith.core.placement import placed
from lorasmith.core.quantization import weight_source
from lorasmith.families.base import FAMILIES
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.files.checkpoint import OriginalCheckpoint
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model, TextEncoder
from lorasmith.families.parts.autoencoders import AUTOENCODERS
from lorasmith.families.parts.encoders import EMBEDDED, ENCODERS
from lorasmith.families.slots import Encoding
from lorasmith.sampling.generate import generate
from lorasmith.sampling.sample import prepare_noise
from lorasmith.sampling.samplers import sigmas_for
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
    case.skip("diffusers reads the file")
    part.save_config(tmp_path)
    theirs = type(part).from_single_file(
        load_file(case.files["transformer"]), config=str(tmp_path), local_files_only=True
    )
    state = case.ours.components.denoiser.state_dict()
    assert [name for name, tensor in theirs.state_dict().items() if not torch.equal(state[name], tensor)] == []


@pytest.mark.slow_by_family
def test_streamed_text_encoders_give_the_same_numbers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = case.ours.text_encoder
    modules = encoder.encoders.modules.values()
    with encoder.active():
        placed = encoder.encode("a fox, 日本語")
    monkeypatch.setattr(TextEncoder, "_streamed", lambda self, device, *, sees: {*self.encoders.modules})
    with encoder.active():
        sources = [weight_source(layer) for one in modules for layer in packable_layers(one)]
        assert any(isinstance(source, StreamedWeight) for source in sources), "those of its blocks"
        streamed = encoder.encode("a fox, 日本語")
    assert not any(weight_source(layer) for one in modules for layer in one.modules())
    assert streamed.tensors.keys() == placed.tensors.keys()
    # A product of one row on the CPU depends on where its weight begins in memory, by a bit.
    torch.testing.assert_close(streamed.tensors, placed.tensors, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_diffusers_folder_is_the_same_model(case: Case, tmp_path: Path) -> None:
    case.skip("folder")
    case.tiny.save_folder(tmp_path / "folder")
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
    if case.tiny.reads_weights:
        text = text.replace("(red:1.3)", "red")
    ours = encoded(case.ours, text)
    with torch.no_grad():
        theirs = case.tiny.conditioning(case.tiny.made(), text)
    assert ours.tensors.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours.tensors[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow_by_family
def test_escaped_brackets_are_brackets_as_in_comfyui(case: Case) -> None:
    """Its tokenizers take the backslash away even where brackets are no syntax; diffusers' keep it."""
    if case.tiny.reads_weights:
        pytest.skip("brackets are syntax")
    escaped = r"fox \(art\)"
    ours = case.ours.text_encoder.encode(escaped).tensors["context"]
    assert torch.equal(ours, case.ours.text_encoder.encode("fox (art)").tensors["context"])
    theirs = encoded(case.ours, escaped).tensors["context"]
    assert theirs.shape != ours.shape or not torch.equal(theirs, ours)


def encoded(model: Model, text: str) -> Conditioning:
    return replace(model.text_encoder, encoding=Encoding(lengths="diffusers")).encode(text)


@pytest.mark.slow_by_family
@pytest.mark.parametrize("guidance", [1.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_pictures_are_those_of_diffusers(case: Case, guidance: float) -> None:
    case.skip("pictures")
    if guidance != 1:
        case.skip("guided picture")
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
    arguments = {
        "latents": noise,
        "sigmas": sigmas[:-1].tolist(),
        "num_inference_steps": steps,
        "height": SIDE,
        "width": SIDE,
        "prompt": "a fox",
    }
    theirs = case.tiny.drawn(pipeline, arguments, guidance)
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1
    assert np.asarray(ours).std() > 1, "a picture, and no plain surface"


@pytest.mark.slow_by_family
def test_a_batch_is_its_samples_one_by_one(case: Case) -> None:
    model = case.ours
    family, denoiser = model.family, model.components.denoiser
    captions = [model.text_encoder.encode(text) for text in ("a fox", "a penguin on a pink background " * 12, "")]
    latents = models.seeded("latents", (3, *model.components.latent.shape(SIDE, 2 * SIDE)), seed=0)
    time = model.components.schedule.at(torch.tensor([0.2, 0.5, 0.9])).time
    with torch.no_grad():
        together = family.predict(denoiser, latents, time, family.join(captions))
        alone = [family.predict(denoiser, latents[i : i + 1], time[i : i + 1], one) for i, one in enumerate(captions)]
    assert together.shape == latents.shape
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.slow_by_family
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


def test_constants_are_those_of_the_published_code_whatever_the_weights_are(case: Case) -> None:
    """Rotary frequencies above all, in bf16 off by up to 0.4 %: the published code computes them in fp32."""
    published, components = case.tiny.parts(), case.ours.components
    for part, module in {"transformer": components.denoiser, **components.text_encoders}.items():
        theirs = dict(published[part].named_buffers())
        with placed(module, device=torch.device("cpu"), dtype=torch.bfloat16):
            constants = {name: one for name, one in module.named_buffers() if name not in module.state_dict()}
            for name in constants.keys() & theirs.keys():
                assert torch.equal(constants[name], theirs[name]), f"{part} {name}"
            assert [name for name, one in constants.items() if one.dtype in (torch.bfloat16, torch.float16)] == []


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
    expected = case.tiny.call(case.tiny.parts()["transformer"], latents, given, torch.tensor([0.6]))
    ours = predicted(case.ours)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow_by_family
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


@pytest.mark.slow_by_family
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


@pytest.mark.slow_by_family
def test_a_file_under_diffusers_names_is_the_same_denoiser(case: Case, tmp_path: Path) -> None:
    state = case.tiny.parts()["transformer"].state_dict()
    model = load_model(save(tmp_path / "diffusion_pytorch_model.safetensors", dict(state)))
    assert model.family is case.ours.family
    assert torch.equal(predicted(model), predicted(case.ours))
