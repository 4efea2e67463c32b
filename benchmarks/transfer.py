"""A large file to the device in two ways, and what it takes to prepare a model again.

    python -m benchmarks.transfer --gib 24 --model flux-12b
    python -m benchmarks.transfer --gib 0.01 --model tiny --device cpu

The file is written first, and its pages are dropped before each way, if the system does that. `direct` copies its
memory-mapped tensors one after the other; `buffers` copies them as a run does, through two pinned buffers. `again` has
the file in the system's cache.

The second table has the seconds in which weights are placed, and quantized, from host memory, as at the start of a run
and after a drawing that was requested of it, for each kind of weights.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.bases import MODELS, machine
from benchmarks.results import Results, add_json
from benchmarks.sides import let_go, trouble_of
from lorasmith.core.mapped_files import MappedFile
from lorasmith.core.pinned_memory import DeviceCopies
from lorasmith.core.placement import dtype_from_name
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import engine_of, plan_job

_TENSOR = 2**25
"""Bytes of a tensor in the file."""

KINDS = ("none", "int8", "nf4")


def main() -> None:
    arguments = _arguments()
    device = torch.device(arguments.device)
    results = Results(arguments, torch=torch.__version__, machine=machine(device))
    results.table({"file": "", "way": "", "s": ".2f", "GB/s": ".2f"})
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "large"
        size = max(1, round(arguments.gib * 2**30 / _TENSOR)) * _TENSOR
        began = time.perf_counter()
        _write(path, size)
        _add(results, size, "written", time.perf_counter() - began)
        for name, way in {"direct": _direct, "buffers": _through_buffers}.items():
            _drop_pages(path)
            for again in ("", " again"):
                let_go()
                _add(results, size, name + again, _seconds(lambda way=way: way(path, size, device), device))
    results.table({"weights": "", "prepared, s": ".2f", "left, s": ".2f", "prepared again, s": ".2f"})
    model = MODELS[arguments.model].make(dtype_from_name("bf16"), device)
    model.components.denoiser.to("cpu")
    for kind in KINDS:
        let_go()
        found: list[float] = []
        trouble = trouble_of(lambda kind, found=found: found.extend(round_trip(model, kind, device)), kind)
        results.add(f"{kind}: {trouble}" if trouble else kind, *(found if len(found) == 3 else [None] * 3))


def round_trip(model: Model, kind: str, device: torch.device) -> tuple[float, float, float]:
    """Seconds until a model is prepared, until it is as before, and until it is prepared again."""
    job = plan_job(model.denoiser, TrainConfig(quantization=kind, training_dtype="bf16"), device)  # type: ignore[arg-type]
    engine = engine_of(job)
    try:
        prepared = engine.prepared()
        first = _seconds(prepared.__enter__, device)
        left = _seconds(lambda: prepared.__exit__(None, None, None), device)
        again = engine.prepared()
        second = _seconds(again.__enter__, device)
        again.__exit__(None, None, None)
    finally:
        engine.release()
    return first, left, second


def _seconds(do: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    kept = do()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    del kept
    return seconds


def _add(results: Results, size: int, way: str, seconds: float) -> None:
    results.add(f"{size / 2**30:.2f} GiB", way, seconds, size / 1e9 / seconds)


def _write(path: Path, size: int) -> None:
    piece = torch.randint(0, 255, (_TENSOR,), dtype=torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        for _ in range(size // _TENSOR):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _drop_pages(path: Path) -> None:
    with path.open("rb") as file, contextlib.suppress(AttributeError, OSError):  # Linux has it
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _tensors(path: Path, size: int) -> list[torch.Tensor]:
    file = MappedFile(path)
    return [file.tensor(at, torch.bfloat16, (_TENSOR // 2,)) for at in range(0, size, _TENSOR)]


def _direct(path: Path, size: int, device: torch.device) -> list[torch.Tensor]:
    # A copy on the CPU too, as a mapped tensor is not read before it is used.
    return [tensor.to(device, copy=True) for tensor in _tensors(path, size)]


def _through_buffers(path: Path, size: int, device: torch.device) -> list[torch.Tensor]:
    with contextlib.closing(DeviceCopies(device)) as copies:
        found = []
        for tensor in _tensors(path, size):
            found.append(torch.empty_like(tensor, device=device))
            copies.copy(tensor, found[-1])
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=24, help="size of the file")
    parser.add_argument("--folder", type=Path, help="where the file is written; the system's temporary folder if not")
    parser.add_argument("--model", choices=MODELS, default="flux-12b", help="whose weights are placed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
