"""How long a LoRA takes on a machine, before anything is downloaded.

What a step of each released model computes is counted on the meta device (`tools/step_work.py`); the rates of the
machine are measured once, in less than a second, and kept. On a processor a step takes the time of its products and of
its operations, on a GPU, which computes while the host launches operations, the longer of the two.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from lorasmith.bench.benchmark import measured_rates
from lorasmith.bench.measure import pass_seconds
from lorasmith.core.placement import fast_dtype
from lorasmith.core.processor import BUSY, busy_processors, usable_processors
from lorasmith.families.locating import BUILT_IN
from lorasmith.runs.presets import PRESETS, USUAL_IMAGES, USUAL_PRESET, recipe_settings, run_s
from lorasmith.training.config import TrainConfig
from lorasmith.training.measured_times import Times, measured


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What a step on one picture of a model's own size computes at the defaults, and the memory that it needs."""

    family: str  # title
    resolution: int  # side of the picture
    weights: int  # of the denoiser, in millions
    gflop: float  # of products
    operations: int
    least_gib: float  # of a card, with the settings that need least

    def at(self, resolution: int) -> StepWork:
        """That of a picture of another size; attention, which grows faster, is a small part of it."""
        ratio = (resolution / self.resolution) ** 2
        return replace(self, resolution=resolution, gflop=self.gflop * ratio)


STEP_WORK: Mapping[str, StepWork] = {
    BUILT_IN: StepWork(
        family="Stable Diffusion 1.x", resolution=64, weights=9, gflop=2.44, operations=1843, least_gib=0.5
    ),
    "sd1.5": StepWork(
        family="Stable Diffusion 1.x", resolution=512, weights=860, gflop=1710, operations=3224, least_gib=1.1
    ),
    "anima": StepWork(family="Anima", resolution=1024, weights=2091, gflop=38400, operations=8301, least_gib=2.5),
    "sdxl": StepWork(
        family="Stable Diffusion XL", resolution=1024, weights=2567, gflop=13800, operations=10728, least_gib=2.8
    ),
    "wan-2.1-1.3b": StepWork(family="Wan", resolution=640, weights=1419, gflop=9690, operations=9667, least_gib=1.5),
    "flux.2-klein-4b": StepWork(
        family="Flux.2 klein", resolution=1024, weights=3876, gflop=75500, operations=4378, least_gib=4.6
    ),
    "sd3.5-medium": StepWork(
        family="Stable Diffusion 3.5", resolution=1024, weights=2243, gflop=24300, operations=7661, least_gib=2.6
    ),
    "z-image": StepWork(family="Z-Image", resolution=1024, weights=6155, gflop=109000, operations=7988, least_gib=4.2),
    "ideogram-4": StepWork(
        family="Ideogram 4", resolution=1024, weights=9279, gflop=175000, operations=9102, least_gib=6.3
    ),
    "chroma1-hd": StepWork(
        family="Chroma", resolution=1024, weights=8900, gflop=136000, operations=11303, least_gib=5.0
    ),
    "qwen-image-2.1": StepWork(
        family="Qwen-Image 2.1", resolution=1024, weights=7115, gflop=135000, operations=7269, least_gib=4.7
    ),
    "flux.1-dev": StepWork(
        family="Flux.1", resolution=1024, weights=11901, gflop=154000, operations=11535, least_gib=5.5
    ),
    "krea-2": StepWork(family="Krea 2", resolution=1024, weights=12820, gflop=235000, operations=8018, least_gib=7.4),
    "qwen-image": StepWork(
        family="Qwen-Image", resolution=1024, weights=20430, gflop=143000, operations=17419, least_gib=5.9
    ),
}
"""By the name of the release, or of the built-in model."""


@dataclass(frozen=True)
class Rates:
    """What a machine computes."""

    gflop_s: float  # seconds of a billion operations in large products
    operation_s: float  # seconds of an operation on small tensors
    is_processor: bool

    def step_s(self, work: StepWork) -> float:
        """Seconds of a step."""
        products = work.gflop * self.gflop_s / _REACHED
        others = work.operations * self.operation_s
        return products + others if self.is_processor else max(products, others)


_REACHED = 0.6
"""Share of the rate of a large product that those of a step reach."""
_SMALL = 64  # side of the tensors of operations that are timed
_ROUNDS = 12  # of which the fastest counts, as other programs slow the others down
_CHILD_S = 120  # for a GPU to be measured

