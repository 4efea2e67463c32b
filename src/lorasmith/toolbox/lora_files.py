"""LoRA files by module, under the file's names or a model's.

Files of one layout name the same module alike, so they are compared and merged in their spelling, without a model and
for every family. Files of different layouts are matched by the paths of a model: a given one, or the released one of
the recognised family (`released`).

Output is overwritten only on request, and headers record the operation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError, ModelError, OutputError
from lorasmith.core.files import atomic_path, check_writable, open_regular
from lorasmith.core.folders import pipeline_index
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.families.loading import released_names
from lorasmith.formats.container import check_safetensors, read_safetensors, write_safetensors
from lorasmith.formats.layouts.adapter_config import stated_alphas, without_config
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.lora_file import bundle_of, lora_of_tensors, read_lora_tensors, refuse_non_finite, save_lora
from lorasmith.formats.metadata import RUN_ENTRY, sshs_hashes
from lorasmith.formats.names import ModelNames
from lorasmith.formats.scales import rank_of, scale_of, scaled_by, with_one_alpha
from lorasmith.formats.spelling import (
    KOHYA,
    PEFT,
    XLABS,
    ModuleTensors,
    all_assembled,
    component_of,
    grouped,
    guessed_family,
    spelled,
    without_core,
    without_prefix,
)
from lorasmith.toolbox.changes import is_plain_lora


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file or folder."""

    path: Path
    layout: str  # registered name of the layout of most keys
    family: str | None  # title, None if not recognised
    tensors: Mapping[str, Tensor]
    modules: Mapping[ModuleRef, ModuleTensors]
    names: ModelNames | None  # of the model by which modules are identified; None for the file's own spelling
    bases: Mapping[ModuleRef, str]  # base in the file by module, for the file's own spelling; else empty
    unknown: Mapping[str, Tensor]  # tensors outside complete adapters and differences, or that do not fit the model
    metadata: Mapping[str, str]

    @property
    def words(self) -> dict[str, Tensor]:
        """The vectors of words that it was trained with, by key; they are among `unknown`, too."""
        others = bundle_of(self.tensors)[1]
        return {key: tensor for key, tensor in self.tensors.items() if key not in others}


