"""LoRAs applied to a model: folded into the weights or run beside them, and removed bit-exactly."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter import Adapter, wide
from lorasmith.adapters.catalogue import STRENGTH
from lorasmith.adapters.frozen_layer import FrozenLayer, is_targetable, packable_layers, placed_for_products
from lorasmith.adapters.inject import Attached, adapters_attached, adapters_on, lacking, load_adapters
from lorasmith.adapters.lora import LowRank
from lorasmith.adapters.variants import rank_ordered
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError
from lorasmith.core.mapped_files import release_pages
from lorasmith.core.placement import full_precision
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

    def prefixed(self, path: str) -> Patch:
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
def placed_with_patches(
    model: nn.Module, patches: Sequence[Patch], *, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """`model` is placed for products and has `patches` inside, whose weights take the place of the placed ones.

    Raises LoraError when one does not fit the model.
    """
    originals = {parameter: parameter.data for parameter in model.parameters()}
    with (
        placed_for_products(model, device=device, dtype=dtype),
        patches_merged(model, patches, originals=originals),
        adapters_attached(model, attachments(model, patches)),
    ):
        yield


@contextlib.contextmanager
def patches_merged(
    model: nn.Module,
    patches: Sequence[Patch],
    *,
    dtype: torch.dtype | None = None,
    unpacking: bool = False,
    originals: Mapping[nn.Parameter, Tensor] | None = None,
) -> Iterator[None]:
    """Patches that are not applied in activation space are folded into the weights inside, in order.

    Patched parameters point to new tensors; the old ones are kept and restored, so nothing is rounded. Adapters of
    weights that are cast for each product are left to `attachments`: merging would be part of each cast.

    dtype: of the patched parameters, into which they are rounded once; their own if None.
    unpacking: whether quantized weights that are patched become plain ones inside; else they are refused.
    originals: what parameters are restored to if not to what they are now, which is then freed where it is patched.
    """
    restored: dict[nn.Parameter, Tensor] = {}
    sources: dict[nn.Module, object] = {}
    full = full_precision(model)

    def change(path: str, name: str, changes: Sequence[Callable[[Tensor], Tensor]]) -> None:
        """Apply functions to a parameter, in fp32."""
        parameter, layer = _parameter(model, path, name), model.get_submodule(path)
        weight = parameter.data
        if name == "weight" and weight_source(layer) is not None:
            if not unpacking:
                raise LoraError(cannot_merge(model))
            weight = FrozenLayer(layer).weight
            sources[layer] = layer.__dict__.pop(WEIGHT_SOURCE)
        restored[parameter] = parameter.data if originals is None else originals[parameter]
        kept = weight.dtype if dtype is None else torch.float32 if parameter in full else dtype
        parameter.data = functools.reduce(lambda value, how: how(value), changes, wide(weight)).detach().to(kept)
        release_pages(weight)

    try:
        for (path, name), changes in _folded(model, patches).items():
            change(path, name, changes)
        yield
    finally:
        for parameter, original in restored.items():
            parameter.data = original
        for layer, source in sources.items():
            setattr(layer, WEIGHT_SOURCE, source)


def _folded(model: nn.Module, patches: Sequence[Patch]) -> dict[tuple[str, str], list[Callable[[Tensor], Tensor]]]:
    """What is folded into each parameter, by module path and name, in order."""
    found: dict[tuple[str, str], list[Callable[[Tensor], Tensor]]] = {}
    for patch in patches:
        unmerged = _unmerged(model, patch)
        adapters = {
            path: adapter for path, adapter in patch.adapters.items() if not patch.bypass and path not in unmerged
        }
        for path, adapter in load_adapters(model, adapters).items():
            found.setdefault((path, "weight"), []).append(
                functools.partial(_with_adapter, adapter=adapter, strength=patch.strength)
            )
        for path, changes in patch.differences.items():
            for name, difference in changes.items():
                if name == "weight" and path in unmerged:
                    continue
                parameter = _parameter(model, path, name)
                if difference.shape != parameter.shape:
                    raise LoraError(
                        f"a difference of shape {tuple(difference.shape)} does not fit {path}.{name} of shape "
                        f"{tuple(parameter.shape)}; the LoRA was made for another model"
                    )
                found.setdefault((path, name), []).append(
                    functools.partial(_with_difference, difference=difference, strength=patch.strength)
                )
    return found


def _with_adapter(weight: Tensor, *, adapter: Adapter, strength: float) -> Tensor:
    return adapter.to(weight.device).merged(weight, strength=strength)


def _with_difference(weight: Tensor, *, difference: Tensor, strength: float) -> Tensor:
    return torch.add(weight, difference.to(weight.device, weight.dtype), alpha=strength)


def cannot_merge(model: nn.Module) -> str:
    """The message for a LoRA that would have to be merged into quantized weights."""
    layers = packable_layers(model)
    count = sum(map(_is_quantized, layers))
    return (
        f"a LoRA can be merged into plain weights only, but {count} of {len(layers)} layers of this model are "
        "quantized; set bypass on, or load the bf16 or fp16 version of the model"
    )


def attachments(model: nn.Module, patches: Sequence[Patch]) -> list[Attached]:
    """The adapters of patches that run beside the weights, frozen, on the device and in the dtype of their layers.

    They are those of `bypass` patches, and of layers whose weight is cast for each product.
    """
    found = []
    for patch in patches:
        unmerged = _unmerged(model, patch)
        differences = {
            path: AdapterWeights("full", {"diff": changes["weight"]})
            for path, changes in patch.differences.items()
            if path in unmerged and "weight" in changes
        }
        for weights in (
            {path: adapter for path, adapter in patch.adapters.items() if patch.bypass or path in unmerged},
            differences,
        ):
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
    for attachment in attached:
        _placed(model, attachment.adapters)


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


def _unmerged(model: nn.Module, patch: Patch) -> set[str]:
    """Paths of layers whose weight nothing is folded into: cast for each product, or quantized if `bypass`."""
    modules = dict(model.named_modules())
    sources = {path: weight_source(modules[path]) for path in (*patch.adapters, *patch.differences) if path in modules}
    return {
        path
        for path, source in sources.items()
        if source is not None and (patch.bypass or not _is_quantized(modules[path]))
    }


def _is_quantized(layer: nn.Module) -> bool:
    source = weight_source(layer)
    return source is not None and not (isinstance(source, Packed) and source.is_cast)


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
        layers = {place for place, module in model.named_modules() if is_targetable(module)}
        raise LoraError(lacking(path, name, is_layer=path in layers)) from None
