"""A step on the processor in each format, number of threads and memory format, beside the way that a run takes.

    env -u OMP_NUM_THREADS python -m benchmarks.processor
    env -u OMP_NUM_THREADS python -m benchmarks.processor --models tiny --busy 2
    env -u OMP_NUM_THREADS GOMP_SPINCOUNT=300000 python -m benchmarks.processor --models tiny --busy 2

`× best` is the time of the way that a run takes (its row is marked) as a multiple of the fastest row. Steps of all rows
alternate; a time is the least of its steps, as other work only adds to them. With `--busy` as many endless loops run
beside; times are then medians, and the marked row is that of `threads_beside`. GNU's OpenMP waits 300,000 turns
if it is left to itself.
"""

from __future__ import annotations

from lorasmith.core.processor import let_threads_sleep

let_threads_sleep()  # before torch is imported

import argparse  # noqa: E402
import contextlib  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from dataclasses import replace  # noqa: E402

import torch  # noqa: E402

from benchmarks.bases import MODELS, machine  # noqa: E402
from benchmarks.results import Results, add_json  # noqa: E402
from benchmarks.step_time import contiguous  # noqa: E402
from lorasmith.bench.measure import synthetic_samples, training_steps  # noqa: E402
from lorasmith.core.allocator import keep_freed_memory  # noqa: E402
from lorasmith.training.config import TrainConfig  # noqa: E402
from lorasmith.training.job import plan_job  # noqa: E402
from lorasmith.training.processor_way import Load, on_processor  # noqa: E402

_SIZES = {"tiny": (4, 16), "sd15": (1, 32), "flux": (1, 16)}
"""Batch size, and side of the latents."""


def main() -> None:
    arguments = _arguments()
    keep_freed_memory()
    torch.manual_seed(0)
    device, load = torch.device("cpu"), Load.now(always=True)
    results = Results(arguments, torch=torch.__version__, machine=machine(device), busy_before=f"{load.busy:.2f}")
    results.table({"model": "", "format": "", "threads": "d", "memory": "", "step, s": ".3f", "× best": ".2f", "": ""})
    for name in arguments.models:
        batch, side = _SIZES[name]
        model = MODELS[name].make(torch.float32, device)
        samples = synthetic_samples(model, batch, side, side)
        config = TrainConfig(batch_size=batch, exact_dtype=True)
        with on_processor(plan_job(model.denoiser, config, device), samples) as job:
            chosen = job.config.training_dtype, torch.get_num_threads(), True
        with _programs(arguments.busy):
            if arguments.busy:
                chosen = chosen[0], Load.now().chosen, True
            counts = sorted({torch.get_num_threads() >> halved for halved in range(8)} - {0}, reverse=True)
            kinds = (True,) if arguments.busy else (True, False)
            found = {
                (dtype, count, last): list[float]() for dtype in ("bf16", "fp32") for count in counts for last in kinds
            }
            for _ in range(arguments.rounds):
                for (dtype, count, last), seconds in found.items():
                    torch.set_num_threads(count)
                    planned = plan_job(model.denoiser, replace(config, training_dtype=dtype), device)
                    with (
                        contextlib.nullcontext() if last else contiguous(),
                        training_steps(planned, samples) as once,
                    ):
                        once()
                        for _ in range(arguments.steps):
                            began = time.perf_counter()
                            once()
                            seconds.append(time.perf_counter() - began)
        torch.set_num_threads(counts[0])
        times = {way: (statistics.median if arguments.busy else min)(seconds) for way, seconds in found.items()}
        least = min(times.values())
        for way, seconds in times.items():
            dtype, count, last = way
            layout = "channels-last" if last else "contiguous"
            results.add(name, dtype, count, layout, seconds, seconds / least, "a run's" if way == chosen else "")


@contextlib.contextmanager
def _programs(count: int) -> Iterator[None]:
    """Inside the context, as many programs keep a processor busy each."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_json(parser)
    parser.add_argument("--models", nargs="+", choices=_SIZES, default=list(_SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed of each row in each round")
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="programs beside that keep a processor busy each"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
