"""diffusers' layout: `unet.<path>.lora_A.weight` and `.lora_B.weight` as PEFT names them, A being the down matrix.

Alpha has no tensor here. diffusers keeps it in the header, which the other programs that read this layout ignore:
without it they scale by 1. Written files are correct for both: alpha / rank is multiplied into the factors, and the
header states that alpha equals the rank.

Read as well: older diffusers (`.lora.down.weight`, `.processor.to_q_lora.down.weight`), paths with no prefix at all,
original paths in their place, `.alpha` tensors; XLabs' names for Flux.1 (`double_blocks.0.processor.qkv_lora1`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lorasmith.adapters.algorithms import format_of
from lorasmith.core.adapter_state import DENOISER, DIFFUSERS, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.formats.layouts.adapter_config import ADAPTER_METADATA
from lorasmith.formats.layouts.layout import Layout, Lost
from lorasmith.formats.layouts.peft import rank_fields, targets, uneven_magnitudes
from lorasmith.formats.names import (
    ModelNames,
    PlacedModules,
    diffusers_places,
    encoder_paths,
    original_places,
    other_places,
)
from lorasmith.formats.scales import baked, loras_in
from lorasmith.formats.spelling import (
    DIFFUSERS_ENCODER,
    DIFFUSERS_EXPERTS,
    DIFFUSERS_PARTS,
    DIFFUSERS_PREFIXES,
    PEFT,
    ModuleTensors,
    any_of,
    spelled,
    split_key,
    without_core,
)


class DiffusersLayout(Layout):
    """Dotted diffusers paths after `unet.`, `transformer.` and `text_encoder.`, alpha multiplied in.

    That of a second expert may have `transformer_2.`; `transformer.` is written for it, as diffusers reads it.
    """

    name = "diffusers"
    title = "diffusers"
    has_diffusers_names = True
    holds_words = False  # diffusers refuses files with tensors that are of no LoRA

    def detects(self, keys: Iterable[str]) -> int:
        return sum(bool(_PREFIX.match(key) and split_key(key)) for key in keys)

    def bases(self, names: ModelNames) -> Mapping[str, PlacedModules]:
        bases: dict[str, PlacedModules] = {}
        for path, parts in {**other_places(names), **original_places(names), **diffusers_places(names)}.items():
            for spelling in _spellings(path):
                bases |= {prefix + spelling: parts for prefix in (*DIFFUSERS_PREFIXES, "")}
        for component in names.text_encoders:
            bases |= {f"{component}.{path}": parts for path, parts in encoder_paths(names, component)}
        return bases

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: ModelNames) -> AdapterState:
        """Raises LoraError when the header's `lora_adapter_metadata` is malformed, or the file is of two experts."""
        experts = [prefix for prefix in DIFFUSERS_EXPERTS if any(key.startswith(prefix) for key in tensors)]
        if len(experts) > 1:
            raise LoraError(
                f"a LoRA file is for one denoiser, and this one has keys for {' and '.join(sorted(experts))}, the two "
                "experts of a model; save the keys of each in a file of its own"
            )
        return super().read(tensors, metadata, names)

    def base_of(self, ref: ModuleRef, names: ModelNames) -> str:
        return ".".join(_place(ref, names))

    def spelled(self, module: ModuleTensors) -> dict[str, Tensor]:
        if module.adapter is not None and format_of(module.adapter).is_low_rank:
            module = replace(module, adapter=baked(without_core(module.adapter)))
        return spelled(module, PEFT, alpha=False)

    def header(self, state: AdapterState, names: ModelNames) -> dict[str, str]:
        fields: dict[str, Any] = {}
        parts: dict[str, dict[str, AdapterWeights]] = {}
        for ref, weights in state.adapters.items():
            part, path = _place(ref, names)
            parts.setdefault(part, {})[path] = weights
        modules = [
            _place(ModuleRef(component, path), names)
            for component in dict.fromkeys(ref.component for ref in state.adapters)
            for path in names.paths(component)
        ]
        for part, adapters in parts.items():
            loras = loras_in(adapters)
            if loras:
                config = {
                    **rank_fields(loras, alpha_is_rank=True),
                    "target_modules": targets(loras, [path for other, path in modules if other == part]),
                    "use_dora": any("dora_scale" in weights.tensors for weights in loras.values()),
                }
                fields |= {f"{part}.{field}": value for field, value in config.items()}
        return {ADAPTER_METADATA: json.dumps(fields, sort_keys=True)} if fields else {}

    def losses(self, state: AdapterState, names: ModelNames) -> list[Lost]:
        known = {ref: weights for ref, weights in state.adapters.items() if DIFFUSERS in format_of(weights).programs}
        reasons = {
            ref: f"diffusers loads LoRA alone, and this is {weights.algorithm}"
            for ref, weights in state.adapters.items()
            if ref not in known
        } | uneven_magnitudes(known)
        return [
            *(Lost(ref, reasons[ref]) for ref in state.adapters if ref in reasons),
            *(Lost(ref, "diffusers has no differences of weights, norms and biases") for ref in state.differences),
        ]


_PREFIX = re.compile(
    f"{any_of((*DIFFUSERS_PREFIXES, *DIFFUSERS_PARTS))}|{DIFFUSERS_ENCODER}|"
    r"(single_)?transformer_blocks\.|"
    r"(down|mid|up|double|single|joint)_blocks?\."
)


def _place(ref: ModuleRef, names: ModelNames) -> tuple[str, str]:
    """The part of the pipeline with a module, which is the prefix of its keys, and the module's path there."""
    return names.pipeline_place(ref.path) if ref.component == DENOISER else (ref.component, ref.path)


def _spellings(path: str) -> Iterator[str]:
    """A path in PEFT's spelling and, for attention projections, in that of diffusers' attention processors."""
    yield path
    parent, _, projection = path.rpartition(".attn1.")
    if not parent:
        parent, _, projection = path.rpartition(".attn2.")
    if projection in ("to_q", "to_k", "to_v", "to_out.0"):
        attention = path.removesuffix(projection)
        yield f"{attention}processor.{projection.removesuffix('.0')}"
