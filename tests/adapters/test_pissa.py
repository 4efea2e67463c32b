"""PiSSA: where it starts, what it saves, and PEFT's numbers on the same weights."""

from __future__ import annotations

import pytest
import torch
from layer_cases import LAYERS, LayerCase, Small, randomised
from torch import nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.adapters.lora import LoraAdapter
from lorasmith.adapters.variants import PissaAdapter


def fresh(layer: nn.Module, *, rank: int = 3, alpha: float = 2.0) -> PissaAdapter:
    return PissaAdapter.create(FrozenLayer(layer), rank=rank, alpha=alpha, seed=0, path="layer", zero="up")


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_it_starts_from_the_largest_singular_values(case: LayerCase) -> None:
    layer = case.make()
    down, up = (start.flatten(1) for start in fresh(layer)._start)
    matrix = layer.weight.detach().flatten(1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    expected = (left[:, :3] * values[:3]) @ right[:3]

    torch.testing.assert_close(2.0 / 3 * up @ down, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-3, atol=1e-4)  # shared evenly


def test_subspace_iteration_finds_them_in_a_matrix_much_wider_than_the_rank() -> None:
    layer = nn.Linear(300, 200)
    down, up = fresh(layer, rank=4, alpha=4.0)._start
    values = torch.linalg.svdvals(layer.weight.detach())

    torch.testing.assert_close(torch.linalg.svdvals(up @ down)[:4], values[:4], rtol=5e-3, atol=0)


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_what_is_saved_is_a_plain_lora_of_twice_the_rank(case: LayerCase) -> None:
    layer = case.make()
    adapter = fresh(layer)
    randomised(adapter)
    weights = adapter.to_weights()
    plain = LoraAdapter.from_weights(weights, FrozenLayer(layer))

    assert weights.algorithm == "lora"
    assert (plain.rank, plain.alpha, plain.scale) == (6, 4.0, adapter.scale)
    torch.testing.assert_close(plain.merged(layer.weight), adapter.merged(layer.weight))
    # Nothing cancels in it: a bf16 file is as exact as that of any LoRA.
    exact = adapter.merged(layer.weight).detach() - layer.weight.detach()
    for parameter in plain.parameters():
        parameter.data = parameter.data.bfloat16().float()
    rounded = plain.merged(layer.weight).detach() - layer.weight.detach()
    assert (rounded - exact).norm() < 0.01 * exact.norm()


def test_outputs_and_gradients_are_pefts() -> None:
    from peft import LoraConfig, get_peft_model

    def make() -> Small:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Small()

    names, x = ("inner", "outer"), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    base = make()
    config = LoraConfig(r=3, lora_alpha=2.0, target_modules=list(names), init_lora_weights="pissa")
    peer = get_peft_model(make(), config)
    adapters = {name: fresh(base.get_submodule(name)) for name in names}
    theirs = {name: peer.base_model.model.get_submodule(name) for name in names}
    for seed, (name, adapter) in enumerate(adapters.items()):
        layer = theirs[name]
        matrices = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        # The same start, whichever sign its vectors have.
        torch.testing.assert_close(adapter._start[1] @ adapter._start[0], (matrices[1] @ matrices[0]).detach())
        adapter._start = (matrices[0].detach().clone(), matrices[1].detach().clone())
        randomised(adapter, seed=seed)
        matrices[0].data += adapter.down.data
        matrices[1].data += adapter.up.data

    with adapters_attached(base.requires_grad_(False), [Attached(adapters)]):
        ours = base(x)
        ours.square().sum().backward()
    expected = peer(x)
    expected.square().sum().backward()

    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    for name, adapter in adapters.items():
        torch.testing.assert_close(adapter.down.grad, theirs[name].lora_A["default"].weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapter.up.grad, theirs[name].lora_B["default"].weight.grad, rtol=1e-4, atol=1e-4)
