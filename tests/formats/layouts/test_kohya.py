from __future__ import annotations

import re

import pytest
import torch

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.formats.layouts.kohya import KohyaLayout
from lorasmith.formats.layouts.layout import sentences

LAYOUT = KohyaLayout()
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K, TO_V = TO_Q.replace("to_q", "to_k"), TO_Q.replace("to_q", "to_v")
FLAT_TO_Q = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def bases(tensors) -> set[str]:
    return {key.split(".")[0] for key in tensors}


def test_names_of_stable_diffusion_1(unet_names, make_state) -> None:
    tensors = LAYOUT.write(make_state(unet_names), unet_names)
    assert f"lora_unet_{FLAT_TO_Q}.lora_down.weight" in tensors
    assert all(re.fullmatch(r"lora_unet_\w+\.(lora_(down|up)\.weight|alpha)", key) for key in tensors)
    assert len(tensors) == 3 * len([shape for shape in unet_names.weight_shapes.values() if len(shape) > 1])
    assert tensors["lora_unet_conv_in.lora_down.weight"].shape == (4, 4, 3, 3)
    assert tensors["lora_unet_conv_in.lora_up.weight"].shape == (32, 4, 1, 1)
    assert tensors["lora_unet_conv_in.alpha"].shape == ()


def test_names_of_sdxl(sdxl_names, make_state) -> None:
    state = make_state(sdxl_names, [TO_Q, "up_blocks.0.upsamplers.0.conv"])
    assert bases(LAYOUT.write(state, sdxl_names)) == {
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_output_blocks_1_1_conv",
    }


def test_fused_names_of_transformers(flux_names, make_state) -> None:
    tensors = LAYOUT.write(make_state(flux_names, rank=2), flux_names)
    assert bases(tensors) == {
        *(f"lora_unet_double_blocks_{i}_img_attn_{part}" for i in range(2) for part in ("qkv", "proj")),
        *(f"lora_unet_single_blocks_{i}_linear{part}" for i in range(2) for part in (1, 2)),
        "lora_unet_final_layer_adaLN_modulation_1",
    }
    assert tensors["lora_unet_single_blocks_1_linear1.lora_down.weight"].shape[0] == 4 * 2
    assert float(tensors["lora_unet_single_blocks_1_linear1.alpha"]) == 4 * 2.0


