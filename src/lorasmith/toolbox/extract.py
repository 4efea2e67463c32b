"""A LoRA of what differs: two checkpoints of one family, or a model with several LoRAs and without.

The difference of each Linear layer's and convolution's weights is approximated by a low-rank product; one tensor of the
original checkpoint (the fused projections of transformers) is one matrix, so the rank is that of the file. Norms and
biases can be included as full differences. Both models are read parameter by parameter.

The combined change of several LoRAs is taken of a given rank or in full. Changes that depend on the LoRAs alone are
added exactly; those that depend on the weight (DoRA, OFT, BOFT, GLoRA) are computed on it, in the order in which the
LoRAs are applied. The model is not modified.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer, is_targetable
from lorasmith.adapters.patch import Patch
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError, ModelError
from lorasmith.families.base import Family
from lorasmith.formats.lora_file import PORTABLE, layout_for, save_lora
from lorasmith.formats.names import ModelNames, OriginalName, fused_rows, split
from lorasmith.formats.scales import with_one_alpha
from lorasmith.formats.spelling import ModuleTensors
from lorasmith.toolbox.changes import (
    MatrixChange,
    Truncated,
    added_by,
    as_lora,
    changed_weight,
    is_additive,
    share,
    square_sum,
    stacked,
)
from lorasmith.toolbox.lora_files import HISTORY, file_target, free_target, rank_entries
from lorasmith.toolbox.model_files import ModelReader, Parameter
from lorasmith.toolbox.resize import check_bounds

TensorGroups = dict[str, list[tuple[ModuleRef, OriginalName]]]
"""Modules by tensor of the original checkpoint, each with its place in the tensor."""


@dataclass
class ExtractReport:
    """The result of an extraction; its counts grow with each layer."""

    output: Path
    ranks: dict[str, int] = field(default_factory=dict)  # by module of the original checkpoint
    unchanged: int = 0  # number of layers that are equal in both
    kept: float = 0.0  # squared norm of the difference in the LoRA
    total: float = 0.0  # squared norm of the difference, including norms and biases
    left_out: int = 0  # number of parameters that differ and have no place in the LoRA

    @property
    def captured(self) -> float:
        return share(self.kept, self.total)


def extract(
    base: ModelReader,
    tuned: ModelReader,
    output: Path,
    *,
    rank: int,
    energy: float | None = None,
    differences: bool = False,
    layout: str = PORTABLE,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractReport:
    """Write the LoRA of at most `rank` that brings one model as close as possible to another.

    `energy` in (0, 1] is the share of each difference's squared singular values to keep. `differences` includes norms
    and biases as full differences. `layout` is a registered name or `portable`. `progress` receives (layers done,
    total).

    Raises ModelError if the architectures differ, LoraError if nothing differs that a LoRA can hold, OptionError and
    OutputError.
    """
    check_bounds(rank, energy)
    in_folder = layout_for(layout, base.names).in_folder
    (free_target if in_folder else file_target)(output, overwrite=overwrite)
    _refuse_unlike(base, tuned)
    report = ExtractReport(output)
    adapters: dict[ModuleRef, AdapterWeights] = {}
    groups = _groups(base, tuned)
    for done, (name, group) in enumerate(groups.items(), start=1):
        pieces = [_difference(base, tuned, Parameter(ref, "weight")) for ref, _ in group]
        if any(piece.any() for piece in pieces):
            found, cut = cut_down(name, group, pieces, rank=rank, energy=energy, device=device)
            adapters |= found
            report.ranks[name] = cut.rank
            report.kept += cut.kept
            report.total += cut.total
        else:
            report.unchanged += 1
        if progress is not None:
            progress(done, len(groups))
    layers = {Parameter(ref, "weight") for group in groups.values() for ref, _ in group}
    rest = _rest(base, tuned, layers, report, taken=differences)
    if not adapters and not rest:
        raise LoraError(
            f"{tuned.path} does not differ from {base.path} in any Linear layer or convolution, so there is no LoRA to "
            "extract; check that it is the tuned one"
        )
    note = f"extracted from {tuned.path.name} against {base.path.name} at rank {rank}"
    adapters = with_one_alpha(adapters)
    metadata = extracted_metadata(
        base.family, base.parameterization, adapters.values(), model=base.path.name, title=tuned.path.stem, note=note
    )
    save_lora(output, AdapterState(adapters, rest), base.names, layout=layout, dtype=dtype, metadata=metadata)
    return report


def _groups(base: ModelReader, tuned: ModelReader) -> TensorGroups:
    """Weights that a LoRA can change, grouped by tensor of the original checkpoint."""
    weights = (ref for ref, module in base.modules.items() if is_targetable(module))
    places = (base.places, tuned.places)
    return by_tensor((ref for ref in weights if all(Parameter(ref, "weight") in place for place in places)), base.names)


def by_tensor(modules: Iterable[ModuleRef], names: ModelNames) -> TensorGroups:
    """Modules by the tensor of the original checkpoint that has their weight; those without a name are left out."""
    groups: TensorGroups = {}
    for ref in modules:
        if ref.component == DENOISER and ref.path in names.denoiser:
            place = names.denoiser[ref.path]
            groups.setdefault(place.path, []).append((ref, place))
        elif ref.component != DENOISER and ref.path in names.paths(ref.component):
            groups[f"{ref.component}.{ref.path}"] = [(ref, OriginalName(ref.path))]
    return groups


def cut_down(
    name: str,
    group: Sequence[tuple[ModuleRef, OriginalName]],
    pieces: Sequence[Tensor],
    *,
    rank: int,
    energy: float | None = None,
    device: torch.device | str = "cpu",
) -> tuple[dict[ModuleRef, AdapterWeights], Truncated]:
    """The LoRA by module of one tensor of the original checkpoint, and its approximation.

    `pieces` are the differences of the weights in `group`; `energy` is the share of squared singular values to keep.
    """
    places = [place for _, place in group]
    whole = fused_rows(pieces, places, max(place.rows[1] if place.rows else 0 for place in places))
    cut = MatrixChange(dense=whole.flatten(1).to(device)).truncated(rank=rank, energy=energy, key=name)
    parts = split(as_lora(cut, tuple(whole.shape), float(cut.rank)), places)
    assert parts is not None, "a LoRA can always be cut into rows"
    return {ref: weights for (ref, _), weights in zip(group, parts, strict=True) if weights is not None}, cut


def _rest(
    base: ModelReader, tuned: ModelReader, layers: Container[Parameter], report: ExtractReport, *, taken: bool
) -> dict[ModuleRef, dict[str, Tensor]]:
    """Differences of norms and biases, if they are included and files have a name for them."""
    found: dict[ModuleRef, dict[str, Tensor]] = {}
    for parameter in base.places:
        if parameter in layers or parameter not in tuned.places:
            continue
        difference = _difference(base, tuned, parameter)
        square = square_sum(difference)
        if not square:
            continue
        ref = parameter.module
        report.total += square
        if taken and difference.ndim == 1 and ref.path in base.names.paths(ref.component):
            found.setdefault(ref, {})[parameter.name] = difference
            report.kept += square
        else:
            report.left_out += 1
    return found


def _difference(base: ModelReader, tuned: ModelReader, parameter: Parameter) -> Tensor:
    return tuned.read(parameter).to(torch.float32, copy=True).sub_(base.read(parameter))


def _refuse_unlike(base: ModelReader, tuned: ModelReader) -> None:
    if base.family is not tuned.family:
        raise ModelError(
            f"both checkpoints must be of one family, but {base.path} is {base.family.title} and {tuned.path} is "
            f"{tuned.family.title}; take the model that the other one was trained from"
        )
    shared = {p.module.component for p in base.places} & {p.module.component for p in tuned.places}
    for parameter in {**base.places, **tuned.places}:
        ours, theirs = (model.places.get(parameter) for model in (base, tuned))
        if parameter.module.component in shared and (not ours or not theirs or ours.shape != theirs.shape):
            raise ModelError(
                f"both checkpoints must have the same layers, but {parameter.module.path}.{parameter.name} is missing "
                f"or has another shape in one of them; take the model that {tuned.path} was trained from"
            )


def extracted_metadata(
    family: Family, predicts: str, adapters: Iterable[AdapterWeights], *, model: str, title: str, note: str
) -> dict[str, str]:
    """Metadata of an extracted LoRA; `predicts` is the parameterization, `note` describes how it was made."""
    version = family.kohya_version(predicts)
    return {
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_network_module": "networks.lora",
        "ss_sd_model_name": model,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.modelspec_architecture(predicts)}/lora",
        "modelspec.implementation": family.modelspec_implementation,
        "modelspec.title": title,
        HISTORY: note,
        **rank_entries(adapters),
    }


@dataclass(frozen=True)
class PatchedPart:
    """A network with LoRAs."""

    component: str  # `denoiser` or a text encoder
    module: nn.Module  # without the LoRAs
    patches: Sequence[Patch]  # in order of application

    @cached_property
    def paths(self) -> list[str]:
        """Paths of the modules that change."""
        changed = (path for patch in self.patches for path in (*patch.adapters, *patch.differences))
        return list(dict.fromkeys(changed))

    def changes_of(self, path: str) -> Sequence[tuple[ModuleTensors, float]]:
        """A module's tensors and strength, by patch."""
        found = (
            (ModuleTensors(patch.adapters.get(path), patch.differences.get(path, {})), patch) for patch in self.patches
        )
        return [(module, patch.strength) for module, patch in found if module.adapter or module.differences]


