"""Several LoRAs in one or folded into a checkpoint, each at a strength.

LoRAs add up exactly: their factors are stacked along the rank, with strength · alpha / rank multiplied in if it differs
between them. A stack can be truncated to a rank by singular value decomposition. Algorithms whose change is not up ·
down (LoHa, LoKr, full differences) need the truncation, and those whose change depends on the weight (DoRA, OFT, BOFT,
GLoRA) also need the weight.

A checkpoint keeps its layout. Every tensor that changes is computed in fp32 as when the LoRAs are applied in their
order, and rounded once to the checkpoint's dtype; all others are copied byte by byte, one at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.adapters.algorithms import title_of
from lorasmith.adapters.inject import lacking
from lorasmith.core.adapter_state import DENOISER, AdapterWeights, ModuleRef, multiplied
from lorasmith.core.errors import LoraError, ModelError, OptionError
from lorasmith.core.files import atomic_folder
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.metadata import RANKS_ENTRY
from lorasmith.formats.scales import rank_of, scale_of, scaled_by
from lorasmith.formats.spelling import ModuleTensors, without_core
from lorasmith.toolbox.changes import (
    MatrixChange,
    Truncated,
    added,
    added_by,
    as_lora,
    changed_weight,
    has_full_difference,
    is_additive,
    is_plain_lora,
    layer_like,
    merged_weight,
    share,
    stacked,
    weight_shape,
)
from lorasmith.toolbox.lora_files import (
    LoraFile,
    file_target,
    folder_target,
    free_target,
    noted,
    read_lora,
    read_together,
    rewritten,
    save_alike,
)
from lorasmith.toolbox.model_files import ModelReader, Parameter

WeightedModule = tuple[ModuleTensors, float]  # a file's tensors for a module, and its strength


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge."""

    output: Path
    modules: int  # number of modules
    ranks: Mapping[int, int]  # number of modules by rank
    energy: float | None  # share of the squared singular values kept in truncation; None if nothing was truncated
    # by file, modules or keys that do not belong to the model and are not in the new file
    left_out: Mapping[Path, Sequence[str]]
    leveled: Sequence[Path] = ()  # T-LoRAs, of which all ranks are used at each noise level now


