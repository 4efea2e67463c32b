"""Wan's clips from a first or last frame: diffusers' own call, batches, files, and what of a clip a model is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import tiny_wan
import torch
from original_models import save
from safetensors.torch import load_file
from test_transformer_loras import assert_applied
from tiny_parts import TinyFamily
from torch import Tensor
from transformer_models import Case

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import DataError, ModelError, OptionError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.formats.lora_file import save_lora
from lorasmith.formats.names import matches
from lorasmith.formats.spelling import guessed_family
from lorasmith.training.lora_handle import Lora
from tests.covering import slow_except

TINY = {
    "wan2.2 i2v": tiny_wan.WAN_I2V,
    "wan2.1 i2v": tiny_wan.WAN21_I2V,
    "wan2.1 flf2v": tiny_wan.WAN21_FLF2V,
    "wan2.2 5b": tiny_wan.WAN_5B,
}
FRAMES, SIZE = 9, (32, 64)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    found = {}
    for name, one in TINY.items():
        folder = tmp_path_factory.mktemp("wan")
        found[name] = {**one.saved(folder), "image_encoder": tiny_wan.save_clip_vision(folder)}
    return found


def loaded(files: Mapping[str, Path], **other: str) -> Model:
    encoders = [files["text_encoder"], files["image_encoder"]]
    sees = "2.1" in files["transformer"].name
    return load_model(files["transformer"], text_encoders=encoders if sees else encoders[:1], vae=files["vae"], **other)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=slow_except(TINY, "wan2.1 i2v", "wan2.2 5b"))
def case(request: pytest.FixtureRequest, files: dict[str, dict[str, Path]]) -> tuple[TinyFamily, Model]:
    other = {"edit": "i2v"} if request.param == "wan2.2 5b" else {}
    return TINY[request.param], loaded(files[request.param], **other)


def clip(seed: int = 0) -> Tensor:
    return models.seeded(f"clip {seed}", (1, 3, FRAMES, *SIZE), seed=0, std=0.4).clamp(-1, 1)


def given(model: Model, batch: int = 2) -> Conditioning:
    """Prompts of a batch, each with the frames of a clip of its own."""
    with model.encodes_pictures(torch.device("cpu")):
        beside = [model.picture_inputs(clip(index)) for index in range(batch)]
    prompts = [Conditioning({"context": models.seeded(f"context {i}", (1, 512, 32), seed=0)}) for i in range(batch)]
    return model.family.join([one.with_pictures(tensors) for one, tensors in zip(prompts, beside, strict=True)])


def noisy(model: Model, batch: int = 2) -> Tensor:
    return models.seeded("latents", (batch, *model.components.latent.shape(*SIZE, FRAMES)), seed=0)


TIMES = torch.tensor([600.0, 998.5])


@torch.no_grad()
def test_predictions_are_those_of_diffusers_own_call(case: tuple[TinyFamily, Model]) -> None:
    tiny, model = case
    latents, conditioning, network = noisy(model), given(model), tiny.parts()["transformer"]
    ours = model.denoiser.predict(latents, TIMES, conditioning)
    tensors = conditioning.tensors
    if "first_frame" in tensors:
        first = tensors["first_frame"]
        tokens = latents[0, 0].numel() // 4
        by_token = TIMES[:, None].repeat(1, tokens)
        by_token[:, : tokens // latents.shape[2]] = 0
        theirs = network(torch.cat((first, latents[:, :, 1:]), 2), by_token, tensors["context"]).sample
        torch.testing.assert_close(ours[:, :, 1:], theirs[:, :, 1:], rtol=1e-5, atol=1e-5)
        clean = latents - TIMES.view(-1, 1, 1, 1, 1) / 1000 * ours
        torch.testing.assert_close(clean[:, :, :1], first, rtol=1e-4, atol=1e-5)
        return
    states = tensors.get("clip_vision")
    if states is not None and states.shape[1] == 514:  # diffusers has both pictures in the batch
        states = states.reshape(4, 257, 80)
    theirs = network(
        torch.cat((latents, tensors["known"]), 1), TIMES, tensors["context"], encoder_hidden_states_image=states
    ).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    without = model.denoiser.predict(latents, TIMES, given_nothing(model, conditioning))
    assert (without - ours).norm() > 0.01 * ours.norm(), "frames count"


def given_nothing(model: Model, conditioning: Conditioning) -> Conditioning:
    return Conditioning({name: one for name, one in conditioning.tensors.items() if name != "known"})


@pytest.mark.slow_after(1)
@torch.no_grad()
def test_prompts_of_other_lengths_share_a_batch(case: tuple[TinyFamily, Model]) -> None:
    """512 rows always where the network finds the text behind a picture by its length."""
    _, model = case
    texts = ["a fox", "the quick brown fox " * 45]
    beside = given(model).pictures
    encoded = [
        one.with_pictures({name: tensor[i : i + 1] for name, tensor in beside.items()})
        for i, one in enumerate(map(model.text_encoder.encode, texts))
    ]
    assert encoded[1].tensors["context"].shape[1] > 512
    latents = noisy(model)
    together = model.denoiser.predict(latents, TIMES, model.family.join(encoded))
    alone = [model.denoiser.predict(latents[i : i + 1], TIMES[i : i + 1], one) for i, one in enumerate(encoded)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    if "clip_vision" in beside:
        cut = Conditioning({**encoded[0].tensors, "context": encoded[0].tensors["context"][:, :10]})
        cut_prediction = model.denoiser.predict(latents[:1], TIMES[:1], cut)
        torch.testing.assert_close(cut_prediction, alone[0], rtol=1e-5, atol=1e-5)


def test_what_a_model_is_given_of_a_clip(case: tuple[TinyFamily, Model]) -> None:
    """Its first or also last frame, as latents of a clip that is grey otherwise, behind the mask of frames."""
    _, model = case
    form, latent = model.control_form, model.components.latent
    assert form is not None
    pixels = clip()
    with model.encodes_pictures(torch.device("cpu")):
        found, alone = model.picture_inputs(pixels), model.autoencoder.encode(pixels[:, :, :1])
    alone = latent.to_model(alone)
    if form.name == "i2v":
        assert found.keys() == {"first_frame"}
        whole = latent.to_model(model.autoencoder.encode(pixels))
        torch.testing.assert_close(found["first_frame"], whole[:, :, :1], rtol=1e-4, atol=1e-5)
        return
    known = found["known"]
    assert known.shape == (1, 20, *latent.shape(*SIZE, FRAMES)[1:])
    times = [[1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 1.0 if "last" in form.source else 0]]
    assert known[0, :4, :, 0, 0].tolist() == times and (known[:, :4].amin((3, 4)) == known[:, :4].amax((3, 4))).all()
    torch.testing.assert_close(known[:, 4:, :1], alone, rtol=1e-4, atol=1e-5)
    other = model.picture_inputs(torch.cat((pixels[:, :, :1], clip(1)[:, :, 1:]), 2))
    assert torch.equal(other["known"], known) == (form.source == "first frame")
    with_vision = model.components.image_encoder is not None
    assert ("clip_vision" in found) == with_vision
    if with_vision:
        assert found["clip_vision"].shape == (1, 514 if "last" in form.source else 257, 80)
    assert model.picture_inputs(pixels[:, :, :1]) == {}


def test_variants_are_told_by_their_tensors(files: dict[str, dict[str, Path]]) -> None:
    sources = {name: loaded(one).control_form.source for name, one in files.items()}
    assert sources == {
        "wan2.2 i2v": "first frame",
        "wan2.1 i2v": "first frame",
        "wan2.1 flf2v": "first and last frame",
        "wan2.2 5b": "files",
    }
    of = files["wan2.2 i2v"]
    assert loaded(of, edit="flf2v").control_form.source == "first and last frame"
    assert loaded(files["wan2.1 flf2v"], edit="none").control_form.source == "first frame"
    assert loaded(files["wan2.2 5b"], edit="i2v").control_form.source == "first frame"
    assert loaded(files["wan2.2 5b"]).control_form.need == "none", "although its name has i2v in ti2v"
    with pytest.raises(OptionError, match=r"^edit must be one of i2v, none for wan2\.2_ti2v"):
        loaded(files["wan2.2 5b"], edit="flf2v")


@pytest.mark.parametrize("name", ["Wan2.1-Fun-14B-InP", "wan2.2_fun_inpaint_high_noise_14B"])
def test_fun_inpainting_is_refused_by_its_name(name: str, files: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(files["wan2.2 i2v"]["transformer"].read_bytes())
    with pytest.raises(ModelError, match=rf"{name}\.safetensors must be Wan's image to video, but is Fun inpainting"):
        load_model(path)


def test_an_image_encoder_of_another_size_is_refused(files: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    of = files["wan2.1 i2v"]
    tensors = load_file(of["image_encoder"])
    wide = {**tensors, "vision_model.embeddings.position_embedding.weight": torch.zeros(577, 80)}
    with pytest.raises(
        ModelError, match=r"of pictures of 224×224 px, but has 577 positions for patches of 14 px; give"
    ):
        load_model(of["transformer"], text_encoders=[save(tmp_path / "336.safetensors", wide)])
    from transformers import CLIPVisionConfig, CLIPVisionModel

    other = CLIPVisionModel(CLIPVisionConfig(**{**tiny_wan.CLIP_VISION_SIZES, "hidden_size": 96}))
    named = {f"vision_model.{name}": one for name, one in other.state_dict().items()}
    path = save(tmp_path / "clip_vision_g.safetensors", named)
    with pytest.raises(ModelError, match=r"is the image encoder clip_vision_h of width 96, .* needs one of width 80"):
        load_model(of["transformer"], text_encoders=[path])
    with pytest.raises(ModelError, match=r"is the image encoder clip_vision_h, but Wan image to video has umt5xxl"):
        load_model(files["wan2.2 i2v"]["transformer"], text_encoders=[path])


def test_without_its_image_encoder_the_file_to_get_is_named(files: dict[str, dict[str, Path]]) -> None:
    of = files["wan2.1 i2v"]
    model = load_model(of["transformer"], text_encoders=[of["text_encoder"]], vae=of["vae"])
    with (
        pytest.raises(
            ModelError, match=r"^Wan image to video needs the image encoder clip_vision_h, .*clip_vision_h\."
        ),
        model.encodes_pictures(),
    ):
        pass


def test_known_frames_of_another_size_are_refused(files: dict[str, dict[str, Path]]) -> None:
    model = loaded(files["wan2.2 5b"], edit="i2v")
    conditioning = given(model, 1)
    with pytest.raises(DataError, match=r"^first_frame of a conditioning must have .* 1×2×2, got 1×2×4; encode"):
        model.denoiser.predict(torch.zeros(1, 48, 3, 2, 2), TIMES[:1], conditioning)


def lora_on(model: Model, paths: Sequence[str]) -> AdapterState:
    shapes = model.names.weight_shapes
    return AdapterState(
        {
            ModuleRef(DENOISER, path): AdapterWeights(
                "lora", {"down": torch.ones(1, shapes[path][1]), "up": torch.ones(shapes[path][0], 1)}
            )
            for path in paths
        }
    )


ATTENTION = ["blocks.0.attn1.to_q", "blocks.1.attn2.to_v", "blocks.0.ffn.net.2"]
OF_PICTURES = ["blocks.0.attn2.add_k_proj", "condition_embedder.image_embedder.ff.net.0.proj"]


@pytest.mark.parametrize("layout", ["ai-toolkit", "kohya", "diffusers"])
def test_loras_of_text_and_of_picture_models_load_on_each_other(
    files: dict[str, dict[str, Path]], layout: str, tmp_path: Path
) -> None:
    """By names that musubi-tuner, ComfyUI and diffusers have; what a model has no layer for is named."""
    i2v, a14b = loaded(files["wan2.1 i2v"]), loaded(files["wan2.2 i2v"])
    t2v = tiny_wan.WAN.loaded(tiny_wan.WAN.saved(tmp_path))
    save_options: dict[str, Any] = {"layout": layout, "dtype": torch.float32, "metadata": {}}
    save_lora(tmp_path / "t2v.safetensors", lora_on(t2v, ATTENTION), t2v.names, **save_options)
    for model in (i2v, a14b):
        state = Lora.load(tmp_path / "t2v.safetensors", model).state
        assert {one.path for one in state.adapters} == set(ATTENTION) and not state.unknown
    both = [*ATTENTION, *OF_PICTURES]
    save_lora(tmp_path / "i2v.safetensors", lora_on(i2v, both), i2v.names, **save_options)
    keys = load_file(tmp_path / "i2v.safetensors")
    assert guessed_family({name: tuple(one.shape) for name, one in keys.items()}) == "Wan image to video"
    theirs = {"ai-toolkit": "cross_attn.k_img.", "kohya": "cross_attn_k_img.", "diffusers": "attn2.add_k_proj."}[layout]
    assert any(theirs in name for name in keys)
    state = Lora.load(tmp_path / "i2v.safetensors", i2v).state
    assert {one.path for one in state.adapters} == set(both) and not state.unknown
    for model in (t2v, a14b):
        state = Lora.load(tmp_path / "i2v.safetensors", model).state
        assert {one.path for one in state.adapters} == set(ATTENTION)
        assert {name.rpartition(".lora")[0] for name in state.unknown} and all(
            "img" in name or "add_k" in name or "image_embedder" in name for name in state.unknown
        )


def test_default_targets_are_those_of_text_to_video(files: dict[str, dict[str, Path]]) -> None:
    model = loaded(files["wan2.1 i2v"])
    chosen = [path for path in model.names.weight_shapes if matches(path, model.family.presets["attention+ff"].include)]
    assert len(chosen) == 2 * 10 and not any("add_" in path for path in chosen)


def test_a_diffusers_folder_is_the_same_model(
    case: tuple[TinyFamily, Model], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Those of WanImageToVideoPipeline, with `expand_timesteps` for 5B, and of two experts."""
    import diffusers

    tiny, model = case
    parts = {**tiny.parts(), "image_encoder": tiny_wan.clip_vision()}
    if "clip_vision" not in model.family.conditioning_shapes(model.components.denoiser):
        parts["image_encoder"] = None
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False)
    two = {"transformer_2": parts["transformer"], "boundary_ratio": 0.9} if parts["image_encoder"] is None else {}
    if "expand_timesteps" in parts:
        two = {}
    pipeline = diffusers.WanImageToVideoPipeline(scheduler=scheduler, image_processor=None, **parts, **two)
    edit = "i2v" if "expand_timesteps" in parts else None
    pipeline.save_pretrained(tmp_path / "folder")
    for ours in (load_model(tmp_path / "folder", edit=edit), load_model(pipeline, edit=edit)):
        assert ours.family is model.family and ours.control_form.source == model.control_form.source
        assert (ours.named_expert is not None) == bool(two)
        for name, part in model.components.modules().items():
            state = ours.components.modules()[name].state_dict()
            assert all(torch.equal(state[key], tensor) for key, tensor in part.state_dict().items()), name


@pytest.mark.parametrize("layout", ["portable", "diffusers"])
def test_layers_on_pictures_are_applied_by_diffusers(
    files: dict[str, dict[str, Path]], layout: str, tmp_path: Path
) -> None:
    model = loaded(files["wan2.1 i2v"])
    linear = [
        path for path, shape in model.names.weight_shapes.items() if len(shape) == 2 and path.startswith("blocks.")
    ]
    assert any("add_k_proj" in path for path in linear)
    path = tmp_path / "lora.safetensors"
    save_lora(path, lora_on(model, linear), model.names, layout=layout, dtype=torch.float32, metadata={})
    assert_applied(Case("wan-i2v", tiny_wan.WAN21_I2V, files["wan2.1 i2v"], model), path)
