"""ComfyUI's trainer and this one on the same MODEL and images: seconds a step, and memory."""

from __future__ import annotations

import gc
import inspect
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as management
import comfy_extras.nodes_train as built_in
import psutil
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.report.contact_sheet import load_font
from lorasmith.runs.run import Host, run
from lorasmith.training.events import Event, StepDone
from lorasmith.training.job import plan_job
from lorasmith.training.train import Plan

from .comfy_model import ComfyModel
from .inputs import CATEGORY, NODE, TRAINED, config_of, samples_of, show_text

_WARM = 2  # steps that are not counted, in which memory is taken and kernels are chosen
_SAMPLED_S = 0.005  # between two looks at the memory of a process without a GPU


@dataclass
class Meter:
    """Seconds between calls, one at the end of each step, and the peak of memory above that before the first."""

    clock: Callable[[], float] = time.perf_counter
    times: list[float] = field(default_factory=list)
    peak: int = 0  # bytes

    def __call__(self, *arguments: Any, **named: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(self.clock())

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return statistics.median(b - a for a, b in zip(self.times[_WARM:], self.times[_WARM + 1 :], strict=False))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the context, memory is watched."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            self.peak = torch.cuda.max_memory_allocated() - before
            return
        process, ended = psutil.Process(), threading.Event()
        before = process.memory_info().rss

        def watch() -> None:
            while not ended.wait(_SAMPLED_S):
                self.peak = max(self.peak, process.memory_info().rss - before)

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield
        finally:
            ended.set()
            watching.join()


WAYS = {"default": (True, False), "no checkpointing": (False, False), "bypass": (False, True)}
"""Ways of ComfyUI's node: gradient_checkpointing, bypass_mode."""


def with_built_in(
    model: Any, latents: Sequence[Mapping[str, Tensor]], positive: Sequence[Any], way: str, **settings: Any
) -> Any:
    """Train by ComfyUI's own node, with its defaults beside these settings; returns its outputs."""
    checkpointing, bypass = WAYS[way]
    node = built_in.TrainLoraNode
    declared = node.INPUT_TYPES()["required"]
    values = {name: kind[1]["default"] for name, kind in declared.items() if len(kind) > 1 and "default" in kind[1]}
    values |= {"existing_lora": "[None]", "gradient_checkpointing": checkpointing, "bypass_mode": bypass, **settings}
    taken = inspect.signature(node.execute).parameters  # fewer in older ones
    lists = {name: [value] for name, value in values.items() if name in taken}
    with torch.inference_mode():
        found = node.execute(model=[model], latents=list(latents), positive=list(positive), **lists)
    return getattr(found, "result", None) or found.args


def measured_built_in(model: Any, latents: Any, positive: Any, way: str, meter: Meter, **settings: Any) -> None:
    bar = built_in.ProgressBar
    built_in.ProgressBar = type("Bar", (), {"__init__": lambda self, total: None, "update": meter.__call__})
    try:
        management.load_models_gpu([model])
        with meter.running():
            with_built_in(model, latents, positive, way, **settings)
    finally:
        built_in.ProgressBar = bar


class _Measured(Host):
    """A run without files."""

    runs = None

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._meter()

    def cancelled(self) -> bool:
        return bool(management.processing_interrupted())


def measured(model: ComfyModel, samples: Sequence[Sample], meter: Meter, **settings: Any) -> None:
    config = config_of({"gradient_checkpointing": True, **settings}, (), model)
    management.load_models_gpu([model.patcher])
    with meter.running():
        run(Plan(job=plan_job(model, config, model.device), data=EncodedDataset(tuple(samples))), _Measured(meter))
    management.throw_exception_if_processing_interrupted()


class CompareTrainers:
    """Measures both on this machine."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Trains some steps with ComfyUI's Train LoRA and with Lorasmith's, on the same model and images, and shows "
        "seconds a step and memory beyond the loaded model. What they learn is thrown away."
    )
    RETURN_TYPES = ("STRING", "IMAGE")
    RETURN_NAMES = ("table", "picture")
    OUTPUT_TOOLTIPS = ("Seconds a step and memory of each way, as Markdown.", "The same as bars.")
    FUNCTION = "compare"
    OUTPUT_NODE = True
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        counted = {"default": 8, "min": _WARM + 2, "max": 1000, "tooltip": f"Of each way; {_WARM} are not counted."}
        return {
            "required": {
                **TRAINED,
                "steps": ("INT", counted),
                "rank": ("INT", {"default": 8, "min": 1, "max": 128, "tooltip": "Of the LoRAs that are trained."}),
                "training_dtype": (
                    ["bf16", "fp32", "none"],
                    {"default": "bf16", "tooltip": "In which both compute; none is that of the weights."},
                ),
            },
            "hidden": NODE,
        }

    def compare(
        self,
        model: Sequence[Any],
        latents: Sequence[Mapping[str, Tensor]],
        positive: Sequence[Any],
        steps: Sequence[int],
        rank: Sequence[int],
        training_dtype: Sequence[str],
        unique_id: Sequence[str | None] = (None,),
    ) -> dict[str, Any]:
        settings = {"steps": steps[0], "rank": rank[0], "training_dtype": training_dtype[0]}
        if training_dtype[0] == "fp32":  # ComfyUI's bypass mode fails with weights in its default, bf16
            settings["lora_dtype"] = "fp32"
        found: dict[str, Meter | str] = {}
        for way in WAYS:
            meter = Meter()
            try:
                measured_built_in(model[0], latents, positive, way, meter, **settings)
                found[f"ComfyUI, {way}"] = meter
            except Exception as error:  # of ComfyUI's own node, which fails on some networks
                management.throw_exception_if_processing_interrupted()
                found[f"ComfyUI, {way}"] = str(error).partition("\n")[0] or type(error).__name__
        with torch.inference_mode(False):
            trained = ComfyModel(model[0])
            meter = Meter()
            measured(trained, samples_of(trained, latents, positive), meter, **settings)
            found["Lorasmith"] = meter
        text = table(found)
        show_text(text, unique_id[0])
        return {"ui": {"text": [text]}, "result": (text, picture(found))}


def table(found: Mapping[str, Meter | str]) -> str:
    """As Markdown."""
    lines = ["| trainer | s/step | MB above the model |", "|---|---|---|"]
    for name, one in found.items():
        lines.append(
            f"| {name} | fails: {one} | |"
            if isinstance(one, str)
            else f"| {name} | {one.step:.3g} | {one.peak / 2**20:.0f} |"
        )
    return "\n".join(lines)


_ROW, _LABEL, _BAR, _EDGE = 40, 230, 340, 20
_COLOURS = {True: "#2f7d5b", False: "#8a8f98"}


def picture(found: Mapping[str, Meter | str]) -> Tensor:
    """Bars of both, as IMAGE (1, height, width, 3)."""
    font, bold = load_font(14), load_font(15, bold=True)
    parts = {
        "Seconds a step": ({name: one.step for name, one in found.items() if isinstance(one, Meter)}, "{:.3g} s"),
        "MB beyond the loaded model": (
            {name: one.peak / 2**20 for name, one in found.items() if isinstance(one, Meter)},
            "{:.0f} MB",
        ),
    }
    height = len(parts) * (len(found) + 1) * _ROW + 2 * _EDGE
    sheet = Image.new("RGB", (_LABEL + _BAR + 120, height), "white")
    draw, top = ImageDraw.Draw(sheet), _EDGE
    for title, (values, text) in parts.items():
        draw.text((_EDGE, top), title, "black", bold)
        for name in found:
            top += _ROW
            draw.text((_EDGE, top), name, "black", font)
            if name not in values:
                draw.text((_LABEL, top), "fails", "#a03030", font)
                continue
            width = round(_BAR * values[name] / max(*values.values(), 1e-9))
            draw.rectangle((_LABEL, top, _LABEL + max(1, width), top + 18), _COLOURS[name == "Lorasmith"])
            draw.text((_LABEL + width + 8, top), text.format(values[name]), "black", font)
        top += _ROW
    return torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(1, *sheet.size[::-1], 3) / 255
