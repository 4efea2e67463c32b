"""What is done to mend a LoRA file, in its own spelling: keys that are left out, and tensors that are made anew.

New tensors are made when they are written, one at a time, so that a mend of a large file is small.
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
    """What becomes of a file's tensors.

    Attributes:
        left_out: keys.
        changed: by key, what makes the new tensor from the old one, or from None where there was none.
    """

    left_out: frozenset[str] = frozenset()
    changed: Mapping[str, Callable[[Tensor | None], Tensor]] = field(default_factory=dict)


def bases_of(tensors: Mapping[str, Tensor], names: ModelNames) -> dict[ModuleRef, str]:
    """The base of each module that a file has under a name of its own."""
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
    """Other alphas, made up for in the up matrices."""
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
    """Makes a scalar of this value, in the dtype of the old one if that holds it."""

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
