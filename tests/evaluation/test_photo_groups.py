"""Photos grouped by their features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.evaluation.photo_groups import CUT_DISTANCE, SAME, nearly_same, odd_ones_out


def around(direction: int, number: int, spread: float, seed: int = 0) -> Tensor:
    """Features of photos of one thing: a direction of 64, and differences of length `spread`."""
    noise = torch.randn(number, 64, generator=torch.Generator().manual_seed(seed)) / 8
    return F.normalize(F.one_hot(torch.tensor(direction), 64) + spread * noise, dim=1)


def test_the_others_are_named_wherever_they_are() -> None:
    photos = torch.cat([around(1, 1, 0.6, 5), around(0, 8, 0.6), around(2, 3, 0.6, 2)])
    assert odd_ones_out(photos) == [0, 9, 10, 11]
    assert odd_ones_out(photos.flip(0)) == [0, 1, 2, 11]


def test_nothing_is_named_of() -> None:
    for photos, _why in [
        (around(0, 8, 0.6), "one thing"),
        (torch.eye(64)[:12], "different things, as in a style"),
        (torch.cat([around(0, 2, 0.6), torch.eye(64)[5:6]]), "too few to be most"),
        (torch.cat([around(0, 3, 0.6), torch.eye(64)[5:9]]), "no group has half of them"),
        (torch.cat([around(0, 4, 1.4), torch.eye(64)[5:6]]), "the group is little more alike than that"),
        (torch.zeros(0, 64), "none"),
    ]:
        assert odd_ones_out(photos) == []


def test_average_linkage_agrees_with_its_definition() -> None:
    """Against the means over all pairs of members, computed again at each step."""
    photos = torch.cat([around(index, 4, 1.0, index) for index in range(3)])
    alike = (photos @ photos.T).tolist()
    groups = [[index] for index in range(len(alike))]

    def mean(one: list[int], other: list[int]) -> float:
        return sum(alike[a][b] for a in one for b in other) / (len(one) * len(other))

    while len(groups) > 1:
        pairs = [(mean(one, other), one, other) for n, one in enumerate(groups) for other in groups[:n]]
        best, one, other = max(pairs)
        if best < CUT_DISTANCE:
            break
        groups = [group for group in groups if group not in (one, other)] + [one + other]
    from lorasmith.evaluation.photo_groups import _groups

    assert sorted(map(sorted, groups)) == sorted(map(sorted, _groups((photos @ photos.T).double().numpy())))


def test_near_copies_are_named_once_after_the_first() -> None:
    photos = torch.eye(4)[[0, 1, 0, 2, 0]]
    assert nearly_same(photos) == [(0, 2), (0, 4)]
    almost = torch.tensor([[1.0, 0.0], [SAME - 0.01, (1 - (SAME - 0.01) ** 2) ** 0.5]])
    assert nearly_same(almost) == []
