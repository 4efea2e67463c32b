"""A T-LoRA cut into LoRAs that ComfyUI switches on one after the other, as its ranks come in while noise falls.

Ranks that come in at the same noise level are a band, a plain LoRA at the scale of the whole. ComfyUI's hooks give each
a `start_percent`, before which it is off, so that pictures are those of the T-LoRA. With fewer bands than levels at
which ranks come in, neighbouring levels are one, at their mean. The first band has all that does not depend on noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError, OptionError, OutputError
from lorasmith.core.files import atomic_folder, write_atomic
from lorasmith.formats.lora_file import save_lora
from lorasmith.formats.metadata import RANKS_ENTRY, LeveledRanks
from lorasmith.formats.scales import scale_of
from lorasmith.toolbox.convert import named_lora
from lorasmith.toolbox.lora_files import free_target, noted

MOST_BANDS = 16
"""Bands by default, at most."""

GRAPH = "workflow.json"
"""Name of the example graph beside the bands."""


@dataclass(frozen=True)
class Band:
    """One of the LoRAs."""

    path: Path
    start_percent: float  # part of sampling, 0 to 1, from which it is on
    modules: int


@dataclass(frozen=True)
class Bands:
    """The result of a cut."""

    folder: Path
    bands: Sequence[Band]
    is_exact: bool  # whether every rank comes in at its own level


def cut_into_bands(
    path: Path, output: Path, *, count: int | None = None, model: str | Path | None = None, overwrite: bool = False
) -> Bands:
    """Cut a T-LoRA into `count` bands, written to the folder `output` with a graph for ComfyUI that applies them.

    Only names are read from `model`; None uses the released model of the family. Raises LoraError if the file is no
    T-LoRA with the ranks of its training, OptionError for a count below 1, OutputError and ModelError.
    """
    if count is not None and count < 1:
        raise OptionError(f"a LoRA is cut into at least 1 band, got {count}; raise --count")
    path, target = Path(path), free_target(Path(output), overwrite=overwrite)
    if target.exists() and not (target / GRAPH).is_file():
        raise OutputError(f"{target} has no bands, and only a folder of bands is replaced; choose another --output")
    state, names = named_lora(path, model)
    leveled = LeveledRanks.of(state.metadata)
    plain = {
        ref: adapter for ref, adapter in state.adapters.items() if ref.component == DENOISER and _is_plain(adapter)
    }
    if leveled is None or leveled.total != sum(_rank(adapter) for adapter in plain.values()):
        raise LoraError(
            f"{path.name} must be a T-LoRA as it was trained, and has no ranks by noise level"
            + ("" if leveled is None else " that are those of training")
            + "; give the file that --tlora has trained"
        )
    starts = _starts(plain, leveled)
    levels = sorted({start for of_module in starts.values() for start in of_module}, reverse=True)
    groups = _grouped(levels, min(len(levels), MOST_BANDS if count is None else count))
    rest = replace(state, adapters={ref: adapter for ref, adapter in state.adapters.items() if ref not in plain})
    bands, number_format = [], _number_format(plain)
    with atomic_folder(target) as folder:
        for number, group in enumerate(groups, 1):
            percent = start_percent(sum(group) / len(group), leveled)
            adapters = {
                ref: part for ref, adapter in plain.items() if (part := _part(adapter, starts[ref], group)) is not None
            }
            kept = rest if number == 1 else AdapterState()
            metadata = {key: value for key, value in state.metadata.items() if key != RANKS_ENTRY}
            note = f"band {number} of {len(groups)} of {path.name}, from start_percent {percent:.4f}"
            name = f"{path.stem}-band{number:02}.safetensors"
            whole = AdapterState({**kept.adapters, **adapters}, kept.differences, kept.unknown, words=kept.words)
            save_lora(folder / name, whole, names, dtype=number_format, metadata=noted(metadata, note))
            bands.append(Band(target / name, percent, len(adapters)))
        graph = comfyui_graph([(f"{target.name}/{band.path.name}", band.start_percent) for band in bands])
        write_atomic(folder / GRAPH, json.dumps(graph, indent=2).encode())
    return Bands(target, bands, len(groups) == len(levels))


def start_percent(share: float, leveled: LeveledRanks) -> float:
    """ComfyUI's part of sampling, 0 to 1, from which noise is at most at a share of diffusion time."""
    if share >= 1:
        return 0.0
    if leveled.steps:  # half a step above the last with this rank: samplers' steps lie between those of the table
        step = int(share * leveled.steps + _ROUNDING)
        return min(1.0, max(0.0, 1 - (step + 0.5) / (leveled.steps - 1)))
    share += _ROUNDING
    return max(0.0, 1 - share / (leveled.shift - (leveled.shift - 1) * share))


