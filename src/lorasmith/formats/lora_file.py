"""LoRA files as a whole: load one for a model, whatever its layouts; save one in a chosen layout.

Loading is decided tensor by tensor, because real files mix conventions: each layout reads the tensors that it
recognises and leaves the rest to the next. Tensors that none recognises stay in the state's `unknown` and are written
back unchanged. A file for another model is refused.

A LoRA close to the size of memory is written a few modules at a time (`save_streamed`). Read from a file, it is
memory-mapped; tensors that a layout computes from it (fused rows, factors with alpha multiplied in) go to a temporary
file beside the target and are mapped from there, because the writer needs all tensors in order.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.errors import LoraError, OutputError
from lorasmith.core.files import is_regular, read_regular, temporary_folder, write_atomic
from lorasmith.formats.acceptance import made_portable
from lorasmith.formats.container import count_non_finite, read_safetensors, write_safetensors
from lorasmith.formats.layouts.adapter_config import ADAPTER_METADATA, header_fields, without_config
from lorasmith.formats.layouts.comfy import AiToolkitLayout, ComfyLayout
from lorasmith.formats.layouts.diffusers import DiffusersLayout
from lorasmith.formats.layouts.kohya import KohyaLayout
from lorasmith.formats.layouts.layout import LAYOUTS, Layout, sentences
from lorasmith.formats.layouts.peft import PEFT_CONFIG, PeftLayout
from lorasmith.formats.metadata import BOUNDS, need_of, sshs_hashes
from lorasmith.formats.names import ModelNames, PlacedModules, split
from lorasmith.formats.spelling import (
    BUNDLE,
    PEFT_PREFIX,
    UNREADABLE,
    Unfit,
    all_assembled,
    assembled,
    component_of,
    grouped,
    guessed_family,
)

for _layout in (KohyaLayout(), ComfyLayout(), DiffusersLayout(), PeftLayout(), AiToolkitLayout()):
    LAYOUTS.register(_layout.name)(_layout)  # files are read in this order

_HOLDS_ALL = "kohya"  # every kind of adapter, and differences of norms and biases
PORTABLE = "portable"
"""Name for the layout that most programs read completely for a model's family."""


def layout_for(name: str, names: ModelNames, state: AdapterState | None = None) -> Layout:
    """The layout of a name. Raises LoraError for unknown names."""
    if name.casefold() != PORTABLE:
        return LAYOUTS[name]
    own = LAYOUTS[names.portable]
    is_whole = state is None or not any(loss.left_out for loss in own.losses(state, names))
    return own if is_whole else LAYOUTS[_HOLDS_ALL]


def load_lora(path: Path, names: ModelNames) -> AdapterState:
    """A LoRA for a model, from a safetensors file or a PEFT or diffusers folder.

    Tensors that do not fit the model are in its `unknown` (`unapplied` lists them by module). Raises LoraError if the
    file cannot be read, is not a LoRA, holds NaN or infinity, or is one for another model.
    """
    path = Path(path)
    tensors, metadata = read_lora_tensors(path)
    refuse_non_finite(path, tensors)
    return lora_of_tensors(path, tensors, metadata, names)


def lora_of_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: ModelNames
) -> AdapterState:
    """The LoRA for a model in the tensors of a file."""
    state = state_from_tensors(tensors, metadata, names)
    if state.unknown and (need := need_of(metadata)):
        raise LoraError(f"{path} needs {need}")
    _refuse_other_models(path, tensors, state, names)
    return state


def state_from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: ModelNames) -> AdapterState:
    """The LoRA in a file's tensors; those that do not fit the model are in `unknown`."""
    words, others = bundle_of(tensors)
    state = AdapterState(unknown=others, metadata=dict(metadata))
    for _, layout in LAYOUTS.items():
        recognised = layout.read(state.unknown, metadata, names)
        if twice := state.adapters.keys() & recognised.adapters.keys():
            raise LoraError(
                "a LoRA file holds one adapter for a module, and this one has two, in different layouts, for "
                f"{min(twice).path}; keep the tensors of one of them"
            )
        state.adapters.update(recognised.adapters)
        state.differences.update(recognised.differences)
        state = AdapterState(state.adapters, state.differences, recognised.unknown, state.metadata, words)
    return state


