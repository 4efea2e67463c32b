"""A LoRA in memory, from training or from a file (ComfyUI's LORA_MODEL), and how it is applied.

No part of a file is ignored silently: `Lora.applied` returns which parts do not apply, and callers show that sentence
(a note, a node's warning, a Python warning) or refuse the file if the user asks for that.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor, nn

from lorasmith.adapters.algorithms import title_of
from lorasmith.adapters.frozen_layer import packed_layers
from lorasmith.adapters.patch import Patch, cannot_merge, patches_merged
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.arguments import typed_arguments
from lorasmith.core.errors import LoraError
from lorasmith.core.printable import count_text, printable, sentence
from lorasmith.core.rank_schedule import RankSchedule
from lorasmith.families.files.original_weights import weight_shapes
from lorasmith.families.loading import released_names
from lorasmith.families.model import Denoiser, Model, TextEncoder
from lorasmith.families.parts.embeddings import Word, bundled_vectors
from lorasmith.formats.layouts.adapter_config import stated_alphas, unread_scales
from lorasmith.formats.lora_file import (
    PORTABLE,
    StrangerReason,
    Unapplied,
    bundle_of,
    load_lora,
    lora_of_tensors,
    read_lora_tensors,
    refuse_non_finite,
    save_lora,
    state_from_tensors,
    unapplied,
)
from lorasmith.formats.metadata import LeveledRanks, steps_of
from lorasmith.formats.names import ModelNames
from lorasmith.formats.scales import loras_in, rank_of
from lorasmith.formats.spelling import BUNDLE, ModuleTensors, all_assembled, fits, grouped, guessed_family
from lorasmith.report.pictures import card
from lorasmith.training.trainable import Trainable, TrainableDenoiser

D = TypeVar("D", Denoiser, Trainable, None)
E = TypeVar("E", TextEncoder, None)
H = TypeVar("H", Denoiser, Trainable)


@dataclass(frozen=True)
class Applied(Generic[D, E]):
    """Handles with a LoRA on top; `note` is a sentence on the parts that do not apply, empty if all do."""

    denoiser: D
    encoder: E
    note: str


@dataclass(frozen=True, repr=False)
class Lora:
    """A LoRA with the name table of its model.

    Attributes:
        state: tensors and metadata.
        names: name table of its model; if loaded without one, that of the released model of its family, and empty if
            that is unknown.
        dtype: number format of the saved file, None to keep each tensor's own.
        private: whether a graph that saves it leaves the workflow out of the file.
        name: used in messages.
        given: tensors of the file by key, if it was loaded without its model; otherwise None.
    """

    state: AdapterState
    names: ModelNames
    dtype: torch.dtype | None = None
    private: bool = False
    name: str = "the LoRA"
    given: Mapping[str, torch.Tensor] | None = None

    @classmethod
    @typed_arguments
    def load(cls, path: str | os.PathLike[str], model: Model | Trainable | ModelNames | None = None) -> Lora:
        """Load a LoRA file or folder in any known layout.

        Tensors stay on the memory-mapped file. Without a model, the LoRA can be inspected, applied to a model later,
        and saved in another layout if it is for the released model of a known family.

        Args:
            path: a safetensors file, or a folder of PEFT or diffusers.
            model: the model that it is for, or its names; None to detect it when it is applied.

        Raises:
            LoraError: it cannot be read, is not a LoRA, holds NaN or infinity, or is for another model.
        """
        path = Path(path)
        if model is not None:
            names = model if isinstance(model, ModelNames) else model.names
            return cls(load_lora(path, names), names, name=path.name)
        tensors, metadata = read_lora_tensors(path)
        refuse_non_finite(path, tensors)
        if not grouped(tensors) and not bundle_of(tensors)[0]:
            raise LoraError(f"{path} is not a LoRA: none of its {len(tensors)} tensors has a name that LoRA files use")
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        assumed = released_names(guessed_family(shapes, metadata) or "")
        state = AdapterState(unknown=dict(tensors), metadata=dict(metadata))
        if assumed is not None:
            state = state_from_tensors(tensors, metadata, assumed)
        return cls(state, assumed or _UNKNOWN, name=path.name, given=tensors)

    @typed_arguments
    def for_model(self, model: Model | Trainable | ModelNames) -> Lora:
        """This LoRA with the names of a model; unchanged if it has them already.

        Raises:
            LoraError: it was loaded without a model, and is for another one.
        """
        if self.given is None:
            return self
        names = model if isinstance(model, ModelNames) else model.names
        state = lora_of_tensors(Path(self.name), self.given, self.state.metadata, names)
        return replace(self, state=state, names=names, given=None)

    @typed_arguments
    def save(
        self,
        path: str | os.PathLike[str],
        *,
        layout: str = PORTABLE,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Write the file atomically.

        Args:
            path: the file, or the folder for layouts that are one.
            layout: `portable` (what most programs read completely), `kohya`, `comfy`, `diffusers`, `peft` or
                `ai-toolkit`.
            metadata: text entries, added to its own.

        Raises:
            LoraError: the layout is unknown or cannot hold all of it, or it was loaded without its model and is not for
                the released model of a known family.
            OutputError: the file cannot be written.
        """
        if self.given is not None and (self.state.unknown or not self._modules):
            raise LoraError(
                f"{self.name} can be saved in another layout only with the names of its model, as "
                f"{len(self.state.unknown)} of its {len(self.given)} tensors are for no released model that is known "
                "here; load it with its model: Lora.load(path, model)"
            )
        target = Path(path)
        state = self.state.with_metadata(metadata or {})
        save_lora(target, state, self.names, layout=layout, dtype=self.dtype, metadata=state.metadata)
        return target

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.state.metadata

    @property
    def steps(self) -> int:
        """Optimizer updates that it was trained for, 0 if unknown."""
        return steps_of(self.state.metadata, self.name)

    @property
    def rank_schedule(self) -> RankSchedule | None:
        """How many ranks are used by noise level, of a T-LoRA whose ranks are those of training; None for all."""
        if self._leveled is None or self._leveled.total != self._total_rank:
            return None
        return self._leveled.schedule

    @property
    def _leveled(self) -> LeveledRanks | None:
        return LeveledRanks.of(self.state.metadata)

    @property
    def _total_rank(self) -> int:
        adapters = [weights for ref, weights in self.state.adapters.items() if ref.component == DENOISER]
        return sum(rank_of(weights) or 0 for weights in adapters if weights.tensors.keys() == {"down", "up"})

    @property
    def family(self) -> str:
        """Name of the family of its model, such as `sdxl`; empty if unknown."""
        return self.names.family

    @cached_property
    def algorithms(self) -> Mapping[str, int]:
        """Number of modules by algorithm (`LoRA`, `LoKr`, `DoRA`, ...), most frequent first."""
        return dict(Counter(title_of(adapter) for adapter in self._adapters).most_common())

    @cached_property
    def ranks(self) -> Mapping[int, int]:
        """Number of modules by rank, most frequent first; algorithms without one are left out."""
        return dict(Counter(rank for adapter in self._adapters if (rank := rank_of(adapter)) is not None).most_common())

    @property
    def parameters(self) -> int:
        """Number of parameters, differences of norms and biases included."""
        if self.given is not None:
            return sum(tensor.numel() for key, tensor in self.given.items() if not key.endswith(".alpha"))
        tensors = [tensor for adapter in self._adapters for tensor in adapter.tensors.values()]
        tensors += [change for changes in self.state.differences.values() for change in changes.values()]
        tensors += [vector for vectors in self.state.words.values() for vector in vectors.values()]
        return sum(tensor.numel() for tensor in tensors)

    @cached_property
    def _adapters(self) -> Sequence[AdapterWeights]:
        if self.given is None:
            return tuple(self.state.adapters.values())
        groups = grouped(self.given)
        whole, _ = all_assembled(self.given, groups, stated_alphas(self.given, groups, self.state.metadata))
        return tuple(module.adapter for module in whole.values() if module.adapter is not None)

    @property
    def _algorithms_text(self) -> list[str]:
        return [f"{name} on {count_text(count, 'module')}" for name, count in self.algorithms.items()]

    def __repr__(self) -> str:
        facts = self._algorithms_text
        if self.ranks:
            facts.append(f"rank {' and '.join(map(str, list(self.ranks)[:3]))}{', ...' if len(self.ranks) > 3 else ''}")
        facts.append(f"{self.parameters:,} parameters")
        facts.append(f"for {self.family}" if self.family else "for a model that is not known yet")
        facts += [count_text(self.steps, "step")] if self.steps else []
        return f"Lora({printable(self.name, limit=60)}: {', '.join(facts)})"

    def _repr_html_(self) -> str:
        facts = {
            "family": self.family or "not known yet",
            "algorithm": ", ".join(self._algorithms_text),
            "rank": ", ".join(map(str, self.ranks)),
            "parameters": f"{self.parameters:,}",
            "steps": f"{self.steps:,}" if self.steps else "",
            "trigger": self.metadata.get("modelspec.trigger_phrase", ""),
        }
        return card(self.name, facts)

    def applied(
        self,
        denoiser: D,
        encoder: E,
        *,
        strength: float = 1.0,
        text_strength: float | None = None,
        bypass: bool | None = None,
        strict: bool = False,
    ) -> Applied[D, E]:
        """The handles with this LoRA on top; a handle is unchanged at strength 0.

        Args:
            denoiser, encoder: what the two parts are applied to; None leaves a part to another call.
            strength: factor of the weight change; 1 is as trained.
            text_strength: factor for the text encoders; `strength` if None.
            bypass: whether it runs beside the denoiser's weights instead of being merged into them; None merges it
                unless one of those weights is packed. A T-LoRA is never merged, as its ranks depend on the noise level.
            strict: whether to refuse a LoRA of which a part does not apply.

        Raises:
            LoraError: the LoRA belongs to another model, would have to be merged into packed weights, or is refused.
            OptionError: a strength is not a finite number.
        """
        if self.given is not None and (handle := denoiser or encoder) is not None:
            whole = self.for_model(handle.names)
            return whole.applied(
                denoiser, encoder, strength=strength, text_strength=text_strength, bypass=bypass, strict=strict
            )
        text_strength = strength if text_strength is None else text_strength
        on_denoiser, on_text = denoiser is not None and strength != 0, encoder is not None and text_strength != 0
        left: list[Unapplied] = []
        title = ""
        if encoder is not None and on_text:
            title = encoder.title
            encoder, misfits = self._on_encoder(encoder, text_strength)
            left += misfits
        if denoiser is not None and on_denoiser:
            title = denoiser.title
            denoiser = self._on_denoiser(denoiser, strength, bypass)
        left += (part for part in self._left_over if (on_denoiser if part.component == DENOISER else on_text))
        if on_denoiser and not on_text:
            left += self._all_elsewhere(for_denoiser=False)
        if on_text and not on_denoiser and denoiser is not None:
            left += self._all_elsewhere(for_denoiser=True)
        note = self._sentence(left, title) if left else ""
        if on_denoiser and not note and self._leveled is not None and self.rank_schedule is None:
            note = (
                f"{printable(self.name, limit=60)} used fewer of its ranks where there was more noise, but has other "
                "ranks since, so that all are used; take the file of the training"
            )
        if note and strict:
            raise LoraError(f"{note}, or leave strict off to apply the others")
        return Applied(denoiser, encoder, note or self._note_on_scale)

    @overload
    def applied_to(self, denoiser: H, *, strength: float = ..., bypass: bool | None = ..., strict: bool = ...) -> H: ...
    @overload
    def applied_to(
        self, denoiser: Model, *, strength: float = ..., bypass: bool | None = ..., strict: bool = ...
    ) -> Denoiser: ...
    @typed_arguments
    def applied_to(
        self,
        denoiser: Denoiser | Trainable | Model,
        *,
        strength: float = 1.0,
        bypass: bool | None = None,
        strict: bool = False,
    ) -> Denoiser | Trainable:
        """The denoiser with this LoRA on top, as by `applied`, with a Python warning about parts that do not apply.

        Args:
            denoiser: what it is applied to; of a model, its denoiser.
            strength, bypass, strict: as for `applied`.

        Raises:
            LoraError, OptionError: as `applied`.
        """
        bare = denoiser.denoiser if isinstance(denoiser, Model) else denoiser
        applied: Applied[Any, None] = self.applied(bare, None, strength=strength, bypass=bypass, strict=strict)
        if applied.note:
            warnings.warn(applied.note, stacklevel=3)
        found: Denoiser | Trainable = applied.denoiser
        return found

    @typed_arguments
    def merged_into(self, network: Trainable, *, strength: float = 1.0, strict: bool = False) -> nn.Module:
        """A copy of a network of your own with this LoRA in its weights, and those that were applied to it before.

        It has the class, parameters, dtypes and devices of `network.module`, which stays as it is. Merging into the
        file of a released model is `lorasmith merge --into`.

        Args:
            network: the `Trainable` that the LoRA was trained on, or one of the same title and layers.
            strength: factor of the weight change; 1 is as trained.
            strict: as for `applied`; else a Python warning names the parts that do not apply.

        Raises:
            LoraError: the LoRA is for another network, is refused, has to be merged into packed weights, or is a
                T-LoRA, whose ranks depend on the noise level.
            OptionError: `strength` is not a finite number.
        """
        if isinstance(network, TrainableDenoiser):
            raise LoraError(
                f"merged_into is for a network of your own, got {network.title}; merge into its file with "
                "`lorasmith merge LORA --into MODEL`"
            )
        patches = self.applied_to(network, strength=strength, bypass=False, strict=strict).patches
        if any(patch.ranks is not None for patch in patches):
            raise LoraError(
                f"a LoRA that is merged must be the same at every noise level, and {self.name} is a T-LoRA, which uses "
                "fewer ranks where there is more noise; apply it with applied_to"
            )
        module = copy.deepcopy(network.module)
        with patches_merged(module, [replace(patch, bypass=False) for patch in patches]):
            merged = [parameter.data for parameter in module.parameters()]
        for parameter, data in zip(module.parameters(), merged, strict=True):
            parameter.data = data
        return module

    def applied_to_text(self, encoder: TextEncoder, *, strength: float = 1.0, strict: bool = False) -> TextEncoder:
        """The text encoders with this LoRA, as by `applied`, with a Python warning about parts that do not apply.

        Args:
            encoder: what it is applied to.
            strength, strict: as for `applied`.

        Raises:
            LoraError, OptionError: as `applied`.
        """
        applied = self.applied(None, encoder, strength=strength, strict=strict)
        if applied.note:
            warnings.warn(applied.note, stacklevel=2)
        return applied.encoder

    @cached_property
    def _left_over(self) -> Sequence[Unapplied]:
        """Parts of the file that the model for which it was loaded does not use."""
        return unapplied(self.state, self.names) if self.state.unknown else ()

    @property
    def _note_on_scale(self) -> str:
        """A sentence on an alpha in the header that is not applied; empty if there is none."""
        loras = loras_in(self.state.adapters)
        ranks = {ref.component: rank_of(lora) or 1 for ref, lora in loras.items() if lora.alpha is None}
        for entry, scale in unread_scales(self.state.metadata, ranks).items():
            return (
                f"{printable(self.name, limit=60)} is applied with the scale 1, and by its header's {entry}, on which "
                f"programs do not agree, it is {scale:g}; compare pictures at the strengths 1 and {scale:g}"
            )
        return ""

    @property
    def _modules(self) -> Sequence[ModuleRef]:
        return tuple(dict.fromkeys((*self.state.adapters, *self.state.differences)))

    def _all_elsewhere(self, *, for_denoiser: bool) -> Iterator[Unapplied]:
        """All modules if they are all for the denoiser, otherwise none."""
        if all((ref.component == DENOISER) is for_denoiser for ref in self._modules):
            reason = StrangerReason.DENOISER if for_denoiser else StrangerReason.TEXT
            yield from (Unapplied(ref.path, ref.component, reason) for ref in self._modules)

    def _on_denoiser(self, denoiser: H, strength: float, bypass: bool | None) -> H:
        self._check_fits(denoiser)
        patch: Patch = self._patch(DENOISER, strength=strength, bypass=bool(bypass))
        if (ranks := self.rank_schedule) is not None:
            return denoiser.patched(replace(patch, bypass=True, ranks=ranks))
        changed = {*patch.adapters, *(path for path, difference in patch.differences.items() if "weight" in difference)}
        if not bypass and changed & packed_layers(denoiser.module).keys():
            if bypass is not None:
                raise LoraError(cannot_merge(denoiser.module))
            patch = replace(patch, bypass=True)
        return denoiser.patched(patch)

    def _on_encoder(self, encoder: TextEncoder, strength: float) -> tuple[TextEncoder, list[Unapplied]]:
        """The text encoders, and the modules and words for them that they lack or that do not fit."""
        words, left = words_for(encoder, self.state.words), list[Unapplied]()
        fitting = {word.text for word in words}
        encoder = encoder.with_words(words)
        for word in self.state.words.keys() - fitting:
            left.append(Unapplied(f"{BUNDLE}{word}", next(iter(encoder.encoders.modules), ""), StrangerReason.SHAPE))
        for component in dict.fromkeys(ref.component for ref in self._modules if ref.component != DENOISER):
            module = encoder.encoders.modules.get(component)
            shapes = {} if module is None else weight_shapes(module)
            patch = _as_loaded(self._patch(component, strength=strength, bypass=False), shapes)
            patch, misfits = _fitting(patch, shapes)
            left += [Unapplied(f"{component}.{path}", component, why) for path, why in misfits.items()]
            if patch.adapters or patch.differences:
                encoder = encoder.patched(component, patch)
        return encoder, left

    def _check_fits(self, model: Denoiser | Trainable) -> None:
        """Raise LoraError unless the model's adapted layers are those that this LoRA was made for."""
        ours, theirs = self.names, model.names
        if ours is theirs:
            return
        paths = [ref.path for ref in self.state.adapters if ref.component == DENOISER]
        misfits = [path for path in paths if ours.weight_shapes.get(path) != theirs.weight_shapes.get(path)]
        if ours.family != theirs.family or misfits:
            where = f", whose {misfits[0]} has another shape or is missing" if misfits else ""
            raise LoraError(
                f"a LoRA must be applied to the kind of model that it was made for ({ours.family}), "
                f"got {model.title} ({theirs.family}){where}; load a model of that kind"
            )

    def _patch(self, component: str, *, strength: float, bypass: bool) -> Patch:
        return Patch(
            adapters={ref.path: adapter for ref, adapter in self.state.adapters.items() if ref.component == component},
            differences={
                ref.path: difference for ref, difference in self.state.differences.items() if ref.component == component
            },
            strength=strength,
            bypass=bypass,
        )

    def _sentence(self, left: Sequence[Unapplied], title: str) -> str:
        """The parts that do not apply, by reason: counts, first names and the first reason's remedy."""
        by_reason: dict[StrangerReason, list[str]] = {}
        for part in left:
            by_reason.setdefault(part.reason, []).append(part.name)
        shown = 2 if len(by_reason) == 1 else 1
        width = _NAMES // (shown * len(by_reason))
        groups = []
        for reason, parts in by_reason.items():
            first = ", ".join(printable(name, limit=width) for name in parts[:shown])
            first += ", ..." if parts[shown:] else ""
            groups.append(f"{len(parts)} {reason.text} ({first})")
        total = len(self._modules) + len(self._left_over) + len(self.state.words)
        return sentence(
            f"{printable(title, limit=40)} leaves out {len(left)} of {total} parts of "
            f"{printable(self.name, limit=60)}: {', '.join(groups)}; {left[0].reason.remedy}"
        )


