"""Norm and bias differences: trained beside, merged alike, and precise in half precision."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from diffusers.models.normalization import RMSNorm
from layer_cases import LAYERS, LayerCase, randomised, snapshot
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import Attached, Difference, adapters_attached, is_norm, load_differences
from lorasmith.adapters.lora import LoraAdapter
from lorasmith.adapters.oft import OftAdapter
from lorasmith.adapters.patch import Patch, patches_merged
from lorasmith.core.errors import LoraError

NORMS = {
    "layer norm": (lambda: nn.LayerNorm(6), (2, 3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (2, 3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 4, 4)),
    "RMS norm": (lambda: RMSNorm(6, eps=1e-6), (2, 3, 6)),
}
MODULES = {
    **NORMS,
    **{name: (case.make, case.shape) for name, case in LAYERS.items() if case.make().bias is not None},
}


def made(name: str) -> tuple[nn.Sequential, Tensor]:
    module, shape = MODULES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(module()).requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        return model, torch.randn(shape)


@pytest.mark.parametrize("name", MODULES)
def test_a_fresh_difference_is_exactly_the_identity(name: str) -> None:
    model, x = made(name)
    plain, before = model(x), snapshot(model)
    difference = Difference.create(model[0])
    assert set(difference.to_tensors()) == (
        {"bias"} if name not in NORMS else {n for n, _ in model[0].named_parameters()}
    )
    with adapters_attached(model, [Attached({}, differences={"0": difference})]):
        assert torch.equal(model(x), plain)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_attached_and_merged_agree_in_outputs_and_gradients(name: str, strength: float) -> None:
    model, x = made(name)
    x.requires_grad_()
    difference = Difference.create(model[0])
    randomised(difference)
    inputs = [x, *difference.parameters()]
    with adapters_attached(model, [Attached({}, strength, {"0": difference})]):
        ours = model(x)
        gradients = torch.autograd.grad(ours.square().sum(), inputs)
        recomputed = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False, preserve_rng_state=False)
        again = torch.autograd.grad(recomputed.square().sum(), inputs)
    changed = {f"0.{key}": getattr(model[0], key) + strength * p for key, p in difference.named_parameters()}
    expected = torch.func.functional_call(model, changed, (x,))
    references = torch.autograd.grad(expected.square().sum(), inputs)

    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for one, other, third in zip(gradients, references, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert torch.equal(one, third)
    with patches_merged(model, [Patch({}, {"0": difference.to_tensors()}, strength)]):
        torch.testing.assert_close(ours, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_input_of_a_group_norm_needs_no_gradient(layout: torch.memory_format) -> None:
    """As that of the first norm of a model whose layers below are frozen; torch's own would crash."""
    model = nn.Sequential(nn.GroupNorm(4, 8)).requires_grad_(False)
    difference = Difference.create(model[0])
    x = torch.randn(1, 8, 4, 4).to(memory_format=layout)
    with adapters_attached(model, [Attached({}, differences={"0": difference})]):
        model(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in difference.parameters())
    assert x.grad is None


def test_a_small_change_of_a_norm_survives_half_precision() -> None:
    """A thousandth of the weight, which bf16 loses when it is added to it."""
    model = nn.Sequential(nn.LayerNorm(64)).bfloat16().requires_grad_(False)
    difference = Difference.create(model[0])
    difference.get_parameter("weight").data.fill_(0.001)
    difference.bfloat16()
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with adapters_attached(model, [Attached({}, differences={"0": difference})]):
        model(x).square().sum().backward()

    assert difference._alone(model[0], model[0].forward, x).float().std().item() == pytest.approx(0.001, rel=0.05)
    assert model[0].weight[0].bfloat16() + 0.001 == model[0].weight[0]


@pytest.mark.parametrize("case", [LAYERS["linear"], LAYERS["conv 3x3 stride 2"]], ids=["linear", "conv"])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_bias_changes_outside_whatever_the_adapter_does(case: LayerCase, rotated: bool) -> None:
    model, x = case.model(), case.input()
    layer = FrozenLayer(model.get_submodule("layer"))
    kind = OftAdapter if rotated else LoraAdapter
    adapter = kind.create(layer, rank=2, alpha=0.0 if rotated else 2.0, seed=0, path="layer", zero="up")
    difference = Difference.create(layer.module)
    for trained in (adapter, difference):
        randomised(trained)
    patch = Patch({"layer": adapter.to_weights()}, {"layer": difference.to_tensors()})
    with patches_merged(model, [patch]):
        expected = model(x)
    one_call = Attached({"layer": adapter}, differences={"layer": difference})
    with adapters_attached(model, [one_call]):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    with (
        adapters_attached(model, [Attached({}, differences={"layer": difference})]),
        adapters_attached(model, [Attached({"layer": adapter})]),
    ):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_only_what_scales_its_output_is_a_norm() -> None:
    assert all(is_norm(make()) for make, _ in NORMS.values())
    assert not any(
        is_norm(module)
        for module in (nn.Linear(2, 2), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.LayerNorm(2, elementwise_affine=False))
    )


@pytest.mark.parametrize(
    ("path", "tensors", "sentence"),
    [
        ("0", {"weight": torch.ones(4)}, r"a difference of shape \(4,\) is for 0.weight, which has shape \(6,\)"),
        (
            "1",
            {"bias": torch.ones(4)},
            "a LoRA must not add biases to layers without one, but this one does to 1, as PEFT's",
        ),
        ("2", {"bias": torch.ones(4)}, "the LoRA changes 2, which the model lacks"),
    ],
)
def test_differences_that_do_not_fit_are_refused(path: str, tensors: dict[str, Tensor], sentence: str) -> None:
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4, bias=False))
    with pytest.raises(LoraError, match=f"^{sentence}.*(made for another model|train it with lora_bias=False)$"):
        load_differences(model, {path: tensors})
