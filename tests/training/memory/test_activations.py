"""Keeping fewer activations: the same bits, less memory, and a model that is as before."""

from __future__ import annotations

import weakref
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from lever_cases import flux_dataset, one_step, planned
from test_engine import assert_same
from torch import Tensor, nn

from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.core.blocks import blocks_at_depth
from lorasmith.core.choices import Activations
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from lorasmith.training import engine
from lorasmith.training.engine import prepared
from lorasmith.training.memory import activations
from lorasmith.training.memory.activations import (
    Recipe,
    activations_packed,
    activations_reduced,
    held_by,
    recipes_recorded,
)
from tests.covering import slow_except

SPARING = [kind for kind in get_args(Activations) if kind != "keep"]


pytestmark = pytest.mark.usefixtures("small_is_worth_it")


@pytest.mark.parametrize("algorithm", slow_except(ALGORITHMS, "GLoRA"))
def test_no_bit_changes(tiny: Model, dataset: EncodedDataset, algorithm: str) -> None:
    settings = {"algorithm": algorithm, "targets": "attention+ff, *.conv1", "differences": "norms+biases"}
    expected = one_step(tiny, dataset, **settings)
    for kind in SPARING:
        assert_same(one_step(tiny, dataset, {"activations": kind}, **settings), expected)


def kept_bytes(model: Model, data: EncodedDataset, kind: str) -> int:
    """Bytes that are kept from a forward pass for its backward pass, weights aside."""
    job = planned(model, targets="attention+ff", activations=kind)
    batch = engine.batch_maker(job.model, data.samples, job.config, job.way).step(0)[0]
    sizes: dict[int, int] = {}
    tensors: list[Tensor] = []
    with prepared(job.model, job.adapters, job.config, job.way), recipes_recorded() as recipes:
        weights = {p.untyped_storage().data_ptr() for p in model.components.denoiser.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            for one in held_by(recipes.pack(tensor)) if kind != "keep" else [tensor]:
                tensors.append(one)  # so that no address is used twice
                if one.untyped_storage().data_ptr() not in weights and not isinstance(one, nn.Parameter):
                    sizes[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.denoiser.predict(batch.noised, batch.level.time, batch.conditioning)
    return sum(sizes.values())


def test_each_kind_keeps_less(tiny: Model, dataset: EncodedDataset, flux: Model) -> None:
    for model, data, bounds in ((tiny, dataset, (0.75, 0.55)), (flux, flux_dataset(), (0.85, 0.7))):
        keep, lean, selective = (kept_bytes(model, data, kind) for kind in ("keep", "lean", "selective"))
        assert lean < bounds[0] * keep
        assert selective < bounds[1] * keep


def test_frozen_convolutions_keep_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2, padding="valid"), nn.Conv2d(4, 4, 1, groups=2))
    net.requires_grad_(False)
    x = torch.randn(1, 3, 12, 12, requires_grad=True)
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    kept: list[Tensor] = []
    with activations_reduced(net, "keep"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = net(x)
        assert not kept
        (found,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(found, expected)
    assert not any("forward" in vars(module) for module in net.modules())


def test_what_is_made_again_is_made_once_for_all_who_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 64, requires_grad=True)
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(3)]
    made: list[object] = []
    original = activations.Recipe._recomputed

    def counted(self: activations.Recipe) -> Tensor:
        made.append(self._function)
        return original(self)

    monkeypatch.setattr(activations.Recipe, "_recomputed", counted)
    with activations_packed("lean", nn.Identity()):
        y = F.layer_norm(2 * x, (64,))
        recipe = activations._recipe_of(y)
        out = sum((F.linear(y, weight).square().sum() for weight in weights), torch.zeros(()))
    held = weakref.ref(y)
    del y
    assert held() is None
    assert not made
    out.backward()
    assert made.count(F.layer_norm) == 1
    assert recipe is not None
    assert recipe._value is None  # it is gone when the last has had it


def test_slices_are_made_again_and_what_a_mask_selects_is_kept() -> None:
    x = torch.randn(256, 128, requires_grad=True)
    with recipes_recorded() as recipes:
        kept = x * 2.0
        recipes.pack(kept)
        both = torch.cat((kept, kept))
        part, others = both[128:], both[torch.ones(512, dtype=torch.bool)]
        assert isinstance(recipes.pack(part), Recipe)
        assert recipes.unpack(recipes.pack(others)) is others
    assert torch.equal(recipes.unpack(recipes.pack(part)), part)


def test_an_argument_that_is_changed_in_place_is_noticed() -> None:
    x = torch.randn(4, 64, requires_grad=True)
    with activations_packed("lean", nn.Identity()):
        scaled = 2 * x
        y = F.silu(scaled)
        z = y * y
    with torch.no_grad():
        scaled.add_(1)
    with pytest.raises((AssertionError, RuntimeError), match=r"modified in place|inplace"):
        z.sum().backward()


def test_results_that_are_changed_in_place_are_kept_as_they_are() -> None:
    x = torch.randn(4, 64, requires_grad=True)
    weight = torch.randn(64, 64, requires_grad=True)
    found = []
    for kind in ("keep", "lean"):
        with activations_packed(kind, nn.Identity()):
            y = F.silu(x * 2)
            y.mul_(3)
            z = F.linear(y, weight)
        found.append(torch.autograd.grad(z.square().sum(), (x, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_host_memory_moves_a_tensor_once_and_back_as_it_lay() -> None:
    layer = nn.Linear(2, 2)
    away = activations.HostMemory(layer)
    whole = torch.randn(64, 8)
    left, right = whole.t().chunk(2)
    packed = [away.pack(one) for one in (whole, left, right)]
    assert isinstance(packed[0], activations._Moved)
    memories = {id(one.memory) for one in packed if isinstance(one, activations._Moved)}
    assert len(memories) == 1
    for one, original in zip(reversed(packed), (right, left, whole), strict=True):
        back = away.unpack(one)
        assert torch.equal(back, original)
        assert back.stride() == original.stride()
        assert back.data_ptr() != original.data_ptr()
    layer = nn.Linear(64, 64)  # whose weights stay, as do small tensors
    away = activations.HostMemory(layer)
    for stays in (layer.weight, layer.weight.t(), torch.randn(8), nn.Parameter(torch.randn(64, 64))):
        assert isinstance(away.pack(stays), Tensor)


def test_blocks_by_depth(tiny: Model) -> None:
    unet = tiny.components.denoiser
    names = {id(module): path for path, module in unet.named_modules()}
    depth = {d: [names[id(block)] for block in blocks_at_depth(unet, d)] for d in (1, 2, 3, 5)}
    assert depth[1] == [*(f"down_blocks.{i}" for i in range(3)), *(f"up_blocks.{i}" for i in range(3)), "mid_block"]
    assert "down_blocks.0.resnets.0" in depth[2]
    assert "mid_block.attentions.0" in depth[2]
    assert "down_blocks.0.attentions.0.transformer_blocks.0" in depth[3]
    assert depth[5]  # past the nesting there are still blocks
    assert all(list(unet.get_submodule(path).children()) for paths in depth.values() for path in paths)
