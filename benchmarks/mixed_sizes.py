"""What pictures and captions of several sizes cost a compiled model: graphs, recompilations, seconds.

    python -m benchmarks.mixed_sizes --model flux --latent 64
    python -m benchmarks.mixed_sizes --model flux-tiny --latent 8 --device cpu --rounds 1 --backend aot_eager

Each row is a run of its own, from no compiled code on, with batches of 1: one size, four sizes of pictures of exactly
(`bucket_tokens`) and of about the same area, and four lengths of captions beside them. A run whose sizes have several
numbers of tokens is compiled for all of them. `graphs`
and `breaks` are those of the first round over all samples, `later` the graphs of the further ones, of which there
should be none. `preparing` are the seconds of the first round, compiling included.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks.bases import MODELS, clock_of
from benchmarks.step_time import add_common, begin
from lorasmith.bench.measure import pass_seconds, synthetic_samples, training_steps
from lorasmith.core.placement import dtype_from_name
from lorasmith.data.dataset import Sample
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job

_SHAPES = ((1.0, 1.0), (1.25, 0.75), (0.75, 1.25), (1.5, 0.625))
"""Heights and widths, as multiples of the side of a square."""

_ONE_AREA = ((1.0, 1.0), (2.0, 0.5), (0.5, 2.0), (4.0, 0.25))
"""Those of one area."""

_LENGTHS = (1.0, 0.5, 0.25, 0.75)
"""Lengths of captions, as shares of the family's."""

MIXES = ("one size", "one area", "mixed pictures", "mixed captions", "both")


def main() -> None:
    arguments = _arguments()
    results = begin(arguments)
    device, dtype = torch.device(arguments.device), dtype_from_name(arguments.dtype)
    model = MODELS[arguments.model].make(dtype, device)
    columns = {"samples": "", "side": "", "step, s": ".4f", "preparing, s": ".1f"}
    results.table(columns | dict.fromkeys(("graphs", "breaks", "later"), "d"))
    for mix, is_compiled in itertools.product(MIXES, (False, True)):
        samples = tuple(_samples(model, arguments, mix))
        side = "compiled" if is_compiled else "eager"
        results.add(mix, side, *measured(model, samples, arguments, device, is_compiled=is_compiled))


def measured(
    model: Model, samples: Sequence[Sample], arguments: argparse.Namespace, device: torch.device, *, is_compiled: bool
) -> tuple[float, float, int, int, int]:
    """A run; returns the median seconds of a step, seconds of the first round, graphs, graph breaks, later graphs."""
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters
    counts.clear()
    settings = {"rank": arguments.rank, "targets": arguments.targets, "training_dtype": arguments.dtype}
    job = plan_job(model.denoiser, TrainConfig(**settings, compile=is_compiled, steps=10_000), device)
    job = job.for_samples(samples)
    with training_steps(job, samples) as once:
        began = time.perf_counter()
        for _ in samples:
            once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        preparing = time.perf_counter() - began
        first = counts["stats"]["unique_graphs"]
        steps = arguments.rounds * len(samples)
        taken = pass_seconds(once, steps=steps, device=device, clock=clock_of(device))
    later = counts["stats"]["unique_graphs"] - first
    return statistics.mean(taken.seconds), preparing, first, sum(counts["graph_break"].values()), later


def _samples(model: Model, arguments: argparse.Namespace, mix: str) -> Iterator[Sample]:
    shapes = {"one area": _ONE_AREA, "mixed pictures": _SHAPES, "both": _SHAPES}
    pictures = shapes.get(mix, _SHAPES[:1] * len(_SHAPES))
    captions = _LENGTHS if mix in ("mixed captions", "both") else _LENGTHS[:1] * len(_LENGTHS)
    usual = model.family.conditioning_shapes(model.components.denoiser)["context"][1]
    for number, ((high, wide), share) in enumerate(zip(pictures, captions, strict=True)):
        sides = (2 * round(arguments.latent * scale / 2) for scale in (high, wide))
        [sample] = synthetic_samples(model, 1, *sides, tokens=max(1, round(share * (arguments.tokens or usual))))
        yield replace(sample, name=f"random {number}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common(parser)
    parser.add_argument("--latent", type=int, default=64, help="side of the square latents")
    return parser.parse_args()


if __name__ == "__main__":
    main()
