"""Fresh adapters, and attaching stacks of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layer_cases import LAYERS, LayerCase, randomised, snapshot
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer, is_targetable
from lorasmith.adapters.inject import (
    AdapterPlan,
    Attached,
    Rule,
    adapters_attached,
    create_adapters,
    load_adapters,
    plan_adapters,
)
from lorasmith.adapters.lora import LoraAdapter
from lorasmith.adapters.oft import OftAdapter
from lorasmith.adapters.patch import Patch, patches_merged
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(3, 6, 3)
        self.circular = nn.Conv2d(3, 6, 3, padding_mode="circular", padding=1)
        self.out = nn.ModuleList([nn.Linear(8, 2), nn.Dropout()])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"first": Block(), "second": Block()}).requires_grad_(False)


def planned(model: nn.Module, *include: str, rank: int) -> AdapterPlan:
    return plan_adapters(model, [Rule(include)], rank=rank)


def test_norms_and_other_paddings_are_no_targets() -> None:
    assert not is_targetable(nn.LayerNorm(4))
    assert not is_targetable(nn.ConvTranspose2d(4, 4, 3))
    assert not is_targetable(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))


def test_an_adapter_of_full_rank_can_be_any_change() -> None:
    layer = nn.Linear(6, 4)
    rank = planned(nn.Sequential(layer), "0", rank=100).adapters[0].rank
    change = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    weights = AdapterWeights("lora", {"down": v[:rank], "up": (u * s)[:, :rank]})
    adapter = LoraAdapter.from_weights(weights, FrozenLayer(layer))

    torch.testing.assert_close(adapter.merged(layer.weight.detach()), layer.weight.detach() + change)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (16.0, 1.0), (1.0, 1 / 16), (24.0, 1.5)])
def test_capped_layers_keep_the_others_scale(model: nn.Module, alpha: float | None, scale: float) -> None:
    plan = planned(model, "first.*", rank=16)
    adapters = create_adapters(model, plan, algorithm="lora", alpha=alpha, seed=0, zero="up")

    assert [adapter.scale for adapter in adapters.values()] == pytest.approx([scale] * 3)
    assert [adapter.rank for adapter in adapters.values()] == [8, 6, 2]


def test_fresh_adapters_are_fp32_trainable_and_in_the_models_order(model: nn.Module) -> None:
    with pytest.raises(LoraError, match=r"^unknown adapter algorithm 'lorra' \(did you mean 'LoRA'\?\)"):
        create_adapters(model, planned(model, "*", rank=2), algorithm="lorra", alpha=None, seed=0, zero="up")
    plan = planned(model.to(torch.bfloat16), "*", rank=2)
    adapters = create_adapters(model, plan, algorithm="LoRA", alpha=None, seed=0, zero="up")

    assert list(adapters) == [one.path for one in plan.adapters]
    for adapter in adapters.values():
        assert all(p.dtype == torch.float32 and p.requires_grad for p in adapter.parameters())


@pytest.mark.parametrize("path", ["third.to_q", "first", "first.out.1"])
def test_adapters_for_layers_that_the_model_lacks_are_refused(model: nn.Module, path: str) -> None:
    weights = AdapterWeights("lora", {"down": torch.zeros(2, 8), "up": torch.zeros(8, 2)})
    with pytest.raises(LoraError) as caught:
        load_adapters(model, {path: weights})

    assert str(caught.value) == (f"the LoRA is for a layer {path} that the model lacks; it was made for another model")


def test_attaching_to_a_missing_layer_leaves_the_others_alone(model: nn.Module) -> None:
    before = snapshot(model)
    adapter = LoraAdapter(torch.zeros(1, 8), torch.zeros(8, 1), alpha=1)
    with (
        pytest.raises(AttributeError),
        adapters_attached(model, [Attached({"first.to_q": adapter, "third.to_q": adapter})]),
    ):
        pass

    assert snapshot(model) == before


def test_an_adapter_on_an_embedding_is_merged_and_not_run_beside_it() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4)}).requires_grad_(False)
    weights = AdapterWeights("lora", {"down": torch.randn(2, 4), "up": torch.randn(5, 2)}, alpha=2.0)
    before = model["embed"].weight.clone()
    with patches_merged(model, [Patch({"embed": weights}, {})]):
        expected = before + weights.tensors["up"] @ weights.tensors["down"]
        torch.testing.assert_close(model["embed"].weight, expected)
    adapters = load_adapters(model, {"embed": weights})
    with (
        pytest.raises(LoraError, match=r"adapter on embed \(Embedding\), which can be merged into its weight alone"),
        adapters_attached(model, [Attached(adapters)]),
    ):
        pass


def test_an_inner_stack_and_a_forward_of_the_layers_own_come_back() -> None:
    case = LAYERS["linear"]
    model, x = case.model(), case.input()
    one, two = (LoraAdapter(torch.randn(2, 48), torch.randn(40, 2), alpha=2) for _ in range(2))
    with adapters_attached(model, [Attached({"layer": one})]):
        outer = model(x)
        with adapters_attached(model, [Attached({"layer": two})]):
            assert not torch.equal(model(x), outer)
        assert torch.equal(model(x), outer)
    assert not torch.equal(model(x), outer)
    layer = model.get_submodule("layer")
    layer.forward = own = layer.forward.__func__.__get__(layer)
    with adapters_attached(model, [Attached({"layer": one})]):
        assert layer.forward is not own
    assert layer.forward is own


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_the_bias_stays_outside_what_transforms_the_output(case: LayerCase) -> None:
    model, x = case.model(), case.input()
    layer = FrozenLayer(model.get_submodule("layer"))
    turning, lora = (
        kind.create(layer, rank=2, alpha=0.0 if kind is OftAdapter else 2.0, seed=0, path="", zero="up")
        for kind in (OftAdapter, LoraAdapter)
    )
    for one in (turning, lora):
        randomised(one)
    for stack in ([(turning, 0.7)], [(turning, 0.7), (lora, 1.5)], [(lora, 1.5), (turning, 0.7)]):
        weight = layer.weight
        for adapter, strength in stack:
            weight = adapter.merged(weight, strength)
        expected = torch.func.functional_call(model, {"layer.weight": weight}, (x,))
        with adapters_attached(model, [Attached({"layer": adapter}, strength) for adapter, strength in stack]):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "one vector": lambda: torch.randn(48),
    "a matrix": lambda: torch.randn(5, 48),
    "four dimensions": lambda: torch.randn(2, 3, 2, 48),
    "transposed": lambda: torch.randn(48, 3, 2).permute(2, 1, 0),
    "channels last": lambda: torch.randn(2, 48, 3).transpose(1, 2),
    "a slice": lambda: torch.randn(2, 6, 96)[:, ::2, 48:],
    "expanded": lambda: torch.randn(1, 1, 48).expand(2, 3, 48),
    "empty": lambda: torch.randn(0, 3, 48),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_inputs_of_any_form_go_through_a_linear(make: Callable[[], Tensor]) -> None:
    case = LAYERS["linear"]
    model = case.model()
    layer = FrozenLayer(model.get_submodule("layer"))
    adapter = LoraAdapter.create(layer, rank=2, alpha=2.0, seed=0, path="", zero="up")
    randomised(adapter)
    torch.manual_seed(0)
    x = make().requires_grad_()
    inputs = [x, adapter.down, adapter.up]
    weight = adapter.merged(layer.weight)
    expected = torch.func.functional_call(model, {"layer.weight": weight}, (x,))

    with adapters_attached(model, [Attached({"layer": adapter})]):
        output = model(x)
    # Not a plain sum, so that the incoming gradient is one that is not contiguous either.
    gradients = torch.autograd.grad(output.transpose(0, -1).square().sum(), inputs)
    references = torch.autograd.grad(expected.transpose(0, -1).square().sum(), inputs)

    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, references, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_frozen_and_merged_layers_serve_each_other(model: nn.Module) -> None:
    """Adapters read the weight when they run, so what is merged meanwhile counts."""
    x = torch.randn(3, 8)
    adapter = LoraAdapter(torch.randn(2, 8), torch.randn(8, 2), alpha=2)
    layer = model.get_submodule("first.to_q")
    with (
        adapters_attached(model, [Attached({"first.to_q": adapter})]),
        patches_merged(model, [Patch({"first.to_q": adapter.to_weights()}, strength=-1)]),
    ):
        torch.testing.assert_close(layer(x), x @ layer.weight.T + (x @ adapter.down.T) @ adapter.up.T)
    restored = layer(x)

    with patches_merged(model, [Patch({"first.to_q": adapter.to_weights()}, strength=-1)]):
        merged = layer(x)
        with adapters_attached(model, [Attached({"first.to_q": adapter})]):
            torch.testing.assert_close(layer(x), restored, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer(x), merged)