def bundle_of(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The words in a LoRA file as `AdapterState.words`, and its other tensors."""
    words: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        word, _, encoder = key.removeprefix(BUNDLE).partition(".")
        is_word = key.startswith(BUNDLE) and word and encoder
        if is_word and tensor.ndim in (1, 2) and tensor.numel() and tensor.is_floating_point():
            words.setdefault(word, {})[encoder] = tensor.reshape(-1, tensor.shape[-1])
        else:
            others[key] = tensor
    return words, others


def save_lora(
    path: Path,
    state: AdapterState,
    names: ModelNames,
    *,
    layout: str = PORTABLE,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA atomically, to a file, or to a folder for layouts that are one. The same state gives the same bytes.

    A `dtype` is for the adapters: magnitudes of DoRA keep theirs, and alphas that it would round are written in fp32.
    `metadata` replaces the state's, and the hashes over the content are added to it; in the state's own only hashes
    that are there are updated. Raises LoraError if the layout is unknown or cannot hold all of the LoRA, or a tensor
    holds NaN or infinity, OutputError if the file cannot be written.
    """
    chosen, state, written = _written(state, names, layout, dtype)
    header = with_header(state.metadata if metadata is None else metadata, chosen, state, names)
    carried = {} if chosen.in_folder else state.unknown  # PEFT has no place for tensors of no module
    tensors = {**carried, **written, **_bundle(state, chosen, is_portable=layout.casefold() == PORTABLE)}
    write_lora(path, tensors, header, chosen.companions(state, names), hashed=metadata is not None)


def lora_tensors(
    state: AdapterState, names: ModelNames, *, layout: str = PORTABLE, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of the file that `save_lora` writes, by key. Raises LoraError as it does."""
    return _written(state, names, layout, dtype)[2]


def _written(
    state: AdapterState, names: ModelNames, layout: str, dtype: torch.dtype | None
) -> tuple[Layout, AdapterState, dict[str, Tensor]]:
    """Layout, LoRA in its form, and tensors by key."""
    chosen = layout_for(layout, names, state)
    if layout.casefold() == PORTABLE:
        state = made_portable(state, names)
    if lost := [loss for loss in chosen.losses(state, names) if loss.left_out]:
        raise LoraError(f"a LoRA saved for {chosen.title} must fit it: {sentences(lost)[0]}; choose another layout")
    return (
        chosen,
        state,
        {
            key: tensor if key.endswith(MAGNITUDES) else _cast(tensor, dtype)
            for key, tensor in chosen.write(state, names).items()
        },
    )


def _bundle(state: AdapterState, layout: Layout, *, is_portable: bool) -> dict[str, Tensor]:
    """The words of a LoRA by key, in their own format; none in a layout that has no place for them."""
    if not (layout.holds_words or (is_portable and not layout.in_folder)):
        return {}
    return {
        f"{BUNDLE}{word}.{key}": vector.contiguous() for word, own in state.words.items() for key, vector in own.items()
    }


def with_header(metadata: Mapping[str, str], layout: Layout, state: AdapterState, names: ModelNames) -> dict[str, str]:
    """Metadata with a layout's entries in place of those of other layouts."""
    kept = {key: value for key, value in without_config(metadata).items() if key != BOUNDS}
    return kept | layout.header(state, names)


def write_lora(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    companions: Mapping[str, str],
    *,
    hashed: bool,
) -> None:
    """Write a file, or a folder for layouts with text files beside the tensors."""
    if companions and path.suffix == ".safetensors":
        raise OutputError(f"this layout is a folder, and {path.name} is the name of a file; give a folder's name")
    files: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        folder, _, name = key.rpartition("/")
        files.setdefault(folder, {})[name] = tensor
    for folder, content in files.items() if companions else [("", tensors)]:
        header = dict(metadata)
        if hashed or "sshs_model_hash" in header:
            header |= sshs_hashes(content, header)
        write_safetensors(path / folder / _FILES_IN_FOLDERS[0] if companions else path, content, header)
    for name, text in companions.items():
        write_atomic(path / name, text)


def without(state: AdapterState, modules: Collection[ModuleRef]) -> AdapterState:
    """A LoRA without some of its modules."""
    return AdapterState(
        {ref: weights for ref, weights in state.adapters.items() if ref not in modules},
        {ref: parameters for ref, parameters in state.differences.items() if ref not in modules},
        state.unknown,
        state.metadata,
        state.words,
    )


class StrangerReason(Enum):
    """Why parts of a LoRA are not applied, as text after their number, and the remedy."""

    MODULE = "with no module there", "use the model that it was trained on"
    SHAPE = "of another shape than there", "use the model that it was trained on"
    NAME = "under unknown names", "use a version of it in another layout"
    FUSED = (
        "of fused layers that cannot be cut",
        "train it with separate q, k and v (SimpleTuner: fused_qkv_projections)",
    )
    INCOMPLETE = "incomplete or of no known algorithm", "look at it with `lorasmith check`, or get the file again"
    SUFFIX = "with no name that LoRA files use", "look at it with `lorasmith check`"
    TEXT = "for text encoders", "apply it to text encoders"
    DENOISER = "for the denoiser", "apply it to the denoiser"

    @property
    def text(self) -> str:
        """The reason."""
        return self.value[0]

    @property
    def remedy(self) -> str:
        """What to do."""
        return self.value[1]


@dataclass(frozen=True)
class Unapplied:
    """A part of a LoRA file that is not applied."""

    name: str  # of the module in the file, or the key of a tensor whose suffix is unknown
    component: str  # that the name belongs to
    reason: StrangerReason  # why


def unapplied(state: AdapterState, names: ModelNames) -> list[Unapplied]:
    """Parts of a LoRA, as read for a model, that the model does not use, sorted by name."""
    groups = grouped(state.unknown)
    strangers = state.unknown.keys() - {key for keys in groups.values() for key in keys.values()}
    placed_modules = _known_bases(names) if groups else {}
    # Where most of a LoRA fits, the model is its own, and names that differ in more than numbers are spelt otherwise.
    strange = {base for base in groups if component_of(base) == DENOISER}
    fits = sum(ref.component == DENOISER for ref in {*state.adapters, *state.differences}) > len(strange)
    kinds = {_NUMBERS.sub("0", base) for base in placed_modules} if fits else set()
    why = dict.fromkeys(strangers, StrangerReason.SUFFIX)
    for base, keys in groups.items():
        if base in placed_modules:
            why[base] = _misfit({role: state.unknown[key] for role, key in keys.items()}, placed_modules[base])
        else:
            is_other_name = fits and base in strange and _NUMBERS.sub("0", base) not in kinds
            why[base] = StrangerReason.NAME if is_other_name else StrangerReason.MODULE
    return [Unapplied(name, component_of(name), why[name]) for name in sorted(why)]


_NUMBERS = re.compile(r"\d+")


def _misfit(tensors: Mapping[str, Tensor], parts: PlacedModules) -> StrangerReason:
    """Why tensors, by role, are not applied to the modules of their base."""
    whole = assembled(tensors)
    if isinstance(whole, Unfit):
        return StrangerReason.INCOMPLETE
    places = [part.place for part in parts]
    if whole.adapter is not None and split(whole.adapter, places) is None:
        return StrangerReason.FUSED
    return StrangerReason.SHAPE


def read_lora_tensors(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file, or of the folder in which PEFT or diffusers saves one.

    Tensors are memory-mapped, so that only those that are used take memory. Keys of a text encoder's subfolder have
    its name and a slash in front.
    """
    tensors, metadata = _tensors_in_folder(path) if path.is_dir() else read_safetensors(path)
    for suffix, (what, remedy) in UNREADABLE.items():
        if any(key.endswith(suffix) for key in tensors):
            raise LoraError(f"{path} {what}, so it is not read; {remedy}")
    return tensors, metadata


def _tensors_in_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    fields: dict[str, Any] = {}
    for folder in (path, *sorted(entry for entry in path.iterdir() if entry.is_dir())):
        file = next((folder / name for name in _FILES_IN_FOLDERS if (folder / name).is_file()), None)
        if file is None:
            continue
        prefix = f"{folder.name}/" if folder.name.startswith("text_encoder") and folder != path else ""
        of_file, header = read_safetensors(file)
        tensors |= {prefix + key: tensor for key, tensor in of_file.items()}
        metadata = header | metadata
        if is_regular(config := folder / PEFT_CONFIG):
            try:
                fields |= header_fields(read_regular(config).decode("utf-8", "replace"), prefix + PEFT_PREFIX)
            except OSError as error:
                raise LoraError(f"{config} cannot be read ({error.strerror}); get the folder again") from error
    if not tensors:
        raise LoraError(f"{path} must hold {' or '.join(_FILES_IN_FOLDERS)}; name the LoRA file itself")
    return tensors, metadata | ({ADAPTER_METADATA: json.dumps(fields)} if fields else {})


_FILES_IN_FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")

# A LoRA of a related model has many module names, and some shapes, in common with this one. Input and output
# convolutions may differ between versions of one model, so that a few misfits are no proof.
_MISFIT_LIMIT = 0.1
# LoRAs for Flux.1 are of use on Chroma, which lacks a quarter of the modules. Names of a few modules are no proof.
_ABSENT_LIMIT, _ABSENT_LEAST = 1 / 3, 4


def refuse_non_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise LoraError if a LoRA file, whose tensors these are, holds NaN or infinity."""
    bad = {key: count for key, tensor in tensors.items() if (count := count_non_finite(tensor))}
    if bad:
        first = next(iter(bad))
        others = f", as do {len(bad) - 1} other tensors" if len(bad) > 1 else ""
        raise LoraError(
            f"{path} must hold finite numbers, but {first} holds NaN or infinity ({bad[first]} of "
            f"{tensors[first].numel()} values){others}; go back to an earlier file, or leave such modules out with "
            "`lorasmith check --fix`"
        )


def _known_bases(names: ModelNames) -> dict[str, PlacedModules]:
    """Every name of every layout for modules of a model."""
    return {base: parts for _, layout in LAYOUTS.items() for base, parts in layout.bases(names).items()}


def _refuse_other_models(path: Path, tensors: Mapping[str, Tensor], state: AdapterState, names: ModelNames) -> None:
    groups = grouped(tensors)
    if not groups and state.words:  # of a word that was trained alone
        return
    if not groups:
        raise LoraError(f"{path} is not a LoRA: none of its {len(tensors)} tensors has a name that LoRA files use")
    family = guessed_family({key: tuple(tensor.shape) for key, tensor in tensors.items()}, state.metadata)
    looks = f"looks like a LoRA for {family}" if family else "is a LoRA for another kind of model"
    if not state.adapters and not state.differences:
        if unfit := all_assembled(tensors, groups, {})[1]:
            raise LoraError(
                f"{path} has no module that can be applied: {next(iter(unfit.values()))}; get the file again"
            )
        if fused := [part for part in unapplied(state, names) if part.reason is StrangerReason.FUSED]:
            reason = StrangerReason.FUSED
            raise LoraError(
                f"{path} has no module that can be applied: {len(fused)} {reason.text}, such as {fused[0].name}; "
                f"{reason.remedy}"
            )
        raise LoraError(
            f"{path} {looks}, and none of its {len(groups)} modules fits the loaded {names.family} model; "
            "load the model that it was trained on"
        )
    wrong = (StrangerReason.SHAPE, StrangerReason.INCOMPLETE)
    left = [part for part in unapplied(state, names) if part.component == DENOISER]
    misfits = [part.name for part in left if part.reason in wrong]
    total = sum(component_of(base) == DENOISER for base in groups)
    absent = [part.name for part in left if part.reason in (StrangerReason.MODULE, StrangerReason.NAME)]
    is_other = len(absent) >= _ABSENT_LEAST and len(absent) > _ABSENT_LIMIT * total
    if family and is_other and _family_of_names(names) not in (None, family):
        raise LoraError(
            f"{path} {looks}: {len(absent)} of its {len(groups)} modules, such as {absent[0]}, are not in the loaded "
            f"{names.family} model; load the model that it was trained on"
        )
    if len(misfits) > _MISFIT_LIMIT * total:
        raise LoraError(
            f"{path} {looks}: {len(misfits)} of its {len(groups)} modules, such as {misfits[0]}, have another shape "
            f"than in the loaded {names.family} model; load the model that it was trained on"
        )


def _family_of_names(names: ModelNames) -> str | None:
    """Display name of the family that a LoRA on all of a model would be recognised as."""
    shapes = {path: names.weight_shapes.get(path, ()) for path in names.denoiser}
    return guessed_family({f"{path}.lora_A.weight": (1, *shape[1:]) for path, shape in shapes.items()})


# Rounded, they would change whole rows or columns of the base's weights.
MAGNITUDES = (".dora_scale", ".lora_magnitude_vector")


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    is_rounded_scalar = tensor.ndim == 0 and bool(cast.float() != tensor.float())
    return tensor.to(torch.float32) if is_rounded_scalar else cast


_PIECE_BYTES = 1 << 26  # computed at a time before they are written


def save_streamed(
    path: Path,
    state: AdapterState,
    names: ModelNames,
    layout: Layout,
    metadata: Mapping[str, str],
    *,
    form: Callable[[AdapterState], AdapterState] | None = None,
) -> None:
    """Write a LoRA atomically, with hashes over its content, holding a few modules of it at a time."""
    header = with_header(metadata, layout, state, names)
    companions = layout.companions(state, names)
    mapped = [tensor for weights in state.adapters.values() for tensor in weights.tensors.values()]
    mapped += [tensor for parameters in state.differences.values() for tensor in parameters.values()]
    with spooled(path.parent, mapped) as spool:
        for piece in _pieces(state, names):
            spool.add(layout.write(piece if form is None else form(piece), names))
        spool.add(_bundle(state, layout, is_portable=form is not None))
        write_lora(path, spool.tensors(), header, companions, hashed=True)


@contextlib.contextmanager
def spooled(folder: Path, mapped: Iterable[Tensor]) -> Iterator[Spool]:
    """A temporary file in `folder` for computed tensors; `mapped` are on disk already."""
    with temporary_folder(folder / "lora") as own:
        try:
            with (own / "spool").open("wb") as file:
                yield Spool(own / "spool", file, {tensor.untyped_storage().data_ptr() for tensor in mapped})
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be written to ({error.strerror}); free some space and try again"
            ) from error


class Spool:
    """Tensors on disk, memory-mapped after the last one is written."""

    def __init__(self, path: Path, file: BinaryIO, kept: set[int]) -> None:
        self._path, self._file, self._kept = path, file, kept
        self._there: dict[str, Tensor] = {}
        self._written: dict[str, tuple[int, torch.dtype, torch.Size]] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, by key; one of a key that was written before takes its place."""
        for key, tensor in tensors.items():
            self._there.pop(key, None)
            self._written.pop(key, None)
            if not tensor.numel() or tensor.untyped_storage().data_ptr() in self._kept:
                self._there[key] = tensor
                continue
            start = self._file.seek(-self._file.tell() % _ALIGNMENT, 1)
            self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._written[key] = (start, tensor.dtype, tensor.shape)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, written ones mapped from the file."""
        self._file.flush()
        if not self._written:
            return self._there
        size = self._file.tell()
        whole = torch.from_file(str(self._path), shared=False, size=size, dtype=torch.uint8)
        found = dict(self._there)
        for key, (start, dtype, shape) in self._written.items():
            raw = whole[start : start + shape.numel() * dtype.itemsize]
            found[key] = raw.view(dtype).reshape(shape)
        return found


_ALIGNMENT = 64


def _pieces(state: AdapterState, names: ModelNames) -> Iterator[AdapterState]:
    """A LoRA in parts of bounded size, modules that an original checkpoint fuses staying together."""
    groups: dict[tuple[str, str], list[ModuleRef]] = {}
    for ref in dict.fromkeys((*state.adapters, *state.differences)):
        place = names.denoiser.get(ref.path) if ref.component == DENOISER else None
        groups.setdefault((ref.component, ref.path if place is None else place.path), []).append(ref)
    piece, size = AdapterState(), 0
    for refs in groups.values():
        for ref in refs:
            if ref in state.adapters:
                piece.adapters[ref] = state.adapters[ref]
                size += sum(tensor.nbytes for tensor in state.adapters[ref].tensors.values())
            if ref in state.differences:
                piece.differences[ref] = state.differences[ref]
                size += sum(tensor.nbytes for tensor in state.differences[ref].values())
        if size >= _PIECE_BYTES:
            yield piece
            piece, size = AdapterState(), 0
    yield piece
