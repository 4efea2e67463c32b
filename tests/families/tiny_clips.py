"""The small Wan with small pictures, and both experts of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tiny_parts import original_tensors, randomized
from tiny_wan import WAN

from lorasmith.families.model import Model
from tests.families.original_models import save


def small(model: Model) -> Model:
    """The model with defaults for small pictures and short clips."""
    defaults = replace(model.defaults, resolution=32, frames=5, frame_rate=5.0)
    return replace(model, components=replace(model.components, defaults=defaults))


def clip_model(folder: Path) -> Model:
    """The model, from files in a folder."""
    return small(WAN.loaded(WAN.saved(folder)))


def expert_files(folder: Path) -> dict[str, Path]:
    """Files of two experts by their names, and of the parts that they share."""
    files = WAN.saved(folder)
    for seed, name in enumerate(("high_noise", "low_noise"), start=1):
        denoiser = randomized(WAN.parts()["transformer"], seed=seed)
        tensors = {key: one.clone().contiguous() for key, one in original_tensors("wan", denoiser).items()}
        files[name] = save(files["transformer"].with_name(f"wan2.2_t2v_{name}_14B_fp16.safetensors"), tensors)
    randomized(WAN.parts()["transformer"])  # which all tests share
    return files
