"""How LoKr takes dimensions apart. What PEFT makes of the sizes is tested with PEFT itself (tests/formats/layouts)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.adapters.lokr import factor_shapes, factorization, rank_in


@given(st.integers(1, 2000), st.integers(1, 300))
def test_dimensions_are_factorized_as_by_lycoris_up_to_their_root(dimension: int, factor: int) -> None:
    from lycoris.functional import factorization as lycoris_factorization

    small, large = factorization(dimension, factor)
    assert small * large == dimension
    assert small <= large
    if factor**2 <= dimension or dimension % factor:
        assert (small, large) == lycoris_factorization(dimension, factor)


@pytest.mark.parametrize(
    ("dimension", "factor", "expected"),
    [(320, 8, (8, 40)), (320, 32, (16, 20)), (640, 64, (20, 32)), (12, 4, (3, 4)), (4, 8, (2, 2)), (127, 16, (1, 127))],
)
def test_dimensions_are_factorized_as_by_comfyui(dimension: int, factor: int, expected: tuple[int, int]) -> None:
    assert factorization(dimension, factor) == expected


@pytest.mark.parametrize(
    ("shapes", "factors", "rank"),
    [
        ({"lokr_w1": (2, 3), "lokr_w2": (4, 5, 3, 3)}, ((2, 3), (4, 5, 3, 3)), None),
        ({"lokr_w1": (2, 3), "lokr_w2_a": (4, 6), "lokr_w2_b": (6, 45)}, ((2, 3), (4, 45)), 6),
        ({"lokr_w1_a": (2, 7), "lokr_w1_b": (7, 3), "lokr_w2": (4, 5)}, ((2, 3), (4, 5)), 7),
        (
            {"lokr_w1": (2, 3), "lokr_w2_a": (6, 4), "lokr_w2_b": (6, 5), "lokr_t2": (6, 6, 3, 3)},
            ((2, 3), (4, 5, 3, 3)),
            6,
        ),
    ],
)
def test_tensors_show_factors_and_rank(shapes, factors, rank) -> None:
    assert factor_shapes(shapes) == factors
    assert rank_in(shapes) == rank
