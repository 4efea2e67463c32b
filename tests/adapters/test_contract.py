"""The adapter contract, once for every registered algorithm and its variants on every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from layer_cases import KINDS, LAYERS, LayerCase, randomised, snapshot
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.adapters.patch import Patch, patches_applied, patches_merged

pytestmark = [pytest.mark.pairwise(algorithm=KINDS.keys(), case=LAYERS), pytest.mark.together("algorithm")]

STRENGTHS = [1.0, 0.5, -1.3, 2.0, 0.0]


def create(model: nn.Module, algorithm: str, *, zero: str = "up", rank: int = 3) -> Adapter:
    layer = FrozenLayer(model.get_submodule("layer"))
    return KINDS[algorithm].create(layer, rank=rank, alpha=2.0, seed=0, path="layer", zero=zero)


def filled(model: nn.Module, algorithm: str, *, seed: int = 2) -> Adapter:
    adapter = create(model, algorithm)
    randomised(adapter, seed=seed)
    return adapter


def with_adapter(model: nn.Module, adapter: Adapter, x: Tensor, strength: float = 1.0) -> Tensor:
    with adapters_attached(model, [Attached({"layer": adapter}, strength)]):
        return model(x)


@pytest.mark.pairwise(zero=["up", "down"])
def test_a_fresh_adapter_is_exactly_the_identity(algorithm: str, case: LayerCase, zero: str) -> None:
    model, x = case.model(), case.input()
    adapter = create(model, algorithm, zero=zero)
    weight = model.get_submodule("layer").weight

    for strength in STRENGTHS:
        # Where the bias is added after the product, some processors take another kernel, which rounds differently.
        torch.testing.assert_close(with_adapter(model, adapter, x, strength), model(x), rtol=0, atol=1e-6)
        assert torch.equal(adapter.merged(weight, strength), weight)


@pytest.mark.pairwise(zero=["up", "down"])
def test_a_fresh_adapter_can_learn(algorithm: str, case: LayerCase, zero: str) -> None:
    model = case.model()
    adapter = create(model, algorithm, zero=zero)
    with_adapter(model, adapter, case.input()).square().sum().backward()

    assert any(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


@pytest.mark.pairwise(strength=STRENGTHS)
def test_attached_and_merged_agree(algorithm: str, case: LayerCase, strength: float) -> None:
    model, x = case.model(), case.input()
    adapter = filled(model, algorithm)
    beside = with_adapter(model, adapter, x, strength)

    with patches_merged(model, [Patch({"layer": adapter.to_weights()}, strength=strength)]):
        folded = model(x)

    torch.testing.assert_close(beside, folded, rtol=1e-5, atol=2e-6)
    assert strength == 0 or not torch.allclose(folded, model(x), atol=1e-2)  # it did something at all


def test_gradients_reach_the_trained_adapter_alone(algorithm: str, case: LayerCase) -> None:
    model, x = case.model(), case.input().requires_grad_()
    frozen, trained = filled(model, algorithm, seed=3).requires_grad_(False), filled(model, algorithm, seed=4)
    with adapters_attached(model, [Attached({"layer": frozen}), Attached({"layer": trained})]):
        model(x).square().sum().backward()

    assert all(parameter.grad is None for parameter in (*model.parameters(), *frozen.parameters()))
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.parameters())
    assert x.grad is not None


@pytest.mark.pairwise(strength=[1.0, -0.7], dtype={"single": torch.float32, "double": torch.float64})
def test_gradients_are_those_of_the_merged_weight(
    algorithm: str, case: LayerCase, strength: float, dtype: torch.dtype
) -> None:
    if not KINDS[algorithm].gradient_is_exact:
        dtype = torch.float32  # which its norms are in
    model, x = case.model(dtype), case.input(dtype).requires_grad_()
    adapter = filled(model, algorithm).to(dtype)
    inputs = [x, *adapter.parameters()]
    ours = torch.autograd.grad(with_adapter(model, adapter, x, strength).square().sum(), inputs)

    weight = adapter.merged(model.get_submodule("layer").weight, strength)
    folded = torch.func.functional_call(model, {"layer.weight": weight}, (x,))
    reference = torch.autograd.grad(folded.square().sum(), inputs)

    tolerance = 1e-4 if dtype == torch.float32 else 1e-5
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.pairwise(input_gradient=[True, False])
def test_gradients_are_right_in_double_precision(algorithm: str, case: LayerCase, input_gradient: bool) -> None:
    if not KINDS[algorithm].gradient_is_exact:
        pytest.skip("it holds a norm constant on purpose; the test above has its gradients")
    model, x = case.model(torch.float64), case.input(torch.float64).requires_grad_(input_gradient)
    adapter = filled(model, algorithm).double()

    # gradcheck nudges the tensors it is given, which are the ones that the adapter reads.
    def forward(*_: Tensor) -> Tensor:
        return with_adapter(model, adapter, x, 0.7)

    assert torch.autograd.gradcheck(forward, (x, *adapter.parameters()), fast_mode=True)


def test_recomputation_changes_no_gradient(algorithm: str, case: LayerCase) -> None:
    model, x = case.model(), case.input()
    adapter = filled(model, algorithm)
    with adapters_attached(model, [Attached({"layer": adapter})]):
        plain = torch.autograd.grad(model(x).square().sum(), [*adapter.parameters()])
        recomputed = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False, preserve_rng_state=False)
        again = torch.autograd.grad(recomputed.square().sum(), [*adapter.parameters()])

    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(algorithm: str, case: LayerCase) -> None:
    model, x = case.model(), case.input().requires_grad_()
    adapter = filled(model, algorithm)
    layer = model.get_submodule("layer")
    assert x.numel() < layer.weight.numel(), "the test needs activations smaller than the weight"
    assert layer(x).numel() < layer.weight.numel(), "the test needs activations smaller than the weight"
    saved: list[Tensor] = []

    with (
        adapters_attached(model, [Attached({"layer": adapter})]),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t),
    ):
        layer(x)

    frozen = {layer.weight.data_ptr(), x.data_ptr(), *(parameter.data_ptr() for parameter in adapter.parameters())}
    large = [t.shape for t in saved if t.numel() >= layer.weight.numel() and t.data_ptr() not in frozen]
    assert saved
    assert not large


def test_half_precision_follows_single(algorithm: str, case: LayerCase) -> None:
    x = case.input()
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = case.model(dtype)
        adapter = filled(model, algorithm).to(dtype)
        output = with_adapter(model, adapter, x.to(dtype))
        assert output.dtype == dtype
        # A plain sum of squares hardly changes when outputs are rotated: what rounding leaves of that would be tested.
        loss = (output.float() * torch.linspace(0, 1, output.numel()).reshape(output.shape)).square().sum()
        gradients = torch.autograd.grad(loss, [*adapter.parameters()])
        assert all(gradient.dtype == dtype for gradient in gradients)
        results[dtype] = [t.float() for t in (output, *gradients)]

    for full, half in zip(*results.values(), strict=True):
        assert (full - half).norm() < 0.03 * full.norm()


def test_merging_rounds_once(algorithm: str, case: LayerCase) -> None:
    model = case.model(torch.bfloat16)
    weight = model.get_submodule("layer").weight
    adapter = filled(model, algorithm)
    merged = adapter.merged(weight, 0.8)

    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, adapter.merged(weight.float(), 0.8).to(torch.bfloat16))


def test_weights_make_the_round_trip_as_copies(algorithm: str, case: LayerCase) -> None:
    layer = FrozenLayer(case.model().get_submodule("layer"))
    adapter = filled(case.model(), algorithm)
    weights = adapter.to_weights()
    before = {name: t.clone() for name, t in weights.tensors.items()}
    again = KINDS[algorithm].from_weights(weights, layer)

    assert ADAPTERS.canonical(weights.algorithm) == KINDS[algorithm].algorithm
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in weights.tensors.values())
    assert torch.equal(again.merged(layer.weight), adapter.merged(layer.weight))
    assert (again.to_weights().tensors.keys(), again.to_weights().alpha) == (before.keys(), weights.alpha)
    assert all(torch.equal(t, before[name]) for name, t in again.to_weights().tensors.items())
    for seed, one in ((9, adapter), (10, again)):
        randomised(one, seed=seed)
    assert all(torch.equal(t, before[name]) for name, t in weights.tensors.items())


def test_initial_values_are_a_function_of_seed_and_path(algorithm: str, case: LayerCase) -> None:
    if not KINDS[algorithm].start_is_random:
        pytest.skip("it starts from the layer's weight, or at zero")
    layer = FrozenLayer(case.model().get_submodule("layer"))

    def start(seed: int, path: str) -> list[Tensor]:
        adapter = KINDS[algorithm].create(layer, rank=3, alpha=1.0, seed=seed, path=path, zero="up")
        return list(adapter.to_weights().tensors.values())

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    assert same(start(0, "a"), start(0, "a"))
    assert not same(start(0, "a"), start(1, "a"))
    assert not same(start(0, "a"), start(0, "b"))


def test_two_adapters_add_up(algorithm: str, case: LayerCase) -> None:
    model, x = case.model(), case.input()
    one, two = filled(model, algorithm, seed=3), filled(model, algorithm, seed=4)
    patches = [Patch({"layer": one.to_weights()}, strength=0.6), Patch({"layer": two.to_weights()}, strength=-0.9)]

    with patches_merged(model, patches):
        folded = model(x)
    with adapters_attached(model, [Attached({"layer": one}, 0.6), Attached({"layer": two}, -0.9)]):
        beside = model(x)
    with (
        adapters_attached(model, [Attached({"layer": one}, 0.6)]),
        adapters_attached(model, [Attached({"layer": two}, -0.9)]),
    ):
        nested = model(x)
    with patches_applied(model, [patches[0], Patch(patches[1].adapters, strength=-0.9, bypass=True)]):
        mixed = model(x)

    for other in (beside, nested, mixed):
        torch.testing.assert_close(other, folded, rtol=1e-5, atol=2e-6)


APPLYING: dict[str, Callable[[nn.Module, Adapter], Any]] = {
    "attached": lambda model, adapter: adapters_attached(model, [Attached({"layer": adapter})]),
    "merged": lambda model, adapter: patches_merged(model, [Patch({"layer": adapter.to_weights()})]),
    "bypass": lambda model, adapter: patches_applied(model, [Patch({"layer": adapter.to_weights()}, bypass=True)]),
}


@pytest.mark.pairwise(apply=APPLYING, failing={"well": False, "by exception": True})
def test_the_model_is_untouched_afterwards(
    algorithm: str, case: LayerCase, apply: Callable[[nn.Module, Adapter], Any], failing: bool
) -> None:
    model, x = case.model(), case.input()
    adapter = filled(model, algorithm)
    before, output = snapshot(model), model(x)

    if failing:
        with pytest.raises(ZeroDivisionError), apply(model, adapter):
            raise ZeroDivisionError
    else:
        with apply(model, adapter):
            assert not torch.equal(model(x), output)

    assert snapshot(model) == before
    assert torch.equal(model(x), output)


def test_its_result_may_be_changed_in_place(algorithm: str, case: LayerCase) -> None:
    model, x = case.model(), case.input().requires_grad_()
    layer, adapter = model.get_submodule("layer"), filled(model, algorithm)
    gradients = []
    for added in (Tensor.add, Tensor.add_):
        with adapters_attached(model, [Attached({"layer": adapter})]):
            gradients += torch.autograd.grad(added(layer(x), 1.0).square().sum(), [x, *adapter.parameters()])
    first, second = gradients[: len(gradients) // 2], gradients[len(gradients) // 2 :]
    assert all(map(torch.equal, first, second))
