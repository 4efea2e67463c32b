"""Parameters of tests that meet every pair of values; the rest of the full product is slow.

    @pytest.mark.pairwise(kind=KINDS, depth=[0, 1], layer=LAYERS)
    def test_it(kind, depth, layer): ...

runs over a covering array of the three axes: for any two values of two axes there is a case that has both. A fault
that needs three particular values may need one of the other cases, which are marked slow and made for `make test-all`
alone. An axis is a mapping, whose keys name its cases, or a sequence of values that name themselves. The axes of
several such marks (of a module and of its function) are those of one product. With the mark
`together("axis")`, all cases with one value of that axis are one test: preparing one takes longer than most cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest

Axis = Mapping[str, Any] | Iterable[Any]


def covering(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Rows of indices, one an axis, in which any two indices of two axes meet at least once.

    Each row takes the first pair that has not been met and adds, axis by axis, the index that meets most of those left.

    Args:
        sizes: number of values of each axis, at least one.
    """
    axes = range(len(sizes))
    if len(sizes) < 2:
        yield from itertools.product(*map(range, sizes))
        return
    open_pairs = dict.fromkeys(
        ((i, a), (j, b)) for i, j in itertools.combinations(axes, 2) for a in range(sizes[i]) for b in range(sizes[j])
    )
    while open_pairs:
        row = dict(next(iter(open_pairs)))
        for axis in axes:
            if axis not in row:
                met = [
                    sum(tuple(sorted(((axis, value), other))) in open_pairs for other in row.items())
                    for value in range(sizes[axis])
                ]
                row[axis] = met.index(max(met))
        for pair in itertools.combinations(sorted(row.items()), 2):
            open_pairs.pop(pair, None)
        yield tuple(row[axis] for axis in axes)


def cases(axes: Mapping[str, Axis], *, full: bool) -> list[Any]:
    """Parameters over the axes, in the order of their product.

    Args:
        axes: values by the name of the argument.
        full: whether those outside the covering array are there too, marked slow.
    """
    named = [
        list(axis.items()) if isinstance(axis, Mapping) else [(str(value), value) for value in axis]
        for axis in axes.values()
    ]
    chosen = set(covering([len(axis) for axis in named]))
    rows = itertools.product(*map(range, map(len, named))) if full else sorted(chosen)
    return [
        pytest.param(
            *(axis[index][1] for axis, index in zip(named, row, strict=True)),
            id="-".join(str(axis[index][0]) for axis, index in zip(named, row, strict=True)),
            marks=() if row in chosen else pytest.mark.slow,
        )
        for row in rows
    ]


def grouped(axes: Mapping[str, Axis], together: str, *, full: bool) -> list[Any]:
    """Parameters for each value of an axis, with its cases in the mark `rows`; the slow ones have a parameter too."""
    place, groups = list(axes).index(together), dict[tuple[str, bool], list[Any]]()
    for row in cases(axes, full=full):
        groups.setdefault((_name(axes[together], row.values[place]), bool(row.marks)), []).append(row)
    return [
        pytest.param(*group[0].values, id=name, marks=(*group[0].marks, pytest.mark.rows(group)))
        for (name, _), group in groups.items()
    ]


def _name(axis: Axis, value: object) -> str:
    return next(name for name, known in axis.items() if known is value) if isinstance(axis, Mapping) else str(value)


def slow_except(values: Iterable[Any], *default: Any) -> list[Any]:
    """Values of a parameter, those marked slow that are not for the default run; a tuple has one for each argument."""
    return [
        value
        if value in default
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]
