"""What several processes cost: steps of one and two processes measured, and a model of more of them on paper.

    python -m benchmarks.together
    python -m benchmarks.together --rounds 9 --json together.json
    python -m benchmarks.together --paper

Measured are two processes of one thread each, on two hosts of this machine (`benchmarks.hosts`), over a link without a
limit and over one of 1 Gbit/s. Blocks of a few steps take turns: one process alone with all samples of the step, two
with half of them each that do not know of each other, two that train together, two that sum the gradient once after the
backward pass instead of in buckets during it, and the sum by itself. Times are wall time, the medians of rounds, as
other work on the machine slows all blocks.

The model of a step of N processes, S samples and P trained parameters:

    step     = samples of a process · (forward + backward of a sample) + update + waiting
    samples  = ⌈S / N⌉
    sum      = 4 · P · 2 (N − 1) / N / (bytes a second of the slowest link of the ring)
    waiting  = max(sum / buckets, sum − backward pass of the last batch · (buckets − 1) / buckets)

since a bucket is sent when its gradients are there, which the backward pass makes evenly, and the last one has nothing
left to hide behind. The same function fills the table on paper and predicts the measured steps of two processes from
the parts of one that has half of the samples, and from the rate of the link.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bases import MODELS, machine
from benchmarks.hosts import Host, hosts, missing
from benchmarks.results import Results, add_json
from lorasmith.bench.measure import synthetic_samples
from lorasmith.core.launched import launched_process
from lorasmith.core.placement import dtype_from_name, placed
from lorasmith.core.processes import ALONE, Processes, joined
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine, batch_maker
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.optim.flat import BUCKET_NUMBERS, GradientSums
from lorasmith.training.targets_summary import summarise_targets

PORT = 29600
GBIT = 125e6
"""Bytes a second of 1 Gbit/s."""


@dataclass(frozen=True)
class Case:
    """A measured training.

    Attributes:
        model: of `benchmarks.bases`.
        latent: side of the square latents.
        rank, targets: of the LoRA.
        samples: of a step.
        tokens: of the text.
        dtype: of the products.
    """

    model: str
    latent: int
    rank: int
    samples: int
    targets: str = "attention+ff"
    tokens: int = 64
    dtype: str = "bf16"


CASES = {
    "built-in": Case("tiny", latent=16, rank=16, samples=8, targets="all", dtype="fp32"),
    "Flux.1 of 155 million": Case("flux", latent=16, rank=128, samples=2),
}
LINKS: Mapping[str, float | None] = {"no limit": None, "1 Gbit/s": 1000.0}
"""Name → million bits a second."""


@dataclass(frozen=True)
class Costs:
    """What a step consists of, in seconds.

    Attributes:
        sample: forward and backward pass of a sample.
        backward: backward pass of the last batch.
        update: optimizer and the rest.
        parameters: trained numbers.
        buckets: in which they are summed.
    """

    sample: float
    backward: float
    update: float
    parameters: int
    buckets: int


def sum_seconds(parameters: int, processes: int, bytes_per_s: float) -> float:
    """Seconds of the sum of a gradient over a ring."""
    return 4 * parameters * 2 * (processes - 1) / processes / bytes_per_s


def waiting_seconds(whole: float, backward: float, buckets: int) -> float:
    """Seconds of a sum that the backward pass does not hide.

    Args:
        whole: seconds of the sum.
        backward: of the pass during which its buckets are begun.
        buckets: their number.
    """
    return max(whole / buckets, whole - backward * (buckets - 1) / buckets)


def step_seconds(costs: Costs, samples: int, processes: int, whole: float) -> float:
    """Seconds of a step.

    Args:
        costs: of its parts.
        samples: of the step, over all processes.
        processes: their number.
        whole: seconds of the sum.
    """
    waiting = waiting_seconds(whole, costs.backward, costs.buckets) if processes > 1 else 0.0
    return math.ceil(samples / processes) * costs.sample + costs.update + waiting


def main() -> None:
    arguments = _arguments()
    if arguments.process is not None:
        _process(CASES[arguments.case], arguments)
        return
    torch.set_num_threads(1)
    results = Results(arguments, torch=torch.__version__, machine=machine(torch.device("cpu")))
    if arguments.paper:
        _on_paper(results)
        return
    if reason := missing():
        sys.exit(f"two hosts are needed: {reason}")
    found = {(case, link): _measured(case, link, arguments) for case in arguments.cases for link in LINKS}
    parts = {"pass": "forward and backward", "wait": "waiting", "update": "update"}
    columns = {"training": "", "parameters": ",", "link": "", "block": "", "step, s": ".3f", "× one": ".2f"}
    results.table(columns | {f"{part}, s": ".3f" for part in parts.values()})
    for (case, link), one in found.items():
        for block in BLOCKS:
            times = one.blocks[block]
            ratio = times["step"] / one.blocks["one process"]["step"]
            results.add(case, one.parameters, link, block, times["step"], ratio, *(times[part] for part in parts))
    columns = {"training": "", "link": "", "buckets": "d", "sum by itself, s": ".3f", "by the rate, s": ".3f"}
    columns |= {"of a step": ".2f", "waiting, s": ".3f", "predicted, s": ".3f", "step, s": ".3f", "predicted": ".3f"}
    results.table(
        columns | {"measured / predicted": ".2f"},
        "The sum, and what the model says of the step of two processes; without a rate, from the sum by itself",
    )
    for (case, link), one in found.items():
        rate, costs = LINKS[link], one.costs
        by_rate = None if rate is None else sum_seconds(one.parameters, 2, rate / 1000 * GBIT)
        whole = one.sum if by_rate is None else by_rate
        times = one.blocks["two processes"]
        predicted = step_seconds(costs, CASES[case].samples, 2, whole)
        waiting = waiting_seconds(whole, costs.backward, costs.buckets)
        row = (case, link, costs.buckets, one.sum, by_rate, one.sum / times["step"], times["wait"], waiting)
        results.add(*row, times["step"], predicted, times["step"] / predicted)
    _on_paper(results)


# ---- measured


_APART = "two that do not sum"
BLOCKS = ("one process", _APART, "two processes", "two, one sum at the end")


@dataclass(frozen=True)
class Measured:
    """Of a case over a link.

    Attributes:
        parameters: trained numbers.
        costs: of a process with half of the samples.
        sum: seconds of a sum by itself.
        blocks: name → seconds of the parts of a step, medians of rounds.
    """

    parameters: int
    costs: Costs
    sum: float
    blocks: dict[str, dict[str, float]]


def _measured(case: str, link: str, arguments: argparse.Namespace) -> Measured:
    with tempfile.TemporaryDirectory(prefix="lorasmith-together-") as folder, hosts(2) as pair:
        for host in pair:
            host.limit(LINKS[link])
        file = Path(folder) / "found.json"
        processes = [_started(host, rank, pair[0], case, file, arguments) for rank, host in enumerate(pair)]
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit(f"the processes of {case} over {link} ended with {codes}")
        found = json.loads(file.read_text())
    return Measured(found["parameters"], Costs(**found["costs"]), found["sum"], found["blocks"])


def _started(
    host: Host, rank: int, first: Host, case: str, file: Path, arguments: argparse.Namespace
) -> subprocess.Popen[str]:
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": first.address, "MASTER_PORT": PORT, "OMP_NUM_THREADS": 1}
    own = ["--process", file, "--case", case, "--rounds", arguments.rounds, "--steps", arguments.steps]
    env = {name: str(value) for name, value in place.items()}
    return host.start([sys.executable, "-m", "benchmarks.together", *own], env=env)


def _process(case: Case, arguments: argparse.Namespace) -> None:
    """One of the two: rounds of all blocks; the first one writes what it found."""
    torch.manual_seed(0)
    device, dtype = torch.device("cpu"), dtype_from_name(case.dtype)
    model = MODELS[case.model].make(dtype, device)
    samples = synthetic_samples(model, case.samples, case.latent, case.latent, tokens=case.tokens)
    config = TrainConfig(
        batch_size=case.samples, rank=case.rank, targets=case.targets, training_dtype=case.dtype, steps=10_000
    )
    with joined(launched_process()) as together, placed(model.components.denoiser, device=device, dtype=dtype):
        engines = {}
        for block in BLOCKS:
            share = replace(config, batch_size=case.samples // 2) if block == _APART else config
            job = plan_job(model.denoiser, share, device)
            processes: Processes = ALONE if block in ("one process", _APART) else together
            engines[block] = engine_of(replace(job, way=replace(job.way, processes=processes)))
        flat = engines["two processes"].flat
        at_end = engines["two, one sum at the end"]
        at_end._sums = GradientSums(at_end.flat, together, bucket_numbers=len(flat.master))
        rounds: dict[str, list[dict[str, float]]] = {block: [] for block in BLOCKS}
        sums = []
        for number in range(arguments.rounds + 1):
            for block in BLOCKS[number % 4 :] + BLOCKS[: number % 4]:
                together.gathered(None)
                if block == "one process" and not together.is_first:
                    continue
                times = _block(engines[block], samples, arguments.steps, number * (arguments.steps + 1))
                rounds[block].append(times)
            together.gathered(None)
            began = time.perf_counter()
            for start, end in flat.buckets(BUCKET_NUMBERS)[0]:
                together.summing(flat.grad[start:end])()
            sums.append(time.perf_counter() - began)
        if together.is_first:
            blocks = {block: _medians(found[1:]) for block, found in rounds.items()}  # the first one warms up
            apart, buckets = blocks[_APART], len(flat.buckets(BUCKET_NUMBERS)[0])
            sample = apart["pass"] / (case.samples // 2)
            costs = Costs(sample, apart["backward"], apart["update"], len(flat.master), buckets)
            found = {"parameters": len(flat.master), "costs": asdict(costs), "blocks": blocks}
            arguments.process.write_text(json.dumps(found | {"sum": statistics.median(sums[1:])}))


def _block(engine: Engine, samples: Sequence[Any], steps: int, first: int) -> dict[str, float]:
    """Medians of the parts of some steps, after one that is not counted."""
    maker = batch_maker(engine.model, samples, engine.config, engine.way, engine.rank_masks)
    found = []
    with engine.prepared(), _backward_timed() as backward:
        for step in range(first, first + steps + 1):
            batches = maker.step(step)
            began = time.perf_counter()
            own = engine.gradient(batches)
            passed = time.perf_counter()
            gradient = engine.summed(batches, own)
            summed = time.perf_counter()
            engine.update(step, *gradient)
            ended = time.perf_counter()
            found.append(
                {
                    "step": ended - began,
                    "pass": passed - began,
                    "wait": summed - passed,
                    "update": ended - summed,
                    "backward": backward[-1],
                }
            )
    return _medians(found[1:])


@contextlib.contextmanager
def _backward_timed() -> Iterator[list[float]]:
    """Inside the context, the seconds of each backward pass are appended to what is yielded."""
    whole: Callable[..., None] = torch.autograd.backward
    seconds: list[float] = []

    def backward(*arguments: Any, **keywords: Any) -> None:
        began = time.perf_counter()
        whole(*arguments, **keywords)
        seconds.append(time.perf_counter() - began)

    with mock.patch.object(torch.autograd, "backward", backward):
        yield seconds


def _medians(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


# ---- on paper


PAPERS = {"Flux.1": "flux-12b", "SDXL": "sdxl"}
"""Title → model of `benchmarks.bases`; samples are of 1024×1024 pixels."""
ACHIEVED_FLOPS = 400e12
"""FLOP/s of a GPU in a step, an assumption: 40 % of the bf16 peak of an H100. A slower GPU hides more of a sum."""
BACKWARD = 1.15
"""Of a backward pass over a forward pass; frozen weights have no gradient."""
UPDATE_BYTES = 40
"""Read and written for a trained number in an update by AdamW: weight, gradient, moments, the copy that is used."""
MEMORY_BYTES_PER_S = 2e12
PAPER_LINKS = {"NVLink": 300e9, "PCIe 4.0 ×16": 20e9, "25 Gb Ethernet": 2.8e9}
"""Bytes a second of the slowest link of the ring in one direction, as all-reduces reach it; an assumption."""
PAPER_SAMPLES = 64


def _on_paper(results: Results) -> None:
    """Steps of 64 samples on up to 64 GPUs, by the slowest link of the ring."""
    counts = (1, 2, 4, 8, 16, 32, 64)
    results.table(
        {"model": "", "rank": "d", "parameters": ",", "link": ""} | {f"N = {count}": "" for count in counts},
        f"On paper: seconds of a step of {PAPER_SAMPLES} samples on N GPUs, and the share of a perfect division",
    )
    for title, name in PAPERS.items():
        model = MODELS[name].make(torch.bfloat16, torch.device("meta"))
        forward = _forward_flops(model) / ACHIEVED_FLOPS
        for rank in (16, 64):
            config = TrainConfig(rank=rank, targets="attention+ff")
            parameters = summarise_targets(model.denoiser, config).parameters
            costs = Costs(
                sample=forward * (1 + BACKWARD),
                backward=forward * BACKWARD,
                update=UPDATE_BYTES * parameters / MEMORY_BYTES_PER_S,
                parameters=parameters,
                buckets=max(1, parameters // BUCKET_NUMBERS),
            )
            for link, rate in PAPER_LINKS.items():
                cells = []
                alone = step_seconds(costs, PAPER_SAMPLES, 1, 0.0)
                for count in counts:
                    step = step_seconds(costs, PAPER_SAMPLES, count, sum_seconds(parameters, count, rate))
                    cells.append(f"{step:.3g}, {alone / step / count:.0%}")
                results.add(title, rank, parameters, link, *cells)


def _forward_flops(model: Model) -> int:
    """FLOPs of a forward pass on one sample of 1024×1024 pixels, counted without computing it."""
    (sample,) = synthetic_samples(model, 1, 128, 128)

    def shaped(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("meta", torch.bfloat16)

    conditioning = Conditioning({name: shaped(tensor) for name, tensor in sample.conditioning.tensors.items()})
    with FlopCounterMode(display=False) as counter:
        model.denoiser.predict(shaped(sample.latents[None]), torch.ones(1, device="meta"), conditioning)
    return counter.get_total_flops()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_json(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="counted in each block")
    parser.add_argument("--paper", action="store_true", help="the table on paper alone")
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
