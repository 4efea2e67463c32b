"""Step time and memory of ours against batch, resolution and rank, and of a model that is larger than its memory.

    python -m benchmarks.scaling --model sd15
    python -m benchmarks.scaling --model flux --plot docs/images/scaling.png
    python -m benchmarks.scaling --model flux --offloading

One thing grows at a time, the others stay at `--latent`, `--at-batch` and `--rank`. Columns are those of
`benchmarks.step_time`. `--offloading` leaves the frozen weights in host memory and streams them to the device, which on
the CPU are copies that are counted as a GPU would hold them: the table has the most of them that were there at a time,
beside all of them. What a GPU's allocator says of it is in `benchmarks.levers`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.bases import MODELS, machine, structural_copy
from benchmarks.results import Results
from benchmarks.sides import Ours, Work, memory_of
from benchmarks.step_time import MIB, add_common
from lorasmith.bench.measure import synthetic_samples, training_steps, weight_bytes
from lorasmith.core.allocator import keep_freed_memory
from lorasmith.core.dtypes import dtype_from_name
from lorasmith.core.placement import held
from lorasmith.training import engine
from lorasmith.training.memory.weight_stream import WeightStream

Point = tuple[int, float, int, int]
"""What grows, median seconds, bytes kept for the backward pass, bytes at the most above the weights."""


def main() -> None:
    arguments = _arguments()
    if arguments.keep_memory:
        keep_freed_memory()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    torch.manual_seed(0)
    device, dtype = torch.device(arguments.device), dtype_from_name(arguments.dtype)
    results = Results(arguments, torch=torch.__version__, machine=machine(device))
    model = MODELS[arguments.model].make(dtype, device)
    plain = structural_copy(model.components.denoiser)

    def work(latent: int, batch: int, rank: int) -> Work:
        samples = synthetic_samples(model, batch, latent, latent, tokens=arguments.tokens)
        settings = {"batch_size": batch, "rank": rank, "targets": arguments.targets, "training_dtype": arguments.dtype}
        return Work(model, plain, samples, settings, device, dtype, arguments.steps)

    if arguments.offloading:
        _offloaded(work(arguments.latent, arguments.at_batch, arguments.rank), results)
        return
    results.table({"grows": "", "to": "d", "step, s": ".4f", "× the first": ".2f", "kept, MiB": ".1f", "peak, MiB": ".1f"})
    at = {"batch": arguments.at_batch, "latents": arguments.latent, "rank": arguments.rank}
    growing = {"batch": arguments.batches, "latents": arguments.latents, "rank": arguments.ranks}
    curves: dict[str, list[Point]] = {}
    with held(model.components.denoiser, device=device, dtype=dtype):
        for name, values in growing.items():
            points = [{**at, name: value} for value in values]
            curves[name] = _curve(arguments, values, [work(one["latents"], one["batch"], one["rank"]) for one in points])
            for value, seconds, kept, peak in curves[name]:
                results.add(name, value, seconds, seconds / curves[name][0][1], kept / MIB, peak / MIB)
    if arguments.plot:
        _plot(curves, arguments.plot)


def _curve(arguments: argparse.Namespace, values: list[int], works: list[Work]) -> list[Point]:
    sides = {value: Ours(work) for value, work in zip(values, works, strict=True)}
    seconds: dict[int, list[float]] = {value: [] for value in values}
    for round_ in range(arguments.rounds + 1):
        for value, side in sides.items():
            taken = statistics.median(side.seconds())
            if round_:
                seconds[value].append(taken)
    memory = {value: memory_of(side, torch.device(arguments.device)) for value, side in sides.items()}
    return [(value, statistics.median(seconds[value]), *memory[value]) for value in values]


def _offloaded(work: Work, results: Results) -> None:
    """Some steps with weights in host memory: the most that was on the device, against all."""
    with _recorded_streams() as streams:
        side = Ours(work, offloading=True)
        recipe = replace(side.recipe, offloading=True)  # which a run does without on the CPU
        whole = weight_bytes(work.model.components.denoiser)
        with training_steps(side.job, work.samples, recipe) as once:
            for _ in range(3):
                once()
            peak = streams[0].resident.peak
            rest = weight_bytes(work.model.components.denoiser) - streams[0].ahead_bytes
    columns = dict.fromkeys(("frozen weights, MiB", "streamed, at most at a time, MiB", "always there, MiB"), ".1f")
    results.table(columns | {"share": ".3f"})
    results.add(whole / MIB, peak / MIB, rest / MIB, (peak + rest) / whole)


@contextlib.contextmanager
def _recorded_streams() -> Iterator[list[WeightStream]]:
    """The streams that runs make meanwhile."""
    made: list[WeightStream] = []

    def stream(*arguments: Any) -> WeightStream:
        made.append(WeightStream(*arguments))
        return made[-1]

    with mock.patch.object(engine, "WeightStream", stream):
        yield made


def _plot(curves: dict[str, list[Point]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, points) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        values = [point[0] for point in points]
        axes.plot(values, [point[1] for point in points], color="#1f5fa8", marker="o")
        axes.set_xlabel({"latents": "side of the latents"}.get(name, name))
        axes.set_ylabel("seconds a step", color="#1f5fa8")
        axes.set_ylim(bottom=0)
        memory = axes.twinx()
        memory.plot(values, [point[3] / MIB for point in points], color="#c0562b", marker="s")
        memory.set_ylabel("peak above weights, MiB", color="#c0562b")
        memory.set_ylim(bottom=0)
    figure.savefig(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--latents", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--latent", type=int, default=32, help="side of the latents where something else grows")
    parser.add_argument("--at-batch", type=int, default=1, help="batch where something else grows")
    parser.add_argument("--offloading", action="store_true", help="weights in host memory, instead of the curves")
    parser.add_argument("--plot", type=Path, help="PNG of the curves")
    return parser.parse_args()


if __name__ == "__main__":
    main()