def read_lora(path: Path, names: ModelNames | None = None) -> LoraFile:
    """A LoRA file or folder in any layout, its modules identified by `names`, or None for the file's own spelling.

    Raises LoraError if it cannot be read, is not a LoRA, is for another model than `names`, or holds NaN or infinity.
    """
    path = Path(path)
    tensors, metadata = read_lora_tensors(path)
    refuse_non_finite(path, tensors)
    groups = grouped(tensors)
    if not groups:
        raise LoraError(f"{path} is not a LoRA: none of its {len(tensors)} tensors has a name that LoRA files use")
    counts = {name: layout.detects(tensors) for name, layout in LAYOUTS.items()}
    layout = max(counts, key=lambda name: counts[name])
    family = guessed_family({key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata)
    if names is not None:
        state = lora_of_tensors(path, tensors, metadata, names)
        refs = dict.fromkeys((*state.adapters, *state.differences))
        found = {ref: ModuleTensors(state.adapters.get(ref), state.differences.get(ref, {})) for ref in refs}
        left = sorted(tensors.keys() - bundle_of(tensors)[1].keys())  # words are changed by no tool
        others = {**state.unknown, **{key: tensors[key] for key in left}}
        return LoraFile(path, layout, family, tensors, found, names, {}, others, state.metadata)
    by_base, _ = all_assembled(tensors, groups, stated_alphas(tensors, groups, metadata))
    modules: dict[ModuleRef, ModuleTensors] = {}
    bases: dict[ModuleRef, str] = {}
    unknown = dict(tensors)
    for base, module in by_base.items():
        ref = _flat(base)
        if ref in modules:
            raise LoraError(
                f"a LoRA file holds one adapter for a module, and {path} has two, {bases[ref]} and {base}; "
                "keep the tensors of one of them"
            )
        modules[ref], bases[ref] = module, base
        for key in groups[base].values():
            del unknown[key]
    return LoraFile(path, layout, family, tensors, modules, None, bases, unknown, metadata)


def read_together(
    paths: Sequence[Path], names: ModelNames | None = None, *, one_layout: bool = False
) -> list[LoraFile]:
    """LoRA files in any layouts, with their modules under common names.

    Without `names` these are the files' own spelling if they share it, else those of the released model of their
    family. `one_layout` requires a shared spelling in one layout, to write one file in the layout of the first. Raises
    LoraError if they are for different families, or modules cannot be matched.
    """
    files = [read_lora(path, names) for path in paths]
    if one_layout:
        refuse_folder(files[0])
    if names is not None:
        return files
    known = {file.family: file for file in files if file.family is not None}
    families = sorted(known, key=len)
    # "Stable Diffusion" is the title for files whose version is unknown.
    if any(not longer.startswith(families[0]) for longer in families) or len(families) > 2:
        first, *_, last = families
        raise LoraError(
            f"LoRAs must be for the same family of models, but {known[first].path} looks like one for {first} and "
            f"{known[last].path} like one for {last}; take files that were trained on the same model"
        )
    layouts = {file.layout for file in files}
    if all(_spelled_alike(files[0], other) for other in files[1:]) and not (one_layout and len(layouts) > 1):
        return files
    released = released_names(families[-1], needed=len(layouts) > 1) if families else None
    if released is not None:
        try:
            return [read_lora(path, released) for path in paths]
        except LoraError:
            pass  # for a model of other sizes than the released one
    if len(layouts) == 1:
        return files  # they change different modules
    other = next(file for file in files if file.layout != files[0].layout)
    raise LoraError(
        f"{files[0].path} is in the layout {files[0].layout} and {other.path} in {other.layout}, and what they call "
        "the same module depends on the model; name it with --model"
    )


def save_alike(
    path: Path,
    files: Sequence[LoraFile],
    modules: Mapping[ModuleRef, ModuleTensors],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write modules and words of `files` (read together) as a LoRA, atomically and in the layout of the first.

    Rank, alpha and hashes over the content are added to `metadata`; a dtype of None keeps each tensor's own. Raises
    LoraError for NaN or infinity, and OutputError.
    """
    first = files[0]
    words = {key: tensor for file in reversed(files) for key, tensor in file.words.items()}
    adapters = {ref: module.adapter for ref, module in modules.items() if module.adapter is not None}
    if first.layout == "kohya":
        adapters = with_one_alpha(adapters)
    metadata = {**metadata, **rank_entries(adapters.values())}
    if first.names is not None:
        differences = {ref: dict(module.differences) for ref, module in modules.items() if module.differences}
        state = AdapterState(adapters, differences, words=bundle_of(words)[0])
        save_lora(path, state, first.names, layout=first.layout, dtype=dtype, metadata=metadata)
        return
    bases = {ref: base for file in reversed(files) for ref, base in file.bases.items()}
    tensors: dict[str, Tensor] = {}
    for ref, module in modules.items():
        written = ModuleTensors(adapters.get(ref), module.differences)
        tensors |= spelled_like(first.layout, bases[ref], written, dtype)
    tensors |= words
    header = without_config(metadata)
    write_safetensors(path, tensors, header | sshs_hashes(tensors, header))


def refuse_folder(file: LoraFile) -> None:
    """Raise LoraError for layouts and names that are not written here: folders, and XLabs' names."""
    if LAYOUTS[file.layout].in_folder:
        raise LoraError(
            f"{file.path} is in {LAYOUTS[file.layout].title}'s layout, which is a folder and not a file; convert it "
            "first with `lorasmith convert`"
        )
    if any(re.fullmatch(XLABS, base) for base in file.bases.values()):
        raise LoraError(
            f"{file.path} has the names of XLabs' trainer, which are read and not written; convert it first with "
            "`lorasmith convert`"
        )


def spelled_like(layout: str, base: str, module: ModuleTensors, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A module's tensors by key under `base` in a layout; alpha is multiplied in if the layout has no tensor for it."""
    base = _without_processor(base)
    adapter = module.adapter
    peft = layout == "diffusers"
    if peft and adapter is not None and is_plain_lora(adapter) and scale_of(adapter) != 1:
        adapter = scaled_by(without_core(adapter), scale_of(adapter))
    if dtype is not None and adapter is not None:
        adapter = replace(adapter, tensors={name: tensor.to(dtype) for name, tensor in adapter.tensors.items()})
    differences = {name: t if dtype is None else t.to(dtype) for name, t in module.differences.items()}
    module = ModuleTensors(adapter, differences)
    written = spelled(module, PEFT if peft else KOHYA, alpha=not peft, norm_names=layout == "kohya")
    return {base + suffix: tensor.contiguous() for suffix, tensor in written.items()}


def flat_shapes(names: ModelNames) -> dict[ModuleRef, tuple[int, ...]]:
    """Shape of each of the denoiser's weights, by module in the spelling of either naming."""
    return {
        ModuleRef(DENOISER, path.replace(".", "_")): names.weight_shapes[diffusers]
        for diffusers, original in names.denoiser.items()
        for path in (diffusers, original.path)
        if original.rows is None and diffusers in names.weight_shapes
    }


def _without_processor(base: str) -> str:
    """A path without the part that diffusers' former attention processors added to it."""
    return base.replace(".processor.to_out", ".to_out.0").replace(".processor.to_", ".to_")


def _flat(base: str) -> ModuleRef:
    """A module in a file's spelling, without the differences between layouts that use the same paths."""
    path = without_prefix(_without_processor(base)).replace(".", "_")
    return ModuleRef(component_of(base), path.removeprefix("text_model_"))


def _spelled_alike(first: LoraFile, other: LoraFile) -> bool:
    """Whether two files have the same names for modules of the components that both change."""
    in_both = {ref.component for ref in first.modules} & {ref.component for ref in other.modules}
    return in_both == {ref.component for ref in first.modules.keys() & other.modules.keys()}


HISTORY = "lorasmith.history"  # header entry to which each tool adds a line


def free_target(path: Path, *, overwrite: bool = False) -> Path:
    """`path`, checked before any work. Raises OutputError if it may not be overwritten or cannot be written."""
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; choose another name with --output, or add --overwrite")
    check_writable(path.parent)
    return path


def file_target(path: Path, *, overwrite: bool = False) -> Path:
    """The same for a safetensors file, whose name must have that extension."""
    if path.suffix.casefold() != ".safetensors":
        raise OutputError(f"the output must be a file whose name ends in .safetensors, got {path}; choose another name")
    return free_target(path, overwrite=overwrite)


def folder_target(target: Path) -> Path:
    """`target`, for a diffusers model. Raises OutputError if another kind of file or folder exists there."""
    if target.exists() and pipeline_index(target) is None:
        raise OutputError(
            f"{target} is not a diffusers model, and only a diffusers model is replaced by one; choose another output"
        )
    return target


def rewritten(
    source: Path, target: Path, changes: Mapping[str, Callable[[Tensor], Tensor]], metadata: Mapping[str, str]
) -> None:
    """Copy a safetensors file atomically with some tensors changed, one at a time; others are copied byte by byte.

    `changes` maps names to functions from the old value to a new one of the same shape and dtype. Raises ModelError if
    the source is damaged, and OutputError.
    """
    body = check_safetensors(source, ModelError).body_start
    tensors, _ = read_safetensors(source, ModelError)
    with open_regular(source) as old, atomic_path(target) as temporary:
        entries = parse_foreign_json(old.read(body)[8:])
        entries["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        del entries["__metadata__"]
        with temporary.open("wb") as new:
            new.write(len(text).to_bytes(8, "little") + text)
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                start, end = entry["data_offsets"]
                if name in changes:
                    value = changes[name](tensors[name]).contiguous().reshape(-1).view(torch.uint8)
                    new.write(value.numpy().data)
                else:
                    old.seek(body + start)
                    _copy(old, new, end - start)


def noted(metadata: Mapping[str, str], note: str) -> dict[str, str]:
    """Metadata with one more line of history, without the record of the training run, which no longer applies."""
    lines = [*([metadata[HISTORY]] if metadata.get(HISTORY) else []), note]
    kept = {key: value for key, value in metadata.items() if key != RUN_ENTRY}
    return {**kept, HISTORY: "\n".join(lines)}


def rank_entries(adapters: Iterable[AdapterWeights]) -> dict[str, str]:
    """Rank and alpha for kohya's metadata: numbers, or `Dynamic` if modules differ."""
    known = [(rank, weights.alpha) for weights in adapters if (rank := rank_of(weights)) is not None]
    ranks = {str(rank) for rank, _ in known}
    alphas = {str(float(rank if alpha is None else alpha)) for rank, alpha in known}
    if not ranks:
        return {}
    return {
        "ss_network_dim": ranks.pop() if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
    }


def _copy(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count:
        piece = old.read(min(count, 1 << 24))
        new.write(piece)
        count -= len(piece)
