"""Time and memory of a training step, as multiples of the floor and beside a plain diffusers + PEFT loop.

The floor is one forward and one backward to the latents (which require grad) of the frozen model as diffusers gives
it: same batch, same dtype, eager, contiguous. Times are taken in one process in alternating rounds, and ratios are
medians over rounds, so that a busy machine slows all sides. On the CPU the clock is processor time.

    python -m benchmarks.step_time --model sd15 --latent 32 --dtype bf16
    python -m benchmarks.step_time --model flux --latent 32 64 --batch 1 4
    python -m benchmarks.step_time --model sd15 --latent 64 --batch 4 --sides floor lorasmith --steps 1 --rounds 1
    python -m benchmarks.step_time --model tiny --latent 16 --batch 8 --targets all --rank 8 --algorithms

Models are described in `benchmarks.bases`, sides and their columns in `benchmarks.sides`. `kept` is what the forward
pass keeps for the backward pass, `peak` the most above the frozen weights with all that is trained; both are bytes of
tensors and the same each time (on a GPU `peak` is the allocator's). `--memory` adds the peak of resident memory, of one
process for each side on the CPU. With `--algorithms` the sides are the algorithms, all of them or those that are named, and ratios
are to LoRA's step.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.bases import MODELS, machine, structural_copy
from benchmarks.results import Results, add_json
from benchmarks.sides import Frozen, Ours, Peft, Side, Work, let_go, memory_of, resident_peak
from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.bench.measure import synthetic_samples
from lorasmith.core.allocator import is_out_of_memory, keep_freed_memory
from lorasmith.core.dtypes import dtype_from_name
from lorasmith.core.errors import TrainingError
from lorasmith.core.options import options_of
from lorasmith.core.placement import held
from lorasmith.training.config import TrainConfig

VARIANTS: dict[str, dict[str, str]] = {name: {"algorithm": name} for name in ALGORITHMS} | {
    "DoRA-input": {"dora": "input"},
    "DoRA-output": {"dora": "output"},
}
"""What is compared by `--algorithms` → settings of the run."""

OURS: dict[str, dict[str, Any]] = {
    "lorasmith": {},
    "checkpointing": {"gradient_checkpointing": True},
    "lean": {"activations": "lean"},
    "selective": {"activations": "selective"},
    "compile": {"compile": True},
}
"""Sides of ours → settings of the run."""

SIDES = ("forward", "floor", *OURS, "peft")
TITLES = {"checkpointing": "lorasmith, checkpointing", "lean": "lorasmith, lean", "selective": "lorasmith, selective",
          "compile": "lorasmith, compiled", "peft": "diffusers + PEFT"}  # fmt: skip
MIB = 2**20


@dataclass
class Row:
    """What is known of a side on a batch.

    Attributes:
        latent, batch: side of the square latents, and how many.
        seconds: medians of the rounds.
        kept, peak, resident: bytes; None where they were not measured.
        trouble: why there are no numbers; empty where there are.
    """

    name: str
    latent: int
    batch: int
    parameters: int = 0
    seconds: list[float] = field(default_factory=list)
    kept: int | None = None
    peak: int | None = None
    resident: int | None = None
    trouble: str = ""


def main() -> None:
    arguments = _arguments()
    results = Results(arguments, torch=torch.__version__, machine=_set_up(arguments))
    begin(arguments, results)
    with _model(arguments) as open_work:
        for latent in arguments.latent:
            for batch in arguments.batch:
                report(arguments, results, compare(arguments, open_work(latent, batch), latent, batch))


def compare(arguments: argparse.Namespace, work: Work, latent: int, batch: int) -> list[Row]:
    """All sides on one batch."""
    rows = [Row(name, latent, batch) for name in arguments.sides]
    sides: dict[str, Side] = {}

    def measure_memory(row: Row) -> None:
        side = sides[row.name] = side_of(row.name, work)
        row.kept, row.peak = memory_of(side, work.device)
        row.parameters = side.parameters
        if arguments.memory:
            row.resident = _in_a_process_of_its_own(arguments, row.name, latent, batch)

    def measure_time(row: Row) -> None:
        row.seconds.append(statistics.median(sides[row.name].seconds()))

    for row in rows:  # memory first: what is too large for the device shows at once
        _try(measure_memory, row)
    for round_ in range(arguments.rounds + 1):
        turn = round_ % len(rows)  # who comes first after another side pays for what that has left in the caches
        for row in rows[turn:] + rows[:turn]:
            if not row.trouble:
                _try(measure_time, row)
    for side in sides.values():
        side.close()
    for row in rows:
        del row.seconds[:1]  # the first round warms caches and lets libraries pick their kernels
    return rows


def _try(measure: Callable[[Row], None], row: Row) -> None:
    """Measure, and note in the row if memory or a compiler is missing."""
    try:
        measure(row)
    except (RuntimeError, MemoryError, TrainingError) as error:
        if not isinstance(error, TrainingError) and not is_out_of_memory(error):
            raise
        row.trouble = "does not fit" if is_out_of_memory(error) else str(error)
    if row.trouble:
        let_go()  # only now that nothing holds the tensors of what failed


def side_of(name: str, work: Work) -> Side:
    """A side by its name, or that of an algorithm."""
    if name in ("forward", "floor"):
        return Frozen(work, backward=name == "floor")
    if name == "peft":
        return Peft(work)
    return Ours(work, **(OURS[name] if name in OURS else VARIANTS[name]))


def begin(arguments: argparse.Namespace, results: Results) -> None:
    """The table that `report` fills."""
    by_algorithm = arguments.algorithms is not None
    columns = {"latents": "", "batch": "d", "side": "", "parameters": ",", "step, s": ".4f"}
    columns |= dict.fromkeys(("× LoRA", "× floor") if by_algorithm else ("× floor", "× (floor + forward)"), ".3f")
    columns |= {"kept, MiB": ".1f", "peak, MiB": ".1f"} | ({"resident, MiB": ".1f"} if arguments.memory else {})
    results.table(columns)


def report(arguments: argparse.Namespace, results: Results, rows: list[Row]) -> None:
    """The rows of one batch; ratios are medians over rounds."""
    beside = {one.name: one.seconds for one in rows if not one.trouble}
    pair = (("LoRA",), ("floor",)) if arguments.algorithms is not None else (("floor",), ("floor", "forward"))
    for row in rows:
        title = TITLES.get(row.name, row.name)
        bytes_ = [row.kept, row.peak, *([row.resident] if arguments.memory else [])]
        results.add(
            f"{row.latent}×{row.latent}",
            row.batch,
            f"{title}: {row.trouble}" if row.trouble else title,
            row.parameters,
            statistics.median(row.seconds) if row.seconds and not row.trouble else None,
            *(None if row.trouble else _ratio(row.seconds, *map(beside.get, names)) for names in pair),
            *(None if one is None else one / MIB for one in bytes_),
        )


def _ratio(mine: list[float], *others: list[float] | None) -> float | None:
    """None where one of the others was not measured."""
    known = [one for one in others if one is not None]
    if len(known) < len(others):
        return None
    return statistics.median(a / sum(b) for a, *b in zip(mine, *known, strict=True))


@contextlib.contextmanager
def _model(arguments: argparse.Namespace) -> Iterator[Any]:
    """The model as a run holds it: conversions happen once, before its first step. Yields what makes a `Work`."""
    device, dtype = torch.device(arguments.device), dtype_from_name(arguments.dtype)
    model = MODELS[arguments.model].make(dtype, device)
    plain = structural_copy(model.components.denoiser)

    def work(latent: int, batch: int) -> Work:
        samples = synthetic_samples(model, batch, latent, latent, tokens=arguments.tokens)
        settings = {
            "batch_size": batch,
            "rank": arguments.rank,
            "targets": arguments.targets,
            "training_dtype": arguments.dtype,
        }
        return Work(model, plain, samples, settings, device, dtype, arguments.steps)

    with held(model.components.denoiser, device=device, dtype=dtype):
        yield work


def _in_a_process_of_its_own(arguments: argparse.Namespace, name: str, latent: int, batch: int) -> int:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident, arguments, name, latent, batch).result()


def _resident(arguments: argparse.Namespace, name: str, latent: int, batch: int) -> int:
    _set_up(arguments)
    with _model(arguments) as open_work:
        work = open_work(latent, batch)
        with side_of("forward", work).opened() as once:
            once()  # loads what libraries load for it
        return resident_peak(side_of(name, work))


def _set_up(arguments: argparse.Namespace) -> str:
    if arguments.keep_memory:
        keep_freed_memory()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    torch.manual_seed(0)
    return machine(torch.device(arguments.device))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common(parser)
    parser.add_argument("--latent", type=int, nargs="+", default=[32], help="sides of the square latents")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--sides", nargs="+", choices=SIDES, metavar="NAME", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--compile", action="store_true", help="the compiled side as well")
    parser.add_argument("--memory", action="store_true", help="resident memory too, in a process for each side")
    parser.add_argument(
        "--algorithms", nargs="*", choices=VARIANTS, metavar="NAME", help="compare these, or all if none is named"
    )
    arguments = parser.parse_args()
    if arguments.algorithms is not None:
        arguments.sides = list(dict.fromkeys(("forward", "floor", "LoRA", *(arguments.algorithms or VARIANTS))))
    else:
        known = options_of(TrainConfig)
        usual = [name for name in SIDES if name != "compile" and set(OURS.get(name, ())) <= set(known)]
        arguments.sides = [*(arguments.sides or usual), *(["compile"] if arguments.compile else [])]
    return arguments


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark of steps."""
    add_json(parser)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--tokens", type=int, help="of the text; the family's usual number if left out")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="attention+ff")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed of each side in each round")
    parser.add_argument("--threads", type=int, default=0, help="0 keeps torch's own choice")
    parser.add_argument(
        "--keep-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let every side keep freed memory, as the command line does",
    )


if __name__ == "__main__":
    main()
