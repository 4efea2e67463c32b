"""Step time and memory of ours against batch, resolution and rank, and of a model that is larger than its memory.

    python -m benchmarks.scaling --model sd15
    python -m benchmarks.scaling --model flux --plot docs/images/scaling.png
    python -m benchmarks.scaling --model flux --offloading

One quantity grows at a time, the others stay at `--latent`, `--at-batch` and `--rank`. Columns are those of
`benchmarks.step_time`. `--offloading` keeps the frozen weights in host memory and streams them to the device; on the
CPU the copies are made as on a GPU. The table has those on the device, beside all of them. For a GPU's allocator see
`benchmarks.levers`.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.bases import MODELS, structural_copy
from benchmarks.results import Results
from benchmarks.sides import MIB, Found, Ours, Work, compared
from benchmarks.step_time import add_common, begin
from lorasmith.adapters.weight_stream import streams_of
from lorasmith.bench.measure import synthetic_samples, training_steps, weight_bytes
from lorasmith.core.placement import dtype_from_name, placed


def main() -> None:
    arguments = _arguments()
    results = begin(arguments)
    device, dtype = torch.device(arguments.device), dtype_from_name(arguments.dtype)
    model = MODELS[arguments.model].make(dtype, device)
    plain = structural_copy(model.components.denoiser)

    def work(latent: int, batch: int, rank: int) -> Work:
        samples = synthetic_samples(model, batch, latent, latent, tokens=arguments.tokens)
        settings = {"batch_size": batch, "rank": rank, "targets": arguments.targets, "training_dtype": arguments.dtype}
        return Work(model, plain, samples, settings, device, dtype, arguments.steps)

    if arguments.offloading:
        _offloaded(work(arguments.latent, arguments.at_batch, arguments.rank), results)
        return
    columns = {"grows": "", "to": "d", "step, s": ".4f", "× the first": ".2f"}
    results.table(columns | {"kept, MiB": ".1f", "peak, MiB": ".1f"})
    at = {"batch": arguments.at_batch, "latents": arguments.latent, "rank": arguments.rank}
    growing = {"batch": arguments.batches, "latents": arguments.latents, "rank": arguments.ranks}
    curves: dict[str, dict[int, Found]] = {}
    with placed(model.components.denoiser, device=device, dtype=dtype):
        for name, values in growing.items():
            points = {value: {**at, name: value} for value in values}
            makers = {
                value: functools.partial(lambda one: Ours(work(one["latents"], one["batch"], one["rank"])), point)
                for value, point in points.items()
            }
            curves[name] = compared(makers, device, arguments.rounds)
            first = curves[name][values[0]]
            for value, one in curves[name].items():
                results.add(one.titled(name), value, one.step, one.ratio(first), *one.mib)
    if arguments.plot:
        _plot(curves, arguments.plot)


def _offloaded(work: Work, results: Results) -> None:
    """Some steps with weights in host memory: what is on the device, against all of them."""
    module = work.model.components.denoiser
    side = Ours(work, offloading=True)
    way = replace(side.job.way, offloading=True)  # which runs on the CPU ignore
    whole = weight_bytes(module)
    with training_steps(replace(side.job, way=way), work.samples) as once:
        for _ in range(3):
            once()
        streamed, here = sum(stream.size_bytes for stream in streams_of(module)), weight_bytes(module)
    columns = dict.fromkeys(("frozen weights, MiB", "two blocks, MiB", "always there, MiB"), ".1f")
    results.table(columns | {"share": ".3f"})
    results.add(whole / MIB, streamed / MIB, (here - streamed) / MIB, here / whole)


def _plot(curves: dict[str, dict[int, Found]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, found) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        points = {value: (one.step, one.peak / MIB) for value, one in found.items() if one.step and one.peak}
        axes.plot(list(points), [step for step, _ in points.values()], color="#1f5fa8", marker="o")
        axes.set_xlabel({"latents": "side of the latents"}.get(name, name))
        axes.set_ylabel("seconds a step", color="#1f5fa8")
        axes.set_ylim(bottom=0)
        memory = axes.twinx()
        memory.plot(list(points), [peak for _, peak in points.values()], color="#c0562b", marker="s")
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
