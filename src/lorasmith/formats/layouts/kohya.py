"""kohya's layout: `lora_unet_down_blocks_0_…_to_q.lora_down.weight`, `.lora_up.weight`, `.alpha`.

Module paths have their dots flattened to underscores, so names are looked up in tables made from the model and never
parsed. UNets of Stable Diffusion 1 and 2 have diffusers' names, SDXL and transformers those of the original
checkpoint. LyCORIS uses the same layout for its algorithms.

Read as well: the other naming, `lycoris_` (LyCORIS' wrapper), `lora_transformer_` (OneTrainer), `oft_unet_` (the OFT
of sd-scripts for UNets, which is LyCORIS' under another name).

LyCORIS bounds the rotations of OFT and BOFT by alpha times the number of outputs, where `AdapterWeights` and ComfyUI
have the bound itself. On reading, alpha becomes the bound; on writing, the bound is applied to the rotations and alpha
is zero, which every program reads alike. The metadata keeps the bounds, for a run that continues the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor

from lorasmith.adapters.algorithms import format_of
from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.formats.layouts.layout import Layout, Lost
from lorasmith.formats.metadata import BOUNDS
from lorasmith.formats.names import (
    ModelNames,
    PlacedModules,
    diffusers_places,
    encoder_paths,
    original_places,
    other_places,
    unfusable,
)
from lorasmith.formats.scales import checked_scale
from lorasmith.formats.spelling import KOHYA, KOHYA_ENCODER, KOHYA_PREFIXES, ModuleTensors, any_of, spelled, split_key


class KohyaLayout(Layout):
    """Flattened module paths after `lora_unet_` and `lora_te_`, a scalar `.alpha` for each module."""

    name = "kohya"
    title = "kohya / sd-scripts"
    writes_cores = True
    has_alphas = True
    alphas_misread = True
    refused_by: Mapping[str, str] = MappingProxyType({})

    def detects(self, keys: Iterable[str]) -> int:
        return sum(bool(_PREFIX.match(key) and split_key(key)) for key in keys)

    def bases(self, names: ModelNames) -> Mapping[str, PlacedModules]:
        namings = [diffusers_places(names), original_places(names)]
        if names.kohya_naming == "original":
            namings.reverse()
        namings.append(other_places(names))
        bases: dict[str, PlacedModules] = {}
        for prefix in KOHYA_PREFIXES:
            for places in namings:
                for path, parts in places.items():
                    bases.setdefault(prefix + _flat(path), parts)
        for component in names.text_encoders:
            for prefix in names.text_encoders[component].kohya:
                bases |= {prefix + _flat(path): parts for path, parts in encoder_paths(names, component)}
        return bases

    def base_of(self, ref: ModuleRef, names: ModelNames) -> str:
        if ref.component != DENOISER:
            return names.text_encoders[ref.component].kohya[0] + _flat(ref.path)
        return (_UNFUSED if self.follows_original(names) else _WRITTEN) + _flat(ref.path)

    def follows_original(self, names: ModelNames) -> bool:
        return names.kohya_naming == "original"

    def original_base(self, path: str) -> str:
        return _WRITTEN + _flat(path)

    def spelled(self, module: ModuleTensors) -> dict[str, Tensor]:
        return spelled(module, KOHYA, norm_names=True)

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: ModelNames) -> AdapterState:
        state = super().read(tensors, metadata, names)
        bounds = _stated_bounds(metadata)
        for ref, weights in state.adapters.items():
            form = format_of(weights)
            if form.bounded is None:
                continue
            if weights.alpha:
                state.adapters[ref] = replace(weights, alpha=weights.alpha * form.shape_of(weights)[0])
            elif ref.path in bounds:
                state.adapters[ref] = replace(weights, alpha=bounds[ref.path])
        return state

    def write(self, state: AdapterState, names: ModelNames) -> dict[str, Tensor]:
        return super().write(_bounded(state), names)

    def header(self, state: AdapterState, names: ModelNames) -> dict[str, str]:
        bounds = {
            ref.path: weights.alpha
            for ref, weights in state.adapters.items()
            if format_of(weights).bounded is not None and weights.alpha
        }
        return {BOUNDS: json.dumps(bounds, sort_keys=True)} if bounds else {}

    def losses(self, state: AdapterState, names: ModelNames) -> list[Lost]:
        reason = "q, k, v cannot be fused exactly, and kohya's scripts and diffusers do not look for their names"
        return [Lost(ref, reason, left_out=False) for ref in self.unfused(state, names)]

    def unfused(self, state: AdapterState, names: ModelNames) -> list[ModuleRef]:
        return [] if names.kohya_naming == "diffusers" else unfusable(_bounded(state), names)


_WRITTEN, _UNFUSED = KOHYA_PREFIXES[:2]
_PREFIX = re.compile(f"{any_of(KOHYA_PREFIXES)}|{KOHYA_ENCODER}")


def _bounded(state: AdapterState) -> AdapterState:
    """A LoRA with the bounds of its rotations applied, and alpha 0."""
    bounded = {ref: format_of(weights).bounded for ref, weights in state.adapters.items()}
    return replace(
        state,
        adapters={
            ref: weights if (apply := bounded[ref]) is None else apply(weights)
            for ref, weights in state.adapters.items()
        },
    )


def _stated_bounds(metadata: Mapping[str, str]) -> dict[str, float]:
    """Bounds of rotations by module path, as `header` states them. Raises LoraError where they are malformed."""
    text = metadata.get(BOUNDS, "{}")
    try:
        bounds = {path: checked_scale(bound) for path, bound in parse_foreign_json(text).items()}
    except (ValueError, AttributeError) as error:
        raise LoraError(
            f"{BOUNDS} in a LoRA's metadata must give a number for each module path, got {text[:60]!r}; "
            "remove that entry, and rotations have no bound"
        ) from error
    return {path: bound for path, bound in bounds.items() if bound > 0}


def _flat(path: str) -> str:
    return path.replace(".", "_")
