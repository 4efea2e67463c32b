"""Stable Diffusion 1 and 2 from the original layout, held against what diffusers makes of the same files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from original_models import SD1, SD2, SMALLEST, TinyModel, openclip, save
from torch import Tensor

from lorasmith.core.errors import ModelError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.parts.clip import clip_tokenizer
from lorasmith.families.slots import Encoding

PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class Loaded:
    """One checkpoint, as we load it and as diffusers does."""

    ours: Model
    theirs: Any


@pytest.fixture(scope="module", params=[SD1, SD2], ids=["sd1", "sd2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    from diffusers import StableDiffusionPipeline

    tiny: TinyModel = request.param
    folder = tmp_path_factory.mktemp(f"sd{tiny.version}")
    file = save(folder / "tiny.safetensors", tiny.tensors())
    pipeline = StableDiffusionPipeline.from_single_file(
        str(file),
        config=str(tiny.diffusers_folder(folder / "config")),
        local_files_only=True,
        safety_checker=None,
        feature_extractor=None,
        tokenizer=None,
    )
    model = load_model(file)
    assert model.family.name == f"sd{tiny.version}"
    return Loaded(model, pipeline)


PARTS: dict[str, Callable[[Model], Any]] = {
    "unet": lambda model: model.components.denoiser,
    "vae": lambda model: model.components.vae,
    "text_encoder": lambda model: model.components.text_encoders["text_encoder"],
}


def test_every_tensor_is_the_one_that_diffusers_loads_frozen_and_in_eval_mode(loaded: Loaded) -> None:
    for part, get in PARTS.items():
        module, theirs = get(loaded.ours), getattr(loaded.theirs, part).state_dict()
        ours = module.state_dict()
        assert ours.keys() == theirs.keys()
        assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(child.training for child in module.modules())
        assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


@torch.no_grad()
def test_predictions_are_those_of_diffusers(loaded: Loaded) -> None:
    unet = loaded.theirs.unet
    latents, time = models.seeded("x", (2, 4, 8, 16), seed=0), torch.tensor([951.0, 123.0])
    context = models.seeded("context", (2, 8, unet.config.cross_attention_dim), seed=0)

    prediction = loaded.ours.denoiser.predict(latents, time, Conditioning({"context": context}))
    assert torch.equal(prediction, unet(latents, time, encoder_hidden_states=context).sample)


@torch.no_grad()
def test_pictures_go_through_the_autoencoder_as_in_diffusers(loaded: Loaded) -> None:
    vae = loaded.theirs.vae
    pixels = models.seeded("pixels", (1, 3, 32, 48), seed=0, std=0.5)
    latents = loaded.ours.autoencoder.encode(pixels)

    assert loaded.ours.components.latent.downscale == 4
    assert latents.shape == (1, 4, 8, 12)
    torch.testing.assert_close(latents, vae.encode(pixels).latent_dist.mean)
    torch.testing.assert_close(loaded.ours.autoencoder.decode(latents), vae.decode(latents).sample.clamp(-1, 1))
    scaled = loaded.ours.components.latent.to_model(latents)
    torch.testing.assert_close(scaled, latents * vae.config.scaling_factor)


@torch.no_grad()
def test_prompts_are_encoded_as_in_diffusers(loaded: Loaded) -> None:
    tokenizer = clip_tokenizer(pad_token="<|endoftext|>" if loaded.ours.family.name == "sd1" else "!")
    tokens = tokenizer("a red fox", padding="max_length", return_tensors="pt")
    expected = loaded.theirs.text_encoder(input_ids=tokens.input_ids)
    found = loaded.ours.text_encoder.encode("a red fox")

    torch.testing.assert_close(found.tensors["context"], expected.last_hidden_state)
    torch.testing.assert_close(found.tensors["pooled"], expected.pooler_output)
    assert found.text == "a red fox"


def test_the_pooled_vector_is_that_of_the_first_end_token(loaded: Loaded) -> None:
    """Neither padding with the end token nor text after it moves it."""
    encoder = loaded.ours.components.text_encoders["text_encoder"]
    tokens = torch.full((1, 77), 49407)
    tokens[0, :4] = torch.tensor([49406, 320, 736, 49407])
    with torch.no_grad():
        output = encoder(input_ids=tokens)

    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 3])


def test_skipping_a_layer_leaves_out_the_last_one_of_version_1_alone(loaded: Loaded) -> None:
    """Version 2 is loaded without its last layer, so "clip skip 2" is what it does anyway."""
    plain, skipped = (
        replace(loaded.ours.text_encoder, encoding=Encoding(skip_layers=n)).encode("a fox") for n in (0, 1)
    )

    same = torch.equal(plain.tensors["context"], skipped.tensors["context"])
    assert same == (loaded.ours.family.name == "sd2")


def test_names_say_what_each_family_calls_its_parts(loaded: Loaded) -> None:
    names = loaded.ours.names
    version = int(loaded.ours.family.name[-1])

    assert names.kohya_naming == "diffusers"
    assert names.peft_prefix == "unet"
    assert names.text_encoders["text_encoder"].comfyui[0] == ("clip_l" if version == 1 else "clip_h")
    assert len(names.paths("text_encoder")) == 2 * 6
    assert all(path.startswith("text_model.encoder.layers.") for path in names.paths("text_encoder"))
    # Projections are 1×1 convolutions in version 1 and matrices in version 2.
    assert names.weight_shapes["mid_block.attentions.0.proj_in"][2:] == ((1, 1) if version == 1 else ())
    assert names.weight_shapes["conv_in"][0] == 64


def test_the_denoiser_alone_takes_the_dtype_asked_for(tmp_path: Path) -> None:
    model = load_model(save(tmp_path / "m.safetensors", SD1.tensors()), dtype=torch.bfloat16)
    dtypes = {part: {p.dtype for p in get(model).parameters()} for part, get in PARTS.items()}

    assert dtypes == {"unet": {torch.bfloat16}, "vae": {torch.float32}, "text_encoder": {torch.float32}}


@pytest.mark.parametrize("prefix", [PREFIX, "diffusion_model.", "net.", "model.", ""])
def test_a_denoiser_alone_is_found_under_any_prefix(tmp_path: Path, prefix: str) -> None:
    tensors = {name.replace(PREFIX, prefix, 1): t for name, t in SMALLEST.unet_tensors().items()}
    model = load_model(save(tmp_path / "unet.safetensors", tensors))

    assert model.family.name == "sd1"
    assert torch.equal(model.components.denoiser.conv_in.weight, tensors[f"{prefix}input_blocks.0.0.weight"])
    assert model.title == "unet"


def test_a_denoiser_alone_says_what_it_cannot_do(tmp_path: Path) -> None:
    model = load_model(save(tmp_path / "unet.safetensors", SMALLEST.unet_tensors()))

    with pytest.raises(
        ModelError,
        match=r"^Stable Diffusion 1.x needs the text encoder clip_l, which this model came without",
    ):
        model.text_encoder.encode("a fox")
    with pytest.raises(ModelError, match=r"needs an autoencoder for pictures, which this model came without"):
        model.autoencoder.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ModelError, match=r"needs an autoencoder for pictures, which this model came without"):
        model.autoencoder.decode(torch.zeros(1, 4, 8, 8))


DEEP = TinyModel(2, models.UNetShape(64, (1, 1, 1, 1), 2, (True, True, True, False), context=1024, linear=True))
PROBE = f"{PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"


def with_bias(spread: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {PROBE: models.seeded("bias", (64,), seed=0, std=spread)}


@pytest.mark.parametrize(
    ("version", "change", "metadata", "expected"),
    [
        (2, with_bias(0.15), {}, "v"),
        (2, with_bias(0.05), {}, "epsilon"),
        (1, with_bias(0.15), {}, "epsilon"),
        (2, with_bias(0.15), {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        (2, with_bias(0.05), {"modelspec.prediction_type": "v"}, "v"),
        (1, with_bias(0.05), {"modelspec.prediction_type": "v"}, "v"),
        (1, lambda tensors: tensors | {"v_pred": torch.zeros(0)}, {}, "v"),
    ],
)
def test_v_prediction_is_recognised(
    tmp_path: Path, version: int, change: Callable[..., dict[str, Tensor]], metadata: dict[str, str], expected: str
) -> None:
    tiny = DEEP if version == 2 else TinyModel(1, replace(DEEP.unet, context=768, linear=False))
    model = load_model(save(tmp_path / "m.safetensors", change(tiny.unet_tensors()), metadata))

    assert model.components.parameterization == expected
    assert model.family.kohya_version(expected) == f"sd_v{version}" + ("_v" if expected == "v" else "")
    assert model.defaults.resolution == (768 if (version, expected) == (2, "v") else 512)


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "used"), [(24, 23), (23, 23), (3, 2)])
def test_the_last_openclip_layer_is_left_out_unless_it_is_gone_already(tmp_path: Path, stored: int, used: int) -> None:
    unet = TinyModel(2, models.UNetShape(32, (1,), 1, (True,), context=1024, linear=True)).unet_tensors()
    text = openclip(layers=stored, vocabulary=50)
    model = load_model(save(tmp_path / "m.safetensors", {**unet, **text}))
    layers = model.components.text_encoders["text_encoder"].state_dict()
    last = f"cond_stage_model.model.transformer.resblocks.{used - 1}.mlp.c_fc.weight"

    assert sum(name.endswith("mlp.fc1.weight") for name in layers) == used
    assert any(torch.equal(tensor, text[last]) for name, tensor in layers.items() if name.endswith("fc1.weight"))


def test_what_training_and_merging_left_in_a_file_is_passed_over(tmp_path: Path) -> None:
    extra = {
        "first_stage_model.loss.logvar": torch.zeros(1),
        "first_stage_model.model_ema.decay": torch.zeros(1),
        "cond_stage_model.transformer.text_projection.weight": torch.zeros(2, 2),
        "cond_stage_model.logit_scale": torch.zeros(1),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(1),
    }
    model = load_model(save(tmp_path / "m.safetensors", SD1.tensors() | extra))

    assert model.components.vae is not None
    assert "text_encoder" in model.components.text_encoders


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}input_blocks.1.1.proj_in.weight",
        f"{PREFIX}output_blocks.0.0.skip_connection.weight",
        "first_stage_model.encoder.down.0.block.0.conv2.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ],
)
def test_a_missing_tensor_is_a_sentence(tmp_path: Path, name: str) -> None:
    tensors = TinyModel(1, SMALLEST.unet).tensors()
    del tensors[name]
    with pytest.raises(ModelError, match=r"lacks |does not fit its architecture|this architecture lacks"):
        load_model(save(tmp_path / "m.safetensors", tensors))


def test_the_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = SMALLEST.unet_tensors()
    del tensors[f"{PREFIX}time_embed.2.bias"]
    with pytest.raises(
        ModelError, match=r"^the checkpoint lacks time_embed.2.bias; it is incomplete or was cut short$"
    ):
        load_model(save(tmp_path / "m.safetensors", tensors))


def test_a_left_over_tensor_is_named(tmp_path: Path) -> None:
    extra = {f"{PREFIX}label_emb.0.0.weight": torch.zeros(2, 2), f"{PREFIX}zero_convs.0.bias": torch.zeros(2)}
    with pytest.raises(ModelError) as caught:
        load_model(save(tmp_path / "m.safetensors", SMALLEST.unet_tensors() | extra))

    assert str(caught.value) == (
        "the checkpoint has 2 denoiser tensors that this architecture lacks, such as label_emb.0.0.weight; "
        "it is of an unsupported variant"
    )


@pytest.mark.parametrize("name", ["input_blocks.0.0.bias", "out.0.weight"])
def test_a_tensor_of_another_shape_is_a_sentence(tmp_path: Path, name: str) -> None:
    tensors = SMALLEST.unet_tensors() | {PREFIX + name: torch.zeros(7)}
    with pytest.raises(
        ModelError, match=r"m\.safetensors does not fit its architecture: .* got \(7,\); .* unsupported variant$"
    ):
        load_model(save(tmp_path / "m.safetensors", tensors))


def test_widths_that_norms_cannot_group_are_a_sentence(tmp_path: Path) -> None:
    tensors = TinyModel(1, models.UNetShape(48, (1,), 1, (True,))).unet_tensors()
    with pytest.raises(
        ModelError, match=r"m\.safetensors does not fit its architecture: num_channels .*must be divisible"
    ):
        load_model(save(tmp_path / "m.safetensors", tensors))