def merge_loras(
    loras: Sequence[tuple[Path, float]],
    output: Path,
    *,
    rank: int | None = None,
    model: ModelReader | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Merge LoRAs (path, strength) into one file in the layout of the first, truncated to `rank` if given.

    `model` is needed if the layouts do not determine which modules are the same, and for algorithms whose change
    depends on the weights. A dtype of None keeps that of the files, or uses fp32 where it would round. Raises LoraError
    if they are for different models, or cannot be stacked and `rank` is None; OptionError and OutputError.
    """
    if rank is not None and rank < 1:
        raise OptionError(f"a rank must be at least 1, got {rank}")
    file_target(output, overwrite=overwrite)
    names = None if model is None else model.names
    files = read_together([Path(path) for path, _ in loras], names, one_layout=True)
    by_strength = [(file, strength) for file, (_, strength) in zip(files, loras, strict=True) if strength]
    kept, total = 0.0, 0.0
    modules: dict[ModuleRef, ModuleTensors] = {}
    for ref in dict.fromkeys(ref for file, _ in by_strength for ref in file.modules):
        parts = [(file.modules[ref], strength) for file, strength in by_strength if ref in file.modules]
        whole = _exactly(parts, rank)
        if whole is None and rank is None:
            raise LoraError(_cannot_stack(ref, by_strength))
        if whole is None:
            assert rank is not None
            whole, cut = _cut_down(ref, parts, rank, model)
            kept, total = kept + cut.kept, total + cut.total
        modules[ref] = whole
    if not modules:
        raise LoraError("a merge needs at least one LoRA with a strength other than 0, and all of these are 0")
    save_alike(output, files, modules, _merged_metadata(files, loras, rank), dtype=dtype)
    found = [rank_of(module.adapter) for module in modules.values() if module.adapter is not None]
    return MergeReport(
        output=output,
        modules=len(modules),
        ranks={rank: found.count(rank) for rank in found if rank is not None},
        energy=share(kept, total) if total else None,
        left_out={file.path: left for file in files if (left := sorted(file.unknown.keys() - file.words.keys()))},
        leveled=_leveled(files) if len(files) > 1 or rank is not None else (),
    )


def _leveled(files: Sequence[LoraFile]) -> Sequence[Path]:
    return tuple(file.path for file in files if RANKS_ENTRY in file.metadata)


def _exactly(parts: Sequence[WeightedModule], rank: int | None) -> ModuleTensors | None:
    """The exact sum of several files' changes of a module, None if there is none."""
    adapters = [(module.adapter, strength) for module, strength in parts if module.adapter is not None]
    if rank is not None and any(has_full_difference(module) for module, _ in parts):
        return None
    if len(adapters) == 1 and (adapters[0][1] == 1 or is_plain_lora(adapters[0][0])):
        (weights, strength), *_ = adapters
        if rank is not None and (not is_plain_lora(weights) or weights.tensors["down"].shape[0] > rank):
            return None
        scaled = weights if strength == 1 else _stack(adapters)
        return ModuleTensors(scaled, _summed(parts))
    if not all(is_plain_lora(weights) for weights, _ in adapters):
        return None
    if rank is not None and sum(weights.tensors["down"].shape[0] for weights, _ in adapters) > rank:
        return None
    return ModuleTensors(_stack(adapters) if adapters else None, _summed(parts))


def _stack(adapters: Sequence[tuple[AdapterWeights, float]]) -> AdapterWeights:
    """The sum of LoRAs. If all have one scale it is kept, and no number in their tensors changes."""
    factors = [strength * scale_of(weights) for weights, strength in adapters]
    loras = [weights if len(adapters) == 1 else without_core(weights) for weights, _ in adapters]
    in_common = len(set(factors)) == 1 and factors[0] > 0
    if not in_common:
        loras = [scaled_by(weights, factor) for weights, factor in zip(loras, factors, strict=True)]
    tensors = [weights.tensors for weights in loras]
    _refuse_unlike([(roles["up"].shape[0], *roles["down"].shape[1:]) for roles in tensors])
    rank = sum(roles["down"].shape[0] for roles in tensors)
    mid = {name: tensor for name, tensor in tensors[0].items() if name == "mid"}
    joined = {
        "down": _joined([roles["down"] for roles in tensors], 0),
        "up": _joined([roles["up"] for roles in tensors], 1),
    }
    return AdapterWeights("lora", {**joined, **mid}, factors[0] * rank if in_common else float(rank))


def _joined(pieces: Sequence[Tensor], dimension: int) -> Tensor:
    """Concatenated pieces of any dtypes, in a dtype that holds all of their values."""
    dtype = pieces[0].dtype
    for piece in pieces:
        dtype = torch.promote_types(dtype, piece.dtype)
    return torch.cat([piece.to(dtype) for piece in pieces], dimension)


def _summed(parts: Sequence[WeightedModule]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for module, strength in parts:
        for name, difference in module.differences.items():
            scaled = multiplied(difference, strength)
            _refuse_unlike([tuple(scaled.shape), *([tuple(result[name].shape)] if name in result else [])])
            result[name] = scaled if name not in result else added(result[name].float(), scaled, 1.0)
    return result


def _refuse_unlike(shapes: Sequence[tuple[int, ...]]) -> None:
    if len(set(shapes)) > 1:
        raise LoraError(
            f"LoRAs must be for the same model, but a module has shape {' in one and '.join(map(str, shapes))} in "
            "another; take files that were trained on the same model"
        )


def _cut_down(
    ref: ModuleRef, parts: Sequence[WeightedModule], rank: int, model: ModelReader | None
) -> tuple[ModuleTensors, Truncated]:
    """The best LoRA of a rank for the sum of several files' changes of a module."""
    shape = None if model is None or ref.component != DENOISER else model.names.weight_shapes.get(ref.path)
    if all(module.adapter is None or is_additive(module.adapter) for module, _ in parts):
        weighty = [(module, strength) for module, strength in parts if module.adapter or "weight" in module.differences]
        shapes = [
            shape or (weight_shape(module.adapter) if module.adapter else tuple(module.differences["weight"].shape))
            for module, _ in weighty
        ]
        changes = [added_by(module, shape).times(strength) for module, strength in weighty]
        _refuse_unlike([change.shape for change in changes])
        change, shape = stacked(*changes), max(shapes, key=len)
    else:
        if model is None or ref not in model.modules:
            names = sorted({title_of(m.adapter) for m, _ in parts if m.adapter and not is_additive(m.adapter)})
            raise LoraError(
                f"what {' and '.join(names)} does to {ref.path} depends on the model's weights; "
                "name the model with --model, or merge into it with --into"
            )
        before = model.read(Parameter(ref, "weight")).float()
        after = changed_weight(parts, model.modules[ref], before)
        change, shape = MatrixChange(dense=(after - before).flatten(1)), tuple(before.shape)
    cut = change.truncated(rank=rank, key=f"{ref.component}.{ref.path}")
    biases = {name: difference for name, difference in _summed(parts).items() if name != "weight"}
    return ModuleTensors(as_lora(cut, shape, float(cut.rank)), biases), cut


def _cannot_stack(ref: ModuleRef, files: Sequence[tuple[LoraFile, float]]) -> str:
    at_fault = ((file, file.modules[ref].adapter) for file, _ in files if ref in file.modules)
    path, weights = next(
        (file.path, weights) for file, weights in at_fault if weights is not None and not is_plain_lora(weights)
    )
    needed = "--rank" if is_additive(weights) else "--rank and --model"
    return (
        f"only plain LoRAs can be merged exactly, and {path} changes {ref.path} by {title_of(weights)}; "
        f"add {needed} to approximate the sum, or merge into the model with --into"
    )


def _merged_metadata(
    files: Sequence[LoraFile], loras: Sequence[tuple[Path, float]], rank: int | None
) -> dict[str, str]:
    """Entries that are equal in all files, and a note on the merge."""
    first, *others = (file.metadata for file in files)
    common = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    triggers = dict.fromkeys(t for file in files if (t := file.metadata.get("modelspec.trigger_phrase")))
    merged = ", ".join(f"{Path(path).name}:{strength:g}" for path, strength in loras)
    if len(files) > 1 or rank is not None:
        common.pop(RANKS_ENTRY, None)  # ranks are not those of training
    entries = {"modelspec.trigger_phrase": ", ".join(triggers), "modelspec.merged_from": merged}
    return noted({**common, **{key: value for key, value in entries.items() if value}}, f"merged {merged}")


@dataclass(frozen=True)
class FoldReport:
    """The result of folding."""

    output: Path
    modules: int  # number of modules that changed
    left_out: Mapping[Path, Sequence[str]]  # by LoRA, its modules or keys that do not belong to the model
    skipped: Sequence[str] = ()  # files of the folder that were not copied because they hold weights without the LoRAs
    leveled: Sequence[Path] = ()  # T-LoRAs, of which all ranks are used at each noise level now


def fold_into(
    model: ModelReader,
    loras: Sequence[tuple[Path, float]],
    output: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FoldReport:
    """Write a copy of a model with LoRAs (path, strength) folded in: a single file if the model is one, else a folder.

    `progress` receives (tensors changed, total).

    Raises LoraError if a LoRA is for another model or makes weights too large for the model's dtype, ModelError and
    OutputError.
    """
    (file_target if model.path.is_file() else free_target)(output, overwrite=overwrite)
    files = [(read_lora(Path(path), model.names), strength) for path, strength in loras]
    present = {ref.component for ref in model.modules}
    parts: dict[ModuleRef, list[WeightedModule]] = {}
    for file, strength in files:
        for ref, module in file.modules.items():
            if strength and ref.component in present:
                parts.setdefault(ref, []).append((module, strength))
    _refuse_misfits(model, files, parts)
    changes = _changes(model, parts, progress)
    note = f"folded in {', '.join(f'{Path(path).name}:{strength:g}' for path, strength in loras)}"
    if model.path.is_file():
        _write(model.path, output, changes.get(model.path, {}), note)
        skipped: list[str] = []
    else:
        skipped = _write_folder(model, output, changes, note)
    left_out = {
        file.path: sorted([*file.unknown, *(ref.path for ref in file.modules if ref.component not in present)])
        for file, _ in files
    }
    found = {path: names for path, names in left_out.items() if names}
    return FoldReport(output, len(parts), found, skipped, _leveled([file for file, _ in files]))


Rewrite = Callable[[Tensor], Tensor]


def _changes(
    model: ModelReader, parts: Mapping[ModuleRef, Sequence[WeightedModule]], progress: Callable[[int, int], None] | None
) -> dict[Path, dict[str, Rewrite]]:
    """The function from old to new value of each tensor that changes, by file and name, which reports its progress."""
    inside: dict[tuple[Path, str], list[Parameter]] = {}
    for parameter, place in model.places.items():
        if any(_touches(module, parameter.name) for module, _ in parts.get(parameter.module, ())):
            inside.setdefault((place.file, place.tensor), []).append(parameter)
    changes: dict[Path, dict[str, Rewrite]] = {}
    done = count(1)

    def changed(tensor: Tensor, *, name: str, parameters: Sequence[Parameter]) -> Tensor:
        result = _changed(tensor, name=name, model=model, parts=parts, parameters=parameters)
        if progress is not None:
            progress(next(done), len(inside))
        return result

    for (file, name), parameters in inside.items():
        changes.setdefault(file, {})[name] = partial(changed, name=name, parameters=parameters)
    return changes


def _changed(
    tensor: Tensor,
    *,
    name: str,
    model: ModelReader,
    parts: Mapping[ModuleRef, Sequence[WeightedModule]],
    parameters: Sequence[Parameter],
) -> Tensor:
    """A tensor of the checkpoint with the changes of all its parameters folded in."""
    whole = tensor.to(torch.float32, copy=True)  # the file's own memory is not to be written to
    for parameter in parameters:
        place = model.places[parameter]
        rows = whole if place.rows is None else whole[place.rows]
        value = _folded(model, parameter, rows.reshape(place.shape), parts[parameter.module]).reshape(rows.shape)
        if place.rows is None:
            whole = value
        else:
            whole[place.rows] = value  # indexing above gave a copy
    result = whole.to(tensor.dtype)
    if not torch.isfinite(result.float()).all() and torch.isfinite(tensor.float()).all():
        raise LoraError(
            f"the LoRAs make {name} too large for the model's {str(tensor.dtype).removeprefix('torch.')}; "
            "lower the strengths, or fold into a model in another number format"
        )
    return result


def _folded(model: ModelReader, parameter: Parameter, value: Tensor, parts: Sequence[WeightedModule]) -> Tensor:
    """One parameter (fp32) with a module's adapters and differences, in order."""
    for module, strength in parts:
        if parameter.name == "weight":
            value = merged_weight(module, layer_like(model.modules[parameter.module], value), value, strength)
        elif parameter.name in module.differences:
            value = added(value, module.differences[parameter.name], strength)
    return value


def _refuse_misfits(
    model: ModelReader, files: Sequence[tuple[LoraFile, float]], parts: Mapping[ModuleRef, Sequence[WeightedModule]]
) -> None:
    """Refuse, before writing, LoRAs that would be left out silently or do not fit."""
    if not parts:
        raise LoraError(f"nothing is to be folded into {model.path}: every strength is 0, or of parts that it lacks")
    for ref, ones in parts.items():
        for module, _ in ones:
            for name in ("weight", "bias"):
                if not _touches(module, name):
                    continue
                place = model.places.get(Parameter(ref, name))
                if place is None and Parameter(ref, "weight") in model.places:
                    raise LoraError(lacking(ref.path, name, is_layer=True))
                difference = module.differences.get(name)
                if place is None or (difference is not None and tuple(difference.shape) != place.shape):
                    paths = ", ".join(str(file.path) for file, _ in files if ref in file.modules)
                    raise LoraError(
                        f"{paths} changes {ref.path}.{name}, which {model.path} lacks or has in another shape; "
                        "it was made for another model"
                    )


def _touches(module: ModuleTensors, name: str) -> bool:
    return name in module.differences or (name == "weight" and module.adapter is not None)


def _write(source: Path, target: Path, changes: Mapping[str, Rewrite], note: str) -> None:
    metadata = check_safetensors(source, ModelError).metadata
    # Hashes over the weights would be wrong, and the new ones are known only after the last tensor.
    kept = {key: value for key, value in metadata.items() if key not in _HASHES}
    rewritten(source, target, changes, noted(kept, note))


def _write_folder(
    model: ModelReader, output: Path, changes: Mapping[Path, Mapping[str, Rewrite]], note: str
) -> list[str]:
    """Returns the files that were not copied."""
    changed_parts, used = {file.parent for file in changes}, model.files()
    skipped = []
    with atomic_folder(folder_target(output)) as folder:
        for file in sorted(path for path in model.path.rglob("*") if path.is_file()):
            target = folder / file.relative_to(model.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file in changes:
                _write(file, target, changes[file], note)
            elif file.parent in changed_parts and file.suffix in _WEIGHTS and file not in used:
                skipped.append(file.relative_to(model.path).as_posix())
            else:
                shutil.copyfile(file, target)
    return skipped


_HASHES = frozenset({"modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"})
_WEIGHTS = frozenset({".safetensors", ".bin", ".ckpt", ".pt", ".msgpack", ".onnx"})
