"""The model of runs that train together goes from one state to another and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lorasmith.adapters.inject import adapters_on
from lorasmith.core.blocks import blocks_at_depth
from lorasmith.core.options import config_from
from lorasmith.core.recomputation import Recomputing
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.joint import SharedModel


def engine(model: Model, **settings: Any) -> tuple[Engine, SharedModel]:
    fields = {"steps": 1, "rank": 2, "targets": "attention", "training_dtype": "bf16", "exact_dtype": True, **settings}
    job = plan_job(model.denoiser, config_from(TrainConfig, fields), torch.device("cpu"))
    return engine_of(job), SharedModel(job)


def layer_of(engine: Engine) -> nn.Module:
    return engine.model.module.get_submodule(next(iter(engine.trained.adapters)))


def test_states_follow_from_each_other_and_leave_the_model_as_it_was(tiny: Model) -> None:
    one, shared = engine(tiny)
    other, _ = engine(tiny, seed=1)
    layer = layer_of(one)
    before = {name: tensor.clone() for name, tensor in tiny.components.denoiser.state_dict().items()}

    def facts() -> tuple[torch.dtype, int]:
        return layer.get_parameter("weight").dtype, len(adapters_on(layer))

    shared.freeze()
    assert facts() == (torch.bfloat16, 0)
    shared.attach([one])
    assert facts() == (torch.bfloat16, 1)
    forward = layer.forward
    shared.attach([one])
    assert layer.forward == forward  # nothing was made again
    shared.attach([one, other])
    assert layer.forward != forward
    shared.freeze()
    assert facts() == (torch.bfloat16, 0)
    shared.bare()
    assert "forward" not in layer.__dict__
    after = tiny.components.denoiser.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )


@pytest.mark.parametrize(
    ("plans", "kept"), [(["keep", "keep"], "keep"), (["keep", "selective"], "selective"), (["host", "lean"], "host")]
)
def test_the_run_with_the_least_memory_says_how_activations_are_kept(tiny: Model, plans: list[Any], kept: str) -> None:
    one, shared = engine(tiny)
    other, _ = engine(tiny)
    for each, plan in zip((one, other), plans, strict=True):
        each.way = replace(each.way, activations=plan)
    shared.attach([one, other])
    try:
        assert shared.activations == kept
        shared.attach([one, other], reduced=False)  # to measure what they need
        assert shared.activations == "keep"
    finally:
        shared.bare()


def test_blocks_are_kept_as_in_the_run_that_recomputes_most(tiny: Model) -> None:
    one, shared = engine(tiny)
    other, _ = engine(tiny)

    def kept() -> int:
        block = blocks_at_depth(tiny.components.denoiser, 1)[0]
        recomputing: Recomputing = block.forward.func.__self__
        return recomputing._kept

    one.way = replace(one.way, checkpoint_depth=1, kept_blocks=3)
    try:
        shared.attach([one, other])
        assert kept() == 3
        other.way = replace(other.way, checkpoint_depth=1, kept_blocks=2)
        shared.attach([one, other])
        assert kept() == 2
        other.way = replace(other.way, kept_blocks=1)  # memory ran out
        shared.attach([one, other])
        assert kept() == 1
    finally:
        shared.bare()
