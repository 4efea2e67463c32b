"""A LoRA of the combined change of several LoRAs on a model, of a given rank or in full.

Changes that depend on the LoRAs alone are added exactly; those that depend on the weight (DoRA, OFT, BOFT, GLoRA) are
computed on it, in the order in which the LoRAs are applied. The model is not modified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer, is_targetable
from lorasmith.adapters.patch import Patch
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.formats.names.model_names import ModelNames
from lorasmith.formats.names.spelling import ModuleTensors
from lorasmith.formats.scales import with_one_alpha
from lorasmith.toolbox.changes import added_by, is_additive, layer_like, merged_weight
from lorasmith.toolbox.extract import by_tensor, cut_down
from lorasmith.toolbox.lowrank import stacked


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
        found = ((ModuleTensors(one.adapters.get(path), one.differences.get(path, {})), one) for one in self.patches)
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
        return stacked(*(one for one in added if not one.is_nothing)).matrix().reshape(frozen.shape)
    before = frozen.weight.detach().float()
    after = before
    for module, strength in changes:
        after = merged_weight(module, layer_like(layer, after), after, strength)
    return (after - before).cpu()


def _other_changes(part: PatchedPart, path: str, *, weight: bool) -> dict[str, Tensor]:
    """Differences of a module's parameters summed over the LoRAs, with that of the weight on request."""
    sums: dict[str, Tensor] = {}
    for module, strength in part.changes_of(path):
        for name, difference in module.differences.items():
            if weight or name != "weight":
                sums[name] = sums.get(name, torch.zeros(())) + difference.float() * strength
    return {name: one for name, one in sums.items() if one.any()}


def _as_written(ref: ModuleRef, names: ModelNames) -> ModuleRef:
    """A module by its path in files, where CLIP's start with `text_model.` in any version of transformers."""
    is_known = ref.component == DENOISER or ref.path in names.paths(ref.component)
    return ref if is_known else ModuleRef(ref.component, f"text_model.{ref.path}")
