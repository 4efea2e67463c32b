"""Times that were measured once on a machine, in a file of the user's cache.

times.json = {<machine>: {<what was measured>: {<variant>: <seconds>}}}
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lorasmith.core.errors import LorasmithError
from lorasmith.core.files import read_regular, write_atomic
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.processor import processor_name
from lorasmith.core.typed_json import typed
from lorasmith.data.encoding_cache import default_cache, ensure_private

Times = Mapping[str, float]
"""Seconds by variant; variants that failed are missing."""

FASTER = 0.97
"""Part of the time of one variant below which another is faster; less is within the noise."""


def measured(
    device: torch.device,
    name: str,
    measure: Callable[[], Times],
    *,
    is_final: Callable[[Times], bool] = lambda kept: True,
) -> Times:
    """The kept times of something on a device, or those that are measured now, of which infinite ones are left out.

    Kept times that are not final are measured again; the faster ones are kept.
    """
    kept, machine = _read(), machine_of(device)
    known = kept.setdefault(machine, {})
    before = known.get(name)
    if before is None or not is_final(before):
        finite = {variant: seconds for variant, seconds in measure().items() if math.isfinite(seconds)}
        known[name] = {
            variant: min(seconds, (before or {}).get(variant, seconds)) for variant, seconds in finite.items()
        }
        _write(kept)
    return known[name]


def machine_of(device: torch.device) -> str:
    """What times on a device depend on: the device, its driver and versions."""
    if device.type != "cuda":
        processor = f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}"
        return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    library: Any = torch._C  # whose names differ by how torch was built
    driver = library._cuda_getDriverVersion()
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{torch.cuda.get_device_name(device)}, driver {driver}, {versions}"


def _path() -> Path | None:
    """The file of times; None without a folder for caches."""
    cache = default_cache()
    return cache.folder.parent / "times.json" if cache.limit_bytes else None


def _read() -> dict[str, dict[str, dict[str, float]]]:
    if (path := _path()) is None:
        return {}
    try:
        return typed(parse_foreign_json(read_regular(path)), dict[str, dict[str, dict[str, float]]])
    except (OSError, ValueError):
        return {}


def _write(kept: Mapping[str, Mapping[str, Times]]) -> None:
    if (path := _path()) is not None:
        with contextlib.suppress(LorasmithError, OSError):  # they are measured again
            ensure_private(path.parent)
            write_atomic(path, json.dumps(kept, indent=1))
