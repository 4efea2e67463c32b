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
import gc
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import MODELS, machine
from benchmarks.results import Results, add_json
from lorasmith.bench.measure import synthetic_samples, weight_bytes
from lorasmith.core.launch_environment import launched_process
from lorasmith.core.processes import joined
from lorasmith.families.loading import load_model
from lorasmith.formats.container import write_safetensors
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import batch_maker
from lorasmith.training.job import engine_of
from lorasmith.training.memory import sharding
from lorasmith.training.memory.frozen_weights import frozen_bytes
from lorasmith.training.train import plan_job

MIB = 2**20
_TOKENS = 32
CPU = torch.device("cpu")


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        _work(arguments)
        return
    results = Results(arguments, torch=torch.__version__, machine=machine(CPU))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "flux.safetensors"
        denoiser = MODELS[arguments.model].make(torch.float32, CPU).components.denoiser
        write_safetensors(file, {name: tensor.bfloat16() for name, tensor in denoiser.state_dict().items()})
        whole = weight_bytes(denoiser)
        del denoiser
        for kind in arguments.kinds:
            columns = {"processes": "d", "sharded": "", "held, MiB": ".0f", "between steps, MiB": ".0f"}
            columns |= {"peak, MiB": ".0f", "`lorasmith plan`, MiB": ".0f", "step, s": ".2f"}
            results.table(columns, title=f"{whole / MIB:.0f} MiB of weights in fp32, quantization {kind}")
            for processes in arguments.processes:
                for sharded in (False, True) if processes > 1 else (False,):
                    found = _measured(arguments, file, kind, processes, sharded)
                    row = [max(one[name] for one in found) for name in ("held", "between", "peak", "planned")]
                    results.add(
                        processes, "yes" if sharded else "no", *(number / MIB for number in row), found[0]["step_s"]
                    )


def _measured(
    arguments: argparse.Namespace, file: Path, kind: str, processes: int, sharded: bool
) -> list[dict[str, float]]:
    """What each process found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "benchmarks.sharding"]
    command += ["--worker", str(file), "--kinds", kind, "--steps", str(arguments.steps)]
    command += ["--latent", str(arguments.latent), *(["--sharded"] if sharded else [])]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def _work(arguments: argparse.Namespace) -> None:
    """Train in one process and print what it holds, as JSON."""
    (kind,) = arguments.kinds
    with joined(launched_process()) as processes:
        model = load_model(arguments.worker)
        samples = synthetic_samples(model, 4, arguments.latent, arguments.latent, tokens=_TOKENS)
        config = TrainConfig(
            training_dtype="fp32",
            rank=4,
            batch_size=processes.size,
            quantization=kind,
            sharding=arguments.sharded,
            gradient_checkpointing=True,
        )
        job = plan_job(model.denoiser, config, CPU)
        before, times = anonymous_bytes(), []
        engine, steps = engine_of(job), itertools.count()
        maker = batch_maker(job.denoiser, samples, job.config, job.runtime)

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
        count = processes.size if arguments.sharded else 1
        planned = frozen_bytes(
            model.components.denoiser, kind=kind, dtype=torch.float32, offloading=False, processes=count
        )
        found: dict[str, Any] = {"held": held, "between": between, "peak": max(seen) - before, "planned": planned}
        for one in processes.gathered({**found, "step_s": statistics.median(times)}):
            if processes.is_first:
                print(json.dumps(one), flush=True)


def anonymous_bytes() -> int:
    """Anonymous memory of this process, which files that are mapped are no part of."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


@contextmanager
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
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
