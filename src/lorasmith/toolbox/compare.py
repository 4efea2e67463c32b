"""Comparison of two files: two LoRAs by module, or two checkpoints by tensor.

LoRAs are compared by their changes of each weight, independent of layout, rank and alpha. Changes that depend on the
weight (DoRA, OFT, BOFT, GLoRA) are compared through the model's weights if a model is given, else by their tensors.
Distances are relative to the first file: ‖A − B‖ / ‖A‖.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.adapters.algorithms import title_of
from lorasmith.core.adapter_state import ModuleRef
from lorasmith.core.errors import LoraError, ModelError
from lorasmith.core.folders import pipeline_index
from lorasmith.families.files.checkpoint import weight_files
from lorasmith.families.locating import BUILT_IN, named_path
from lorasmith.formats.container import check_safetensors, read_safetensors
from lorasmith.formats.scales import rank_of
from lorasmith.formats.spelling import ModuleTensors, block_of, grouped
from lorasmith.toolbox.changes import (
    MatrixChange,
    added_by,
    has_full_difference,
    is_additive,
    layer_like,
    merged_weight,
    stacked,
)
from lorasmith.toolbox.lora_files import LoraFile, read_together
from lorasmith.toolbox.model_files import ModelReader, Parameter, open_model


@dataclass(frozen=True)
class Pair:
    """The difference of two matrices or tensors, or its sum over a block."""

    name: str  # module, tensor or block
    first: float  # squared Frobenius norm
    second: float  # squared Frobenius norm
    apart: float  # squared norm of the difference
    inner: float  # inner product

    @property
    def distance(self) -> float:
        """‖A − B‖ / ‖A‖: 0 for equal ones; infinite if A is zero and B is not."""
        if not self.apart:
            return 0.0
        return math.sqrt(self.apart / self.first) if self.first else math.inf

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the two; None if one of them is zero."""
        norm = math.sqrt(self.first * self.second)
        return max(-1.0, min(1.0, self.inner / norm)) if norm else None


@dataclass(frozen=True)
class Comparison:
    """Differences of two files."""

    kind: str  # `LoRA` or `checkpoint`
    pairs: Sequence[Pair]  # of each module (LoRA) or tensor (checkpoint) in both
    only_first: Sequence[str]
    only_second: Sequence[str]
    # descriptions by module or tensor that differ: algorithm, rank and alpha, or shape and dtype
    settings: Mapping[str, tuple[str, str]]
    metadata: Mapping[str, tuple[str | None, str | None]]  # header entries that differ, None for a missing one
    by_tensors: int = 0  # modules compared by tensors, as their change depends on a model that was not given

    def blocks(self) -> list[Pair]:
        """The pairs summed by block of the model."""
        blocks: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            blocks.setdefault(_block(pair.name), []).append(pair)
        return [_sum(name, pairs) for name, pairs in blocks.items()]

    def overall(self) -> Pair:
        return _sum("all", self.pairs)

    def is_same(self, *, tolerance: float = 0.0, weights_only: bool = False) -> bool:
        """Whether the files are equal up to a distance of `tolerance`; `weights_only` ignores settings and metadata."""
        if self.only_first or self.only_second or not all(pair.distance <= tolerance for pair in self.pairs):
            return False
        return weights_only or not (self.settings or self.metadata)


def compare(first: Path, second: Path, *, model: ModelReader | None = None) -> Comparison:
    """Compare two LoRAs or two checkpoints: files, folders, or names of built-in models.

    Raises LoraError or ModelError if one cannot be read, or they are of different kinds or families.
    """
    kinds = [_is_lora(path) for path in (first, second)]
    if kinds[0] != kinds[1]:
        lora, other = (first, second) if kinds[0] else (second, first)
        raise LoraError(f"two files of one kind can be compared, but {lora} is a LoRA and {other} is a checkpoint")
    return _compare_loras(first, second, model) if kinds[0] else _compare_checkpoints(first, second)


