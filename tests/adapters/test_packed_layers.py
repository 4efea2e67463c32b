"""Layers whose weight is made anew for each use: the same numbers as with a parameter, and nobody keeps the weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from layer_cases import KINDS, LAYERS, LayerCase, randomised
from torch import Tensor, nn

from lorasmith.adapters.adapter import Adapter
from lorasmith.adapters.frozen_layer import FrozenLayer, give_source
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.core.quantization import Packed, packed

pytestmark = [pytest.mark.pairwise(algorithm=[*KINDS, "none"], case=LAYERS), pytest.mark.together("algorithm")]


def filled(case: LayerCase, algorithm: str) -> dict[str, Adapter]:
    """An adapter that was made for the layer as it is; none for the bare layer."""
    if algorithm == "none":
        return {}
    layer = FrozenLayer(case.model().get_submodule("layer"))
    adapter = KINDS[algorithm].create(layer, rank=3, alpha=2.0, seed=0, path="layer", zero="up")
    randomised(adapter, seed=2)
    return {"layer": adapter}


def passes(model: nn.Module, adapters: dict[str, Adapter], x: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The output, then the gradients to input and adapter."""
    with adapters_attached(model, [Attached(adapters)]):
        y = model(x)
        yield (y,)
        trained = [parameter for one in adapters.values() for parameter in one.parameters()]
        yield torch.autograd.grad(y.square().sum(), [x, *trained])


def with_packed(model: nn.Module, weight: Packed) -> nn.Module:
    give_source(model.get_submodule("layer"), weight, device=torch.device("cpu"), dtype=torch.float32)
    return model


@pytest.mark.pairwise(kind=["none", "int8", "nf4"])
def test_outputs_and_gradients_are_exactly_those_of_a_parameter(algorithm: str, case: LayerCase, kind: str) -> None:
    plain, x, adapters = case.model(), case.input().requires_grad_(), filled(case, algorithm)
    parameter = plain.get_submodule("layer").weight
    weight = packed(parameter, kind, torch.float32)
    parameter.data = weight.weight()

    expected = [tensor for tensors in passes(plain, adapters, x) for tensor in tensors]
    found = [tensor for tensors in passes(with_packed(case.model(), weight), adapters, x) for tensor in tensors]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_no_weight_is_kept_for_the_backward_pass_which_makes_it_again(algorithm: str, case: LayerCase) -> None:
    model, x = case.model(), case.input().requires_grad_()
    weight = packed(model.get_submodule("layer").weight, "int8", torch.float32)
    made: list[Tensor] = []  # holds on to them, so that no address is used twice
    saved: list[Tensor] = []

    def unpack(*tensors: Tensor, dtype: torch.dtype) -> Tensor:
        made.append(weight.unpack(*tensors, dtype=dtype))
        return made[-1]

    steps = passes(with_packed(model, replace(weight, unpack=unpack)), filled(case, algorithm), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        next(steps)
    forward = len(made)
    assert forward
    assert saved
    places = {tensor.untyped_storage().data_ptr() for tensor in made}
    assert not places & {tensor.untyped_storage().data_ptr() for tensor in saved}
    next(steps)
    assert len(made) > forward
