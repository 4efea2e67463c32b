"""Low-rank algebra against dense algebra: the best approximation is the best, and nothing else is claimed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.toolbox.changes import MatrixChange, stacked


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def change(out: int, rank: int, inside: int, seed: int, *, dense: bool = False) -> MatrixChange:
    return MatrixChange(
        (normal(out, rank, seed=seed), normal(rank, inside, seed=seed + 1)),
        normal(out, inside, seed=seed + 2) if dense else None,
    )


sizes = st.integers(1, 24)
changes = st.builds(change, sizes, sizes, sizes, st.integers(0, 99), dense=st.booleans())


@given(changes, st.integers(1, 30))
def test_no_matrix_of_the_rank_is_closer(whole: MatrixChange, rank: int) -> None:
    """Eckart and Young: the error is the rest of the singular values."""
    cut = whole.truncated(rank=rank)
    matrix = whole.matrix().double()
    singular = torch.linalg.svdvals(matrix)

    assert cut.rank == min(rank, *((whole.factors[0].shape[1],) if whole.dense is None else ()), *whole.shape)
    error = torch.linalg.matrix_norm(matrix - cut.up.double() @ cut.down.double())
    assert float(error) == pytest.approx(float(singular[rank:].norm()), abs=1e-5 * float(singular.norm()))
    assert cut.kept == pytest.approx(float(singular[:rank].square().sum()), rel=1e-5)
    assert cut.total == pytest.approx(float(singular.square().sum()), rel=1e-5)


@given(changes, st.floats(0.05, 1.0))
def test_the_least_rank_that_keeps_the_energy_is_taken(whole: MatrixChange, energy: float) -> None:
    cut = whole.truncated(energy=energy)
    kept = torch.linalg.svdvals(whole.matrix().double()).square().cumsum(0)

    assert cut.energy >= energy - 1e-6
    if cut.rank > 1:
        assert float(kept[cut.rank - 2] / kept[-1]) < energy + 1e-6


@given(changes)
def test_both_factors_are_as_large(whole: MatrixChange) -> None:
    cut = whole.truncated(rank=3)
    assert torch.allclose(cut.up.norm(dim=0), cut.down.norm(dim=1), rtol=1e-3, atol=1e-4)


@given(sizes, sizes, sizes, sizes, st.booleans(), st.booleans())
def test_norms_and_products_are_those_of_the_matrices(
    out: int, rank: int, other_rank: int, inside: int, dense: bool, other_dense: bool
) -> None:
    first, second = change(out, rank, inside, 0, dense=dense), change(out, other_rank, inside, 7, dense=other_dense)
    a, b = first.matrix().double(), second.matrix().double()
    scale = float(a.norm() * b.norm())

    assert first.norm() == pytest.approx(float(a.norm()), rel=1e-5)
    assert first.inner(second) == pytest.approx(float((a * b).sum()), abs=1e-5 * scale)
    total = stacked(first.times(2.0), second.times(-0.5))
    assert torch.allclose(total.matrix().double(), 2 * a - 0.5 * b, atol=1e-4)
    assert total.norm() == pytest.approx(float((2 * a - 0.5 * b).norm()), rel=1e-4)


def test_the_norm_of_a_difference_of_equals_is_rounding_and_no_cancellation() -> None:
    first = change(300, 16, 200, 0)
    rotation = torch.linalg.qr(normal(16, 16, seed=3)).Q
    assert first.factors is not None
    same = MatrixChange((first.factors[0] @ rotation, rotation.T @ first.factors[1]))

    assert stacked(first, same.times(-1)).norm() < 1e-6 * first.norm()


@settings(max_examples=10)
@given(st.integers(1, 40), st.sampled_from([(900, 500), (500, 900)]))
def test_a_random_projection_is_as_good_as_the_decomposition(rank: int, shape: tuple[int, int]) -> None:
    """On a large matrix whose singular values fall slowly, the error is within 1 % of the least one."""
    out, inside = shape
    smaller = min(shape)
    singular = 1 / torch.arange(1, smaller + 1) ** 0.7
    left = torch.linalg.qr(normal(out, smaller, seed=1)).Q
    right = torch.linalg.qr(normal(inside, smaller, seed=2)).Q
    matrix = (left * singular) @ right.T
    cut = MatrixChange(dense=matrix).truncated(rank=rank)

    assert cut.rank == rank
    error = float((matrix - cut.up @ cut.down).norm())
    assert error <= 1.01 * float(singular[rank:].norm())
    assert cut.energy == pytest.approx(float(singular[:rank].square().sum() / singular.square().sum()), rel=0.01)


def test_a_random_projection_finds_a_low_rank_exactly_and_draws_from_no_global_stream() -> None:
    matrix = normal(900, 8, seed=0) @ normal(8, 800, seed=1)
    before = torch.get_rng_state()
    cut = MatrixChange(dense=matrix).truncated(rank=32, energy=1.0, key="layer")

    assert torch.equal(torch.get_rng_state(), before)
    assert cut.rank == 8
    assert float((matrix - cut.up @ cut.down).norm() / matrix.norm()) < 1e-5
    again = MatrixChange(dense=matrix).truncated(rank=32, energy=1.0, key="layer")
    assert torch.equal(cut.up, again.up)


def test_nothing_has_all_of_its_energy_at_rank_one() -> None:
    cut = MatrixChange(dense=torch.zeros(6, 5)).truncated(rank=3, energy=0.9)
    assert (cut.energy, cut.total) == (1.0, 0.0)
    assert not (cut.up @ cut.down).any()
