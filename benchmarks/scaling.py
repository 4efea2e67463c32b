"""Step time and memory of ours against batch, resolution and rank, and of a model that is larger than its memory.

    python -m benchmarks.scaling --model sd15
    python -m benchmarks.scaling --model flux --plot docs/images/scaling.png
    python -m benchmarks.scaling --model flux --offloading

One thing grows at a time, the others stay at `--latent`, `--at-batch` and `--rank`. Columns are those of
`benchmarks.step_time`. `--offloading` leaves the frozen weights in host memory and streams them to the device, which on
the CPU are copies that are counted as a GPU would hold them: the table has the most of them that were there at a time,
beside all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.bases import MODELS, machine
from benchmarks.sides import Ours, Work, counts_of
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
    print(json.dumps({**vars(arguments), "torch": torch.__version__, "machine": machine()}, default=str))
    device, dtype = torch.device(arguments.device), dtype_from_name(arguments.dtype)
    model = MODELS[arguments.model](dtype, device)
    plain = model.components.denoiser if arguments.offloading else copy.deepcopy(model.components.denoiser)

    def work(latent: int, batch: int, rank: int) -> Work:
        samples = synthetic_samples(model, batch, latent, latent, tokens=arguments.tokens)
        settings = {"batch_size": batch, "rank": rank, "targets": arguments.targets, "training_dtype": arguments.dtype}
        return Work(model, plain, samples, settings, device, dtype, arguments.steps)

    if arguments.offloading:
        _offloaded(work(arguments.latent, arguments.at_batch, arguments.rank))
        return
    with held(model.components.denoiser, device=device, dtype=dtype):
        curves = {
            "batch": _curve(arguments, arguments.batches, lambda n: work(arguments.latent, n, arguments.rank)),
            "latents": _curve(arguments, arguments.latents, lambda n: work(n, arguments.at_batch, arguments.rank)),
            "rank": _curve(arguments, arguments.ranks, lambda n: work(arguments.latent, arguments.at_batch, n)),
        }
    _report(curves)
    if arguments.plot:
        _plot(curves, arguments.plot)


def _curve(arguments: argparse.Namespace, values: list[int], work: Callable[[int], Work]) -> list[Point]:
    sides = {value: Ours(work(value)) for value in values}
    seconds: dict[int, list[float]] = {value: [] for value in values}
    for round_ in range(arguments.rounds + 1):
        for value, side in sides.items():
            taken = statistics.median(side.seconds())
            if round_:
                seconds[value].append(taken)
    device = torch.device(arguments.device)
    counts = {value: counts_of(side, device) for value, side in sides.items()}
    return [(value, statistics.median(seconds[value]), counts[value].held, counts[value].peak) for value in values]


def _report(curves: dict[str, list[Point]]) -> None:
    print("\n| grows | to | step, s | × the first | kept, MiB | peak, MiB |")
    print("|---|---|---|---|---|---|")
    for name, points in curves.items():
        for value, seconds, kept, peak in points:
            ratio = seconds / points[0][1]
            print(f"| {name} | {value} | {seconds:.3f} | {ratio:.2f} | {kept / MIB:.1f} | {peak / MIB:.1f} |")


def _offloaded(work: Work) -> None:
    """Some steps with weights in host memory: the most that was on the device, against all."""
    with _recorded_streams() as streams:
        side = Ours(work, offloading=True)
        runtime = replace(side.job.runtime, offloading=True)  # which a run does without on the CPU
        whole = weight_bytes(work.model.components.denoiser)
        with training_steps(replace(side.job, runtime=runtime), work.samples) as once:
            for _ in range(3):
                once()
            peak = streams[0].resident.peak
            rest = weight_bytes(work.model.components.denoiser) - streams[0].ahead_bytes
    print("\n| frozen weights, MiB | streamed, at most at a time, MiB | always there, MiB | share |")
    print("|---|---|---|---|")
    print(f"| {whole / MIB:.1f} | {peak / MIB:.1f} | {rest / MIB:.1f} | {(peak + rest) / whole:.3f} |")


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
