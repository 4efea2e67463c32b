"""Dropout: how often, how much, for whom, and the same again for the same draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from layer_cases import LAYERS, LayerCase, randomised
from torch import Tensor, nn

from lorasmith.adapters.adapter import Adapter
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.full import FullAdapter
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.adapters.lora import LoraAdapter
from lorasmith.adapters.variants import InputDora, OutputDora, PissaAdapter, RankMasks
from lorasmith.core.errors import OptionError


def masked(adapters: Mapping[str, Adapter], *, rank: float = 0.0, module: float = 0.0, seed: int = 0) -> RankMasks:
    return RankMasks(adapters, rank_dropout=rank, module_dropout=module, seed=seed, schedule=None)


def lora(rank: int = 8, features: int = 12, kind: type[Adapter] = LoraAdapter) -> Adapter:
    layer = FrozenLayer(nn.Linear(features, features))
    return kind.create(layer, rank=rank, alpha=float(rank), seed=0, path="", zero="up")


def masks(count: int, *, rank: float = 0.0, module: float = 0.0, seed: int = 0, path: str = "a") -> Tensor:
    made = masked({path: lora()}, rank=rank, module=module, seed=seed).masks(range(count), torch.zeros(count))
    assert made is not None
    return made


def test_rank_dropout_leaves_out_its_share_and_scales_up_the_rest() -> None:
    made = masks(4000, rank=0.25)

    assert made.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert (made == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert made.mean().item() == pytest.approx(1.0, abs=0.015)
    # Independent of each other: as many dimensions are left out as of a binomial distribution.
    assert (made == 0).sum(1).float().var().item() == pytest.approx(8 * 0.25 * 0.75, rel=0.1)


def test_module_dropout_leaves_out_all_or_nothing_and_scales_nothing() -> None:
    made = masks(4000, module=0.4)

    assert set(made.unique().tolist()) == {0.0, 1.0}
    assert (made.std(dim=1) == 0).all()
    assert (made[:, 0] == 0).float().mean().item() == pytest.approx(0.4, abs=0.025)


def test_masks_are_a_function_of_seed_draw_and_path() -> None:
    whole, again = masks(64, rank=0.5), masks(64, rank=0.5)
    one_by_one = [masked({"a": lora()}, rank=0.5).masks([draw], torch.zeros(1)) for draw in range(64)]

    assert torch.equal(whole, again)
    assert torch.equal(whole, torch.cat([mask for mask in one_by_one if mask is not None]))
    for other in (masks(64, rank=0.5, seed=1), masks(64, rank=0.5, path="b"), whole.roll(1, 0), whole.roll(1, 1)):
        assert 0.4 < (whole == other).float().mean() < 0.6


def test_nothing_is_drawn_without_dropout() -> None:
    assert masked({"a": lora()}).masks([0, 1], torch.zeros(2)) is None
    assert masked({"a": FullAdapter(torch.zeros(2, 2))}, rank=0.5).masks([0], torch.zeros(1)) is None


def adapters_for(case: LayerCase) -> Iterator[tuple[nn.Module, Adapter, LoraAdapter]]:
    """A model, an adapter for its layer, and the low-rank product in it."""
    for kind in (LoraAdapter, OutputDora, InputDora, PissaAdapter):
        model = case.model()
        layer = FrozenLayer(model.get_submodule("layer"))
        adapter = kind.create(layer, rank=3, alpha=2.0, seed=0, path="layer", zero="up")
        randomised(adapter)
        yield model, adapter, getattr(adapter, "inner", adapter)


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_a_masked_adapter_is_one_with_those_dimensions_scaled(case: LayerCase) -> None:
    for model, adapter, product in adapters_for(case):
        x = case.input()
        dropout = masked({"layer": adapter}, rank=0.5, module=0.2, seed=5)
        made = dropout.masks(range(len(x)), torch.zeros(len(x)))
        assert made is not None
        made[0] = torch.tensor([0.0, 2.0, 1.0])
        with adapters_attached(model, [Attached({"layer": adapter})]), dropout.masks_applied(made):
            together = model(x)
            gradients = torch.autograd.grad(together.square().sum(), [*product.parameters()])
        alone, sums = [], [torch.zeros_like(gradient) for gradient in gradients]
        for sample, mask in zip(x.split(1), made.split(1), strict=True):
            with adapters_attached(model, [Attached({"layer": adapter})]), dropout.masks_applied(mask):
                alone.append(model(sample))
                for total, gradient in zip(
                    sums, torch.autograd.grad(alone[-1].square().sum(), [*product.parameters()]), strict=True
                ):
                    total += gradient

        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
        for gradient, total in zip(gradients, sums, strict=True):
            torch.testing.assert_close(gradient, total, rtol=1e-4, atol=1e-4)
        assert product.mask is None


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_the_mask_multiplies_the_inner_dimension(case: LayerCase) -> None:
    model, x = case.model(), case.input()
    layer = FrozenLayer(model.get_submodule("layer"))
    adapter = LoraAdapter.create(layer, rank=3, alpha=2.0, seed=0, path="layer", zero="up")
    randomised(adapter)
    mask = torch.tensor([0.0, 2.0, 1.0])
    scaled = LoraAdapter(
        adapter.down.detach() * mask.reshape(-1, *(1,) * (adapter.down.ndim - 1)), adapter.up.detach(), alpha=2.0
    )
    with adapters_attached(model, [Attached({"layer": scaled})]):
        expected = model(x)
    with (
        adapters_attached(model, [Attached({"layer": adapter})]),
        masked({"layer": adapter}, rank=0.5).masks_applied(mask.repeat(len(x), 1)),
    ):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_left_out_is_the_frozen_one_and_tokens_may_come_before_samples() -> None:
    model, x = LAYERS["linear"].model(), torch.randn(4, 7, 48)
    layer = FrozenLayer(model.get_submodule("layer"))
    adapter = LoraAdapter.create(layer, rank=3, alpha=2.0, seed=0, path="layer", zero="up")
    randomised(adapter)
    frozen, dropout = model(x), masked({"layer": adapter}, rank=0.5)
    with adapters_attached(model, [Attached({"layer": adapter})]):
        with dropout.masks_applied(torch.zeros(4, 3)):
            assert torch.equal(model(x), frozen)
        with dropout.masks_applied(torch.rand(4, 3)):
            torch.testing.assert_close(model(x.transpose(0, 1)), model(x).transpose(0, 1))


def test_a_layer_whose_input_does_not_begin_with_the_batch_is_refused() -> None:
    case = LAYERS["linear"]
    model = case.model()
    adapter = LoraAdapter(torch.zeros(3, 48), torch.zeros(40, 3), alpha=1.0)
    dropout = masked({"layer": adapter}, rank=0.5)
    with (
        adapters_attached(model, [Attached({"layer": adapter})]),
        dropout.masks_applied(torch.ones(5, 3)),
        pytest.raises(
            OptionError, match=r"^ranks of single samples need layers whose input begins with the batch \(5\), got"
        ),
    ):
        model(case.input())
