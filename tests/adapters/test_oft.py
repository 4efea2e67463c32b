"""OFT: rotations, block sizes, the constraint, strength, and tensors that do not fit."""

from __future__ import annotations

import pytest
import torch
from layer_cases import randomised
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.adapters.oft import OftAdapter
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import OptionError


def fresh(layer: nn.Module, rank: int, *, alpha: float = 0.0) -> OftAdapter:
    return OftAdapter.create(FrozenLayer(layer), rank=rank, alpha=alpha, seed=0, path="the.layer", zero="up")


def cayley(blocks: Tensor) -> Tensor:
    """The rotation of all outputs (out, out) by definition, in double precision: W' = Rᵀ W."""
    skew = blocks.double() - blocks.double().mT
    identity = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return torch.block_diag(*((identity + skew) @ torch.linalg.inv(identity - skew)))


@pytest.mark.parametrize("rank", [2, 3, 4, 8])
@pytest.mark.parametrize("strength", [1.0, 0.4, -0.8])
def test_the_merged_weight_is_the_formula(rank: int, strength: float) -> None:
    layer = nn.Conv2d(5, 24, 3)
    adapter = fresh(layer, rank)
    randomised(adapter)
    identity = torch.eye(24, dtype=torch.float64)
    turn = identity + strength * (cayley(adapter.oft_blocks.detach()) - identity)
    expected = torch.einsum("nm,n...->m...", turn, layer.weight.double())

    torch.testing.assert_close(adapter.merged(layer.weight, strength).double(), expected, rtol=1e-5, atol=1e-6)


def test_angles_and_lengths_of_the_rows_of_a_block_stay() -> None:
    layer = nn.Linear(40, 48)
    adapter = fresh(layer, 6)
    randomised(adapter, std=1.0)
    before, after = (weight.double().unflatten(0, (8, 6)) for weight in (layer.weight, adapter.merged(layer.weight)))

    torch.testing.assert_close(after.mT @ after, before.mT @ before, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize(
    ("outputs", "rank", "size"),
    [(320, 8, 8), (320, 16, 16), (320, 32, 16), (640, 12, 10), (4, 8, 2), (3, 8, 3), (40, 1, 2), (49, 2, 7)],
)
def test_block_sizes(outputs: int, rank: int, size: int) -> None:
    assert fresh(nn.Linear(4, outputs), rank).oft_blocks.shape == (outputs // size, size, size)
    assert fresh(nn.Conv2d(12, 24, 1, groups=4), 4).oft_blocks.shape == (8, 3, 3)  # within groups


@pytest.mark.parametrize("layer", [nn.Linear(4, 1), nn.Conv2d(6, 6, 3, groups=6)], ids=["one output", "depthwise"])
def test_single_outputs_are_refused(layer: nn.Module) -> None:
    with pytest.raises(OptionError, match=r"^OFT rotates outputs .* the\.layer has single ones; exclude this layer$"):
        fresh(layer, 4)


@pytest.mark.parametrize("constraint", [0.5, 100.0])
def test_a_constraint_shortens_the_whole_of_q(constraint: float) -> None:
    layer = nn.Linear(6, 12)
    bound, free = fresh(layer, 4, alpha=constraint), fresh(layer, 4)
    randomised(bound)
    length = (bound.oft_blocks - bound.oft_blocks.mT).norm()
    free.oft_blocks.data.copy_(bound.oft_blocks * min(1.0, constraint / length.item()))

    torch.testing.assert_close(bound.merged(layer.weight), free.merged(layer.weight), rtol=1e-5, atol=1e-6)
    assert bound.to_weights().alpha == constraint
    again = OftAdapter.from_weights(AdapterWeights("oft", free.to_weights().tensors), FrozenLayer(layer))
    assert torch.equal(again.merged(layer.weight), free.merged(layer.weight)), "no alpha is no constraint"


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Conv2d(6, 8, 3)], ids=["linear", "conv"])
def test_factors_of_a_file_multiply_the_rotated_rows(layer: nn.Module) -> None:
    rescale = torch.linspace(0.5, 2, 8).reshape(8, *(1,) * (layer.weight.ndim - 1))
    plain = fresh(layer, 2)
    randomised(plain)
    tensors = {**plain.to_weights().tensors, "rescale": rescale}
    adapter = OftAdapter.from_weights(AdapterWeights("oft", tensors, 0.0), FrozenLayer(layer))

    for strength in (1.0, 0.5):
        expected = (1 + strength * (rescale - 1)) * plain.merged(layer.weight, strength)
        torch.testing.assert_close(adapter.merged(layer.weight, strength), expected, rtol=1e-5, atol=1e-6)
    model, x = nn.Sequential(layer), torch.randn(2, 6, *(5,) * (layer.weight.ndim - 2))
    expected = torch.func.functional_call(model, {"0.weight": adapter.merged(layer.weight)}, (x,))
    with adapters_attached(model, [Attached({"0": adapter})]):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(adapter.to_weights().tensors["rescale"], rescale)


def test_half_precision_keeps_lengths_that_a_rotation_keeps() -> None:
    """The diagonal of R, a little below one here, would be rounded to one."""
    layer = nn.Linear(64, 64, bias=False).bfloat16().requires_grad_(False)
    adapter = fresh(layer, 8)
    randomised(adapter, std=4.5e-3)
    diagonal = cayley(adapter.oft_blocks.detach()).diagonal()
    assert diagonal.mean() < 0.9995
    assert (diagonal.bfloat16() == 1).all()
    x = torch.randn(8192, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    model = nn.Sequential(layer)
    plain = model(x).double().square().mean()
    with torch.no_grad(), adapters_attached(model, [Attached({"0": adapter.bfloat16()})]):
        assert model(x).double().square().mean() / plain == pytest.approx(1, abs=2e-4)
