"""A LoRA file from one layout into another.

Both layouts use one name table: that of the given model, else that of the released model of the family recognised by
the file's names and shapes. Conversions keep every change; one that the target cannot hold, or that its programs would
read differently, is refused unless `lossy` is set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lorasmith.core.adapter_state import AdapterState
from lorasmith.core.errors import LoraError
from lorasmith.families.loading import released_names
from lorasmith.formats.acceptance import made_portable, misread_alphas, shortfalls
from lorasmith.formats.layouts.layout import sentences
from lorasmith.formats.lora_file import (
    PORTABLE,
    StrangerReason,
    layout_for,
    load_lora,
    read_lora_tensors,
    save_streamed,
    state_from_tensors,
    unapplied,
    without,
)
from lorasmith.formats.metadata import without_private
from lorasmith.formats.names import ModelNames
from lorasmith.formats.spelling import guessed_family
from lorasmith.toolbox.lora_files import free_target
from lorasmith.toolbox.model_files import open_model


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    path: Path
    layout: str  # title
    family: str  # title or name of the family whose names were used
    modules: int  # number of modules
    losses: tuple[str, ...]  # with `lossy`, a sentence per kind of loss
    notes: tuple[str, ...]  # a sentence per program that does not apply all of the new file, though nothing was lost


def convert_lora(
    path: str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    lossy: bool = False,
    *,
    private: bool = False,
    overwrite: bool = False,
) -> Converted:
    """Convert a LoRA file or folder `to` another layout, or to `portable`, the one that most programs read.

    Only names are read from `model`; None uses the released model of the family. With `lossy`, modules that cannot be
    converted exactly are approximated or left out. `private` leaves paths, prompts, captions and workflow out of the
    metadata. Raises LoraError, also if it cannot be converted exactly, ModelError and OutputError.
    """
    source, target = Path(path), free_target(Path(output), overwrite=overwrite)
    state, names = named_lora(source, model)
    layout = layout_for(to, names, state)
    is_portable = to.casefold() == PORTABLE
    losses = layout.losses(state, names)
    found = shortfalls(state, layout, names, is_portable=is_portable)
    lost = [*sentences(losses), *(shortfall.sentence for shortfall in found if shortfall.program == layout.title)]
    held_to = f"the released {names.family} model (--model names another)" if model is None else "the model"
    strangers: dict[StrangerReason, list[str]] = {}
    for part in unapplied(state, names):
        strangers.setdefault(part.reason, []).append(part.name)
    for reason, parts in strangers.items():
        first = parts[0] if len(parts) == 1 else f"{len(parts)} modules, such as {parts[0]}"
        lost.append(f"{first}: {held_to} has no place for it, {reason.text}")
    if state.words and not (layout.holds_words or is_portable):
        lost.append(f"the word {', '.join(state.words)}: it is an embedding of its own there")
    if lost and not lossy:
        raise LoraError(
            f"{source.name} cannot be converted for {layout.title} without loss ({lost[0]}); "
            "add --lossy to convert the rest, or choose another layout"
        )
    kept = replace(without(state, {loss.module for loss in losses if loss.left_out}), unknown={})
    modules = len({*kept.adapters, *kept.differences})
    if not modules:
        raise LoraError(f"nothing of {source.name} can be converted for {layout.title} ({lost[0]})")
    metadata = without_private(state.metadata) if private else state.metadata
    alphas = misread_alphas(kept, names)
    form = (lambda piece: made_portable(piece, names, alphas)) if is_portable else None
    save_streamed(target, kept, names, layout, metadata, form=form)
    others = shortfalls(kept, layout, names, is_portable=is_portable)
    notes = tuple(shortfall.sentence for shortfall in others if shortfall.program != layout.title)
    return Converted(target, layout.title, names.family, modules, tuple(lost), notes)


def named_lora(source: Path, model: str | os.PathLike[str] | None) -> tuple[AdapterState, ModelNames]:
    """A LoRA with the names of its model, or of the released model of its family. Raises LoraError and ModelError."""
    if model is not None:
        names = open_model(model).names
        return load_lora(source, names), names
    tensors, metadata = read_lora_tensors(source)
    names = _released(source, tensors, metadata)
    state = state_from_tensors(tensors, metadata, names)
    if not state.adapters and not state.differences:
        raise LoraError(
            f"{source} is for a model of other sizes than the released {names.family}; name its model with --model"
        )
    return state, names


def _released(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> ModelNames:
    """Names of the released model of the recognised family. Raises LoraError if none is recognised."""
    family = guessed_family({key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata)
    names = None if family is None else released_names(family, needed=True)
    if names is None:
        looks = f"looks like a LoRA for {family}, whose names are" if family else "is for a model whose names are"
        raise LoraError(f"{path} {looks} not known here; name the model with --model")
    return names
