"""LoRAs on models that people look at: folded in or beside, in order, and undone bit-exactly."""

from __future__ import annotations

import pytest
import torch
from layer_cases import snapshot
from torch import Tensor, nn

from lorasmith.adapters.patch import Patch, attachments, patches_applied, patches_merged
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4, bias=False)).requires_grad_(False)


def lora(seed: int = 0, width: int = 6, out: int = 6) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "down": torch.randn(2, width, generator=generator),
        "up": torch.randn(out, 2, generator=generator),
    }
    return AdapterWeights("lora", tensors, alpha=1.0)


@pytest.mark.parametrize("bypass", [False, True])
def test_differences_are_added_with_the_strength(model: nn.Module, bypass: bool) -> None:
    changes = {"0": {"bias": torch.ones(6)}, "1": {"weight": torch.full((6,), 2.0), "bias": torch.full((6,), 3.0)}}
    originals = {name: parameter.clone() for name, parameter in model.named_parameters()}
    before = snapshot(model)

    with patches_applied(model, [Patch({}, changes, strength=0.5, bypass=bypass)]):
        assert torch.equal(model[0].bias, originals["0.bias"] + 0.5)
        assert torch.equal(model[1].weight, originals["1.weight"] + 1.0)
        assert torch.equal(model[1].bias, originals["1.bias"] + 1.5)
        assert torch.equal(model[2].weight, originals["2.weight"])
    assert snapshot(model) == before


def test_an_adapter_and_a_difference_of_one_weight_add_up(model: nn.Module) -> None:
    weight = model[2].weight.clone()
    one = lora(out=4)
    with patches_merged(model, [Patch({"2": one}, {"2": {"weight": torch.ones(4, 6)}}, strength=2.0)]):
        expected = weight + 2 * (one.tensors["up"] @ one.tensors["down"] / 2 + 1)
        torch.testing.assert_close(model[2].weight.data, expected)
    assert torch.equal(model[2].weight, weight)


def test_no_alpha_means_scale_one(model: nn.Module) -> None:
    weight, one = model[0].weight.clone(), lora()
    with patches_merged(model, [Patch({"0": AdapterWeights("lora", one.tensors)})]):
        torch.testing.assert_close(model[0].weight.data, weight + one.tensors["up"] @ one.tensors["down"])


def test_patches_nest_and_are_undone_in_reverse(model: nn.Module) -> None:
    x = torch.randn(2, 6)
    base = model(x)
    with patches_applied(model, [Patch({"0": lora(1)})]):
        first = model(x)
        with patches_applied(model, [Patch({"0": lora(2)}), Patch({"2": lora(3, out=4)}, bypass=True)]):
            assert not torch.equal(model(x), first)
        assert torch.equal(model(x), first)
    assert torch.equal(model(x), base)


MISFITS = {
    "no such layer": (Patch({"7": lora()}), "the LoRA is for a layer 7 that the model lacks"),
    "another shape": (
        Patch({"2": lora()}),
        r"an adapter .* down \(2, 6\), up \(6, 2\) does not fit a layer",
    ),
    "a bypass": (Patch({"2": lora()}, bypass=True), r"an adapter .* does not fit a layer"),
    "no such bias": (
        Patch({}, {"2": {"bias": torch.ones(4)}}),
        "a LoRA must not add biases to layers without one, but this one does to 2, as PEFT's lora_bias=True",
    ),
    "no such module": (Patch({}, {"9.x": {"bias": torch.ones(4)}}), "the LoRA changes 9.x.bias, which the model lacks"),
    "another norm": (
        Patch({}, {"1": {"weight": torch.ones(4)}}),
        r"a difference of shape \(4,\) does not fit 1.weight of shape \(6,\)",
    ),
}


@pytest.mark.parametrize(("misfit", "sentence"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused_and_nothing_stays_changed(model: nn.Module, misfit: Patch, sentence: str) -> None:
    before = snapshot(model)
    fitting = Patch({"0": lora()}, {"1": {"bias": torch.ones(6)}})
    with (
        pytest.raises(LoraError, match=f"^{sentence}.*; .*(made for another model|lora_bias=False)$"),
        patches_applied(model, [fitting, misfit]),
    ):
        pass

    assert snapshot(model) == before


def test_adapters_beside_the_weights_are_frozen_and_in_the_layers_dtype(model: nn.Module) -> None:
    patches = [Patch({"0": lora()}, strength=0.4, bypass=True), Patch({"2": lora(out=4)})]
    (one,) = attachments(model.to(torch.bfloat16), patches)

    assert one.strength == 0.4
    assert list(one.adapters) == ["0"]
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in one.adapters["0"].parameters())


def test_merging_keeps_the_weights_dtype_and_adds_in_fp32(model: nn.Module) -> None:
    model.to(torch.bfloat16)
    weight, one = model[0].weight.clone(), lora()
    product: Tensor = one.tensors["up"] @ one.tensors["down"]
    with patches_merged(model, [Patch({"0": one}, strength=0.3)]):
        assert model[0].weight.dtype == torch.bfloat16
        assert torch.equal(model[0].weight.data, torch.add(weight.float(), product, alpha=0.15).bfloat16())
    assert torch.equal(model[0].weight, weight)
