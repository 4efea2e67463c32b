"""The best approximation of a LoRA by smaller ranks.

Each module's up · down is truncated to its largest singular values, a convolution's with its kernel flattened and a
Tucker core multiplied in. The scale alpha / rank of each module is kept, so that training can continue at the same
learning rate, and so are a DoRA's magnitudes. LoHa, LoKr and full differences become LoRAs with a scale of 1. In
kohya's layout alphas that differ afterwards are made equal by scaling factors (see `with_one_alpha`). Files are resized
in their own spelling, without a model.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.adapters.algorithms import title_of
from lorasmith.core.adapter_state import AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError, OptionError
from lorasmith.families.loading import released_names
from lorasmith.formats.container import write_safetensors
from lorasmith.formats.layouts.adapter_config import configs_of, without_config
from lorasmith.formats.metadata import RANKS_ENTRY, sshs_hashes
from lorasmith.formats.names import ModelNames
from lorasmith.formats.scales import scale_of, scaled_by, with_one_alpha
from lorasmith.formats.spelling import ModuleTensors, grouped
from lorasmith.toolbox.changes import (
    added_by,
    as_lora,
    factors_of,
    has_full_difference,
    is_additive,
    is_low_rank,
    share,
    weight_shape,
)
from lorasmith.toolbox.lora_files import (
    LoraFile,
    file_target,
    flat_shapes,
    noted,
    rank_entries,
    read_lora,
    refuse_folder,
    spelled_like,
)


@dataclass(frozen=True)
class Resized:
    """One module."""

    name: str  # in the file's spelling
    algorithm: str  # display name of the algorithm before
    before: int | None  # rank before, None if it was not a LoRA
    after: int  # rank after
    kept: float  # squared singular values kept, of the change at strength 1
    total: float  # all squared singular values

    @property
    def energy(self) -> float:
        """Share of the squared singular values that is kept; 1 for a change of zero."""
        return share(self.kept, self.total)


@dataclass(frozen=True)
class ResizeReport:
    """The result of resizing."""

    output: Path
    modules: Sequence[Resized]  # those with a rank after resizing
    warnings: Sequence[str]  # one sentence for each kind of approximation or assumption

    @property
    def energy(self) -> float:
        """Share of the squared singular values that is kept, over all modules."""
        return share(sum(module.kept for module in self.modules), sum(module.total for module in self.modules))


def resize(
    path: Path,
    output: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    names: ModelNames | None = None,
    overwrite: bool = False,
) -> ResizeReport:
    """Write a copy of a LoRA with ranks of at most `rank`, in the same layout and dtype.

    `energy` in (0, 1] is the share of each module's squared singular values to keep; ranks then differ. `names` of the
    model are for LoHa and LoKr on convolutions, whose tensors do not determine the kernel. Raises LoraError if a
    module's change has no rank, or every rank is small enough already; OptionError if neither bound is given, and
    OutputError.
    """
    check_bounds(rank, energy)
    file_target(output, overwrite=overwrite)
    file = read_lora(path)
    refuse_folder(file)
    shapes = _known_shapes(file, names)
    tensors, keys = dict(file.tensors), grouped(file.tensors)
    smaller: dict[ModuleRef, AdapterWeights] = {}
    reports = []
    for ref, module in file.modules.items():
        if module.adapter is None and not has_full_difference(module):
            continue
        _refuse_unsuitable(file, ref, module)
        smaller[ref], report = _smaller(file, ref, module, shapes.get(ref), rank, energy)
        reports.append(report)
    if all(report.before is not None and report.after == report.before for report in reports):
        largest = max((report.after for report in reports), default=0)
        raise LoraError(f"{path} must have a rank above the new one, and its largest is {largest}; give a smaller one")
    if file.layout == "kohya":
        smaller = with_one_alpha(smaller)
    for ref, weights in smaller.items():
        if weights is not file.modules[ref].adapter or configs_of(file.metadata):
            _replace(tensors, keys[file.bases[ref]], file, file.bases[ref], weights)
    write_safetensors(output, tensors, _metadata(file, tensors, list(smaller.values()), rank, energy))
    return ResizeReport(output, reports, _warnings(file, reports, shapes))


def check_bounds(rank: int | None, energy: float | None) -> None:
    """Raise OptionError unless there is a rank of at least 1, a share of energy in (0, 1], or both."""
    if rank is None and energy is None:
        raise OptionError(
            "a rank or an energy is needed, got neither; give --rank, such as 8, or --energy, such as 0.95"
        )
    if rank is not None and rank < 1:
        raise OptionError(f"a rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise OptionError(f"an energy is a share above 0 and at most 1, such as 0.95, got {energy:g}")


_KEPT = frozenset({"dora_scale", "magnitude", "up_bias", "diff_b", "w_norm", "b_norm"})


def _refuse_unsuitable(file: LoraFile, ref: ModuleRef, module: ModuleTensors) -> None:
    weights = module.adapter
    if weights is not None and not is_low_rank(weights) and not is_additive(weights):
        raise LoraError(
            f"{file.path} changes {file.bases[ref]} by {title_of(weights)}, which has no rank to choose; merge it into "
            "its model with `lorasmith merge --into`, and extract a LoRA from the result"
        )


def _smaller(
    file: LoraFile,
    ref: ModuleRef,
    module: ModuleTensors,
    shape: tuple[int, ...] | None,
    rank: int | None,
    energy: float | None,
) -> tuple[AdapterWeights, Resized]:
    weights, name = module.adapter, file.bases[ref]
    if weights is None or not is_low_rank(weights) or has_full_difference(module):
        change = added_by(module, shape)
        cut = change.truncated(rank=rank, energy=energy, key=name)
        title = "full difference" if weights is None else title_of(weights)
        shape = shape or (tuple(module.differences["weight"].shape) if weights is None else weight_shape(weights))
        return as_lora(cut, shape, float(cut.rank)), Resized(name, title, None, cut.rank, cut.kept, cut.total)
    before, scale = weights.tensors["down"].shape[0], scale_of(weights)
    cut = factors_of(weights).truncated(rank=rank, energy=energy)
    after = min(cut.rank, before)
    report = Resized(name, title_of(weights), before, after, cut.kept * scale**2, cut.total * scale**2)
    if after == before:
        return weights, report
    smaller = as_lora(cut, weight_shape(weights), scale * cut.rank)
    tensors = {**smaller.tensors, **{name: t for name, t in weights.tensors.items() if name == "dora_scale"}}
    return AdapterWeights("lora", tensors, smaller.alpha), report


def _replace(
    tensors: dict[str, Tensor], keys: Mapping[str, str], file: LoraFile, base: str, weights: AdapterWeights
) -> None:
    """Replace a module's tensors by a LoRA. A LoRA keeps its keys, and other tensors stay."""
    dtype = next(tensors[key].dtype for role, key in keys.items() if role not in ("alpha", *_KEPT))
    alpha = None if "alpha" not in keys else tensors[keys["alpha"]]
    for role, key in keys.items():
        if role not in _KEPT:
            del tensors[key]
    if "down" not in keys:
        tensors |= spelled_like(file.layout, base, ModuleTensors(weights), dtype)
        return
    if alpha is None:
        weights = scaled_by(weights, scale_of(weights))
    else:
        assert weights.alpha is not None
        exact = torch.tensor(weights.alpha, dtype=torch.float32)
        rounded = exact.to(alpha.dtype)
        tensors[keys["alpha"]] = rounded if rounded.float() == exact else exact
    for role in ("down", "up", "mid"):
        if role in weights.tensors:
            tensors[keys[role]] = weights.tensors[role].to(dtype)


