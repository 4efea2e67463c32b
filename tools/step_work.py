"""Print the table of `runs/time_estimate.py`: what a step of each released model computes, and the memory it needs.

    python -m tools.step_work [NAME ...]

Counted on the meta device for one picture, without weights: some seconds to a minute for each.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from lorasmith.bench.benchmark import latent_side
from lorasmith.bench.measure import Counter
from lorasmith.families.locating import BUILT_IN, ModelFiles, built_in_models
from lorasmith.families.model_search import load_completed
from lorasmith.runs.memory_estimate import MemoryEstimate, estimate_memory, on_meta_device
from lorasmith.runs.shelf import denoiser_shapes, memory_of, releases, write_header
from lorasmith.runs.time_estimate import StepWork
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.memory.memory_plan import largest_pass


def work_counted(files: ModelFiles, memory: MemoryEstimate | None = None) -> StepWork:
    """What a step on a picture of the model's own size computes at the defaults."""
    model = load_completed(files, None).model
    weights = sum(one.numel() for one in model.denoiser.module.parameters())
    config = replace(TrainConfig(), training_dtype="bf16", exact_dtype=True)
    job = plan_job(model.denoiser, config, "cpu")
    with on_meta_device(model, job, latent_side(model, None)) as (samples, way):
        once = largest_pass(job.model, samples, job.config, way)
        counter = Counter(way.device)
        with counter:
            once().float().square().mean().backward()
    if memory is None:
        memory = estimate_memory(files, TrainConfig(), card_bytes=2**50)
    least = min(one.needed_bytes for one in replace(memory, card_bytes=0)._proposals())
    return StepWork(
        family=model.family.title,
        resolution=model.defaults.resolution,
        weights=round(weights / 1e6),
        gflop=float(f"{counter.flops / 1e9:.3g}"),
        operations=counter.operations,
        least_gib=round(least / 2**30, 1),
    )


def main(names: list[str]) -> None:
    """Print the rows of these models, or of all."""
    if not names or BUILT_IN in names:
        print(f'    "{BUILT_IN}": {work_counted(ModelFiles(str(built_in_models()[BUILT_IN])))},', flush=True)
    for name, (family, release) in releases().items():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / release.file
            write_header(path, denoiser_shapes(family, release.config), torch.bfloat16)
            print(f'    "{name}": {work_counted(ModelFiles(str(path)), memory_of(name))},', flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
