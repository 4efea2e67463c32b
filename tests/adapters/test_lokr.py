"""LoKr: its formula whole and in parts, the factor rule, how it starts, and tensors that do not fit."""

from __future__ import annotations

import pytest
import torch
from layer_cases import LAYERS, randomised
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.adapters.lokr import LokrAdapter
from lorasmith.core.adapter_state import AdapterWeights


def fresh(layer: nn.Module, *, factor: int = 4, zero: str = "up") -> LokrAdapter:
    return LokrAdapter.create(FrozenLayer(layer), rank=factor, alpha=1.0, seed=3, path="layer", zero=zero)


def test_a_fresh_one_has_two_whole_factors_as_comfyuis() -> None:
    linear, conv = fresh(nn.Linear(320, 640), factor=8), fresh(nn.Conv2d(320, 64, 3), factor=8)

    assert {name: tuple(p.shape) for name, p in linear.named_parameters()} == {
        "lokr_w1": (8, 8),
        "lokr_w2": (80, 40),
    }
    assert {name: tuple(p.shape) for name, p in conv.named_parameters()} == {
        "lokr_w1": (8, 8),
        "lokr_w2": (8, 40, 3, 3),
    }


@pytest.mark.parametrize(("zero", "empty", "filled"), [("up", "lokr_w2", "lokr_w1"), ("down", "lokr_w1", "lokr_w2")])
def test_one_factor_starts_at_zero_and_the_other_as_torchs_own_layers(zero: str, empty: str, filled: str) -> None:
    adapter = fresh(nn.Conv2d(320, 640, 3), factor=16, zero=zero)
    values = adapter.get_parameter(filled)
    bound = values[0].numel() ** -0.5

    assert not adapter.get_parameter(empty).any()
    assert values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


FORMS = {
    "whole": {"lokr_w1": (2, 4), "lokr_w2": (6, 2, 3, 3)},
    "w2 in parts": {"lokr_w1": (2, 4), "lokr_w2_a": (6, 3), "lokr_w2_b": (3, 18)},
    "w2 in parts with its kernel": {"lokr_w1": (2, 4), "lokr_w2_a": (6, 3), "lokr_w2_b": (3, 2, 3, 3)},
    "w1 in parts": {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 4), "lokr_w2": (6, 2, 3, 3)},
    "both in parts": {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (6, 3), "lokr_w2_b": (3, 18)},
    "Tucker": {"lokr_w1": (2, 4), "lokr_w2_a": (3, 6), "lokr_w2_b": (3, 2), "lokr_t2": (3, 3, 3, 3)},
}
RANKS = {"whole": None, "w1 in parts": 1}


def tensors(form: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in FORMS[form].items()}


def kronecker(given: dict[str, Tensor]) -> Tensor:
    """By definition, in double precision."""
    full = {name: tensor.double() for name, tensor in given.items()}
    w1 = full["lokr_w1"] if "lokr_w1" in full else full["lokr_w1_a"] @ full["lokr_w1_b"]
    if "lokr_w2" in full:
        w2 = full["lokr_w2"]
    elif "lokr_t2" in full:
        w2 = torch.einsum("ijkl,ip,jr->prkl", full["lokr_t2"], full["lokr_w2_a"], full["lokr_w2_b"])
    else:
        w2 = (full["lokr_w2_a"] @ full["lokr_w2_b"].flatten(1)).reshape(6, 2, 3, 3)
    return torch.kron(w1[:, :, None, None], w2.contiguous())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "stacked"])
def test_every_form_is_applied_by_the_formula(form: str, stacked: bool) -> None:
    layer = nn.Conv2d(8, 12, 3, stride=2, padding=1)
    adapter = LokrAdapter.from_weights(AdapterWeights("lokr", tensors(form), 2.5), FrozenLayer(layer))
    rank = RANKS.get(form, 3)
    scale = 1.0 if rank is None else 2.5 / rank
    change = 0.6 * scale * kronecker(tensors(form))
    weight = layer.weight.double() + change
    x = torch.randn(2, 8, 7, 5, generator=torch.Generator().manual_seed(1))

    assert adapter.scale == scale
    torch.testing.assert_close(adapter.merged(layer.weight, 0.6).double(), weight, rtol=1e-5, atol=1e-5)
    sets = [Attached({"0": adapter}, 0.6)] * (2 if stacked else 1)
    total = weight + change if stacked else weight
    expected = nn.functional.conv2d(x.double(), total, layer.bias.double(), stride=2, padding=1)
    model = nn.Sequential(layer)
    with adapters_attached(model, sets):
        torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_parts_of_a_file_stay_what_they_are(form: str) -> None:
    layer = FrozenLayer(nn.Conv2d(8, 12, 3))
    weights = LokrAdapter.from_weights(AdapterWeights("lokr", tensors(form)), layer).to_weights()

    assert weights.alpha == (RANKS.get(form, 3) or 1)  # the alpha that leaves the product as it is
    assert weights.tensors.keys() == FORMS[form].keys()
    assert all(torch.equal(tensor, tensors(form)[name]) for name, tensor in weights.tensors.items())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_order_of_channels_in_memory_makes_no_difference(memory_format: torch.memory_format) -> None:
    case = LAYERS["conv 3x3 stride 2"]
    model, plain = case.model().to(memory_format=memory_format), case.model()
    adapter = fresh(model.get_submodule("layer"))
    randomised(adapter)
    results = []
    for one, x in ((model, case.input().to(memory_format=memory_format)), (plain, case.input())):
        x.requires_grad_()
        with adapters_attached(one, [Attached({"layer": adapter})]):
            output = one(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *adapter.parameters()])])

    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
