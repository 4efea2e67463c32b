"""What adapters and files exchange."""

from __future__ import annotations

import torch

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef, multiplied


def test_metadata_is_added_on_a_copy() -> None:
    ref = ModuleRef(DENOISER, "mid_block.conv")
    state = AdapterState({ref: AdapterWeights("lora", {"down": torch.zeros(1)})}, metadata={"a": "1", "b": "2"})
    more = state.with_metadata({"b": "3", "c": "4"})

    assert more.metadata == {"a": "1", "b": "3", "c": "4"}
    assert state.metadata == {"a": "1", "b": "2"}
    assert more.adapters is state.adapters


def test_states_do_not_share_their_defaults() -> None:
    AdapterState().metadata["a"] = "1"

    assert AdapterState().metadata == {}


def test_modules_sort_by_component_and_path() -> None:
    refs = [ModuleRef("text_encoder", "a"), ModuleRef("denoiser", "b"), ModuleRef("denoiser", "a")]

    assert sorted(refs) == [("denoiser", "a"), ("denoiser", "b"), ("text_encoder", "a")]


def test_a_product_has_a_dtype_that_holds_it() -> None:
    for factor, dtype in [(1.0, torch.bfloat16), (0.25, torch.bfloat16), (3.1, torch.float32)]:
        tensor = torch.tensor([1.0, 0.3, -7.0]).bfloat16()
        product = multiplied(tensor, factor)
        assert product.dtype == dtype
        assert torch.equal(product.float(), tensor.float() * factor)