def comfyui_graph(bands: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """A graph for ComfyUI, in the format of its API, that draws with LoRAs (name, start_percent) as hooks."""
    graph: dict[str, Any] = {
        "model": _node("CheckpointLoaderSimple", ckpt_name="model.safetensors"),
        "latent": _node("EmptyLatentImage", width=1024, height=1024, batch_size=1),
        "off": _node("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0),
    }
    hooks: dict[str, Any] = {}
    for number, (name, percent) in enumerate(bands, 1):
        graph[f"band {number}"] = _node("CreateHookLora", lora_name=name, strength_model=1.0, strength_clip=1.0)
        made = [f"band {number}", 0]
        if percent > 0:
            graph[f"on {number}"] = _node(
                "CreateHookKeyframe", strength_mult=1.0, start_percent=percent, prev_hook_kf=["off", 0]
            )
            graph[f"from {number}"] = _node("SetHookKeyframes", hooks=made, hook_kf=[f"on {number}", 0])
            made = [f"from {number}", 0]
        if hooks:
            graph[f"bands 1 to {number}"] = _node("CombineHooks2", hooks_A=hooks["all"], hooks_B=made)
            made = [f"bands 1 to {number}", 0]
        hooks["all"] = made
    graph["clip"] = _node(
        "SetClipHooks", clip=["model", 1], apply_to_conds=True, schedule_clip=False, hooks=hooks["all"]
    )
    graph["positive"] = _node("CLIPTextEncode", clip=["clip", 0], text="a picture")
    graph["negative"] = _node("CLIPTextEncode", clip=["clip", 0], text="")
    graph["sampler"] = _node(
        "KSampler",
        model=["model", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        seed=0,
        steps=20,
        cfg=7.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    graph["picture"] = _node("VAEDecode", samples=["sampler", 0], vae=["model", 2])
    graph["saved"] = _node("SaveImage", images=["picture", 0], filename_prefix="bands")
    return graph


_ROUNDING = 1e-6


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _is_plain(weights: AdapterWeights) -> bool:
    return weights.tensors.keys() == {"down", "up"}


def _rank(weights: AdapterWeights) -> int:
    return weights.tensors["down"].shape[0]


def _starts(plain: Mapping[ModuleRef, AdapterWeights], leveled: LeveledRanks) -> dict[ModuleRef, list[float]]:
    """The share of diffusion time from which each inner dimension of a module is used."""
    schedule = leveled.schedule
    return {
        ref: [
            round(schedule.start(index // schedule.copies, _rank(adapter) // schedule.copies), 9)
            for index in range(_rank(adapter))
        ]
        for ref, adapter in plain.items()
    }


def _grouped(levels: Sequence[float], count: int) -> list[list[float]]:
    """Descending levels in `count` groups of about equal size; the first level, from pure noise, stays alone."""
    if count == 1:
        return [list(levels)]
    others, found = list(levels[1:]), [list(levels[:1])]
    for number in range(count - 1):
        first, last = (len(others) * place // (count - 1) for place in (number, number + 1))
        found.append(others[first:last])
    return found


def _part(weights: AdapterWeights, starts: Sequence[float], group: Sequence[float]) -> AdapterWeights | None:
    """The inner dimensions of a module that come in at these levels, at the scale of the whole; None for none."""
    chosen = torch.tensor([index for index, start in enumerate(starts) if start in group], dtype=torch.long)
    if not len(chosen):
        return None
    tensors = {"down": weights.tensors["down"][chosen], "up": weights.tensors["up"][:, chosen]}
    return replace(weights, tensors=tensors, alpha=scale_of(weights) * len(chosen))


def _number_format(plain: Mapping[ModuleRef, AdapterWeights]) -> torch.dtype | None:
    formats = {tensor.dtype for adapter in plain.values() for tensor in adapter.tensors.values()}
    return formats.pop() if len(formats) == 1 else None
