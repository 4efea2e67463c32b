"""What settings come to on a device."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from lever_cases import resolved
from torch import nn

from lorasmith.core.typed_json import typed
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.way import Way, WayState, dtype_on_device, notes_on_device, state_of_earlier


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


@pytest.mark.parametrize(
    ("dtype", "products", "is_said"), [("fp32", "high", 1), ("bf16", "high", 0), ("fp32", "highest", 0)]
)
def test_an_fp32_run_whose_products_are_not_is_named(
    tiny: Model, dtype: Any, products: str, is_said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("lorasmith.training.way.fp32_products", lambda: products)
    module = tiny.components.denoiser
    notes = list(notes_on_device(TrainConfig(rank=1, training_dtype=dtype), module, torch.device("cuda")))
    assert len([note for note in notes if "float32_matmul_precision is high here; unset" in note]) == is_said


LADDER = [
    "with all blocks offloaded",
    "without CUDA graphs",
    "with all blocks recomputed",
    "with the same images, 2 at a time, with activation checkpointing",
    "with the same images, 1 at a time, with activation checkpointing",
    "with the same images, 1 at a time, with activation checkpointing",
]


def test_each_smaller_way_needs_less_memory_until_there_is_none(tiny: Model) -> None:
    settings = resolved(batch_size=3, checkpoint_depth=2, gradient_checkpointing=True)
    found: Way | None = replace(
        way(tiny, "cuda", batch_size=3, checkpoint_depth=2, gradient_checkpointing=True),
        offloading=True,
        offloading_share=0.5,
        cuda_graphs=True,
        kept_blocks=4,
    )
    words = []
    while found is not None and (smaller := found.smaller(settings)):
        found, how = smaller
        words.append(how)
    assert words == LADDER
    assert (found.micro_batch, found.checkpoint_depth, found.kept_blocks) == (1, 1, 1)
    kept = replace(found, offloading_share=0.5).smaller(replace(settings, offloading_share=0.5))
    assert kept is None  # that share is set


@pytest.mark.parametrize("settings", [{}, {"autotune": False}], ids=str)
def test_a_way_that_was_measured_by_default_is_kept(tiny: Model, settings: dict[str, Any]) -> None:
    config = resolved(**settings)
    fresh = replace(way(tiny, "cpu", **settings), device=torch.device("cuda"), autotune=not settings)
    state = replace(fresh, autotune=False, compile=True).to_state(config)
    found = fresh.resumed(typed(json.loads(json.dumps(state)), WayState))
    assert (found.compile, found.autotune) == (not settings, False)
    state = replace(fresh, autotune=False, cuda_graphs=True).to_state(config)
    assert fresh.resumed(typed(json.loads(json.dumps(state)), WayState)).cuda_graphs is (not settings)


TUNED = {"activations": "lean", "products": "int8", "compile": False}


@pytest.mark.parametrize("settings", [{}, {"activations": "auto"}, {"compile": True}, {"autotune": True}], ids="".join)
def test_states_of_earlier_versions_have_the_same_way(tiny: Model, settings: dict[str, Any]) -> None:
    fresh, config = way(tiny, "cpu", **settings), resolved(**settings)
    left = replace(fresh, micro_batch=1, checkpoint_depth=1, activations="keep")
    if settings.get("compile"):
        left = left.uncompiled
    if settings.get("autotune"):
        left = replace(left, autotune=False, products="int8")
    earlier: dict[str, Any] = {
        "losses": [],
        "micro_batch": 1,
        "checkpoint_depth": 1,
        "eager": left.compile_failed,
        "attention": "torch",
        "way": {**TUNED, "checkpoint_depth": 1, "kept_blocks": 2} if settings.get("autotune") else None,
    }
    now = {"losses": [], "way": left.to_state(config)}
    ways = [
        fresh.resumed(typed(state_of_earlier(numbers)["way"], WayState))
        for numbers in (json.loads(json.dumps(now)), earlier)
    ]
    assert ways[0] == ways[1]
    assert ways[0].micro_batch == 1 and ways[0].compile is False
    assert ways[0].checkpoint_depth == (0 if fresh.activations == "auto" else 1)
    assert ways[0].products == ("int8" if settings.get("autotune") else "training_dtype")
