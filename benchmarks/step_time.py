"""Time and memory of a training step, as multiples of the floor and beside a plain diffusers + PEFT loop.

The floor is one forward and one backward to the latents (which require grad) of the frozen model as diffusers gives
it: same batch, same dtype, eager, contiguous. Times are taken in one process in alternating rounds, and ratios are
medians over rounds, so that a busy machine slows all sides. On the CPU the clock is processor time.

    python -m benchmarks.step_time --model sd15 --latent 32 --dtype bf16
    python -m benchmarks.step_time --model flux --latent 32 64 --batch 1 4
    python -m benchmarks.step_time --model sd15 --latent 64 --batch 4 --sides floor lorasmith --steps 1 --rounds 1
    python -m benchmarks.step_time --model flux-deep --latent 64 --sides floor lorasmith tread-0.1 tread-0.25 tread-0.5
    python -m benchmarks.step_time --model tiny --latent 16 --batch 8 --targets all --rank 8 --algorithms

Models are described in `benchmarks.bases`, sides and their columns in `benchmarks.sides`. `kept` is what the forward
pass keeps for the backward pass, `peak` the peak above the frozen weights, trained state included; both are bytes of
tensors and deterministic (on a GPU `peak` is the allocator's). `--memory` adds the peak of resident memory, of one
process for each side. With `--algorithms` the sides are the algorithms, all or the given ones, and ratios are to LoRA's
step.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bases import MODELS, machine, structural_copy
from benchmarks.results import Results, add_json
from benchmarks.sides import MIB, Frozen, Once, Ours, Peft, Side, Work, compared, resident_peak, trouble_of
from lorasmith.adapters import frozen_weights
from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.bench.measure import Counter, synthetic_samples
from lorasmith.core import placement
from lorasmith.core.allocator import keep_freed_memory
from lorasmith.core.options import options_of
from lorasmith.core.placement import dtype_from_name, placed
from lorasmith.training import engine
from lorasmith.training.config import TrainConfig
from lorasmith.training.memory import compilation

VARIANTS: dict[str, dict[str, str]] = {name: {"algorithm": name} for name in ALGORITHMS} | {
    "DoRA-input": {"dora": "input"},
    "DoRA-output": {"dora": "output"},
}
"""What is compared by `--algorithms` → settings of the run."""

_TREAD = {f"tread-{rate}": {"tread_rate": rate} for rate in (0.1, 0.25, 0.5)}

OURS: dict[str, dict[str, Any]] = {
    "lorasmith": {},
    "checkpointing": {"gradient_checkpointing": True},
    "lean": {"activations": "lean"},
    "selective": {"activations": "selective"},
    "graphs": {"cuda_graphs": True},
    "compile": {"compile": True},
    "compile-checkpointing": {"compile": True, "gradient_checkpointing": True},
    "contiguous": {},
    **_TREAD,
}
"""Sides of ours → settings of the run. The tensors of `contiguous` are NCHW where a run has them channels-last."""

_LEFT_OUT = {"graphs", "compile", "compile-checkpointing", "contiguous", *_TREAD}
"""Sides that are measured only if they are named."""

SIDES = ("forward", "floor", *OURS, "peft")
TITLES = {"checkpointing": "lorasmith, checkpointing", "lean": "lorasmith, lean", "selective": "lorasmith, selective",
          "graphs": "lorasmith, CUDA graphs", "compile": "lorasmith, compiled",
          "compile-checkpointing": "lorasmith, compiled, checkpointing",
          "contiguous": "lorasmith, NCHW", "peft": "diffusers + PEFT",
          **{name: f"lorasmith, tread_rate {settings['tread_rate']}" for name, settings in _TREAD.items()}}  # fmt: skip


def main() -> None:
    arguments = _arguments()
    results = begin(arguments)
    by_algorithm = arguments.algorithms is not None
    columns = {"latents": "", "batch": "d", "side": "", "parameters": ",", "step, s": ".4f"}
    columns |= dict.fromkeys(("× LoRA", "× floor") if by_algorithm else ("× floor", "× (floor + forward)"), ".3f")
    columns |= {"kept, MiB": ".1f", "peak, MiB": ".1f"} | ({"resident, MiB": ".1f"} if arguments.memory else {})
    results.table(columns)
    others = (("LoRA",), ("floor",)) if by_algorithm else (("floor",), ("floor", "forward"))
    with _model(arguments) as open_work:
        for latent in arguments.latent:
            for batch in arguments.batch:
                work = open_work(latent, batch)
                makers = {name: functools.partial(side_of, name, work) for name in arguments.sides}
                found = compared(makers, work.device, arguments.rounds)
                for name, one in found.items():
                    ratios = [one.ratio(*map(found.get, names)) for names in others]
                    resident = [_resident_mib(arguments, name, latent, batch)] if arguments.memory else []
                    results.add(
                        f"{latent}×{latent}",
                        batch,
                        one.titled(TITLES.get(name, name)),
                        one.parameters,
                        one.step,
                        *ratios,
                        *one.mib,
                        *resident,
                    )
                for name in OURS if arguments.traces is not None else ():
                    if name in arguments.sides:
                        trace(name, work, arguments.traces / f"{arguments.model}-{latent}-{batch}-{name}.json.gz")


def side_of(name: str, work: Work) -> Side:
    """A side by its name, or that of an algorithm."""
    if name in ("forward", "floor"):
        return Frozen(work, backward=name == "floor")
    if name == "peft":
        return Peft(work)
    if name == "contiguous":
        return InNchw(work)
    return Ours(work, **(OURS[name] if name in OURS else VARIANTS[name]))


class InNchw(Ours):
    """Ours, with the memory format that convolutional models have in diffusers."""

    def seconds(self) -> Sequence[float]:
        with contiguous():
            return super().seconds()

    @contextlib.contextmanager
    def opened(self, counter: Counter | None = None) -> Iterator[Once]:
        with contiguous(), super().opened(counter) as once:
            yield once


@contextlib.contextmanager
def contiguous() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in (placement, engine, frozen_weights):
            stack.enter_context(mock.patch.object(module, "memory_format_for", lambda network: torch.contiguous_format))
        yield


def trace(name: str, work: Work, path: Path) -> None:
    """Save the third step of a side as the profiler sees it, for `chrome://tracing` and Perfetto."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if work.device.type == "cuda" else [])]

    def save(_: object) -> None:
        side = side_of(name, work)
        with side.opened() as once:
            once()
            once()
            with profile(activities=kinds) as seen:
                once()
                if work.device.type == "cuda":
                    torch.cuda.synchronize(work.device)
        side.close()
        seen.export_chrome_trace(str(path))

    if trouble := trouble_of(save, name):
        print(f"{path.name}: {trouble}", flush=True)


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

    with placed(model.components.denoiser, device=device, dtype=dtype):
        yield work