def words_for(encoder: TextEncoder, words: Mapping[str, Mapping[str, Tensor]]) -> list[Word]:
    """The words of a LoRA that these text encoders can read, at least one of them each."""
    places = {component: encoder.place_of(component) for component in encoder.encoders.modules}
    found = []
    for word, vectors in words.items():
        fitting = {
            component: chosen
            for component, place in places.items()
            if place is not None and (chosen := bundled_vectors(vectors, place)) is not None
        }
        found += [Word(word, fitting)] if fitting else []
    return found


_UNKNOWN = ModelNames(family="", denoiser={}, peft_prefix="")
"""Names of a model that is not known yet."""

_NAMES = 120
"""Characters for names of parts in a sentence, which has room for little more on one screen line."""


def _as_loaded(patch: Patch, present: Mapping[str, object]) -> Patch:
    """A text encoder's patch under the module paths of the installed transformers (files have `text_model.`)."""

    def path(written: str) -> str:
        return written if written in present else written.removeprefix("text_model.")

    return replace(
        patch,
        adapters={path(written): adapter for written, adapter in patch.adapters.items()},
        differences={path(written): difference for written, difference in patch.differences.items()},
    )


def _fitting(patch: Patch, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Patch, dict[str, StrangerReason]]:
    """The part of a patch that fits weights of these shapes, and the reason for each other module path."""
    misfits = {}
    for path in dict.fromkeys((*patch.adapters, *patch.differences)):
        tensors = ModuleTensors(patch.adapters.get(path), patch.differences.get(path, {}))
        if path not in shapes:
            misfits[path] = StrangerReason.MODULE
        elif not fits(tensors, shapes[path]):
            misfits[path] = StrangerReason.SHAPE
    adapters = {path: adapter for path, adapter in patch.adapters.items() if path not in misfits}
    differences = {path: difference for path, difference in patch.differences.items() if path not in misfits}
    return replace(patch, adapters=adapters, differences=differences), misfits
