from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PrimitiveInt", -3),
        ("PrimitiveFloat", 0.25),
        ("PrimitiveString", "a"),
        ("PrimitiveStringMultiline", "a\nb"),
        ("PrimitiveBoolean", True),
    ],
)
def test_a_primitive_gives_its_value(bench: Any, name: str, value: object) -> None:
    assert bench.one(name, value=value) == value


def test_a_list_joins_things_and_lists_in_order(bench: Any) -> None:
    result = bench.call(
        "CreateList", lists={"inputs.input0": ["a"], "inputs.input1": ["b", "c"], "inputs.input2": ["d"]}
    )
    assert result.outputs == (("a", "b", "c", "d"),)
