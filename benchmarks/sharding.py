"""Memory and step time of sharded weights, for several numbers of processes on one machine.

    OMP_NUM_THREADS=1 python -m benchmarks.sharding
    OMP_NUM_THREADS=1 python -m benchmarks.sharding --processes 1 2 4 --kinds none nf4

A Flux transformer with random weights, mapped from a file as every model is, trains in fp32 with and without
`sharding`. The file is in bf16: weights that are there in the training dtype would stay on the file on the CPU. Memory
is anonymous (RssAnon, which the mapped file is no part of) above that before the weights are placed: between two steps,
and at the peak of a step (sampled each 2 ms). Beside it is the sum of the sharded bytes that a process holds. Step
times are wall times on the machine's cores, which more processes than cores share.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import itertools
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.bases import MODELS, machine
from benchmarks.results import Results, add_json
from lorasmith.adapters.frozen_weights import frozen_bytes
from lorasmith.bench.measure import synthetic_samples, weight_bytes
from lorasmith.core.choices import Quantization
from lorasmith.core.processes import Processes
from lorasmith.families.loading import load_model
from lorasmith.formats.container import write_safetensors
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import batch_maker
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.memory import sharding
from tests.training.processes_together import processes_together

MIB = 2**20
_TOKENS = 32
_MMAP_THRESHOLD = -3
CPU = torch.device("cpu")


def main() -> None:
    arguments = _arguments()
    results = Results(arguments, torch=torch.__version__, machine=machine(CPU))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "flux.safetensors"
        # Another process makes the model, so that those that are measured find no freed memory.
        (whole,) = processes_together(1, functools.partial(_make, file=file, model=arguments.model))
        for kind in arguments.kinds:
            columns = {"processes": "d", "sharded": "", "held, MiB": ".0f", "between steps, MiB": ".0f"}
            columns |= {"peak, MiB": ".0f", "`lorasmith plan`, MiB": ".0f", "step, s": ".2f"}
            results.table(columns, title=f"{whole / MIB:.0f} MiB of weights in fp32, quantization {kind}")
            for processes in arguments.processes:
                for sharded in (False, True) if processes > 1 else (False,):
                    one = functools.partial(_found, file=file, kind=kind, sharded=sharded, arguments=arguments)
                    found = processes_together(processes, one, within_s=3600)
                    row = [max(each[name] for each in found) for name in ("held", "between", "peak", "planned")]
                    results.add(
                        processes, "yes" if sharded else "no", *(number / MIB for number in row), found[0]["step_s"]
                    )


def _make(_: Processes, *, file: Path, model: str) -> int:
    """Write a model with random weights; returns their bytes in fp32."""
    denoiser = MODELS[model].make(torch.float32, CPU).components.denoiser
    write_safetensors(file, {name: tensor.bfloat16() for name, tensor in denoiser.state_dict().items()})
    return weight_bytes(denoiser)


def _found(
    processes: Processes, *, file: Path, kind: Quantization, sharded: bool, arguments: argparse.Namespace
) -> dict[str, float]:
    """What one of the processes holds in bytes, and its time of a step."""
    _return_freed_memory()
    model = load_model(file)
    samples = synthetic_samples(model, 4, arguments.latent, arguments.latent, tokens=_TOKENS)
    config = TrainConfig(
        training_dtype="fp32",
        rank=4,
        batch_size=processes.size,
        quantization=kind,
        sharding=sharded,
        gradient_checkpointing=True,
    )
    job = plan_job(model.denoiser, config, CPU)
    before, times = anonymous_bytes(), []
    engine, steps = engine_of(job), itertools.count()
    maker = batch_maker(job.model, samples, job.config, job.way)

    def once() -> None:
        step = next(steps)
        batches = maker.step(step)
        engine.update(step, *engine.summed(batches, engine.gradient(batches)))

    with engine.prepared():
        once()
        gc.collect()
        between = anonymous_bytes() - before
        parts = [one.whole.to_local() for one in gc.get_objects() if type(one) is sharding._Bytes]
        held = sum(one.untyped_storage().nbytes() for one in parts)
        with _peak() as seen:
            for _ in range(arguments.steps):
                processes.gathered(None)
                began = time.perf_counter()
                once()
                times.append(time.perf_counter() - began)
    planned = frozen_bytes(
        model.components.denoiser,
        kind=kind,
        dtype=torch.float32,
        offloading=False,
        processes=processes.size if sharded else 1,
    )
    peak = max(seen) - before
    return {"held": held, "between": between, "peak": peak, "planned": planned, "step_s": statistics.median(times)}


def _return_freed_memory() -> None:
    """Large tensors are memory of their own from here on, which the system gets back when they are freed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, 1 << 17)


def anonymous_bytes() -> int:
    """Anonymous memory of this process, which files that are mapped are no part of."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


@contextlib.contextmanager
def _peak() -> Iterator[list[int]]:
    """Yields a list of the anonymous memory at many moments inside the context."""
    seen, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="flux-deep")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--kinds", nargs="+", default=["none", "nf4"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--latent", type=int, default=16)
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
