"""The form of a file that diffusers and sd-scripts understand too; test_diffusers has diffusers itself as the judge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.formats.acceptance import made_portable, misread_alphas

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ATTENTION = [f"{BLOCK}.attn{i}.to_{part}" for i in (1, 2) for part in "qkv"]
OTHERS = [f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2", "conv_in", "down_blocks.0.resnets.0.conv1"]
ENCODER = "text_model.encoder.layers.0.self_attn.q_proj"


@settings(max_examples=40)
@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, None]), min_size=10, max_size=10))
def test_attention_has_the_most_frequent_alpha_and_every_change_stays(unet_names, make_adapter, delta, alphas) -> None:
    state = AdapterState()
    for index, (path, alpha) in enumerate(zip((*ATTENTION, *OTHERS), alphas, strict=True)):
        generator = torch.Generator().manual_seed(index)
        adapter = make_adapter(unet_names.weight_shapes[path], "lora", 4, alpha, generator)
        state.adapters[ModuleRef(DENOISER, path)] = adapter
    portable = made_portable(state, unet_names)
    found = {ref.path: weights.alpha or 4.0 for ref, weights in portable.adapters.items()}
    first, *others = sorted({*found.values()}, key=list(found.values()).count, reverse=True)
    if others:
        assert list(found.values()).count(first) > list(found.values()).count(others[0])
    assert {found[path] for path in ATTENTION} == {first}
    assert not misread_alphas(portable, unet_names)
    for ref, weights in state.adapters.items():
        torch.testing.assert_close(delta(portable.adapters[ref]), delta(weights), rtol=1e-6, atol=0)


def test_an_alpha_that_is_right_stays_and_exact_changes_keep_their_dtype(unet_names, make_state) -> None:
    even = make_state(unet_names, dtype=torch.float16)
    assert made_portable(even, unet_names).adapters == even.adapters
    odd = make_state(unet_names, ATTENTION, dtype=torch.float16, alpha=1.0)
    odd.adapters.update(make_state(unet_names, OTHERS, dtype=torch.float16, alpha=2.0).adapters)
    odd.adapters[ModuleRef(DENOISER, ATTENTION[0])] = make_state(
        unet_names, ATTENTION[:1], dtype=torch.float16, alpha=4.0
    ).adapters[ModuleRef(DENOISER, ATTENTION[0])]
    changed = made_portable(odd, unet_names).adapters[ModuleRef(DENOISER, ATTENTION[0])]
    assert changed.alpha == 1.0
    assert torch.equal(changed.tensors["up"], 4 * odd.adapters[ModuleRef(DENOISER, ATTENTION[0])].tensors["up"])
    assert changed.tensors["up"].dtype == torch.float16


def test_text_encoders_count_for_themselves_and_transformers_are_read_right(
    unet_names, flux_names, make_state, make_adapter
) -> None:
    state = make_state(unet_names, ATTENTION)
    for index, alpha in enumerate((4.0, 4.0, 1.0)):
        ref = ModuleRef("text_encoder", ENCODER.replace("layers.0", f"layers.{index}"))
        state.adapters[ref] = make_adapter((8, 4), "lora", 2, alpha, torch.Generator().manual_seed(0))
    assert {ref.path: alpha for ref, alpha in misread_alphas(state, unet_names).items()} == {
        ENCODER.replace("layers.0", "layers.2"): 4.0
    }
    paths = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"]
    uneven = make_state(flux_names, paths[:1], alpha=1.0)
    uneven.adapters.update(make_state(flux_names, paths[1:], alpha=2.0).adapters)
    assert not misread_alphas(uneven, flux_names)


@pytest.mark.parametrize("algorithm", ["lora", "loha"])
def test_cores_of_loras_are_multiplied_in(unet_names, make_adapter, delta, algorithm) -> None:
    ref = ModuleRef(DENOISER, "conv_in")
    weights = make_adapter((32, 4, 3, 3), algorithm, 2, 1.0, torch.Generator().manual_seed(0), variant="tucker")
    portable = made_portable(AdapterState({ref: weights}), unet_names).adapters[ref]
    assert "mid" not in portable.tensors
    torch.testing.assert_close(delta(portable), delta(weights), rtol=1e-5, atol=1e-8)
