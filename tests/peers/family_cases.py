"""What is compared between ComfyUI and us on the small models of the transformer families.

Both sides make the same inputs here; `record_comfyui_families.py` writes down ComfyUI's numbers, and
`tests/families/test_comfyui_families.py` computes ours.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import models
import torch
from lora_cases import CASES, example
from original_models import save
from torch import Tensor
from transformer_models import TINY

from lorasmith.families.conditionings import CONTROL_METHODS
from lorasmith.families.model import Model
from lorasmith.training.lora_handle import Lora

PROMPTS = {"short": "a fox", "empty": "", "long": "a (red:1.3) fox in the [tall] grass, 日本語 " * 30}
"""Prompts: weights are syntax for Flux.1 alone. The long one is longer than any padding."""

_QUOTED = {"hunyuan-video15": '“Ünder (open:1.2)” beside ‘two’ and "one", again "one"'}

SUBSETS = ("clip_l clip_g", "t5xxl", "clip_l t5xxl", "clip_g")
"""Kinds of encoders given without the others."""

EMPTIED = ("", "t5xxl", "clip_l clip_g", "clip_g t5xxl")
"""Kinds of encoders with a prompt, where the others have an empty one."""

SIGMA = 0.6
SIZE = (64, 96)
"""Height and width of the picture in pixels."""

FRAMES = 5
"""Frames of the clip, for models of video."""

CONTROLS = {
    "one": ("", [(64, 96)]),
    "two": ("", [(64, 32), (96, 64)]),
    "two by index": ("index", [(64, 32), (96, 64)]),
    "two by offset": ("offset", [(64, 96), (96, 64)]),
    "two beyond corners": ("uxo", [(64, 96), (96, 64)]),
    "two at time 0": ("index_timestep_zero", [(64, 32), (96, 64)]),
}
"""Of edit models: the method of the controls, empty for the model's own, and height and width of each in pixels.

No side is longer than the picture's: only then are positions of text the same in both programs for Qwen-Image.
"""

SEEN = {"one": [(2, 3)], "two": [(4, 2), (2, 3)]}
"""Of models whose text encoder sees pictures: height and width of each, in tokens."""

INSTRUCTION = "make the fox blue"

PERCENTS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Where ComfyUI's `percent_to_sigma`, from which its trainer draws, is asked."""

STEPS = (4, 28)
"""Numbers of steps whose sigmas are compared; 28 does not divide ComfyUI's tables."""


def prompts(family: str) -> dict[str, str]:
    """The prompts of a family; `quoted` for one that draws what is in quotation marks."""
    return PROMPTS | ({"quoted": _QUOTED[family]} if family in _QUOTED else {})


def picture() -> Tensor:
    """(1, 3, height, width) pixels in [−1, 1]."""
    return models.seeded("picture", (1, 3, *SIZE), seed=0, std=0.4).clamp(-1, 1)


def mask() -> Tensor:
    """(1, height, width): a mask with soft edges, of another size than the picture."""
    rows = torch.linspace(-1, 1, 48)[:, None] - torch.linspace(-0.5, 1.5, 40)
    return (rows * 6 - 3.03).clamp(0, 1)[None]


def fill_files(folder: Path) -> dict[str, Path]:
    """The small Flux.1 with the denoiser of Fill, whose tokens have further inputs."""
    files, tiny = TINY["flux1"].saved(folder), TINY["flux1"]
    tensors = tiny.original(tiny.denoiser(in_channels=384, out_channels=64))
    files["transformer"].unlink()
    path = files["transformer"].with_name("flux1-fill-dev.safetensors")
    return files | {"transformer": save(path, {name: one.contiguous() for name, one in tensors.items()})}


def noisy(model: Model, frames: int = 1) -> Tensor:
    """A sampler's state at `SIGMA`, of the denoiser's latents."""
    return models.seeded("noisy", (1, *model.components.latent.shape(*SIZE, frames)), seed=0)


def controls(model: Model, which: str) -> list[Tensor]:
    """Latents of an autoencoder, not scaled for the denoiser."""
    latent = model.components.latent
    sizes = CONTROLS[which][1]
    return [models.seeded(f"control {i}", (1, *latent.shape(*size)), seed=0) for i, size in enumerate(sizes)]


def has_method(model: Model, method: str) -> bool:
    """Whether the family has a method of controls; its own, where that is ComfyUI's too."""
    if not any(form.source == "files" for form in model.family.controls):
        return False
    if not method:  # ComfyUI leaves out references of Krea 2 that have none
        return model.family.name != "krea2"
    return CONTROL_METHODS["uxo/uno" if method == "uxo" else method] in model.family.control_methods


def seen(model: Model, which: str) -> list[Tensor]:
    """Pixels (1, 3, height, width) in [−1, 1] of pictures in the size in which they are cut into patches."""
    multiple = next(form.sight.multiple for form in model.family.controls if form.sight)
    sizes = [(rows * multiple, columns * multiple) for rows, columns in SEEN[which]]
    return [models.seeded(f"seen {i}", (1, 3, *size), seed=0, std=0.4).clamp(-1, 1) for i, size in enumerate(sizes)]


def first_frame(model: Model) -> tuple[Tensor, Tensor]:
    """Latents of an autoencoder, not scaled for the denoiser, and an image encoder's states, of HunyuanVideo 1.5."""
    latents = models.seeded("first frame", (1, *model.components.latent.shape(*SIZE)), seed=0)
    return latents, models.seeded("states", (1, 9, 1152), seed=0)


def lora(model: Model) -> Lora:
    """A LoRA on the layers that the family trains by default, unless these are all; changes predictions by a tenth."""
    targets = "attention+ff" if model.defaults.targets == "all-linear" else None
    return example(replace(CASES["lora"], targets=targets), model)


def numbers(key: str, tensor: Tensor) -> dict[str, list[float]]:
    """Shape and fingerprint of a tensor."""
    return {"shape": list(tensor.shape), "fingerprint": models.fingerprint(key, tensor).tolist()}
