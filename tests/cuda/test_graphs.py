"""What can be compiled is compiled whole: no graph breaks, and one graph for each kind of block.

Dynamo asks no device for that, so that these are real steps on the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import batch_maker
from lorasmith.training.job import engine_of, plan_job
from tests.cuda.cases import FAMILIES, samples_of, small_model
from tests.training.lever_cases import VARIANTS

pytestmark = pytest.mark.usefixtures("graphs_alone")

MOST_GRAPHS = 4  # of a model with two kinds of blocks

UNETS = {"sd1": 17, "sdxl": 17}
"""Graphs of models whose blocks are of many kinds and widths."""

LEVERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing-2": {"gradient_checkpointing": True, "checkpoint_depth": 2},
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4"},
    "fp8": {"quantization": "fp8_e4m3"},
    "int8-checkpointing": {"quantization": "int8", "gradient_checkpointing": True},
    "offloading": {"offloading": True},
    "offloading-checkpointing": {"offloading": True, "gradient_checkpointing": True},
    "offloading-int8": {"offloading": True, "quantization": "int8"},
    **{name: VARIANTS[name] for name in ("DoRA per output", "GLoRA", "PiSSA", "T-LoRA", "dropout", "norms and biases")},
}

CASES = [
    *(("flux1", lever) for lever in LEVERS),
    *((family, "plain") for family in FAMILIES if family != "flux1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "lever"),
    [pytest.param(*case, id="-".join(case)) for case in CASES],
)
def test_a_block_is_one_graph(family: str, lever: str, tmp_path: Path) -> None:
    model = small_model(family, tmp_path)
    given = {"rank": 4, "batch_size": 2, "learning_rate": 1e-3, "training_dtype": "fp32", "compile": True}
    job = plan_job(model.denoiser, TrainConfig(**{**given, **LEVERS[lever]}), torch.device("cpu"))
    engine = engine_of(job)
    engine.way = replace(engine.way, offloading=job.config.offloading)  # which a plan leaves out on the CPU
    samples = samples_of(model, 2, is_masked=False)
    maker = batch_maker(job.model, samples, job.config, job.way, engine.rank_masks)
    with engine.prepared():
        for step in range(2):
            engine.update(step, *engine.gradient(maker.step(step)))
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= UNETS.get(family, MOST_GRAPHS)
