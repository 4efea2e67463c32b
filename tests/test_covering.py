"""Covering arrays: every pair is there, in far fewer cases than the product has."""

from __future__ import annotations

import itertools
import math

from tests.covering import cases, covering


def test_any_two_values_meet() -> None:
    for sizes in [
        (),
        (3,),
        (3, 4),
        (2, 2, 2),
        (13, 10, 5),
        (13, 10, 3, 2),
        (13, 10, 2, 2),
        (3, 3, 3, 2, 2),
        (1, 4, 1, 3),
    ]:
        rows = list(covering(sizes))
        assert len(set(rows)) == len(rows)
        assert all(0 <= index < size for row in rows for index, size in zip(row, sizes, strict=True))
        for i, j in itertools.combinations(range(len(sizes)), 2):
            assert {(row[i], row[j]) for row in rows} == set(itertools.product(range(sizes[i]), range(sizes[j])))
        if len(sizes) > 2:
            largest = sorted(sizes)[-1] * sorted(sizes)[-2]
            assert largest <= len(rows) <= 1.5 * largest + 2
            assert len(rows) < math.prod(sizes) or len(rows) == largest
        assert list(covering(sizes)) == rows


def test_the_rest_of_the_product_is_slow_and_there_when_it_is_wanted() -> None:
    axes = {"kind": {"a": 1, "b": 2}, "depth": [0, 1], "dtype": ["fp32", "bf16"]}
    fast, full = cases(axes, full=False), cases(axes, full=True)
    assert len(full) == len({one.id for one in full}) == 8
    assert [one.id for one in full if not one.marks] == [one.id for one in fast]
    assert {mark.name for one in full for mark in one.marks} == {"slow"}
    assert next(one for one in full if one.id == "b-0-bf16").values == (2, 0, "bf16")
