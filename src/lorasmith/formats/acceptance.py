"""Which programs apply which part of a file: the measurements of `docs/load-matrix.md`, as rules.

A test holds these rules to the recorded numbers of the matrix. `ComfyUI`, `diffusers` and `sd-scripts` (its own
network) represent the programs built on them; LyCORIS, with which sd-scripts loads the other algorithms, reads kohya's
layout and all of `AdapterWeights` except DoRA per input.

diffusers, reading kohya's names of some families (`ProgramLimits.diffusers_one_alpha`), reads the alphas of attention
layers, and those of all layers of a text encoder, as the most frequent alpha of that part of the model; in the portable
form alpha is multiplied into the factors there. Tucker cores, which diffusers and sd-scripts do not read and ComfyUI
fails to merge in a LoKr, are multiplied in.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lorasmith.adapters.algorithms import format_of
from lorasmith.core.adapter_state import (
    COMFYUI,
    DENOISER,
    DIFFUSERS,
    SD_SCRIPTS,
    AdapterState,
    AdapterWeights,
    ModuleRef,
)
from lorasmith.formats.layouts.layout import Layout, named
from lorasmith.formats.names import ModelNames, ProgramLimits, matches
from lorasmith.formats.scales import loras_in, most_frequent_alpha, with_alpha
from lorasmith.formats.spelling import without_core


@dataclass(frozen=True)
class Shortfall:
    """Modules that one program does not apply as trained."""

    program: str
    modules: tuple[ModuleRef, ...]
    is_all: bool  # of the LoRA's
    reason: str  # why, as text after the program's name and the modules

    @property
    def sentence(self) -> str:
        """The shortfall as a sentence, without a full stop."""
        what = "any of it" if self.is_all else f"{named(self.modules)},"
        return f"{self.program} does not apply {what} as meant: {self.reason}"


def shortfalls(state: AdapterState, layout: Layout, names: ModelNames, *, is_portable: bool = False) -> list[Shortfall]:
    """Shortfalls of a LoRA in a layout, with one reason for each module and program."""
    found = []
    for program, rules in _RULES.items():
        lora = _Whole(state, layout, names, is_portable)
        by_reason: dict[str, list[ModuleRef]] = {}
        for ref, reason in rules(lora).items():
            by_reason.setdefault(reason, []).append(ref)
        found += [
            Shortfall(program, tuple(refs), len(refs) == len(lora.refs()), reason) for reason, refs in by_reason.items()
        ]
    return found


@dataclass(frozen=True)
class _Whole:
    """A LoRA as a file of one layout."""

    state: AdapterState
    layout: Layout
    names: ModelNames
    is_portable: bool

    @property
    def limits(self) -> ProgramLimits:
        return self.names.limits

    def refs(self) -> list[ModuleRef]:
        return list(dict.fromkeys((*self.state.adapters, *self.state.differences)))

    def outside(self, patterns: tuple[str, ...]) -> Iterator[ModuleRef]:
        """The denoiser's modules that no pattern matches."""
        return (ref for ref in self.refs() if ref.component == DENOISER and not matches(ref.path, patterns))

    def lacking(self) -> Iterator[str]:
        """Linear layers without which diffusers refuses the file."""
        present = {ref.path for ref in self.refs() if ref.component == DENOISER}
        linear = [path for path, shape in self.names.weight_shapes.items() if len(shape) == 2]
        for start in self.limits.diffusers_whole_blocks:
            blocks = {path.removeprefix(start).partition(".")[0] for path in present if path.startswith(start)}
            needed = tuple(f"{start}{index}." for index in range(len(blocks)))
            yield from (path for path in linear if path.startswith(needed) and path not in present)

    def having(self, role: str) -> Iterator[ModuleRef]:
        """Modules whose adapters have a tensor of this role."""
        return (ref for ref, weights in self.state.adapters.items() if role in weights.tensors)

    def unfused(self) -> list[ModuleRef]:
        return self.layout.unfused(self.state, self.names)

    def unapplied(self, program: str, also: tuple[str, ...] = ()) -> Iterator[ModuleRef]:
        """Modules that have differences, or more than the tensors of an algorithm that the program knows or `also`."""
        for ref in self.refs():
            weights = self.state.adapters.get(ref)
            if weights is None or ref in self.state.differences:
                yield ref
                continue
            form = format_of(weights)
            cores = form.cores if self.is_portable else frozenset()  # they will be multiplied in
            is_known = program in form.programs or weights.algorithm in also
            if not is_known or not any(weights.tensors.keys() <= whole | cores for whole in form.needed):
                yield ref


