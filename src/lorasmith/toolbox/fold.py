"""LoRAs folded into a checkpoint: the same model in the same layout, with other weights.

Every changed tensor is computed in fp32 as when the LoRAs are applied in their order, and rounded once to the
checkpoint's dtype. All others are copied byte by byte. One tensor is in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.core.adapter_state import ModuleRef
from lorasmith.core.errors import LoraError, ModelError
from lorasmith.core.files import atomic_folder
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.spelling import ModuleTensors
from lorasmith.toolbox.changes import added, layer_like, merged_weight
from lorasmith.toolbox.lora_files import LoraFile, read_lora
from lorasmith.toolbox.merge import Part
from lorasmith.toolbox.model_files import ModelFiles, Parameter
from lorasmith.toolbox.writing import file_target, folder_target, free_target, noted, rewritten


@dataclass(frozen=True)
class FoldReport:
    """The result of folding."""

    output: Path
    modules: int  # number of modules that changed
    left_out: Mapping[Path, Sequence[str]]  # by LoRA, its modules or keys that do not belong to the model
    skipped: Sequence[str] = ()  # files of the folder that were not copied because they hold weights without the LoRAs


def fold_into(
    model: ModelFiles, loras: Sequence[tuple[Path, float]], output: Path, *, overwrite: bool = False
) -> FoldReport:
    """Write a copy of a model with LoRAs (path, strength) folded in: a single file if the model is one, else a folder.

    Raises LoraError if a LoRA is for another model or makes weights too large for the model's dtype, ModelError and
    OutputError.
    """
    (file_target if model.path.is_file() else free_target)(output, overwrite=overwrite)
    files = [(read_lora(Path(path), model.names), strength) for path, strength in loras]
    present = {ref.component for ref in model.modules}
    parts: dict[ModuleRef, list[Part]] = {}
    for file, strength in files:
        for ref, module in file.modules.items():
            if strength and ref.component in present:
                parts.setdefault(ref, []).append((module, strength))
    _refuse_misfits(model, files, parts)
    changes = _changes(model, parts)
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
    return FoldReport(output, len(parts), {path: names for path, names in left_out.items() if names}, skipped)


Changed = Callable[[Tensor], Tensor]


def _changes(model: ModelFiles, parts: Mapping[ModuleRef, Sequence[Part]]) -> dict[Path, dict[str, Changed]]:
    """The function from old to new value of each tensor that changes, by file and name."""
    inside: dict[tuple[Path, str], list[Parameter]] = {}
    for parameter, place in model.places.items():
        if any(_touches(module, parameter.name) for module, _ in parts.get(parameter.module, ())):
            inside.setdefault((place.file, place.tensor), []).append(parameter)
    changes: dict[Path, dict[str, Changed]] = {}
    for (file, name), parameters in inside.items():
        changes.setdefault(file, {})[name] = partial(
            _changed, name=name, model=model, parts=parts, parameters=parameters
        )
    return changes


def _changed(
    tensor: Tensor,
    *,
    name: str,
    model: ModelFiles,
    parts: Mapping[ModuleRef, Sequence[Part]],
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


def _folded(model: ModelFiles, parameter: Parameter, value: Tensor, parts: Sequence[Part]) -> Tensor:
    """One parameter (fp32) with a module's adapters and differences, in order."""
    for module, strength in parts:
        if parameter.name == "weight":
            value = merged_weight(module, layer_like(model.modules[parameter.module], value), value, strength)
        elif parameter.name in module.differences:
            value = added(value, module.differences[parameter.name], strength)
    return value


def _refuse_misfits(
    model: ModelFiles, files: Sequence[tuple[LoraFile, float]], parts: Mapping[ModuleRef, Sequence[Part]]
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
                difference = module.differences.get(name)
                if place is None or (difference is not None and tuple(difference.shape) != place.shape):
                    paths = ", ".join(str(file.path) for file, _ in files if ref in file.modules)
                    raise LoraError(
                        f"{paths} changes {ref.path}.{name}, which {model.path} lacks or has in another shape; "
                        "it was made for another model"
                    )


def _touches(module: ModuleTensors, name: str) -> bool:
    return name in module.differences or (name == "weight" and module.adapter is not None)


def _write(source: Path, target: Path, changes: Mapping[str, Changed], note: str) -> None:
    metadata = check_safetensors(source, ModelError).metadata
    # Hashes over the weights would be wrong, and the new ones are known only after the last tensor.
    kept = {key: value for key, value in metadata.items() if key not in _HASHES}
    rewritten(source, target, changes, noted(kept, note))


def _write_folder(
    model: ModelFiles, output: Path, changes: Mapping[Path, Mapping[str, Changed]], note: str
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
