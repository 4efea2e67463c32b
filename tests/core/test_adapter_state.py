"""What adapters and files exchange."""

from __future__ import annotations

import torch

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef


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
