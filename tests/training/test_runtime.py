"""What settings come to on a device."""

from __future__ import annotations

from typing import Any

import torch
from lever_cases import resolved

from lorasmith.families.model import Model
from lorasmith.training.runtime import Runtime


def runtime(tiny: Model, device: str, **settings: Any) -> Runtime:
    return Runtime.of(resolved(**settings), tiny.components.denoiser, torch.device(device))


def test_a_cpu_keeps_weights_and_activations_where_they_are(tiny: Model) -> None:
    assert not runtime(tiny, "cpu", offloading=True).offloading
    assert runtime(tiny, "cuda", offloading=True).offloading
    assert runtime(tiny, "cpu", activations="host").activations == "keep"
    assert runtime(tiny, "cuda", activations="host").activations == "host"


def test_compiled_code_decides_itself_what_to_keep(tiny: Model) -> None:
    assert runtime(tiny, "cpu", compile=True, activations="lean").activations == "keep"
    assert runtime(tiny, "cpu", activations="lean").activations == "lean"


def test_depth_is_for_checkpointing_and_budgets_are_bytes(tiny: Model) -> None:
    assert runtime(tiny, "cpu", checkpoint_depth=3).checkpoint_depth == 0
    assert runtime(tiny, "cpu", checkpoint_depth=3, gradient_checkpointing=True).checkpoint_depth == 3
    assert runtime(tiny, "cpu", memory_budget=1.5).memory_budget == 3 * 2**29
    assert runtime(tiny, "cpu").memory_budget is None


def test_pieces_are_whole_batches_and_the_dtype_may_be_the_models_own(tiny: Model) -> None:
    assert runtime(tiny, "cpu", batch_size=7).micro_batch == 7
    assert runtime(tiny, "cpu", training_dtype="bf16").dtype == torch.bfloat16
    assert runtime(tiny, "cpu", training_dtype="none").dtype == next(tiny.components.denoiser.parameters()).dtype
