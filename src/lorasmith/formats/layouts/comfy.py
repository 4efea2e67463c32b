"""The layouts of ComfyUI's trainer and of ai-toolkit, which share ComfyUI's prefix.

ComfyUI     `diffusion_model.<original path>.lora_up.weight`, `.lora_down.weight`, `.alpha`
ai-toolkit  `diffusion_model.<path>.lora_A.weight`, `.lora_B.weight`, alpha multiplied in

ComfyUI's module paths are those of the original checkpoint, with dots. Convolutions are flattened to two dimensions:
down is (rank, in·kh·kw). Norms and biases have full differences, `.diff` and `.diff_b`. ComfyUI reads every key of it;
most other programs read none for UNets, so it serves exchange with ComfyUI and not as a general format.

Read as well: diffusers' paths after `diffusion_model.`, and `model.diffusion_model.`.

ai-toolkit's paths are diffusers' or the original checkpoint's, by family (`ModelNames.ai_toolkit_naming`). Without
`.alpha` tensors, which some of diffusers' loaders refuse and others ignore, it is what ComfyUI, diffusers and
the trainers of newer families all read. Algorithms other than LoRA keep LyCORIS' names and alphas after the same paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from lorasmith.adapters.algorithms import format_of
from lorasmith.core.adapter_state import DENOISER, ModuleRef
from lorasmith.formats.layouts.layout import Layout
from lorasmith.formats.names import (
    ModelNames,
    PlacedModules,
    diffusers_places,
    encoder_paths,
    original_places,
    other_places,
)
from lorasmith.formats.scales import baked
from lorasmith.formats.spelling import (
    COMFYUI_ENCODER,
    COMFYUI_PREFIXES,
    KOHYA,
    PEFT,
    ModuleTensors,
    any_of,
    spelled,
    split_key,
    without_core,
)


class _ComfyuiNames(Layout):
    """Module paths after ComfyUI's prefixes; adapters without an exact place there have PEFT's prefix."""

    def bases(self, names: ModelNames) -> Mapping[str, PlacedModules]:
        places = {**other_places(names), **diffusers_places(names), **original_places(names)}
        bases = {prefix + path: parts for prefix in COMFYUI_PREFIXES for path, parts in places.items()}
        for component in names.text_encoders:
            for prefix in _encoder_prefixes(component, names):
                bases |= {prefix + path: parts for path, parts in encoder_paths(names, component)}
        return bases

    def base_of(self, ref: ModuleRef, names: ModelNames) -> str:
        if ref.component != DENOISER:
            return _encoder_prefixes(ref.component, names)[0] + ref.path
        return ".".join(names.pipeline_place(ref.path))

    def original_base(self, path: str) -> str:
        return COMFYUI_PREFIXES[0] + path


def _encoder_prefixes(component: str, names: ModelNames) -> list[str]:
    """What is in front of the paths of a text encoder; the first is written, all are read."""
    own = names.text_encoders[component]
    return [f"text_encoders.{kind}.transformer.{own.comfyui_stem}" for kind in own.comfyui]


class ComfyLayout(_ComfyuiNames):
    """Original module paths after `diffusion_model.`, all tensors in at most two dimensions."""

    name = "comfy"
    title = "ComfyUI"
    has_alphas = True

    def detects(self, keys: Iterable[str]) -> int:
        return sum(bool(_PREFIX.match(key) and split_key(key)) and not _AI_TOOLKIT_SUFFIX.search(key) for key in keys)

    def follows_original(self, names: ModelNames) -> bool:
        return True

    def spelled(self, module: ModuleTensors) -> dict[str, Tensor]:
        return spelled(_plain(module), KOHYA)


class AiToolkitLayout(_ComfyuiNames):
    """ComfyUI's prefix with PEFT's names of the factors."""

    name = "ai-toolkit"
    title = "ai-toolkit"

    def detects(self, keys: Iterable[str]) -> int:
        return sum(key.startswith(COMFYUI_PREFIXES) and bool(_AI_TOOLKIT_SUFFIX.search(key)) for key in keys)

    def base_of(self, ref: ModuleRef, names: ModelNames) -> str:
        if ref.component == DENOISER and names.ai_toolkit_naming == "diffusers":
            return COMFYUI_PREFIXES[0] + ref.path
        return super().base_of(ref, names)

    def follows_original(self, names: ModelNames) -> bool:
        return names.ai_toolkit_naming == "original"

    def spelled(self, module: ModuleTensors) -> dict[str, Tensor]:
        """A LoRA in PEFT's spelling without alpha; anything more in LyCORIS'."""
        weights = None if module.adapter is None else without_core(module.adapter)
        if weights is None or not format_of(weights).is_low_rank or "dora_scale" in weights.tensors:
            return spelled(module, KOHYA)
        return spelled(replace(module, adapter=baked(weights)), PEFT, alpha=False)


_AI_TOOLKIT_SUFFIX = re.compile(r"\.lora_[AB]\.weight$")
"""What distinguishes ai-toolkit's files, which begin with the same prefix."""

_PREFIX = re.compile(f"{any_of(COMFYUI_PREFIXES)}|{COMFYUI_ENCODER}")


def _plain(module: ModuleTensors) -> ModuleTensors:
    """A LoRA's factors in two dimensions, and other algorithms without a Tucker core, which ComfyUI fails to merge.

    A LoRA's Tucker core needs its kernel, so such an adapter is not flattened.
    """
    weights = module.adapter
    if weights is None:
        return module
    form = format_of(weights)
    if not form.is_low_rank:
        return replace(module, adapter=without_core(weights))
    if form.cores & weights.tensors.keys():
        return module
    tensors = {name: t.flatten(1) if name in ("down", "up") else t for name, t in weights.tensors.items()}
    return replace(module, adapter=replace(weights, tensors=tensors))
