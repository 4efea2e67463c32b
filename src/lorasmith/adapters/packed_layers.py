"""Layers whose weight is packed: which layers can be, how a packed weight is set, and the plain one restored.

A packed layer computes through `FrozenLayer`, which unpacks the weight for each product; its parameter is a
`placeholder`. A model is packed during a run (`frozen_weights`), or from its file on (`families.files`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import CONVOLUTIONS, FrozenLayer, FrozenProduct, is_targetable
from lorasmith.core.mapped_files import release_pages
from lorasmith.core.placement import placed
from lorasmith.core.quantization import (
    WEIGHT_SOURCE,
    Packed,
    WeightSource,
    as_stored,
    placeholder,
    scaled_codes,
    weight_source,
)


def packable_layers(module: nn.Module) -> list[nn.Module]:
    """Layers whose weight only their own forward uses: plain Linear layers and convolutions, in model order."""
    owners = Counter(id(p) for one in module.modules() for p in one.parameters(recurse=False))
    return [
        layer
        for layer in module.modules()
        if is_targetable(layer) and type(layer) in (nn.Linear, *CONVOLUTIONS) and owners[id(layer.weight)] == 1
    ]


def cast_weights(module: nn.Module, code: torch.dtype) -> None:
    """Pack the weights of a module's layers in an fp8 format without scales; packed ones stay as they are."""
    for layer in packable_layers(module):
        if weight_source(layer) is not None:
            continue
        weight = layer.get_parameter("weight").data
        scale = torch.ones((1,) * weight.ndim, device=weight.device)
        source = scaled_codes(weight.to(code), scale, weight.dtype)
        release_pages(weight)
        give_source(layer, source, device=weight.device, dtype=weight.dtype)


def packed_layers(module: nn.Module) -> dict[str, Packed]:
    """Packed weights on the device of their use, by module path; streamed ones are left out."""
    sources = ((path, weight_source(layer)) for path, layer in module.named_modules())
    return {path: source for path, source in sources if isinstance(source, Packed)}


def give_source(layer: nn.Module, source: WeightSource, *, device: torch.device, dtype: torch.dtype) -> None:
    """Compute a layer with weights from `source`; its parameter becomes an empty placeholder."""
    weight = layer.get_parameter("weight")
    weight.data = placeholder(weight.shape, device, dtype)
    setattr(layer, WEIGHT_SOURCE, source)
    # As a method: torch.compile distinguishes methods by their function, and other objects one by one.
    layer.forward = FrozenProduct(FrozenLayer(layer), with_bias=True).__call__


@contextlib.contextmanager
def weight_source_set(
    layer: nn.Module, source: WeightSource, *, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """A layer computes with weights from `source` inside; afterwards it is restored bit for bit."""
    weight, data = layer.get_parameter("weight"), layer.get_parameter("weight").data
    before = {name: layer.__dict__[name] for name in (WEIGHT_SOURCE, "forward") if name in layer.__dict__}
    try:
        give_source(layer, source, device=device, dtype=dtype)
        yield
    finally:
        weight.data = data
        for name in (WEIGHT_SOURCE, "forward"):
            layer.__dict__.pop(name, None)
        layer.__dict__.update(before)


@contextlib.contextmanager
def weights_as_stored(module: nn.Module, dtype: torch.dtype, *, without: Collection[nn.Module] = ()) -> Iterator[None]:
    """Inside the context, the layers of `layers_as_stored` cast their weight to `dtype` for each product.

    The numbers are those of a model that was cast as a whole, in the memory of the stored one.
    """
    with contextlib.ExitStack() as undo:
        for layer in layers_as_stored(module, dtype):
            if layer not in without:
                weight = layer.get_parameter("weight").data
                source = as_stored(weight, dtype)
                undo.enter_context(weight_source_set(layer, source, device=weight.device, dtype=dtype))
        yield


@contextlib.contextmanager
def placed_for_products(module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside the context, a model is placed, its weights as stored where they are narrower than `dtype`."""
    with weights_as_stored(module, dtype), placed(module, device=device, dtype=dtype):
        yield


SMALL_BYTES = 2**28
"""Bytes up to which all weights are cast at once: casts would save little, and take a large share of the time."""


def layers_as_stored(module: nn.Module, dtype: torch.dtype) -> list[nn.Module]:
    """Layers whose weights stay in the narrower dtype of their file for products in `dtype`; none of small models."""
    layers = [layer for layer in packable_layers(module) if weight_source(layer) is None]
    weights = {layer: layer.get_parameter("weight") for layer in layers}
    narrower = [one for one, weight in weights.items() if weight.dtype.itemsize < dtype.itemsize]
    return narrower if sum(weights[one].numel() for one in narrower) * dtype.itemsize > SMALL_BYTES else []


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a network by name, the codes where weights are packed."""
    packed = {f"{path}.weight": one for path, one in packed_layers(module).items()}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name not in packed:
            yield name, tensor
    for name, weight in packed.items():
        yield from ((f"{name} {number}", tensor) for number, tensor in enumerate(weight.tensors))
