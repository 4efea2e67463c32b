"""The interface between adapters and LoRA files: tensors by module, under names independent of layouts.

Adapters read and write `AdapterWeights`; layouts convert whole files to and from `AdapterState`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

DENOISER = "denoiser"
"""Component name of the trained network (UNet or transformer)."""


class ModuleRef(NamedTuple):
    """A module of a model: component (`denoiser`, `text_encoder`, `text_encoder_2`, ...) and its diffusers path."""

    component: str
    path: str


@dataclass(frozen=True)
class AdapterWeights:
    """One module's adapter.

    Attributes:
        algorithm: registered adapter name in lower case (`lora`, `loha`, `lokr`, `oft`, ...).
        tensors: by canonical name. For `lora`: `down` (rank, in[, kh, kw]), `up` (out, rank[, 1, 1]), optional `mid`
            (rank, rank, kh, kw) for Tucker and `dora_scale`. Other algorithms use LyCORIS' own tensor names.
        alpha: numerator of the scale alpha / rank; None if the file has none, which means scale 1. For `oft` and
            `boft` the bound of ‖Q‖ (as in ComfyUI), 0 or None for no bound.
    """

    algorithm: str
    tensors: Mapping[str, Tensor]
    alpha: float | None = None


@dataclass(frozen=True)
class AdapterState:
    """A whole LoRA.

    Attributes:
        adapters: adapter of each module.
        differences: full additive differences of a module's parameters, by parameter name (`weight`, `bias`): the
            norm and bias differences of LyCORIS and ComfyUI (`diff`, `diff_b`, `w_norm`, `b_norm`).
        unknown: tensors that no layout could attribute, by their key in the file; kept unchanged.
        metadata: as in a safetensors header.
    """

    adapters: dict[ModuleRef, AdapterWeights] = field(default_factory=dict)
    differences: dict[ModuleRef, dict[str, Tensor]] = field(default_factory=dict)
    unknown: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def with_metadata(self, extra: Mapping[str, str]) -> AdapterState:
        return replace(self, metadata={**self.metadata, **extra})
