"""What adapters add is what their definitions say, read off their tensors alone."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.algorithms import title_of
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError
from lorasmith.formats.spelling import ModuleTensors
from lorasmith.toolbox.changes import added_by, is_additive, is_plain_lora, layer_like, merged_weight, weight_shape

LINEAR, CONV = (24, 16), (8, 4, 3, 3)


def test_added_by_its_definition() -> None:
    for shape in [LINEAR, CONV, (8, 4, 1, 1)]:
        for algorithm in ["lora", "loha", "lokr"]:
            weights = cases.random_weights(shape, algorithm)
            change = added_by(ModuleTensors(weights), shape)

            assert is_additive(weights)
            assert torch.allclose(change.matrix().double(), cases.weight_change(weights), atol=1e-6)


def test_a_tucker_core_is_multiplied_in() -> None:
    weights = cases.random_weights(CONV, variant="tucker")
    change = added_by(ModuleTensors(weights))

    assert change.factors is not None
    assert change.factors[0].shape[1] == 4
    assert torch.allclose(change.matrix().double(), cases.weight_change(weights), atol=1e-7)
    assert weight_shape(weights) == CONV


def test_a_full_difference_and_a_lora_add_up() -> None:
    weights = cases.random_weights(CONV)
    difference = torch.randn(CONV)
    change = added_by(ModuleTensors(weights, {"weight": difference, "bias": torch.ones(8)}))

    assert torch.allclose(change.matrix().double(), cases.weight_change(weights) + difference.flatten(1), atol=1e-5)


def test_shapes_are_told_by_the_tensors() -> None:
    for algorithm, expected in [("lora", LINEAR), ("loha", LINEAR), ("lokr", LINEAR)]:
        assert weight_shape(cases.random_weights(LINEAR, algorithm)) == expected
        conv = weight_shape(cases.random_weights(CONV, algorithm))
        assert conv == ((8, 36) if algorithm == "loha" else CONV)  # LoHa flattens kernels


def test_kinds_of_changes() -> None:
    for weights, plain, additive, title in [
        (cases.random_weights(LINEAR), True, True, "LoRA"),
        (cases.random_weights(LINEAR, variant="dora"), False, False, "DoRA"),
        (cases.random_weights(LINEAR, "loha"), False, True, "LoHa"),
        (cases.random_weights(LINEAR, "oft"), False, False, "OFT"),
    ]:
        assert (is_plain_lora(weights), is_additive(weights)) == (plain, additive)
        assert title_of(weights) in (title, title.lower())


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(LoraError, match=r"^unknown adapter algorithm 'novel'"):
        is_additive(AdapterWeights("novel", {"x": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(16, 24), LINEAR), (nn.Conv2d(4, 8, 3, padding=1, stride=2), CONV)], ids=str
)
def test_a_layer_with_another_weight_leaves_the_layer_alone(layer: nn.Module, shape: tuple[int, ...]) -> None:
    before: Tensor = layer.weight.detach().clone()  # type: ignore[union-attr, operator]
    weight = torch.randn(shape)
    other = layer_like(layer, weight)

    assert type(other) is type(layer)
    assert torch.equal(other.weight, weight)
    assert torch.equal(layer.weight, before)  # type: ignore[arg-type]
    weights = cases.random_weights(shape)
    merged = merged_weight(ModuleTensors(weights), other, weight, 0.5)
    expected = weight.double().flatten(1) + 0.5 * cases.weight_change(weights)
    assert torch.allclose(merged.double().flatten(1), expected, atol=1e-6)