def _is_lora(path: Path) -> bool:
    if str(path) == BUILT_IN or pipeline_index(path) is not None:
        return False
    if path.is_dir():
        return True
    names = check_safetensors(path).tensors
    known = sum(len(keys) for keys in grouped(names).values())
    return 2 * known > len(names)


def _compare_loras(first: Path, second: Path, model: ModelReader | None) -> Comparison:
    a, b = read_together([first, second], None if model is None else model.names)
    pairs, settings, by_tensors = [], {}, 0
    for ref in (ref for ref in a.modules if ref in b.modules):
        one, other = a.modules[ref], b.modules[ref]
        described = _described(one), _described(other)
        if described[0] != described[1]:
            settings[_name(ref)] = described
        pair, exact = _module_pair(ref, one, other, model)
        by_tensors += not exact
        pairs.append(pair)
    return Comparison(
        kind="LoRA",
        pairs=pairs,
        only_first=_lacking(a, b),
        only_second=_lacking(b, a),
        settings=settings,
        metadata=_unequal(a.metadata, b.metadata),
        by_tensors=by_tensors,
    )


def _lacking(file: LoraFile, other: LoraFile) -> list[str]:
    """Modules that only `file` has, and its tensors outside modules that `other` lacks or has with other values."""
    alike = {
        key for key, tensor in file.unknown.items() if key in other.unknown and torch.equal(tensor, other.unknown[key])
    }
    return [*(_name(ref) for ref in file.modules if ref not in other.modules), *sorted(file.unknown.keys() - alike)]


def _name(ref: ModuleRef) -> str:
    return f"{ref.component}.{ref.path}"


def _block(name: str) -> str:
    component, _, path = name.partition(".")
    return ".".join(part for part in (component, block_of(path)) if part)


def _described(module: ModuleTensors) -> str:
    words = [f"difference of {name}" for name in sorted(module.differences)]
    if (weights := module.adapter) is not None:
        rank = rank_of(weights)
        # A LoRA without an alpha has a scale of 1, like one whose alpha is its rank.
        alpha = weights.alpha if weights.alpha is not None else rank
        numbers = (("rank", rank), ("alpha", alpha))
        words = [title_of(weights), *(f"{word} {number:g}" for word, number in numbers if number is not None), *words]
    return ", ".join(words)


def _module_pair(
    ref: ModuleRef, first: ModuleTensors, other: ModuleTensors, model: ModelReader | None
) -> tuple[Pair, bool]:
    """The pair of two files' tensors for a module, and whether it compares changes (else: tensors)."""
    pairs, exact = [], True
    names = {*first.differences, *other.differences}
    modules = (first, other)
    if any(module.adapter or has_full_difference(module) for module in modules):
        names -= {"weight"}
        changes = [_change(ref, module, model) for module in modules]
        if None not in changes:
            pairs.append(_change_pair("", *(change for change in changes if change is not None)))
        else:
            pairs.append(_tensor_pair("", *(_flattened(module) for module in modules)))
            exact = False
    for name in sorted(names):
        present = [module.differences.get(name) for module in modules]
        shape = next(tensor.shape for tensor in present if tensor is not None)
        filled = [torch.zeros(shape) if tensor is None else tensor for tensor in present]
        pairs.append(_tensor_pair("", *filled))
    return _sum(_name(ref), pairs), exact


def _change(ref: ModuleRef, module: ModuleTensors, model: ModelReader | None) -> MatrixChange | None:
    """A module's change of its weight; None if it depends on a weight and there is no model."""
    if module.adapter is None and "weight" not in module.differences:
        return MatrixChange()
    if module.adapter is None or is_additive(module.adapter):
        return added_by(module)
    if model is None or Parameter(ref, "weight") not in model.places:
        return None
    weight = model.read(Parameter(ref, "weight")).float()
    merged = merged_weight(module, layer_like(model.modules[ref], weight), weight, 1.0)
    return MatrixChange(dense=(merged - weight).flatten(1))


