"""The process with a CUDA device that is not there: answers requests of the tests, one JSON value a line.

    python -m tests.cuda.process LIBRARY

The library (`fake_cuda.cpp`) must be loaded before torch, which the tests have loaded already. A request is a family,
the number of samples, whether their captions differ in length, and keywords of `tracing.traced`, or null for the floor;
of a model of full size also the blocks of each kind that it has, and the side of its latents.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def answer(
    family: str,
    samples: int,
    is_masked: bool,
    settings: dict[str, Any] | None,
    blocks: Sequence[int] = (),
    side: int | None = None,
) -> dict[str, Any]:
    """What `traced` or `floor` found for a small model of a family; with the side of latents, for one of full size."""
    from lorasmith.bench.measure import synthetic_samples
    from tests.cuda.cases import full_size, samples_of, small_model
    from tests.cuda.tracing import floor, traced

    if side is not None:
        model = full_size(family, blocks)
        given = synthetic_samples(model, samples, side, side)
        return vars(traced(model, given, batch_size=samples, counts=True, **settings or {}))
    with tempfile.TemporaryDirectory() as folder:
        model = small_model(family, Path(folder))
        given = samples_of(model, samples, is_masked=is_masked)
        return vars(floor(model, given) if settings is None else traced(model, given, batch_size=samples, **settings))


def main() -> None:
    device = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    import torch

    device.replace_guard()  # where torch was built with CUDA, it has a guard of its own by now
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            found = answer(**json.loads(line))
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
