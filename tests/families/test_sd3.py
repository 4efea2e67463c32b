"""Stable Diffusion 3 and 3.5: variants, encoders that are missing, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import family_cases
import models
import pytest
import torch
from original_models import save
from tiny_parts import original_tensors, randomized
from tiny_sd3 import SD3
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import DataError, ModelError
from lorasmith.core.folders import Folders
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.slots import Encoding, TextEncoders
from lorasmith.formats.lora_file import PORTABLE, layout_for, save_lora
from lorasmith.training.lora_handle import Lora
from tests.covering import slow_except
from tests.families.test_comfyui_families import GOLDEN, assert_same
from tests.nodes.conftest import Bench


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return SD3.saved(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def model(files: dict[str, Path]) -> Model:
    return SD3.loaded(files)


@torch.no_grad()
def predicted(model: Model, side: int = 8) -> Tensor:
    shapes = model.family.conditioning_shapes(model.components.denoiser)
    prompt = Conditioning({name: models.seeded(name, shape, seed=0) for name, shape in shapes.items()})
    latents = models.seeded("latents", (1, 16, side, side), seed=0)
    return model.denoiser.predict(latents, torch.tensor([600.0]), prompt)


def test_the_networks_time_goes_to_1000(model: Model) -> None:
    level = model.components.schedule.at_sigma(torch.tensor([0.25]))
    assert (level.sigma.item(), level.time.item()) == (0.25, 250.0)


def test_the_first_version_has_no_norms_and_one_attention(tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    config = {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "pos_embed_max_size": 12}
    theirs = randomized(SD3Transformer2DModel(**config, joint_attention_dim=64, pooled_projection_dim=64))
    ours = load_model(save(tmp_path / "sd3_medium.safetensors", original_tensors("sd3", theirs)))
    assert ours.components.denoiser.config.qk_norm is None
    shapes = ours.family.conditioning_shapes(ours.components.denoiser)
    given = {name: models.seeded(name, shape, seed=0) for name, shape in shapes.items()}
    latents = models.seeded("latents", (1, 16, 8, 8), seed=0)
    with torch.no_grad():
        expected = theirs(latents, given["context"], given["pooled"], torch.tensor([600.0])).sample
    torch.testing.assert_close(predicted(ours), expected, rtol=1e-5, atol=1e-5)


def test_one_encoder_is_enough_and_none_is_too_few(model: Model) -> None:
    encoder = model.text_encoder
    one = replace(
        encoder,
        encoders=replace(encoder.encoders, modules={"text_encoder_3": encoder.encoders.modules["text_encoder_3"]}),
    )
    encoded = one.encode("a fox").tensors
    whole = encoder.encode("a fox").tensors
    torch.testing.assert_close(encoded["context"], whole["context"][:, 77:])
    assert not encoded["pooled"].any()
    model.family.check_encoders(one.encoders)
    with pytest.raises(
        ModelError, match=r"Stable Diffusion 3\.5 needs the text encoder clip_l, .* clip_l\.safetensors"
    ):
        model.family.check_encoders(TextEncoders())
    with pytest.raises(ModelError, match=r"needs the text encoder clip_l"):
        replace(encoder, encoders=TextEncoders()).encode("a fox")


def test_without_t5_diffusers_has_zeros_in_its_place(model: Model) -> None:
    encoder = replace(model.text_encoder, encoding=Encoding(lengths="diffusers"))
    clips = {name: one for name, one in encoder.encoders.modules.items() if name != "text_encoder_3"}
    context = replace(encoder, encoders=replace(encoder.encoders, modules=clips)).encode("a fox").tensors["context"]
    assert context.shape == (1, 77 + 256, 4096)
    assert context[:, :77].any() and not context[:, 77:].any()


def test_pictures_beyond_the_table_of_positions_are_refused(model: Model) -> None:
    with pytest.raises(DataError, match=r"positions for pictures of up to 384 pixels a side, got 400×400; choose"):
        predicted(model, 50)


def test_what_diffusers_layout_cannot_hold_is_saved_portably_in_kohyas(model: Model, tmp_path: Path) -> None:
    path = "transformer_blocks.0.attn.to_out.0"
    size = model.names.weight_shapes[path]
    down, up = (models.seeded(name, shape, seed=0) for name, shape in (("d", (2, size[1])), ("u", (size[0], 2))))
    lora = AdapterState({ModuleRef(DENOISER, path): AdapterWeights("lora", {"down": down, "up": up}, 2.0)})
    with_bias = replace(lora, differences={ModuleRef(DENOISER, path): {"bias": torch.ones(size[0])}})
    assert [layout_for(PORTABLE, model.names, one).name for one in (lora, with_bias)] == ["diffusers", "kohya"]
    save_lora(tmp_path / "lora.safetensors", with_bias, model.names)
    assert Lora.load(tmp_path / "lora.safetensors", model).state.differences.keys() == with_bias.differences.keys()


RECORDED = GOLDEN["families"]["sd3"]["subsets"]


@pytest.mark.parametrize("kinds", slow_except(family_cases.SUBSETS, "clip_l clip_g"))
def test_some_encoders_alone_give_comfyuis_conditioning(model: Model, kinds: str) -> None:
    encoder, slots = model.text_encoder, model.family.text_encoders
    chosen = {name: one for name, one in encoder.encoders.modules.items() if slots[name].kind in kinds.split()}
    ours = replace(encoder, encoders=replace(encoder.encoders, modules=chosen)).encode("a fox").tensors
    for key, tensor in ours.items():
        assert_same(key, tensor, RECORDED[kinds][key])


@pytest.mark.parametrize("kinds", slow_except(family_cases.EMPTIED, ""))
def test_empty_prompts_are_left_out_as_by_comfyuis_node(model: Model, kinds: str, tmp_path: Path) -> None:
    texts = {slot.kind: "a fox" if slot.kind in kinds.split() else "" for slot in model.family.text_encoders.values()}
    (given,) = Bench(Folders(tmp_path)).one("CLIPTextEncodeSD3", clip=model.text_encoder, **texts, empty_padding="none")
    for key, tensor in given.tensors.items():
        assert_same(key, tensor, RECORDED[f"texts {kinds}"][key])
