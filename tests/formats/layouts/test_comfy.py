from __future__ import annotations

import torch

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.formats.acceptance import shortfalls
from lorasmith.formats.layouts.comfy import ComfyLayout

LAYOUT = ComfyLayout()
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
ORIGINAL_TO_Q = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"


def test_writes_what_comfyuis_trainer_writes(unet_names, make_state) -> None:
    state = make_state(unet_names, [TO_Q, "conv_in"], rank=2, alpha=1.0, dtype=torch.bfloat16)
    state.differences[ModuleRef(DENOISER, "conv_norm_out")] = {"weight": torch.ones(32), "bias": torch.ones(32)}
    state.differences[ModuleRef(DENOISER, "conv_in")] = {"bias": torch.ones(32)}
    tensors = LAYOUT.write(state, unet_names)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"diffusion_model.{ORIGINAL_TO_Q}.lora_down.weight": (2, 32),
        f"diffusion_model.{ORIGINAL_TO_Q}.lora_up.weight": (32, 2),
        f"diffusion_model.{ORIGINAL_TO_Q}.alpha": (),
        "diffusion_model.input_blocks.0.0.lora_down.weight": (2, 4 * 3 * 3),
        "diffusion_model.input_blocks.0.0.lora_up.weight": (32, 2),
        "diffusion_model.input_blocks.0.0.alpha": (),
        "diffusion_model.input_blocks.0.0.diff_b": (32,),
        "diffusion_model.out.0.diff": (32,),
        "diffusion_model.out.0.diff_b": (32,),
    }
    assert {tensor.dtype for key, tensor in tensors.items() if "diff" not in key.split(".")[-1]} == {torch.bfloat16}


def test_flattened_convolutions_get_their_kernel_back(unet_names, make_state, delta) -> None:
    state = make_state(unet_names)
    again = LAYOUT.read(LAYOUT.write(state, unet_names), {}, unet_names)
    down = again.adapters[ModuleRef(DENOISER, "conv_in")].tensors["down"]
    assert torch.equal(down, state.adapters[ModuleRef(DENOISER, "conv_in")].tensors["down"])
    assert down.shape == (4, 4, 3, 3)


def test_tuckers_core_keeps_its_kernel(unet_names, make_adapter) -> None:
    adapter = make_adapter((32, 4, 3, 3), "lora", 2, 1.0, torch.Generator().manual_seed(0), variant="tucker")
    state = AdapterState({ModuleRef(DENOISER, "conv_in"): adapter})
    tensors = LAYOUT.write(state, unet_names)
    assert tensors["diffusion_model.input_blocks.0.0.lora_mid.weight"].shape == (2, 2, 3, 3)
    assert tensors["diffusion_model.input_blocks.0.0.lora_down.weight"].shape == (2, 4, 1, 1)


def test_reads_diffusers_names_and_the_checkpoints_prefix(unet_names, make_state) -> None:
    tensors = LAYOUT.write(make_state(unet_names, [TO_Q]), unet_names)
    for base in (f"diffusion_model.{TO_Q}", f"model.diffusion_model.{ORIGINAL_TO_Q}"):
        renamed = {key.replace(f"diffusion_model.{ORIGINAL_TO_Q}", base): t for key, t in tensors.items()}
        assert LAYOUT.read(renamed, {}, unet_names).adapters.keys() == {ModuleRef(DENOISER, TO_Q)}


def test_text_encoders_go_by_what_they_are(unet_names, sdxl_names, make_adapter) -> None:
    path = "text_model.encoder.layers.1.mlp.fc2"
    adapter = make_adapter((8, 4), "lora", 2, 1.0, torch.Generator().manual_seed(0))
    state = AdapterState({ModuleRef(name, path): adapter for name in ("text_encoder", "text_encoder_2")})
    tensors = LAYOUT.write(state, sdxl_names)
    prefixes = {key.split(".text_model")[0] for key in tensors}
    assert prefixes == {"text_encoders.clip_l.transformer", "text_encoders.clip_g.transformer"}
    assert LAYOUT.read(tensors, {}, sdxl_names).adapters.keys() == state.adapters.keys()
    as_clip_h = {key.replace("clip_l", "clip_h"): t for key, t in tensors.items() if "clip_l" in key}
    assert LAYOUT.read(as_clip_h, {}, unet_names).adapters.keys() == {ModuleRef("text_encoder", path)}


def test_what_cannot_be_fused_goes_by_a_name_comfyui_reads(flux_names, make_state) -> None:
    paths = [f"transformer_blocks.0.attn.to_{part}" for part in "qk"]
    tensors = LAYOUT.write(make_state(flux_names, paths, algorithm="lokr"), flux_names)
    assert {key.rsplit(".", 1)[0] for key in tensors} == {f"transformer.{path}" for path in paths}


def test_a_lokr_with_a_core_is_written_without(unet_names) -> None:
    ref = ModuleRef(DENOISER, "down_blocks.0.resnets.0.conv1")
    generator = torch.Generator().manual_seed(0)
    sizes = {"lokr_w1": (4, 4), "lokr_w2_a": (2, 8), "lokr_w2_b": (2, 8), "lokr_t2": (2, 2, 3, 3)}
    tensors = {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
    written = LAYOUT.write(AdapterState({ref: AdapterWeights("lokr", tensors, 3.0)}), unet_names)
    second = written["diffusion_model.input_blocks.1.0.in_layers.2.lokr_w2"]
    assert second.is_contiguous()
    for row, column in ((0, 0), (5, 2)):
        expected = sum(
            1.5 * tensors["lokr_t2"][i, j] * tensors["lokr_w2_a"][i, row] * tensors["lokr_w2_b"][j, column]
            for i in range(2)
            for j in range(2)
        )
        torch.testing.assert_close(second[row, column], expected)
    assert LAYOUT.read(written, {}, unet_names).adapters.keys() == {ref}


def test_what_comfyui_takes_otherwise_is_said(unet_names, make_adapter) -> None:
    def reasons(algorithm: str, variant: str) -> list[str]:
        weights = make_adapter((32, 32), algorithm, 4, 0.0, torch.Generator().manual_seed(0), variant=variant)
        state = AdapterState({ModuleRef(DENOISER, TO_Q): weights})
        assert not LAYOUT.losses(state, unet_names)
        return [one.reason for one in shortfalls(state, LAYOUT, unet_names) if one.program == LAYOUT.title]

    assert not reasons("lora", "dora_in")
    assert not reasons("oft", "")
    assert ["relative to the untrained weight's norm" in reason for reason in reasons("lora", "dora_out")] == [True]
    assert ["rescale" in reason for reason in reasons("boft", "")] == [True]
