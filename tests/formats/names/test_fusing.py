from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.formats.names import OriginalName, fused, fused_rows, split, split_rows

SIZES = (6, 6, 6, 10)
ROWS = sum(SIZES)
PARTS = [OriginalName("linear1", (sum(SIZES[:i]), sum(SIZES[: i + 1])), swap_halves=i == 3) for i in range(len(SIZES))]
IN = 8


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expected(changes: dict[int, torch.Tensor]) -> torch.Tensor:
    """ΔW of the fused module, put together by hand."""
    whole = torch.zeros(ROWS, IN, dtype=torch.float64)
    for i, change in changes.items():
        rows = torch.cat([change[5:], change[:5]]) if i == 3 else change
        whole[sum(SIZES[:i]) : sum(SIZES[: i + 1])] = rows
    return whole


@settings(max_examples=60)
@given(
    algorithm=st.sampled_from(["lora", "loha"]),
    chosen=st.sets(st.integers(0, 3), min_size=1),
    ranks=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    alphas=st.lists(st.sampled_from([None, 0.5, 1.0, 4.0]), min_size=4, max_size=4),
    alike=st.booleans(),
)
def test_fusing_and_splitting_again_keep_every_change(make_adapter, delta, algorithm, chosen, ranks, alphas, alike):
    if alike:
        ranks, alphas = [ranks[0]] * 4, [alphas[0]] * 4
    adapters = {i: make_adapter((SIZES[i], IN), algorithm, ranks[i], alphas[i], generator(i)) for i in sorted(chosen)}
    whole = fused(list(adapters.values()), [PARTS[i] for i in adapters], ROWS)
    assert whole is not None
    torch.testing.assert_close(
        delta(whole), expected({i: delta(weights) for i, weights in adapters.items()}), rtol=1e-5, atol=1e-7
    )
    again = split(whole, PARTS)
    assert again is not None
    assert {i for i, weights in enumerate(again) if weights is not None} == chosen
    for i, weights in adapters.items():
        torch.testing.assert_close(delta(again[i]), delta(weights), rtol=1e-5, atol=1e-7)
        if alike:
            assert {name: t.shape for name, t in again[i].tensors.items()} == {
                name: t.shape for name, t in weights.tensors.items()
            }
            assert all(torch.equal(again[i].tensors[name], tensor) for name, tensor in weights.tensors.items())
            assert again[i].alpha == weights.alpha


@pytest.mark.parametrize("algorithm", ["lora", "loha"])
def test_a_fused_adapter_is_split_and_fused_back_at_its_own_rank(make_adapter, delta, algorithm):
    whole = make_adapter((ROWS, IN), algorithm, 3, 1.5, generator(0))
    parts = split(whole, PARTS)
    changes = dict(enumerate(delta(part) for part in parts))
    torch.testing.assert_close(expected(changes), delta(whole))
    again = fused(parts, PARTS, ROWS)
    assert again.alpha == 1.5
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_untrained_up_matrices_stay_whole():
    whole = AdapterWeights("lora", {"down": torch.ones(4, IN), "up": torch.zeros(ROWS, 4)}, 1.0)
    assert all(part.tensors["down"].shape == (4, IN) and part.alpha == 1.0 for part in split(whole, PARTS))


def test_a_rank_that_happens_to_be_zero_stays_in_blocks_of_equal_size(make_adapter):
    adapters = [make_adapter((SIZES[i], IN), "lora", 3, 3.0, generator(i)) for i in range(2)]
    adapters[0].tensors["up"][:, 2] = 0
    again = split(fused(adapters, PARTS[:2], 12), PARTS[:2])
    assert [part.tensors["down"].shape[0] for part in again] == [3, 3]


def test_magnitudes_per_output_are_cut_and_stacked(make_adapter):
    adapters = [
        make_adapter((size, IN), "lora", 2, 1.0, generator(i), variant="dora_out") for i, size in enumerate(SIZES)
    ]
    whole = fused(adapters, PARTS, ROWS)
    assert whole.tensors["dora_scale"].shape == (ROWS, 1)
    again = split(whole, PARTS)
    for before, after in zip(adapters, again, strict=True):
        assert torch.equal(before.tensors["dora_scale"], after.tensors["dora_scale"])
    assert fused(adapters[:2], PARTS[:2], ROWS) is None


