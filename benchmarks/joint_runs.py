"""Runs that train together over one model in one process, against as many processes: images a second, and memory.

    OMP_NUM_THREADS=1 python -m benchmarks.joint_runs --model tiny --runs 1 2 4 8
    OMP_NUM_THREADS=1 python -m benchmarks.joint_runs --model flux --quantization nf4 --latent 16 --tokens 64

Both sides are real processes with the same file, samples and settings, in turn; the processes of the second side run at
once. Images are counted by processor seconds, which other work on the machine changes less than wall time, from the
end of the warm-up on. Memory is the sum over the processes: `own` is what each has for itself (RssAnon, without the
model's file, whose pages all share), `peak` the largest resident size, the file's pages included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.bases import MODELS, machine
from benchmarks.results import Results, add_json
from lorasmith.bench.measure import synthetic_samples
from lorasmith.core.allocator import keep_freed_memory
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, StepDone
from lorasmith.training.job import TrainJob, plan_job
from lorasmith.training.joint import train_jointly
from lorasmith.training.train import Plan, RunHost, run_job

_WARMUP = 2
_MIB = 2**20


@dataclass(frozen=True)
class Taken:
    """What a process took.

    Attributes:
        images: that it trained on after the warm-up.
        seconds: of its processor time for them.
        own, peak: bytes of memory.
    """

    images: int
    seconds: float
    own: int
    peak: int


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        print(json.dumps(asdict(_trained(arguments))))
        return
    results = Results(arguments, torch=torch.__version__, machine=machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        file = _model_file(arguments, Path(folder))
        columns = {"runs": "d", "images/s, together": ".3f", "images/s, apart": ".3f", "ratio": ".3f"}
        columns |= dict.fromkeys(("own, together, MiB", "own, apart, MiB", "peak, together, MiB", "peak, apart"), ".0f")
        results.table(columns)
        for count in arguments.runs:
            rounds = [
                (_sum([_started(file, count, True)]), _sum([_started(file, 1, False) for _ in range(count)]))
                for _ in range(arguments.rounds)
            ]
            speeds = [(one.images / one.seconds, other.images / other.seconds) for one, other in rounds]
            sizes = [
                statistics.median(getattr(side, name) for side in sides) / _MIB
                for name in ("own", "peak")
                for sides in zip(*rounds, strict=True)
            ]
            results.add(
                count,
                *(statistics.median(side) for side in zip(*speeds, strict=True)),
                statistics.median(one / other for one, other in speeds),
                *sizes,
            )


def _started(file: str, runs: int, together: bool) -> subprocess.Popen[str]:
    """A process that trains runs."""
    own = ["--child", file, "--runs", str(runs), *(["--together"] if together else [])]
    command = [sys.executable, "-m", "benchmarks.joint_runs", *sys.argv[1:], *own]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _sum(processes: list[subprocess.Popen[str]]) -> Taken:
    """What processes took, all together."""
    found = []
    for process in processes:
        said, _ = process.communicate()
        assert process.returncode == 0, "a process failed; its error is above"
        found.append(Taken(**json.loads(said.splitlines()[-1])))
    return Taken(*(sum(getattr(one, name) for one in found) for name in ("images", "seconds", "own", "peak")))


def _model_file(arguments: argparse.Namespace, folder: Path) -> str:
    """The name of the built-in model, or a file of random weights."""
    if arguments.model == "tiny":
        return "lorasmith-tiny"
    torch.manual_seed(0)
    model = MODELS[arguments.model].make(torch.bfloat16, torch.device("cpu"))
    save_file(model.components.denoiser.state_dict(), folder / "model.safetensors")
    return str(folder / "model.safetensors")


def _trained(arguments: argparse.Namespace) -> Taken:
    """Train in this process, as the parent asks."""
    keep_freed_memory()
    model = load_model(arguments.child)
    (runs,) = arguments.runs
    data = EncodedDataset(synthetic_samples(model, 4, arguments.latent, arguments.latent, tokens=arguments.tokens))
    clock = _Clock(_WARMUP, arguments.steps + _WARMUP)
    jobs = [_job(model, arguments, seed) for seed in range(runs)]
    plans = [Plan(denoiser=model.denoiser, job=one, data=data) for one in jobs]
    if not arguments.together:
        run_job(plans[0], clock)
    else:
        works = [partial(run_job, plan, clock) for plan in plans]
        for result in train_jointly(jobs, works):
            if isinstance(result, Exception):
                raise result
    return Taken(arguments.steps * arguments.batch * runs, clock.seconds, clock.own, _status("VmHWM"))


def _job(model: Model, arguments: argparse.Namespace, seed: int) -> TrainJob:
    settings: dict[str, Any] = {"rank": arguments.rank, "targets": arguments.targets, "seed": seed}
    settings |= {"steps": arguments.steps + _WARMUP, "batch_size": arguments.batch, "validation_share": 0.0}
    settings |= {"training_dtype": arguments.dtype, "quantization": arguments.quantization}
    settings |= {"gradient_checkpointing": arguments.checkpointing, "algorithm": arguments.algorithm}
    return plan_job(model.denoiser, TrainConfig(**settings), torch.device("cpu"))


class _Clock(RunHost):
    """Processor time between two steps, each the moment at which the last of the runs has it."""

    def __init__(self, first: int, last: int) -> None:
        self._at = {first: 0.0, last: 0.0}
        self._first, self._last = first, last
        self.own = 0

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepDone) and event.step in self._at:
            self._at[event.step] = time.process_time()
            self.own = max(self.own, _status("RssAnon"))

    @property
    def seconds(self) -> float:
        """Processor seconds from the one to the other."""
        return self._at[self._last] - self._at[self._first]


def _status(name: str) -> int:
    """A size in bytes from what Linux says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_json(parser)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--latent", type=int, default=16, help="side of the square latents")
    parser.add_argument("--tokens", type=int, help="of the text; the family's usual number if left out")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="attention+ff")
    parser.add_argument("--algorithm", default="LoRA")
    parser.add_argument("--dtype", default="fp32", choices=("bf16", "fp32"))
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=10, help="timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--together", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
