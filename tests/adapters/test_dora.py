"""DoRA: its formula, tensors that do not fit, half precision, and PEFT's and LyCORIS' numbers on the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_cases import LAYERS, LayerCase, Small, randomised
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.adapters.variants import DoraAdapter, InputDora, OutputDora, dora_from_weights
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError

AXES = {"output": OutputDora, "input": InputDora}


def fresh(layer: nn.Module, kind: type[DoraAdapter], *, algorithm: str = "LoRA", alpha: float = 2.0) -> DoraAdapter:
    frozen = FrozenLayer(layer)
    inner = ADAPTERS[algorithm].create(frozen, rank=3, alpha=alpha, seed=3, path="layer", zero="up")
    return kind.around(inner, frozen)


@pytest.mark.together("algorithm")
@pytest.mark.pairwise(case=LAYERS, algorithm=["LoRA", "LoHa", "LoKr"], axis=AXES.keys())
def test_the_merged_weight_is_the_formula(case: LayerCase, algorithm: str, axis: str) -> None:
    layer = case.make()
    adapter = fresh(layer, AXES[axis], algorithm=algorithm)
    randomised(adapter)
    weight = layer.weight.detach().double()
    moved = adapter.inner.merged(weight.float()).detach().double()
    others = [dim for dim in range(weight.ndim) if dim != (0 if axis == "output" else 1)]
    start, norm = (t.square().sum(others, keepdim=True).sqrt() for t in (weight, moved))
    expected = (start + adapter.magnitude.detach().double()) * moved / norm

    torch.testing.assert_close(adapter.merged(layer.weight).double(), expected, rtol=1e-5, atol=1e-6)
    half = weight + 0.5 * (expected - weight)  # strength is ComfyUI's
    torch.testing.assert_close(adapter.merged(layer.weight, 0.5).double(), half, rtol=1e-5, atol=1e-6)
    scale = adapter.to_weights().tensors["dora_scale"]
    assert scale.shape == norm.shape
    torch.testing.assert_close(scale.double(), start + adapter.magnitude.detach().double(), rtol=1e-6, atol=1e-6)


def test_small_changes_survive_half_precision() -> None:
    """A change of the magnitudes by a thousandth, which is less than bf16 can tell from none."""
    layer = nn.Linear(64, 64, bias=False).requires_grad_(False)
    adapter = fresh(layer, OutputDora)
    with torch.no_grad():
        adapter.magnitude.copy_(0.001 * adapter.to_weights().tensors["dora_scale"])

    ratio = adapter.bfloat16().merged(layer.weight) / layer.weight

    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.001), rtol=0, atol=1e-5)


def test_a_row_of_zeros_stays_finite() -> None:
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.weight[:, 2] = 0
    x = torch.randn(3, 6)
    for kind in AXES.values():
        adapter, model = fresh(layer, kind), nn.Sequential(layer)
        with adapters_attached(model, [Attached({"0": adapter})]):
            assert torch.equal(model(x), F.linear(x, layer.weight, layer.bias))
            model(x).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in adapter.parameters())


def lora(scale: Tensor, algorithm: str = "lora") -> AdapterWeights:
    return AdapterWeights(
        algorithm, {"down": torch.zeros(2, 6), "up": torch.zeros(8, 2), "dora_scale": scale}, alpha=2.0
    )


def test_the_shape_of_a_scale_tells_its_axis() -> None:
    for shape, kind in (((8, 1), OutputDora), ((8,), OutputDora), ((1, 6), InputDora)):
        assert isinstance(dora_from_weights(lora(torch.ones(shape)), FrozenLayer(nn.Linear(6, 8))), kind)
    square = {"down": torch.zeros(2, 6), "up": torch.zeros(6, 2), "dora_scale": torch.ones(1, 6)}
    assert isinstance(dora_from_weights(AdapterWeights("lora", square), FrozenLayer(nn.Linear(6, 6))), InputDora)
    weights = AdapterWeights("oft", {"oft_blocks": torch.zeros(2, 4, 4), "dora_scale": torch.ones(8, 1)}, alpha=0.0)
    with pytest.raises(LoraError, match=r"^dora_scale must come with LoRA, LoHa, LoKr, got one with oft"):
        dora_from_weights(weights, FrozenLayer(nn.Linear(6, 8)))


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 8), (7, 1), (8, 6), ()])
def test_a_scale_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        LoraError, match=r"^a dora_scale of shape \(.*\) does not fit .*; it was made for another model$"
    ):
        dora_from_weights(lora(torch.ones(shape)), FrozenLayer(nn.Linear(6, 8)))


NAMES = ("conv", "inner", "outer")


def make() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


@pytest.mark.parametrize("algorithm", ["LoRA", "LoHa"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_are_lycoris(name: str, axis: str, algorithm: str) -> None:
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule

    layer = make().get_submodule(name)
    module = {"LoRA": LoConModule, "LoHa": LohaModule}[algorithm]
    # A scale of 1, because LyCORIS multiplies LoHa's by it twice here.
    peer = module("x", layer, lora_dim=3, alpha=3.0, weight_decompose=True, wd_on_out=axis == "output")
    adapter = fresh(layer, AXES[axis], algorithm=algorithm, alpha=3.0)
    torch.testing.assert_close(peer.dora_scale.data, adapter.to_weights().tensors["dora_scale"])
    randomised(adapter)
    weights = adapter.to_weights()
    named = {"down": "lora_down.weight", "up": "lora_up.weight"}
    state = {named.get(role, role): tensor for role, tensor in weights.tensors.items()}
    for key, tensor in state.items():
        peer.get_parameter(key).data.copy_(tensor)
    expected, _ = peer.get_merged_weight(1.0, shape=layer.weight.shape)

    torch.testing.assert_close(adapter.merged(layer.weight.detach()), expected.detach(), rtol=1e-5, atol=1e-6)