EVEN = [OriginalName("qkv", (8 * i, 8 * i + 8), swap_halves=i == 2) for i in range(3)]


def test_a_fused_adapter_of_any_kind_is_cut_where_its_rows_allow(make_adapter, merged) -> None:
    for algorithm, rank in [("oft", 4), ("lokr", 4), ("glora", 2), ("loha", 2), ("lora", 2)]:
        alpha = 0.0 if algorithm == "oft" else 3.0
        whole = make_adapter((24, IN), algorithm, rank, alpha, generator(0))
        weight = torch.rand(24, IN, generator=generator(1))
        parts = split(whole, EVEN)
        assert parts is not None
        for part, place in zip(parts, EVEN, strict=True):
            rows = split_rows(merged(whole, weight), place)
            torch.testing.assert_close(merged(part, split_rows(weight, place)), rows, rtol=1e-6, atol=1e-7)
        again = fused(parts, EVEN, 24)
        assert again.alpha == whole.alpha
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_blocks_of_oft_stand_one_after_the_other(make_adapter, merged):
    adapters = [make_adapter((8, IN), "oft", 2, 0.0, generator(i)) for i in range(2)]
    weight = torch.rand(24, IN, generator=generator(5))
    whole = fused(adapters, [EVEN[0], EVEN[2]], 24)
    changed = merged(whole, weight)
    assert torch.equal(changed[8:16], weight[8:16].double())
    for weights, place in zip(adapters, (EVEN[0], EVEN[2]), strict=True):
        expected_rows = merged(weights, split_rows(weight, place))
        torch.testing.assert_close(split_rows(changed, place), expected_rows, rtol=1e-6, atol=1e-7)
    assert split(whole, EVEN)[1] is None


def test_what_has_no_exact_translation_is_left_alone(make_adapter) -> None:
    for algorithm, variant, alpha in [
        ("lokr", "", 1.0),
        ("oft", "", 1.0),
        ("boft", "", 0.0),
        ("glora", "", 1.0),
        ("lora", "dora_in", 1.0),
    ]:
        adapters = [make_adapter((8, IN), algorithm, 2, alpha, generator(i), variant=variant) for i in range(2)]
        assert fused(adapters, EVEN[:2], 16) is None
        alone = [OriginalName("proj")]
        assert fused(adapters[:1], alone, 0) is adapters[0]
        assert split(adapters[0], alone) == [adapters[0]]


def test_rows_inside_a_block_are_not_cut(make_adapter) -> None:
    for algorithm, variant, alpha in [
        ("lokr", "", 1.0),
        ("oft", "", 0.0),
        ("oft", "", 1.0),
        ("boft", "", 0.0),
        ("lora", "dora_in", 1.0),
    ]:
        whole = make_adapter((24, IN), algorithm, 2, alpha, generator(0), variant=variant)
        assert split(whole, [OriginalName("qk", (0, 11)), OriginalName("qk", (11, 24))]) is None


def test_halves_are_exchanged_both_ways(make_adapter, delta):
    place = [OriginalName("final_layer.adaLN_modulation.1", None, swap_halves=True)]
    weights = make_adapter((8, IN), "lora", 2, 1.0, generator(0))
    whole = fused([weights], place, 0)
    assert torch.equal(delta(whole), torch.cat([delta(weights)[4:], delta(weights)[:4]]))
    assert torch.equal(delta(split(whole, place)[0]), delta(weights))


def test_rows_of_biases():
    pieces = [torch.arange(6.0), torch.arange(10.0)]
    whole = fused_rows(pieces, [PARTS[0], PARTS[3]], ROWS)
    assert whole.tolist() == [0, 1, 2, 3, 4, 5, *[0] * 12, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert [split_rows(whole, PARTS[i]).tolist() for i in (0, 3)] == [piece.tolist() for piece in pieces]
