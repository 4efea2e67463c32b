"""Repairs of a LoRA file, in its own spelling: keys that are left out, and tensors that are replaced.

New tensors are made when they are written, one at a time, so that repairing a large file takes little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorasmith.adapters.algorithms import format_of
from lorasmith.core.adapter_format import multiplied
from lorasmith.core.adapter_state import AdapterState, ModuleRef
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.names.model_names import ModelNames
from lorasmith.formats.names.spelling import grouped
from lorasmith.formats.scales import full_alpha

__all__ = ["Mend", "bases_of", "levelled", "scalar"]


@dataclass(frozen=True)
class Mend:
    """Changes of a file's tensors.

    Attributes:
        left_out: keys.
        changed: key → function from the old tensor, or None if there was none, to the new one.
    """

    left_out: frozenset[str] = frozenset()
    changed: Mapping[str, Callable[[Tensor | None], Tensor]] = field(default_factory=dict)


def bases_of(tensors: Mapping[str, Tensor], names: ModelNames) -> dict[ModuleRef, str]:
    """The file's base of each module that is not fused with others."""
    groups = grouped(tensors)
    return {
        parts[0].module: base
        for _, layout in LAYOUTS.items()
        for base, parts in layout.bases(names).items()
        if base in groups and len(parts) == 1
    }


def levelled(
    alphas: Mapping[ModuleRef, float],
    state: AdapterState,
    bases: Mapping[ModuleRef, str],
    tensors: Mapping[str, Tensor],
) -> Mend:
    """Other alphas, compensated in the up matrices.

    Args:
        alphas: new alpha by module.
        state: the LoRA.
        bases: base in the file by module.
        tensors: the file's, by key.
    """
    groups = grouped(tensors)
    changed: dict[str, Callable[[Tensor | None], Tensor]] = {}
    for ref, alpha in alphas.items():
        weights, keys = state.adapters[ref], groups[bases[ref]]
        if not format_of(weights).is_low_rank or "alpha" not in keys:
            continue
        now = full_alpha(weights) if weights.alpha is None else weights.alpha
        changed[keys["alpha"]] = scalar(alpha)
        changed[keys["up"]] = _times(now / alpha)
    return Mend(changed=changed)


def scalar(value: float) -> Callable[[Tensor | None], Tensor]:
    """A function that makes a scalar of this value, in the dtype of the old one if that holds it exactly."""

    def make(old: Tensor | None) -> Tensor:
        exact = torch.tensor(value)
        if old is None:
            return exact
        same = exact.to(old.dtype)
        return same if float(same) == value else exact

    return make


def _times(factor: float) -> Callable[[Tensor | None], Tensor]:
    def make(old: Tensor | None) -> Tensor:
        assert old is not None
        return multiplied(old, factor)

    return make