def _resident_mib(arguments: argparse.Namespace, name: str, latent: int, batch: int) -> float:
    """Measured in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident, arguments, name, latent, batch).result() / MIB


def _resident(arguments: argparse.Namespace, name: str, latent: int, batch: int) -> int:
    _set_up(arguments)
    with _model(arguments) as open_work:
        work = open_work(latent, batch)
        with side_of("forward", work).opened() as once:
            once()  # loads what libraries load for it
        return resident_peak(side_of(name, work))


def _set_up(arguments: argparse.Namespace) -> None:
    if arguments.keep_memory:
        keep_freed_memory()
    compilation.BACKEND = arguments.backend
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    torch.manual_seed(0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common(parser)
    parser.add_argument("--latent", type=int, nargs="+", default=[32], help="sides of the square latents")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--sides", nargs="+", choices=SIDES, metavar="NAME", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--compile", action="store_true", help="the compiled side as well")
    parser.add_argument("--memory", action="store_true", help="resident memory too, in a process for each side")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="save a profile of a step of our sides there")
    parser.add_argument(
        "--algorithms", nargs="*", choices=VARIANTS, metavar="NAME", help="compare these, or all if none is named"
    )
    arguments = parser.parse_args()
    if arguments.algorithms is not None:
        arguments.sides = list(dict.fromkeys(("forward", "floor", "LoRA", *(arguments.algorithms or VARIANTS))))
    else:
        known = options_of(TrainConfig)
        usual = [name for name in SIDES if name not in _LEFT_OUT and set(OURS.get(name, ())) <= set(known)]
        arguments.sides = [*(arguments.sides or usual), *(["compile"] if arguments.compile else [])]
    return arguments


def begin(arguments: argparse.Namespace) -> Results:
    """Set memory, threads and seed as the options of `add_common` say; what every benchmark of steps begins with."""
    _set_up(arguments)
    return Results(arguments, torch=torch.__version__, machine=machine(torch.device(arguments.device)))


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark of steps."""
    add_json(parser)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--tokens", type=int, help="of the text; the family's usual number if left out")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="attention+ff")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default=compilation.BACKEND, help="of torch.compile; aot_eager needs no compiler")
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
