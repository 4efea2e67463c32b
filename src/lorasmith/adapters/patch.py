"""LoRAs applied to a model: folded into the weights or run beside them, and removed bit-exactly."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter import Adapter
from lorasmith.adapters.catalogue import STRENGTH
from lorasmith.adapters.frozen_layer import FrozenLayer, packable_layers
from lorasmith.adapters.inject import Attached, adapters_attached, adapters_on, load_adapters
from lorasmith.adapters.lora import LowRank
from lorasmith.adapters.variants import rank_ordered
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError
from lorasmith.core.quantization import WEIGHT_SOURCE, Packed, weight_source
from lorasmith.core.rank_schedule import RankSchedule


@dataclass(frozen=True)
class Patch:
    """One LoRA on one model."""

    adapters: Mapping[str, AdapterWeights]  # adapter of each module path
    # additive differences by module path and parameter name; they are folded in even with `bypass`, except those of
    # weights that are packed
    differences: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    strength: float = 1.0  # 1 is the LoRA as trained
    bypass: bool = False  # run adapters in activation space instead of folding them into the weights
    # of the low-rank adapters, by noise level (`ranks_chosen`), for which `bypass` is on; None for all ranks
    ranks: RankSchedule | None = None

    def __post_init__(self) -> None:
        STRENGTH.check(self.strength)

    def below(self, path: str) -> Patch:
        """The patch for a module that has the patched one at `path`."""
        return replace(
            self,
            adapters={f"{path}.{own}": weights for own, weights in self.adapters.items()},
            differences={f"{path}.{own}": changes for own, changes in self.differences.items()},
        )


@contextlib.contextmanager
def patches_applied(model: nn.Module, patches: Sequence[Patch]) -> Iterator[None]:
    """`model` has `patches` inside. Raises LoraError when one does not fit the model."""
    with patches_merged(model, patches), adapters_attached(model, attachments(model, patches)):
        yield


@contextlib.contextmanager
def patches_merged(
    model: nn.Module, patches: Sequence[Patch], *, dtype: torch.dtype | None = None, unpacking: bool = False
) -> Iterator[None]:
    """Patches that are not applied in activation space are folded into the weights inside, in order.

    Patched parameters point to new tensors; the old ones are kept and restored, so nothing is rounded. Patches of
    weights that are cast for each product are folded in then.

    dtype: of the patched parameters, fp32 where they are converted to another one later; their own if None.
    unpacking: whether quantized weights that are patched become plain ones inside; else they are refused.
    """
    originals: dict[nn.Parameter, Tensor] = {}
    sources: dict[nn.Module, object] = {}

    def point(parameter: nn.Parameter, value: Tensor) -> None:
        originals.setdefault(parameter, parameter.data)
        parameter.data = value.detach()

    def change(path: str, name: str, how: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to a parameter."""
        parameter, layer = _parameter(model, path, name), model.get_submodule(path)
        source = weight_source(layer) if name == "weight" else None
        if isinstance(source, Packed) and source.is_plain:
            sources.setdefault(layer, source)
            setattr(layer, WEIGHT_SOURCE, source.changed(how))
            return
        if source is not None:
            if not unpacking:
                raise LoraError(cannot_merge(model))
            point(parameter, FrozenLayer(layer).weight)
            sources[layer] = layer.__dict__.pop(WEIGHT_SOURCE)
        point(parameter, how(parameter.to(dtype or parameter.dtype)))

    try:
        for patch in patches:
            if not patch.bypass:
                for path, adapter in load_adapters(model, patch.adapters).items():
                    adapter = adapter.to(_parameter(model, path, "weight").device)
                    change(path, "weight", functools.partial(adapter.merged, strength=patch.strength))
            beside = _weights_beside(model, patch)
            for path, changes in patch.differences.items():
                for name, difference in changes.items():
                    if name == "weight" and path in beside:
                        continue
                    parameter = _parameter(model, path, name)
                    if difference.shape != parameter.shape:
                        raise LoraError(
                            f"a difference of shape {tuple(difference.shape)} does not fit {path}.{name} of shape "
                            f"{tuple(parameter.shape)}; the LoRA was made for another model"
                        )
                    added = difference.to(parameter.device, torch.float32)
                    change(path, name, functools.partial(_sum, added=added, strength=patch.strength))
        yield
    finally:
        for parameter, original in originals.items():
            parameter.data = original
        for layer, source in sources.items():
            setattr(layer, WEIGHT_SOURCE, source)