def _change_pair(name: str, first: MatrixChange, second: MatrixChange) -> Pair:
    if first.is_nothing or second.is_nothing:
        first, second = (
            MatrixChange(dense=torch.zeros(other.shape)) if one.is_nothing else one
            for one, other in ((first, second), (second, first))
        )
    squares = first.norm() ** 2, second.norm() ** 2
    if first.shape != second.shape:
        return _unrelated(name, *squares)
    apart = 0.0 if _identical(first, second) else stacked(first, second.times(-1)).norm() ** 2
    return Pair(name, *squares, apart, first.inner(second))


def _identical(first: MatrixChange, second: MatrixChange) -> bool:
    """Whether two changes have equal tensors, so that their difference is exactly zero."""
    ours, theirs = ((*(change.factors or ()), change.dense) for change in (first, second))
    return len(ours) == len(theirs) and all(
        mine is other or (mine is not None and other is not None and torch.equal(mine, other))
        for mine, other in zip(ours, theirs, strict=True)
    )


def _tensor_pair(name: str, first: Tensor, second: Tensor) -> Pair:
    first, second = first.double(), second.double()
    squares = float(first.square().sum()), float(second.square().sum())
    if first.shape != second.shape:
        return _unrelated(name, *squares)
    return Pair(name, *squares, float((first - second).square().sum()), float((first * second).sum()))


def _unrelated(name: str, first: float, second: float) -> Pair:
    """The pair of tensors of different shapes: their inner product is zero."""
    return Pair(name, first, second, first + second, 0.0)


def _flattened(module: ModuleTensors) -> Tensor:
    tensors = {} if module.adapter is None else dict(module.adapter.tensors)
    return torch.cat([torch.zeros(0), *(tensors[name].float().flatten() for name in sorted(tensors))])


def _sum(name: str, pairs: Iterable[Pair]) -> Pair:
    pairs = list(pairs)
    totals = (math.fsum(getattr(pair, field) for pair in pairs) for field in ("first", "second", "apart", "inner"))
    return Pair(name, *totals)


def _unequal(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    keys = sorted({*first, *second})
    return {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}


def _compare_checkpoints(first: Path, second: Path) -> Comparison:
    paths = [named_path(path) for path in (first, second)]
    if paths[0].is_dir() == paths[1].is_dir():
        a, b = (_stored(path) for path in paths)
    else:
        a, b = (_by_parameter(open_model(path)) for path in paths)
    settings, pairs = {}, []
    for name in (name for name in a if name in b):
        one, other = a[name](), b[name]()
        described = _in_words(one), _in_words(other)
        if described[0] != described[1]:
            settings[name] = described
        pairs.append(_tensor_pair(name, one, other))
    headers = [check_safetensors(path, ModelError).metadata if path.is_file() else {} for path in paths]
    return Comparison(
        kind="checkpoint",
        pairs=pairs,
        only_first=[name for name in a if name not in b],
        only_second=[name for name in b if name not in a],
        settings=settings,
        metadata=_unequal(*headers),
    )


Readers = dict[str, Callable[[], Tensor]]  # name → function that reads the tensor


def _stored(path: Path) -> Readers:
    """The tensors of a file, or of all parts of a diffusers folder, under their own names."""
    if path.is_file() or not path.exists():
        return _in_file(path, "")
    folders = sorted(part for part in path.iterdir() if part.is_dir() and (part / "config.json").is_file())
    readers: Readers = {}
    for folder in folders:
        for file in weight_files(folder):
            readers |= _in_file(file, f"{folder.name}.")
    return readers


def _in_file(path: Path, prefix: str) -> Readers:
    tensors, _ = read_safetensors(path, ModelError)
    return {prefix + name: partial(tensors.__getitem__, name) for name in tensors}


def _by_parameter(model: ModelReader) -> Readers:
    return {
        _name(parameter.module) + f".{parameter.name}": partial(model.read, parameter) for parameter in model.places
    }


def _in_words(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
