from __future__ import annotations

import torch

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.formats.layouts.comfy import AiToolkitLayout

LAYOUT = AiToolkitLayout()
TO_Q, PROJ = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0"


def test_factors_have_pefts_names_and_the_scale_in_them(flux_names, make_state) -> None:
    state = make_state(flux_names, [PROJ], rank=2, alpha=1.0)
    tensors = LAYOUT.write(state, flux_names)
    base = "diffusion_model.double_blocks.0.img_attn.proj"
    assert tensors.keys() == {f"{base}.lora_A.weight", f"{base}.lora_B.weight"}
    weights = state.adapters[ModuleRef(DENOISER, PROJ)]
    meant = weights.tensors["up"] @ weights.tensors["down"] / 2
    torch.testing.assert_close(tensors[f"{base}.lora_B.weight"] @ tensors[f"{base}.lora_A.weight"], meant)


def test_parts_that_cannot_be_fused_have_names_that_comfyui_finds(flux_names, make_adapter) -> None:
    shape = flux_names.weight_shapes[TO_Q]
    adapter = make_adapter(shape, "boft", 2, 1.0, torch.Generator().manual_seed(0))
    tensors = LAYOUT.write(AdapterState({ModuleRef(DENOISER, TO_Q): adapter}), flux_names)
    assert {key.rpartition(".")[0] for key in tensors} == {f"transformer.{TO_Q}"}
