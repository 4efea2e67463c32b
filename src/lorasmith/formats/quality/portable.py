"""A LoRA in the form that most programs apply completely, with the same effect.

diffusers, reading kohya's names of some families (`ProgramLimits.diffusers_one_alpha`), reads the alphas of attention
layers, and those of all layers of a text encoder, as the most frequent alpha of that part of the model; there alpha is
multiplied into the factors. Tucker cores, which diffusers and sd-scripts do not read and ComfyUI fails to merge in a
LoKr, are multiplied in.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import replace

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.formats.names.model_names import ModelNames, matches
from lorasmith.formats.names.spelling import without_core
from lorasmith.formats.scales import loras_in, most_frequent_alpha, with_alpha

__all__ = ["made_portable", "misread_alphas"]


def made_portable(
    state: AdapterState, names: ModelNames, alphas: Mapping[ModuleRef, float] | None = None
) -> AdapterState:
    """The same LoRA in the form that most programs apply.

    Args:
        state: the LoRA, or some of its modules.
        names: its model.
        alphas: `misread_alphas` of the whole LoRA, None if `state` is the whole.
    """
    wanted = misread_alphas(state, names) if alphas is None else alphas
    adapters = {ref: without_core(weights) for ref, weights in state.adapters.items()}
    for ref in adapters.keys() & wanted.keys():
        adapters[ref] = with_alpha(adapters[ref], wanted[ref])
    return replace(state, adapters=adapters)


def misread_alphas(state: AdapterState, names: ModelNames) -> dict[ModuleRef, float]:
    """Modules whose alpha diffusers misreads in kohya's layout → the alpha that it uses."""
    patterns = names.limits.diffusers_one_alpha
    if not patterns:
        return {}
    found: dict[ModuleRef, float] = {}
    for component in dict.fromkeys(ref.component for ref in state.adapters):
        common, alphas = most_frequent_alpha(
            loras_in({ref: weights for ref, weights in state.adapters.items() if ref.component == component})
        )
        mistaken = {ref for ref in alphas if component != DENOISER or matches(ref.path, patterns)}
        if len({*alphas.values()}) < 2 or not common or not mistaken:
            continue
        after = collections.Counter(common if ref in mistaken else alpha for ref, alpha in alphas.items())
        # Of equally frequent ones diffusers uses the first in the file, which may be another.
        tied = any(count == after[common] for alpha, count in after.items() if alpha != common)
        found |= {ref: common for ref, alpha in alphas.items() if alpha != common and (tied or ref in mistaken)}
    return found
