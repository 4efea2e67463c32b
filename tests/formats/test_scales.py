"""The scale alpha / rank, and what moves between alpha and the factors."""

from __future__ import annotations

import torch

from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.formats.scales import full_alpha, idle_alpha, rank_of, scale_of, scaled_by, with_alpha, with_one_alpha


def test_scale() -> None:
    lora = {"down": torch.ones(4, 8), "up": torch.ones(6, 4)}
    assert scale_of(AdapterWeights("lora", lora, 2.0)) == 0.5
    assert scale_of(AdapterWeights("lora", lora)) == 1.0
    full = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(3, 4)}
    assert rank_of(AdapterWeights("lokr", full, 7.0)) is None
    assert scale_of(AdapterWeights("lokr", full, 7.0)) == 1.0


def test_a_factor_is_shared_between_the_matrices(make_adapter) -> None:
    for factor in [0.5, -0.3, 1e-4, 0.0, 3.0]:
        weights = make_adapter((16, 8), "lora", 4, 7.0, torch.Generator().manual_seed(0))
        scaled = scaled_by(weights, factor)
        product = scaled.tensors["up"].double() @ scaled.tensors["down"].double()

        assert scaled.alpha == 4
        assert torch.allclose(
            product, factor * (weights.tensors["up"].double() @ weights.tensors["down"].double()), rtol=1e-5
        )


def test_another_alpha_leaves_the_change(make_adapter, delta) -> None:
    weights = make_adapter((16, 8), "lora", 4, 3.0, torch.Generator().manual_seed(0))
    other = with_alpha(weights, 8.0)
    assert other.alpha == 8.0
    torch.testing.assert_close(delta(other), delta(weights), rtol=1e-6, atol=0)


def test_the_most_frequent_alpha_is_every_loras(make_adapter, delta) -> None:
    def adapter(algorithm: str, alpha: float | None) -> AdapterWeights:
        return make_adapter((16, 8), algorithm, 4, alpha, torch.Generator().manual_seed(0))

    given = {
        "a": adapter("lora", 2.0),
        "b": adapter("lora", 2.0),
        "c": adapter("lora", None),
        "d": adapter("loha", 1.0),
    }
    found = with_one_alpha(given)
    assert {name: weights.alpha for name, weights in found.items()} == {"a": 2.0, "b": 2.0, "c": 2.0, "d": 1.0}
    assert [found[name] is given[name] for name in "abcd"] == [True, True, False, True]
    torch.testing.assert_close(delta(found["c"]), delta(given["c"]), rtol=1e-6, atol=0)


def test_alphas_that_change_nothing(make_adapter) -> None:
    for algorithm, full, idle in (("lora", 4.0, 4.0), ("oft", 1.0, 0.0)):
        weights = make_adapter((16, 8), algorithm, 4, None, torch.Generator().manual_seed(0))
        assert (full_alpha(weights), idle_alpha(weights)) == (full, idle)
