"""Cost and gain of settings for memory and speed (levers): seconds of a step, and all device memory, weights included.

    python -m benchmarks.levers --model sd15 --latent 64 --batch 1 4
    python -m benchmarks.levers --model flux-12b --levers none int8 nf4 offloading

The model is in host memory, as after loading, so that the device holds the tensors of the run alone: on a GPU `weights`
are the frozen ones there, `peak` is the allocator's from the run's preparation on, allocations of libraries included.
On the CPU, where `host` and `offloading` change nothing, `peak` are bytes of tensors as in `benchmarks.step_time`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.bases import MODELS, clock_of
from benchmarks.sides import MIB, let_go
from benchmarks.step_time import add_common, begin
from lorasmith.bench.measure import counted, pass_seconds, synthetic_samples, training_steps, weight_bytes
from lorasmith.core.allocator import is_out_of_memory
from lorasmith.core.placement import dtype_from_name
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job

LEVERS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "lean": {"activations": "lean"},
    "selective": {"activations": "selective"},
    "host": {"activations": "host"},
    "checkpointing": {"gradient_checkpointing": True},
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4"},
    "fp8": {"quantization": "fp8_e4m3"},
    "fp8-products": {"quantization": "fp8_e4m3", "products": "fp8"},
    "int8-products": {"quantization": "int8", "products": "int8"},
    "int8-convrot-products": {"quantization": "int8_convrot", "products": "int8"},
    "mxfp8-products": {"quantization": "mxfp8", "products": "mxfp8"},
    "nvfp4-products": {"quantization": "nvfp4", "products": "nvfp4"},
    "offloading": {"offloading": True},
    "offloading-int8": {"offloading": True, "quantization": "int8"},
    "nf4-checkpointing": {"quantization": "nf4", "gradient_checkpointing": True},
}
"""Levers by name → settings of the run. `compile` is a side of `benchmarks.step_time`."""

_WARMUP = 2
"""Steps that are not counted: kernels are chosen, and a stream learns the order of the weights."""


def main() -> None:
    arguments = _arguments()
    results = begin(arguments)
    device = torch.device(arguments.device)
    model = MODELS[arguments.model].make(dtype_from_name(arguments.dtype), device)
    model.components.denoiser.to("cpu")
    let_go()
    columns = {"latents": "", "batch": "d", "lever": "", "step, s": ".4f", "× none": ".3f", "images an hour": ",.0f"}
    results.table(columns | dict.fromkeys(("weights, MiB", "above, MiB", "peak, MiB"), ".1f"))
    for batch in arguments.batch:
        plain = None
        for name in arguments.levers:
            before = [f"{arguments.latent}×{arguments.latent}", batch, name]
            try:
                seconds, weights, peak = measured(arguments, model, batch, LEVERS[name])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                before[-1] = f"{name}: does not fit"
            else:
                plain = seconds if name == "none" else plain
                times = None if plain is None else seconds / plain
                sizes = (size / MIB for size in (weights, peak - weights, peak))
                results.add(*before, seconds, times, 3600 * batch / seconds, *sizes)
                continue
            results.add(*before, *[None] * 6)
            let_go()


def measured(
    arguments: argparse.Namespace, model: Model, batch: int, settings: Mapping[str, Any]
) -> tuple[float, int, int]:
    """A run with one lever.

    Args:
        arguments: of the command line.
        model: in host memory.
        batch: images a step.
        settings: of the lever.

    Returns:
        Seconds of a step (median), bytes of the frozen weights on the device, and the peak of bytes there.
    """
    device = torch.device(arguments.device)
    common = {"batch_size": batch, "rank": arguments.rank, "targets": arguments.targets}
    config = TrainConfig(**{**common, "training_dtype": arguments.dtype, **settings})
    job = plan_job(model.denoiser, config, device)
    samples = synthetic_samples(model, batch, arguments.latent, arguments.latent, tokens=arguments.tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with training_steps(job, samples) as once:
        weights = weight_bytes(model.components.denoiser)
        taken = pass_seconds(once, steps=arguments.steps, warmup=_WARMUP, device=device, clock=clock_of(device))
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    if device.type == "cpu":
        peak = weights + counted(lambda counter: training_steps(job, samples, counter), device).peak
    return statistics.median(taken.seconds), weights, peak


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common(parser)
    parser.add_argument("--latent", type=int, default=32, help="side of the square latents")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS), metavar="NAME")
    return parser.parse_args()


if __name__ == "__main__":
    main()