def _sum(weight: Tensor, *, added: Tensor, strength: float) -> Tensor:
    return torch.add(weight.float(), added, alpha=strength).to(weight.dtype)


def cannot_merge(model: nn.Module) -> str:
    """The message for a LoRA that would have to be merged into quantized weights."""
    layers = packable_layers(model)
    count = sum(map(_is_quantized, layers))
    return (
        f"a LoRA can be merged into plain weights only, but {count} of {len(layers)} layers of this model are "
        "quantized; set bypass on, or load the bf16 or fp16 version of the model"
    )


def attachments(model: nn.Module, patches: Sequence[Patch]) -> list[Attached]:
    """The adapters of `bypass` patches, frozen, on the device and in the dtype of their layers."""
    found = []
    for patch in patches:
        for weights in (patch.adapters, _weights_beside(model, patch)) if patch.bypass else ():
            if weights:
                adapters = _placed(model, load_adapters(model, weights))
                for adapter in rank_ordered(adapters).values():
                    adapter.ranks = patch.ranks
                found.append(Attached(adapters, patch.strength))
    return found


def place_beside(model: nn.Module, attached: Sequence[Attached]) -> None:
    """Move adapters to where their layers are now.

    Of a network that is to be packed, `attachments` are made before it is, as differences are then folded in.
    """
    for one in attached:
        _placed(model, one.adapters)


def ranks_chosen(model: nn.Module, share: Tensor) -> None:
    """Let attached adapters use the ranks of samples at these shares of diffusion time (batch,), until the next call.

    To be called before each evaluation of a model with patches that choose ranks by noise level. They stay chosen for
    the backward pass, which may recompute.
    """
    masks: dict[tuple[RankSchedule, int], Tensor] = {}
    for layer in model.modules():
        for adapter in adapters_on(layer):
            if isinstance(adapter, LowRank) and (ranks := adapter.ranks) is not None:
                like = adapter.factors().down
                if (key := (ranks, adapter.rank)) not in masks:
                    masks[key] = ranks.mask(share, adapter.rank).to(like.device, like.dtype)
                adapter.mask = masks[key]


def patch_tensors(patches: Sequence[Patch]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of patches, under names that say everything else of them."""
    for number, patch in enumerate(patches):
        place = f"{number} {patch.strength} {patch.bypass}" + (f" {patch.ranks}" if patch.ranks else "")
        for path, weights in patch.adapters.items():
            for name, tensor in weights.tensors.items():
                yield f"{place} {path} {weights.algorithm} {weights.alpha} {name}", tensor
        for path, changes in patch.differences.items():
            yield from ((f"{place} {path} {name}", tensor) for name, tensor in changes.items())


def _weights_beside(model: nn.Module, patch: Patch) -> dict[str, AdapterWeights]:
    """The differences of a `bypass` patch whose weights are packed, as adapters: they cannot be folded in."""
    modules = dict(model.named_modules()) if patch.bypass else {}
    return {
        path: AdapterWeights("full", {"diff": changes["weight"]})
        for path, changes in patch.differences.items()
        if "weight" in changes and path in modules and _is_quantized(modules[path])
    }


def _is_quantized(layer: nn.Module) -> bool:
    source = weight_source(layer)
    return source is not None and not (isinstance(source, Packed) and source.is_plain)


def _placed(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    placed = {}
    for path, adapter in adapters.items():
        weight = _parameter(model, path, "weight")
        placed[path] = adapter.requires_grad_(False).to(weight.device, weight.dtype)
    return placed


def _parameter(model: nn.Module, path: str, name: str) -> nn.Parameter:
    try:
        return model.get_parameter(f"{path}.{name}")
    except AttributeError:
        raise LoraError(
            f"the LoRA changes {path}.{name}, which the model lacks; it was made for another model"
        ) from None