def _known_shapes(file: LoraFile, names: ModelNames | None) -> dict[ModuleRef, tuple[int, ...]]:
    """Shapes of weights whose kernels a file does not determine, from its model or the released one of its family."""
    flattened = {ref: m.adapter for ref, m in file.modules.items() if m.adapter and not is_low_rank(m.adapter)}
    if not flattened:
        return {}
    names = names or released_names(file.family or "")
    by_spelling = {} if names is None else flat_shapes(names)
    found = {ref: (by_spelling.get(ref), weight_shape(weights)) for ref, weights in flattened.items()}
    return {ref: shape for ref, (shape, flat) in found.items() if shape and _size(shape) == _size(flat)}


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _warnings(file: LoraFile, reports: Sequence[Resized], shapes: Mapping[ModuleRef, object]) -> list[str]:
    counts = collections.Counter(report.algorithm for report in reports if report.before is None)
    warnings = [
        f"{count} modules were {algorithm} and are LoRA now, which approximates them"
        for algorithm, count in counts.items()
    ]
    with_kernel = [ref for ref, m in file.modules.items() if m.adapter and len(weight_shape(m.adapter)) > 2]
    unknown = [
        ref
        for ref, m in file.modules.items()
        if m.adapter and not is_low_rank(m.adapter) and ref not in shapes and ref not in with_kernel
    ]
    if unknown:
        warnings.append(
            f"{len(unknown)} modules, such as {file.bases[unknown[0]]}, were taken for Linear layers, because the file "
            "does not hold their kernel sizes; if some are convolutions, name the model with --model"
        )
    if RANKS_ENTRY in file.metadata:
        warnings.append(f"{file.path.name} is a T-LoRA; the new file uses all of its ranks at each noise level")
    return warnings


def _metadata(
    file: LoraFile,
    tensors: Mapping[str, Tensor],
    adapters: Sequence[AdapterWeights],
    rank: int | None,
    energy: float | None,
) -> dict[str, str]:
    bounds = [f"rank {rank}"] * (rank is not None) + [f"energy {energy:g}" if energy is not None else ""]
    header = {key: value for key, value in without_config(file.metadata).items() if key != RANKS_ENTRY}
    if "lorasmith.algorithm" in header:
        header["lorasmith.algorithm"] = "lora"
    if header.get("ss_network_module", "").startswith("lycoris"):
        header |= {"ss_network_module": "networks.lora", "ss_network_args": "{}"}
    header = noted(header | rank_entries(adapters), f"resized {file.path.name} to {' and '.join(filter(None, bounds))}")
    return header | sshs_hashes(tensors, header)