def _comfyui(lora: _Whole) -> dict[ModuleRef, str]:
    if reason := lora.layout.refused_by.get(COMFYUI):
        return dict.fromkeys(lora.refs(), reason)
    adapters = lora.state.adapters
    found = dict.fromkeys(
        (ref for ref in lora.having("dora_scale") if adapters[ref].tensors["dora_scale"].shape[0] > 1),
        "it takes DoRA's magnitudes for each output relative to the untrained weight's norm",
    )
    cores_are_written = lora.layout.writes_cores and not lora.is_portable
    for ref, weights in adapters.items():
        form = format_of(weights)
        for role, lacking in form.comfyui_lacks.items():
            if role in weights.tensors and (role not in form.cores or cores_are_written):
                found[ref] = lacking
    if lora.layout.has_diffusers_names:
        found |= dict.fromkeys(lora.having("dora_scale"), "it does not know DoRA's magnitudes by PEFT's name")
    by_diffusers_names = lora.refs() if lora.layout.has_diffusers_names else lora.unfused()
    unknown = lora.limits.unknown_to_comfyui
    return found | dict.fromkeys(
        (ref for ref in by_diffusers_names if ref.component == DENOISER and matches(ref.path, unknown)),
        "it knows these layers by other names than diffusers'",
    )


def _diffusers(lora: _Whole) -> dict[ModuleRef, str]:
    if reason := lora.layout.refused_by.get(DIFFUSERS):
        return dict.fromkeys(lora.refs(), reason)
    if lora.layout.has_diffusers_names:
        return {}
    layout = lora.layout.name
    applies = lora.limits.diffusers_applies.get(layout)
    if applies is None:
        return dict.fromkeys(lora.refs(), f"it does not read {lora.layout.title}'s names of this family")
    odd = list(lora.unapplied(DIFFUSERS, also=lora.limits.diffusers_also_loads.get(layout, ())))
    others = [ref for ref in odd if not _is_dora(lora.state.adapters.get(ref)) or ref in lora.state.differences]
    if others and lora.limits.diffusers_refuses_others:
        return dict.fromkeys(lora.refs(), "it refuses a file with anything but LoRA's factors")
    if lora.limits.diffusers_refuses_unknown and (unknown := tuple(lora.outside(applies))):
        reason = f"it refuses a file with layers that it does not find by such names ({named(unknown)})"
        return dict.fromkeys(lora.refs(), reason)
    if lacking := next(lora.lacking(), None):
        reason = f"it refuses a file that has not every linear layer of a block ({lacking} is missing)"
        return dict.fromkeys(lora.refs(), reason)
    found = dict.fromkeys(others, "it loads LoRA alone")
    found |= dict.fromkeys((ref for ref in odd if ref not in found), "it leaves out DoRA's magnitudes")
    if lora.layout.alphas_misread and not lora.is_portable:
        found |= dict.fromkeys(misread_alphas(lora.state, lora.names), MISREAD_ALPHAS)
    return found | dict.fromkeys(lora.outside(applies), "it does not find these layers by such names")


def _sd_scripts(lora: _Whole) -> dict[ModuleRef, str]:
    applies = lora.limits.sd_scripts_applies
    if applies is None:
        return {}
    if reason := lora.layout.refused_by.get(SD_SCRIPTS):
        return dict.fromkeys(lora.refs(), reason)
    found = dict.fromkeys(
        lora.unapplied(SD_SCRIPTS), "its own network is LoRA without extras (LyCORIS' network loads the others)"
    )
    found |= dict.fromkeys(lora.unfused(), "it looks for the fused layers")
    return found | dict.fromkeys(lora.outside(applies), "it trains and loads the blocks' layers alone")


MISREAD_ALPHAS = "it takes the alphas of attention layers and text encoders for the most frequent one"
_RULES = {COMFYUI: _comfyui, DIFFUSERS: _diffusers, SD_SCRIPTS: _sd_scripts}
PROGRAMS = tuple(_RULES)


def _is_dora(weights: AdapterWeights | None) -> bool:
    if weights is None or DIFFUSERS not in (form := format_of(weights)).programs:
        return False
    return any(weights.tensors.keys() == whole | {"dora_scale"} for whole in form.needed)


def made_portable(
    state: AdapterState, names: ModelNames, alphas: Mapping[ModuleRef, float] | None = None
) -> AdapterState:
    """The same LoRA in the form that most programs apply."""
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
