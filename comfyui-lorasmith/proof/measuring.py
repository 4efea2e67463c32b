"""Seconds of processor time a step, and peak memory, of the pack and of ComfyUI's own node."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import checkout
import families


class Meter:
    """Seconds of this process's CPU time between calls, and peak memory above that of the first."""

    def __init__(self, warm: int = 2) -> None:
        self.times: list[float] = []
        self.warm, self.loaded = warm, 0.0

    def start(self) -> None:
        gc.collect()
        self.loaded = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        yield

    def __call__(self, *arguments: Any, **named: Any) -> None:
        self.times.append(time.process_time())

    def found(self) -> dict[str, Any]:
        steps = [b - a for a, b in zip(self.times[self.warm :], self.times[self.warm + 1 :], strict=False)]
        return {
            **({"s/step": statistics.median(steps)} if steps else {}),
            "MB loaded": round(self.loaded),
            "MB above": round(memory("VmHWM") - self.loaded),
        }


def memory(name: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def ours(family: str) -> dict[str, Any]:
    checkout.pack()
    from lorasmith_pack.comfy_model import ComfyModel
    from lorasmith_pack.comparison import measured

    meter, trained = Meter(), ComfyModel(families.model_of(family))
    measured(trained, trained.samples(*families.data_of(family)), meter, **_SETTINGS)
    return meter.found()


def by_built_in(way: str) -> Callable[[str], dict[str, Any]]:
    def measure(family: str) -> dict[str, Any]:
        checkout.pack()
        from lorasmith_pack.comparison import measured_built_in

        meter, (latents, positive) = Meter(), families.data_of(family)
        images = {"samples": torch.cat(latents)}
        measured_built_in(families.model_of(family), [images], [positive], way, meter, **_SETTINGS)
        return meter.found()

    return measure


WAYS = ("default", "no checkpointing", "bypass")
"""Of ComfyUI's node."""

_SETTINGS = {"steps": 8, "rank": 8, "training_dtype": "fp32", "lora_dtype": "fp32"}