def test_what_cannot_be_fused_keeps_diffusers_names(flux_names, make_state) -> None:
    paths = [f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_out.0")]
    tensors = LAYOUT.write(make_state(flux_names, paths, algorithm="lokr"), flux_names)
    assert bases(tensors) == {
        "lycoris_transformer_blocks_0_attn_to_q",
        "lycoris_transformer_blocks_0_attn_to_k",
        "lora_unet_double_blocks_0_img_attn_proj",
    }
    assert LAYOUT.read(tensors, {}, flux_names).adapters.keys() == {ModuleRef(DENOISER, path) for path in paths}


def test_text_encoders_have_a_number_where_there_are_several(unet_names, sdxl_names, make_adapter) -> None:
    path = "text_model.encoder.layers.1.self_attn.q_proj"
    flat = "text_model_encoder_layers_1_self_attn_q_proj"
    adapter = make_adapter((8, 4), "lora", 2, 1.0, torch.Generator().manual_seed(0))
    one = AdapterState({ModuleRef("text_encoder", path): adapter})
    assert bases(LAYOUT.write(one, unet_names)) == {f"lora_te_{flat}"}
    two = AdapterState({ModuleRef(name, path): adapter for name in ("text_encoder", "text_encoder_2")})
    written = LAYOUT.write(two, sdxl_names)
    assert bases(written) == {f"lora_te1_{flat}", f"lora_te2_{flat}"}
    assert LAYOUT.read(written, {}, sdxl_names).adapters.keys() == two.adapters.keys()
    assert len(LAYOUT.read(written, {}, unet_names).adapters) == 1


def test_reads_other_programs_names(unet_names, make_state) -> None:
    tensors = LAYOUT.write(make_state(unet_names, [TO_Q]), unet_names)
    for base in (
        f"lycoris_{FLAT_TO_Q}",
        f"lora_transformer_{FLAT_TO_Q}",
        f"oft_unet_{FLAT_TO_Q}",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
    ):
        renamed = {base + key[key.index(".") :]: tensor for key, tensor in tensors.items()}
        state = LAYOUT.read(renamed, {}, unet_names)
        assert state.adapters.keys() == {ModuleRef(DENOISER, TO_Q)}
        assert not state.unknown


def test_a_text_encoder_without_its_model_prefix_is_read(unet_names) -> None:
    base = "lora_te1_encoder_layers_0_mlp_fc1"
    tensors = {f"{base}.lora_down.weight": torch.ones(2, 4), f"{base}.lora_up.weight": torch.ones(8, 2)}
    state = LAYOUT.read(tensors, {}, unet_names)
    assert state.adapters.keys() == {ModuleRef("text_encoder", "text_model.encoder.layers.0.mlp.fc1")}
    assert next(iter(state.adapters.values())).alpha is None


def test_kohyas_split_qkv_is_cut_to_its_own_ranks(flux_names, make_state) -> None:
    state = make_state(flux_names, [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"], rank=3, alpha=1.5)
    tensors = LAYOUT.write(state, flux_names)
    base = "lora_unet_double_blocks_0_img_attn_qkv"
    up = tensors[f"{base}.lora_up.weight"]
    assert up.shape == (72, 9)
    assert int((up != 0).sum()) == 3 * 24 * 3
    assert float(tensors[f"{base}.alpha"]) == 4.5
    again = LAYOUT.read(tensors, {}, flux_names)
    assert {weights.tensors["down"].shape[0] for weights in again.adapters.values()} == {3}
    assert {weights.alpha for weights in again.adapters.values()} == {1.5}


def test_differences_of_norms_have_lycoris_names(unet_names) -> None:
    ref = ModuleRef(DENOISER, "conv_norm_out")
    state = AdapterState(differences={ref: {"weight": torch.ones(32), "bias": torch.ones(32)}})
    tensors = LAYOUT.write(state, unet_names)
    assert tensors.keys() == {"lora_unet_conv_norm_out.w_norm", "lora_unet_conv_norm_out.b_norm"}
    assert LAYOUT.read(tensors, {}, unet_names).differences.keys() == {ref}


def test_rotations_are_bounded_in_the_file_as_lycoris_and_comfyui_both_read_it(unet_names, make_state) -> None:
    state = make_state(unet_names, [TO_Q], algorithm="oft", rank=4, alpha=0.5)
    blocks = state.adapters[ModuleRef(DENOISER, TO_Q)].tensors["oft_blocks"]
    tensors = LAYOUT.write(state, unet_names)
    assert float(tensors[f"lora_unet_{FLAT_TO_Q}.alpha"]) == 0
    written = tensors[f"lora_unet_{FLAT_TO_Q}.oft_blocks"]
    length = float((blocks - blocks.mT).norm())
    assert length > 0.5
    torch.testing.assert_close(written, blocks * 0.5 / length)
    tensors[f"lora_unet_{FLAT_TO_Q}.alpha"] = torch.tensor(0.25)
    assert LAYOUT.read(tensors, {}, unet_names).adapters[ModuleRef(DENOISER, TO_Q)].alpha == 0.25 * 32


def test_what_cannot_be_fused_is_said(flux_names, make_state, make_adapter) -> None:
    attention = [f"transformer_blocks.0.attn.to_{part}" for part in ("q", "k", "v", "out.0")]
    assert not LAYOUT.losses(make_state(flux_names, attention), flux_names)
    assert not LAYOUT.losses(make_state(flux_names, attention, algorithm="oft", rank=4, alpha=0.0), flux_names)
    losses = LAYOUT.losses(make_state(flux_names, attention, algorithm="lokr"), flux_names)
    assert [loss.module.path for loss in losses] == attention[:3]
    assert not any(loss.left_out for loss in losses)
    assert sentences(losses)[0].startswith(f"3 modules, such as {attention[0]}: q, k, v cannot be fused")


@pytest.mark.parametrize("algorithm", ["oft", "boft"])
def test_bounds_outlast_a_file_that_has_none_in_its_tensors(unet_names, make_state, algorithm: str) -> None:
    """A run that goes on from a file must not turn further than the one that began it was allowed to."""
    state = make_state(unet_names, [TO_Q, TO_K], algorithm=algorithm, rank=4, alpha=0.5)
    free = make_state(unet_names, [TO_V], algorithm=algorithm, rank=4, alpha=0.0)
    state.adapters.update(free.adapters)
    tensors, header = LAYOUT.write(state, unet_names), LAYOUT.header(state, unet_names)
    again = LAYOUT.read(tensors, header, unet_names)
    bounds = {ref.path: weights.alpha for ref, weights in again.adapters.items()}
    assert bounds == {TO_Q: pytest.approx(0.5), TO_K: pytest.approx(0.5), TO_V: 0.0}
    # What was written already keeps to the bound, so that the second file says the same as the first.
    twice = LAYOUT.write(again, unet_names)
    assert all(torch.allclose(tensor, twice[key], rtol=1e-6) for key, tensor in tensors.items())
    assert "oft_bounds" not in str(LAYOUT.header(free, unet_names))


def test_malformed_bounds_are_refused_in_a_sentence(unet_names, make_state) -> None:
    for text in ["no JSON", "[1]", '{"a": "b"}', '{"a": [1]}', '{"a": NaN}', '{"a": 1e30}', "[" * 50_000]:
        tensors = LAYOUT.write(make_state(unet_names, [TO_Q], algorithm="oft", alpha=0.0), unet_names)
        with pytest.raises(LoraError, match="must give a number for each module path, got"):
            LAYOUT.read(tensors, {"lorasmith.oft_bounds": text}, unet_names)
