"""The layout of ComfyUI's trainer: `diffusion_model.<original path>.lora_up.weight`, `.lora_down.weight`, `.alpha`.

Module paths are those of the original checkpoint, with dots. Convolutions are flattened to two dimensions: down is
(rank, in·kh·kw). Norms and biases have full differences, `.diff` and `.diff_b`. ComfyUI reads every key of it; most
other programs read none for UNets, so it serves exchange with ComfyUI and not as a general format.

Read as well: diffusers' paths after `diffusion_model.`, and `model.diffusion_model.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from lorasmith.adapters.algorithms import format_of
from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.formats.layouts.layout import LAYOUTS, Layout
from lorasmith.formats.names.model_names import ModelNames
from lorasmith.formats.names.places import (
    Parts,
    addressed,
    alias_places,
    diffusers_places,
    encoder_paths,
    original_places,
    read_tensors,
)
from lorasmith.formats.names.recognise import COMFYUI_ENCODER, COMFYUI_PREFIXES, any_of
from lorasmith.formats.names.spelling import KOHYA, ModuleTensors, spelled, split_key, without_core


class ComfyLayout(Layout):
    """Original module paths after `diffusion_model.`, all tensors in at most two dimensions."""

    name = "comfy"
    title = "ComfyUI"
    has_alphas = True

    def detects(self, keys: Iterable[str]) -> int:
        return sum(bool(_PREFIX.match(key) and split_key(key)) and not AI_TOOLKIT_SUFFIX.search(key) for key in keys)

    def bases(self, names: ModelNames) -> Mapping[str, Parts]:
        return comfyui_bases(names)

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: ModelNames) -> AdapterState:
        return read_tensors(tensors, self.bases(names), names)

    def write(self, state: AdapterState, names: ModelNames) -> dict[str, Tensor]:
        """Adapters that have no exact place under an original name keep diffusers' name, after PEFT's prefix."""

        def base_of(ref: ModuleRef) -> str:
            if ref.component != DENOISER:
                return f"text_encoders.{names.text_encoders[ref.component].comfyui[0]}.transformer.{ref.path}"
            return ".".join(names.pipeline_place(ref.path))

        modules = addressed(state, names, base_of, _original_base)
        return {
            base + suffix: tensor
            for base, module in modules.items()
            for suffix, tensor in spelled(_plain(module), KOHYA).items()
        }

    def header(self, state: AdapterState, names: ModelNames) -> dict[str, str]:
        return {}


LAYOUTS.register(ComfyLayout.name)(ComfyLayout())


def comfyui_bases(names: ModelNames) -> dict[str, Parts]:
    """Every name of a model's modules that begins with one of ComfyUI's"""
    places = {**alias_places(names), **diffusers_places(names), **original_places(names)}
    bases = {prefix + path: parts for prefix in COMFYUI_PREFIXES for path, parts in places.items()}
    for component in names.text_encoders:
        for kind in names.text_encoders[component].comfyui:
            prefix = f"text_encoders.{kind}.transformer."
            bases |= {prefix + path: parts for path, parts in encoder_paths(names, component)}
    return bases


AI_TOOLKIT_SUFFIX = re.compile(r"\.lora_[AB]\.weight$")
"""What distinguishes ai-toolkit's files, which begin with the same prefix."""

_PREFIX = re.compile(f"{any_of(COMFYUI_PREFIXES)}|{COMFYUI_ENCODER}")


def _original_base(path: str) -> str:
    return COMFYUI_PREFIXES[0] + path


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
