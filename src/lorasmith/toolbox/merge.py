"""Several LoRAs in one, each at a strength.

LoRAs add up exactly: their factors are stacked along the rank, with strength · alpha / rank multiplied in if it differs
between them. A stack can be truncated to a rank by singular value decomposition. Algorithms whose change is not up ·
down (LoHa, LoKr, full differences) need the truncation, and those whose change depends on the weight (DoRA, OFT, BOFT,
GLoRA) also need the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.adapters.algorithms import title_of
from lorasmith.core.adapter_state import DENOISER, AdapterWeights, ModuleRef, multiplied
from lorasmith.core.errors import LoraError, OptionError
from lorasmith.formats.scales import rank_of, scale_of, scaled_by
from lorasmith.formats.spelling import ModuleTensors, without_core
from lorasmith.toolbox.changes import (
    Change,
    Truncated,
    added,
    added_by,
    as_lora,
    is_additive,
    is_plain_lora,
    layer_like,
    merged_weight,
    share,
    stacked,
    weight_shape,
)
from lorasmith.toolbox.lora_files import LoraFile, read_together, save_alike
from lorasmith.toolbox.model_files import ModelFiles, Parameter
from lorasmith.toolbox.writing import file_target, noted

_NOTHING = torch.zeros(())

Part = tuple[ModuleTensors, float]  # a file's tensors for a module, and its strength


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge."""

    output: Path
    modules: int  # number of modules
    ranks: Mapping[int, int]  # number of modules by rank
    energy: float | None  # share of the squared singular values kept in truncation; None if nothing was truncated
    # by file, modules or keys that do not belong to the model and are not in the new file
    left_out: Mapping[Path, Sequence[str]]


def merge_loras(
    loras: Sequence[tuple[Path, float]],
    output: Path,
    *,
    rank: int | None = None,
    model: ModelFiles | None = None,
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
    save_alike(output, files, modules, _merged_metadata(files, loras), dtype=dtype)
    found = [rank_of(one.adapter) for one in modules.values() if one.adapter is not None]
    return MergeReport(
        output=output,
        modules=len(modules),
        ranks={rank: found.count(rank) for rank in found if rank is not None},
        energy=share(kept, total) if total else None,
        left_out={file.path: sorted(file.unknown) for file in files if file.unknown},
    )


def _exactly(parts: Sequence[Part], rank: int | None) -> ModuleTensors | None:
    """The exact sum of several files' changes of a module, None if there is none."""
    adapters = [(module.adapter, strength) for module, strength in parts if module.adapter is not None]
    if rank is not None and any(module.differences.get("weight", _NOTHING).ndim > 1 for module, _ in parts):
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
    _refuse_unlike([(one["up"].shape[0], *one["down"].shape[1:]) for one in tensors])
    rank = sum(one["down"].shape[0] for one in tensors)
    mid = {name: tensor for name, tensor in tensors[0].items() if name == "mid"}
    joined = {"down": _joined([one["down"] for one in tensors], 0), "up": _joined([one["up"] for one in tensors], 1)}
    return AdapterWeights("lora", {**joined, **mid}, factors[0] * rank if in_common else float(rank))


def _joined(pieces: Sequence[Tensor], dimension: int) -> Tensor:
    """Concatenated pieces of any dtypes, in a dtype that holds all of their values."""
    dtype = pieces[0].dtype
    for piece in pieces:
        dtype = torch.promote_types(dtype, piece.dtype)
    return torch.cat([piece.to(dtype) for piece in pieces], dimension)


def _summed(parts: Sequence[Part]) -> dict[str, Tensor]:
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


def _shape_of(module: ModuleTensors) -> tuple[int, ...]:
    return tuple(module.differences["weight"].shape) if module.adapter is None else weight_shape(module.adapter)


def _cut_down(
    ref: ModuleRef, parts: Sequence[Part], rank: int, model: ModelFiles | None
) -> tuple[ModuleTensors, Truncated]:
    """The best LoRA of a rank for the sum of several files' changes of a module."""
    shape = None if model is None or ref.component != DENOISER else model.names.weight_shapes.get(ref.path)
    if all(module.adapter is None or is_additive(module.adapter) for module, _ in parts):
        weighty = [(module, strength) for module, strength in parts if module.adapter or "weight" in module.differences]
        shapes = [shape or _shape_of(module) for module, _ in weighty]
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
        after = before
        for module, strength in parts:
            after = merged_weight(module, layer_like(model.modules[ref], after), after, strength)
        change, shape = Change(dense=(after - before).flatten(1)), tuple(before.shape)
    cut = change.truncated(rank=rank, key=f"{ref.component}.{ref.path}")
    biases = {name: difference for name, difference in _summed(parts).items() if name != "weight"}
    return ModuleTensors(as_lora(cut, shape, float(cut.rank)), biases), cut


def _cannot_stack(ref: ModuleRef, files: Sequence[tuple[LoraFile, float]]) -> str:
    at_fault = ((file, file.modules[ref].adapter) for file, _ in files if ref in file.modules)
    path, weights = next((file.path, one) for file, one in at_fault if one is not None and not is_plain_lora(one))
    needed = "--rank" if is_additive(weights) else "--rank and --model"
    return (
        f"only plain LoRAs can be merged exactly, and {path} changes {ref.path} by {title_of(weights)}; "
        f"add {needed} to approximate the sum, or merge into the model with --into"
    )


def _merged_metadata(files: Sequence[LoraFile], loras: Sequence[tuple[Path, float]]) -> dict[str, str]:
    """Entries that are equal in all files, and a note on the merge."""
    first, *others = (file.metadata for file in files)
    common = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    triggers = dict.fromkeys(t for file in files if (t := file.metadata.get("modelspec.trigger_phrase")))
    merged = ", ".join(f"{Path(path).name}:{strength:g}" for path, strength in loras)
    entries = {"modelspec.trigger_phrase": ", ".join(triggers), "modelspec.merged_from": merged}
    return noted({**common, **{key: value for key, value in entries.items() if value}}, f"merged {merged}")
