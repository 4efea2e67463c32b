"""A LoRA from the difference of two checkpoints of one family.

The difference of each Linear layer's and convolution's weights is approximated by a low-rank product; one tensor of the
original checkpoint (the fused projections of transformers) is one matrix, so the rank is that of the file. Norms and
biases can be included as full differences. Both models are read parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.adapters.frozen_layer import is_targetable
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError, ModelError
from lorasmith.families.base import Family
from lorasmith.formats.lora_file import PORTABLE, layout_for, save_lora
from lorasmith.formats.names.model_names import ModelNames, OriginalName
from lorasmith.formats.names.places import fused_rows, split
from lorasmith.formats.scales import with_one_alpha
from lorasmith.toolbox.changes import as_lora
from lorasmith.toolbox.lowrank import Change, Truncated, share
from lorasmith.toolbox.model_files import ModelFiles, Parameter
from lorasmith.toolbox.resize import check_bounds
from lorasmith.toolbox.writing import HISTORY, file_target, free_target, rank_entries

Groups = dict[str, list[tuple[ModuleRef, OriginalName]]]
"""Modules by tensor of the original checkpoint, each with its place in the tensor."""


@dataclass(frozen=True)
class ExtractReport:
    """The result of an extraction."""

    output: Path
    ranks: Mapping[str, int]  # by module of the original checkpoint
    unchanged: int  # number of layers that are equal in both
    kept: float  # squared norm of the difference in the LoRA
    total: float  # squared norm of the difference, including norms and biases
    left_out: int  # number of parameters that differ and have no place in the LoRA

    @property
    def captured(self) -> float:
        return share(self.kept, self.total)


def extract(
    base: ModelFiles,
    tuned: ModelFiles,
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
    tally = _Tally()
    adapters: dict[ModuleRef, AdapterWeights] = {}
    groups = _groups(base, tuned)
    for done, (name, group) in enumerate(groups.items(), start=1):
        adapters |= _layer(base, tuned, name, group, tally, rank=rank, energy=energy, device=device)
        if progress is not None:
            progress(done, len(groups))
    layers = {Parameter(ref, "weight") for group in groups.values() for ref, _ in group}
    rest = _rest(base, tuned, layers, tally, taken=differences)
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
    return tally.report(output)


@dataclass
class _Tally:
    ranks: dict[str, int] = field(default_factory=dict)
    unchanged: int = 0
    kept: float = 0.0
    total: float = 0.0
    left_out: int = 0

    def report(self, output: Path) -> ExtractReport:
        return ExtractReport(output, self.ranks, self.unchanged, self.kept, self.total, self.left_out)


def _groups(base: ModelFiles, tuned: ModelFiles) -> Groups:
    """Weights that a LoRA can change, grouped by tensor of the original checkpoint."""
    weights = (ref for ref, module in base.modules.items() if is_targetable(module))
    places = (base.places, tuned.places)
    return by_tensor((ref for ref in weights if all(Parameter(ref, "weight") in one for one in places)), base.names)


def by_tensor(modules: Iterable[ModuleRef], names: ModelNames) -> Groups:
    """Modules by the tensor of the original checkpoint that has their weight; those without a name are left out."""
    groups: Groups = {}
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
    cut = Change(dense=whole.flatten(1).to(device)).truncated(rank=rank, energy=energy, key=name)
    parts = split(as_lora(cut, tuple(whole.shape), float(cut.rank)), places)
    assert parts is not None, "a LoRA can always be cut into rows"
    return {ref: weights for (ref, _), weights in zip(group, parts, strict=True) if weights is not None}, cut


def _layer(
    base: ModelFiles,
    tuned: ModelFiles,
    name: str,
    group: Sequence[tuple[ModuleRef, OriginalName]],
    tally: _Tally,
    *,
    rank: int,
    energy: float | None,
    device: torch.device | str,
) -> dict[ModuleRef, AdapterWeights]:
    """Adapters of the modules in one tensor of the original checkpoint; none if the models do not differ there."""
    pieces = [_difference(base, tuned, Parameter(ref, "weight")) for ref, _ in group]
    if not any(piece.any() for piece in pieces):
        tally.unchanged += 1
        return {}
    adapters, cut = cut_down(name, group, pieces, rank=rank, energy=energy, device=device)
    tally.ranks[name] = cut.rank
    tally.kept += cut.kept
    tally.total += cut.total
    return adapters


def _rest(
    base: ModelFiles, tuned: ModelFiles, layers: Container[Parameter], tally: _Tally, *, taken: bool
) -> dict[ModuleRef, dict[str, Tensor]]:
    """Differences of norms and biases, if they are included and files have a name for them."""
    found: dict[ModuleRef, dict[str, Tensor]] = {}
    for parameter in base.places:
        if parameter in layers or parameter not in tuned.places:
            continue
        difference = _difference(base, tuned, parameter)
        square = float(difference.double().square().sum())
        if not square:
            continue
        ref = parameter.module
        tally.total += square
        if taken and difference.ndim == 1 and ref.path in base.names.paths(ref.component):
            found.setdefault(ref, {})[parameter.name] = difference
            tally.kept += square
        else:
            tally.left_out += 1
    return found


def _difference(base: ModelFiles, tuned: ModelFiles, parameter: Parameter) -> Tensor:
    return tuned.read(parameter).float() - base.read(parameter).float()


def _refuse_unlike(base: ModelFiles, tuned: ModelFiles) -> None:
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
