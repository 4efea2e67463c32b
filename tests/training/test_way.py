"""What settings come to on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lever_cases import resolved
from torch import nn

from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.way import Way, dtype_on_device


def way(tiny: Model, device: str, **settings: Any) -> Way:
    return Way.of(resolved(**settings), tiny.components.denoiser, torch.device(device))


def test_a_cpu_keeps_weights_and_activations_where_they_are(tiny: Model) -> None:
    assert not way(tiny, "cpu", offloading=True).offloading
    assert way(tiny, "cuda", offloading=True).offloading
    assert way(tiny, "cpu", activations="host").activations == "keep"
    assert way(tiny, "cuda", activations="host").activations == "host"


def test_compiled_code_decides_itself_what_to_keep(tiny: Model) -> None:
    assert way(tiny, "cpu", compile=True, activations="lean").activations == "keep"
    assert way(tiny, "cpu", activations="lean").activations == "lean"


def test_depth_is_for_checkpointing_and_budgets_are_bytes(tiny: Model) -> None:
    assert way(tiny, "cpu", checkpoint_depth=3).checkpoint_depth == 0
    assert way(tiny, "cpu", checkpoint_depth=3, gradient_checkpointing=True).checkpoint_depth == 3
    assert way(tiny, "cpu", memory_budget=1.5).memory_budget == 3 * 2**29
    assert way(tiny, "cpu").memory_budget is None
    assert way(tiny, "cuda", memory_cap=1.5).memory_cap == 3 * 2**29
    assert way(tiny, "cpu", memory_cap=1.5).memory_cap is None


def test_pieces_are_whole_batches_and_the_dtype_may_be_the_models_own(tiny: Model) -> None:
    assert way(tiny, "cpu", batch_size=7).micro_batch == 7
    assert way(tiny, "cpu", training_dtype="bf16").dtype == torch.bfloat16
    assert way(tiny, "cpu", training_dtype="none").dtype == next(tiny.components.denoiser.parameters()).dtype


def test_the_models_own_format_may_be_one_that_a_processor_emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    module = nn.Linear(1, 1).half()
    assert dtype_on_device(TrainConfig(training_dtype="none"), module, torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(
    ("settings", "there", "here"),
    [
        ({}, "bf16", "fp32"),
        ({"training_dtype": "bf16"}, "bf16", "fp32"),
        ({"training_dtype": "none"}, "none", "none"),  # the model is in fp32
        ({"training_dtype": "fp32"}, "fp32", "fp32"),
        ({"exact_dtype": True}, "bf16", "fp32"),
        ({"training_dtype": "bf16", "exact_dtype": True}, "bf16", "bf16"),
        ({"training_dtype": "none", "exact_dtype": True}, "none", "none"),
    ],
)
def test_products_that_a_processor_would_emulate_are_in_fp32_unless_exactness_is_asked_for(
    tiny: Model, settings: dict[str, Any], there: str, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, module, config = torch.device("cpu"), tiny.components.denoiser, TrainConfig(rank=1, steps=1, **settings)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert dtype_on_device(config, module, cpu) == there
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert dtype_on_device(config, module, cpu) == here

    job = plan_job(tiny.denoiser, config, cpu)
    assert (job.config.training_dtype, job.requested) == (here, config)
    said = [note for note in job.notes if "no units for" in note]
    assert len(said) == (config.training_dtype == "bf16")
    assert all(("emulates" in note) == config.exact_dtype for note in said)