EVENING_S = 4 * 3600.0
DAY_S = 24 * 3600.0
_measuring = threading.Lock()


def work_of(family: str, weights: int = 0) -> StepWork | None:
    """The work of a model of a family by its title; None for families that are not in the table.

    Products of a size that was not counted are in proportion to the weights, which are in millions; of 0, which is
    unknown, they are those of the family's largest release.
    """
    known = [work for name, work in STEP_WORK.items() if work.family == family and name != BUILT_IN]
    if not known:
        return None
    largest = max(known, key=lambda work: work.weights)
    if not weights:
        return largest
    nearest = min(known, key=lambda work: abs(math.log(weights / work.weights)))
    ratio = weights / nearest.weights
    return replace(nearest, weights=weights, gflop=nearest.gflop * ratio, least_gib=nearest.least_gib * ratio)


def usual_s(picture_s: float) -> float:
    """Seconds of a LoRA of the usual preset and number of photos."""
    preset = PRESETS[USUAL_PRESET]
    share = recipe_settings(preset).get("preview_share", TrainConfig().preview_share)
    return run_s(picture_s, seen=preset.seen(USUAL_IMAGES), preview_share=share)


def best_of(models: Iterable[tuple[str, float | None, bool | None]]) -> str | None:
    """The name of the model for a machine, of (name, seconds of a LoRA, whether it fits), the smallest first.

    The largest one that is trained within an evening, else the fastest within a day.
    """
    fitting = [(name, seconds) for name, seconds, fits in models if seconds is not None and fits is not False]
    if soon := [name for name, seconds in fitting if seconds <= EVENING_S]:
        return soon[-1]
    fastest = min(fitting, key=lambda pair: pair[1], default=None)
    return fastest[0] if fastest is not None and fastest[1] <= DAY_S else None


def rates_of(device: str) -> Rates | None:
    """The rates of a device by its name, kept; measured the first time, and once in a process as long as other programs
    kept processors busy meanwhile. None if that fails.
    """
    with _measuring:
        return _rates_once(device)


@functools.lru_cache(maxsize=8)
def _rates_once(device: str) -> Rates | None:
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        return None
    measure = _measured_here if target.type == "cpu" else _in_child
    try:
        times = measured(target, "rates", functools.partial(measure, target), is_final=_was_quiet)
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError):
        return None
    if not {"gigaflop", "operation"} <= times.keys():
        return None
    return Rates(times["gigaflop"], times["operation"], target.type == "cpu")


def _was_quiet(kept: Times) -> bool:
    return kept.get("busy", BUSY) < BUSY


def _measured_here(device: torch.device) -> Times:
    """Times of a device, and the processors that other programs kept busy.

    Those of a processor are of one thread, as others depend on what else runs, and of products those that its
    processors have together.
    """
    is_processor, before = device.type == "cpu", torch.get_num_threads()
    if is_processor:
        torch.set_num_threads(1)
    try:
        products = measured_rates(device, fast_dtype(torch.bfloat16, device)).products
        operation = _operation_s(device)
    finally:
        torch.set_num_threads(before)
    together = usable_processors() if is_processor else 1
    return {"gigaflop": 1e9 / products / together, "operation": operation, "busy": busy_processors()}


def _operation_s(device: torch.device) -> float:
    """Seconds of an operation in forward and backward passes of small layers."""
    x, weight = (torch.ones(_SMALL, _SMALL, device=device, requires_grad=True) for _ in range(2))

    def once() -> None:
        y = x
        for _ in range(_LAYERS):
            y = F.gelu(F.layer_norm(F.linear(y, weight), (_SMALL,)))
        y.sum().backward()

    return pass_seconds(once, steps=_ROUNDS, device=device, warmup=1).low / (_LAYERS * _OPERATIONS)


_LAYERS = 8
_OPERATIONS = 8  # of a layer: three forward, five backward


def _in_child(device: torch.device) -> Times:
    """Times of a GPU, in a process of its own: who asks takes none of its memory."""
    command = [sys.executable, "-P", "-m", "lorasmith.runs.time_estimate", str(device)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_S, check=True)
    found: dict[str, Any] = json.loads(ended.stdout)
    return {name: float(seconds) for name, seconds in found.items()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measured_here(torch.device(sys.argv[1]))))
