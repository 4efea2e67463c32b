"""Which programs apply which part of a file: what `docs/load-matrix.md` measured, as rules.

A test holds these rules to the recorded numbers of the matrix. `ComfyUI`, `diffusers` and `sd-scripts` (its own
network) stand for the programs built on them; LyCORIS, with which sd-scripts loads the other algorithms, reads kohya's
layout and all that `AdapterWeights` knows except DoRA per input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.formats.layouts.layout import LAYOUTS, Layout, named
from lorasmith.formats.names.model_names import ModelNames, ProgramLimits, matches
from lorasmith.formats.names.places import unfusable
from lorasmith.formats.quality.portable import misread_alphas

__all__ = ["MISREAD_ALPHAS", "PROGRAMS", "Shortfall", "shortfalls"]


@dataclass(frozen=True)
class Shortfall:
    """What one program does not apply as it was meant.

    Attributes:
        program: one of `PROGRAMS`.
        modules: which modules.
        is_all: whether these are all that the LoRA has.
        reason: why, in words that follow the program's name and the modules.
    """

    program: str
    modules: tuple[ModuleRef, ...]
    is_all: bool
    reason: str

    @property
    def sentence(self) -> str:
        """The whole of it, without a full stop."""
        what = "any of it" if self.is_all else f"{named(self.modules)},"
        return f"{self.program} does not apply {what} as meant: {self.reason}"


def shortfalls(state: AdapterState, layout: Layout, names: ModelNames, *, is_portable: bool = False) -> list[Shortfall]:
    """What programs do not apply of a LoRA in a layout, with one reason for each module and program.

    Args:
        state: the LoRA.
        layout: the layout.
        names: its model.
        is_portable: whether it is brought into the form that `made_portable` gives.
    """
    found = []
    for program, rules in _RULES.items():
        lora = _Whole(state, layout.name, names, is_portable)
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
    layout: str
    names: ModelNames
    is_portable: bool

    @property
    def limits(self) -> ProgramLimits:
        return self.names.limits

    def refs(self) -> list[ModuleRef]:
        return list(dict.fromkeys((*self.state.adapters, *self.state.differences)))

    def where(self, reason: str, refs: Iterator[ModuleRef]) -> dict[ModuleRef, str]:
        return dict.fromkeys(refs, reason)

    def outside(self, patterns: tuple[str, ...]) -> Iterator[ModuleRef]:
        """The denoiser's modules that no pattern matches."""
        return (ref for ref in self.refs() if ref.component == DENOISER and not matches(ref.path, patterns))

    def others_than_plain_lora(self) -> Iterator[ModuleRef]:
        """Modules that have more than two factors, or differences."""
        for ref in self.refs():
            weights = self.state.adapters.get(ref)
            plain = {"down", "up", "mid"} if self.is_portable else {"down", "up"}
            if weights is None or ref in self.state.differences or not weights.tensors.keys() <= plain:
                yield ref


def _comfyui(lora: _Whole) -> dict[ModuleRef, str]:
    adapters = lora.state.adapters.items()
    if lora.layout == "peft":
        return lora.where("it loads files, not PEFT's folders", iter(lora.refs()))
    found = lora.where(
        "it takes DoRA's magnitudes for each output relative to the untrained weight's norm",
        (
            ref
            for ref, weights in adapters
            if "dora_scale" in weights.tensors and weights.tensors["dora_scale"].shape[0] > 1
        ),
    )
    found |= lora.where(
        "it leaves out the rescale of OFT and BOFT", (ref for ref, weights in adapters if "rescale" in weights.tensors)
    )
    if lora.layout == "kohya" and not lora.is_portable:
        found |= lora.where(
            "it fails to merge a LoKr with a Tucker core",
            (ref for ref, weights in adapters if "lokr_t2" in weights.tensors),
        )
    if lora.layout == "diffusers":
        unknown = lora.limits.unknown_to_comfyui
        found |= lora.where(
            "it does not know DoRA's magnitudes by PEFT's name",
            (ref for ref, weights in adapters if "dora_scale" in weights.tensors),
        )
        found |= lora.where(
            "it knows these layers by other names than diffusers'",
            (ref for ref in lora.refs() if ref.component == DENOISER and matches(ref.path, unknown)),
        )
    return found


def _diffusers(lora: _Whole) -> dict[ModuleRef, str]:
    if lora.layout == "peft":
        return lora.where("it loads its own layout, not PEFT's folders", iter(lora.refs()))
    if lora.layout == "diffusers":
        return {}
    if lora.layout not in lora.limits.diffusers_reads:
        return lora.where(f"it refuses {LAYOUTS[lora.layout].title}'s names of this family", iter(lora.refs()))
    odd = list(lora.others_than_plain_lora())
    others = [ref for ref in odd if not _is_dora(lora.state.adapters.get(ref)) or ref in lora.state.differences]
    if others and lora.limits.diffusers_refuses_others:
        return lora.where("it refuses a file with anything but LoRA's factors", iter(lora.refs()))
    found = lora.where("it loads LoRA alone", iter(others))
    found |= lora.where("it leaves out DoRA's magnitudes", (ref for ref in odd if ref not in found))
    if not lora.is_portable:
        found |= dict.fromkeys(misread_alphas(lora.state, lora.names), MISREAD_ALPHAS)
    return found | lora.where(
        "it reads the blocks alone of the original names", lora.outside(lora.limits.diffusers_applies)
    )


def _sd_scripts(lora: _Whole) -> dict[ModuleRef, str]:
    if lora.layout != "kohya":
        return lora.where("it reads kohya's layout alone", iter(lora.refs()))
    odd = list(lora.others_than_plain_lora())
    found = lora.where("its own network is LoRA without extras (LyCORIS' network loads the others)", iter(odd))
    found |= lora.where("it looks for the fused layers", iter(unfusable(lora.state, lora.names)))
    return found | lora.where(
        "it trains and loads the blocks' layers alone", lora.outside(lora.limits.sd_scripts_applies)
    )


MISREAD_ALPHAS = "it takes the alphas of attention layers and text encoders for the most frequent one"
PROGRAMS = ("ComfyUI", "diffusers", "sd-scripts")
_RULES = {"ComfyUI": _comfyui, "diffusers": _diffusers, "sd-scripts": _sd_scripts}


def _is_dora(weights: AdapterWeights | None) -> bool:
    return weights is not None and weights.tensors.keys() == {"down", "up", "dora_scale"}