def extract_patches(
    parts: Sequence[PatchedPart],
    names: ModelNames,
    *,
    rank: int | None,
    differences: bool,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> AdapterState:
    """The LoRA of at most `rank` that brings a model as close as possible to the model with its LoRAs.

    With a rank of None it has full differences of the weights. `differences` includes changes of norms, embeddings and
    biases in full. `progress` receives (layers done, total). Raises LoraError if nothing changes.
    """
    by_component = {part.component: part for part in parts}
    paths = {_as_written(ModuleRef(part.component, path), names): path for part in parts for path in part.paths}
    layers = [
        ref for ref, path in paths.items() if is_targetable(by_component[ref.component].module.get_submodule(path))
    ]
    groups = by_tensor(_with_neighbours(layers, names), names)
    adapters: dict[ModuleRef, AdapterWeights] = {}
    whole: dict[ModuleRef, dict[str, Tensor]] = {}
    for done, (name, group) in enumerate(groups.items(), start=1):
        pieces = {ref: _weight_change(by_component[ref.component], paths.get(ref, ref.path)) for ref, _ in group}
        changed = {ref: piece for ref, piece in pieces.items() if piece.any()}
        if rank is None:
            whole |= {ref: {"weight": piece} for ref, piece in changed.items()}
        elif changed:
            adapters |= cut_down(name, group, list(pieces.values()), rank=rank, device=device)[0]
        if progress is not None:
            progress(done, len(groups))
    of_layers = set(layers)
    if differences:
        for ref, path in paths.items():
            if rest := _other_changes(by_component[ref.component], path, weight=ref not in of_layers):
                whole[ref] = whole.get(ref, {}) | rest
    if not adapters and not whole:
        raise LoraError("the LoRAs on the model change nothing that can be extracted; apply one at another strength")
    return AdapterState(with_one_alpha(adapters), whole)


def _with_neighbours(layers: Iterable[ModuleRef], names: ModelNames) -> list[ModuleRef]:
    """The layers, and those that share a tensor with one of them, in the order of the model."""
    touched = by_tensor(layers, names)
    in_denoiser = {place.path for group in touched.values() for ref, place in group if ref.component == DENOISER}
    neighbours = [ModuleRef(DENOISER, path) for path, place in names.denoiser.items() if place.path in in_denoiser]
    return [*neighbours, *(ref for group in touched.values() for ref, _ in group if ref.component != DENOISER)]


def _weight_change(part: PatchedPart, path: str) -> Tensor:
    """The LoRAs' change of a layer's weight, in fp32 and its shape."""
    layer = part.module.get_submodule(path)
    frozen = FrozenLayer(layer)
    changes = part.changes_of(path)
    if not any(module.adapter or "weight" in module.differences for module, _ in changes):
        return torch.zeros(frozen.shape)
    if all(module.adapter is None or is_additive(module.adapter) for module, _ in changes):
        added = [added_by(module, tuple(frozen.shape)).times(strength) for module, strength in changes]
        return stacked(*(change for change in added if not change.is_nothing)).matrix().reshape(frozen.shape)
    before = frozen.weight.detach().float()
    return (changed_weight(changes, layer, before) - before).cpu()


def _other_changes(part: PatchedPart, path: str, *, weight: bool) -> dict[str, Tensor]:
    """Differences of a module's parameters summed over the LoRAs, with that of the weight on request."""
    sums: dict[str, Tensor] = {}
    for module, strength in part.changes_of(path):
        for name, difference in module.differences.items():
            if weight or name != "weight":
                sums[name] = sums.get(name, torch.zeros(())) + difference.float() * strength
    return {name: difference for name, difference in sums.items() if difference.any()}


def _as_written(ref: ModuleRef, names: ModelNames) -> ModuleRef:
    """A module by its path in files, where CLIP's start with `text_model.` in any version of transformers."""
    is_known = ref.component == DENOISER or ref.path in names.paths(ref.component)
    return ref if is_known else ModuleRef(ref.component, f"text_model.{ref.path}")
