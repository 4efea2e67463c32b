"""JSON values in declared types: what fits comes back equal, and the rest is refused with its place."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal, TypedDict

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lorasmith.core.typed_json import Scalar, json_schemas, json_values, typed


class Colour(StrEnum):
    RED = "red"


class Loose(TypedDict, total=False):
    size: Annotated[int, "in pixels"]


@dataclass(frozen=True, kw_only=True)
class Inner:
    """In another."""

    name: Annotated[str, "of it"]
    sides: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float
    is_on: bool = False
    kind: Literal["a", "b"] = "a"
    colour: Colour = Colour.RED
    label: str | None = None
    draws: tuple[tuple[int, float], ...] = ()
    numbers: list[int] = field(default_factory=list)
    inner: Inner | None = None
    loose: Loose = field(default_factory=Loose)
    settings: dict[str, Scalar] = field(default_factory=dict)
    rest: Any = None


def test_what_is_written_is_read() -> None:
    value = Outer(
        rate=1e-4,
        is_on=True,
        kind="b",
        label="x",
        draws=((1, 0.5), (2, 1)),
        numbers=[1],
        inner=Inner(name="n", sides=(1, 2)),
        loose={"size": 3},
        settings={"a": None, "b": True, "c": 1.5, "d": "t"},
        rest=[{"deep": 1}],
    )
    assert typed(json.loads(json.dumps(asdict(value))), Outer) == value
    assert typed({"rate": 1, "unknown": []}, Outer) == Outer(rate=1)
    assert typed({"size": 1, "later": "dropped"}, Loose) == {"size": 1}


def test_what_does_not_fit_is_refused_with_its_place() -> None:
    for value, sentence in [
        ([], "it must be an object, got []"),
        ({}, "rate is missing"),
        ({"rate": "1"}, "rate must be a number, got '1'"),
        ({"rate": True}, "rate must be a number, got True"),
        ({"rate": 1, "numbers": [2**64]}, "it must have integers of 64 bits"),
        ({"rate": 1, "is_on": 1}, "is_on must be true or false, got 1"),
        ({"rate": 1, "kind": "c"}, "kind must be one of a, b, got 'c'"),
        ({"rate": 1, "kind": ["a"]}, "kind must be text, got ['a']"),
        ({"rate": 1, "colour": {}}, "colour must be text, got {}"),
        ({"rate": 1, "colour": "blue"}, "colour must be one of red, got 'blue'"),
        ({"rate": 1, "label": 3}, "label must be text, got 3"),
        ({"rate": 1, "draws": [[1, 0.5], [1]]}, "draws[1] must be a list of 2, got [1]"),
        ({"rate": 1, "draws": 7}, "draws must be a list, got 7"),
        ({"rate": 1, "numbers": [1, 2.5]}, "numbers[1] must be an integer, got 2.5"),
        ({"rate": 1, "inner": {"name": None}}, "inner.name must be text, got None"),
        ({"rate": 1, "loose": {"size": "x" * 99}}, f"loose.size must be an integer, got '{'x' * 59}…"),
        ({"rate": 1, "settings": {"a": []}}, "settings.a must be true or false, an integer, a number or text, got []"),
    ]:
        with pytest.raises(ValueError) as caught:
            typed(value, Outer)
        assert str(caught.value) == sentence


def test_fields_that_were_missing_are_among_the_json_values() -> None:
    (found,) = json_values((typed({"rate": 1}, Outer),))
    assert found.keys() == Outer.__annotations__.keys()


def test_numbers_of_more_than_64_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="of 64 bits"):  # with the place, from msgspec 0.22 on
        typed({"rate": 10**400}, Outer)


def test_schemas_describe_fields_and_require_those_without_a_default() -> None:
    (schema,), named = json_schemas([Outer], "#/in/")
    assert schema == {"$ref": "#/in/Outer"} and named.keys() == {"Outer", "Inner", "Loose", "Colour"}
    assert named["Outer"]["required"] == ["rate"] and named["Outer"]["properties"]["kind"]["enum"] == ["a", "b"]
    assert named["Inner"]["description"] == "In another."
    assert named["Inner"]["properties"]["name"] == {"type": "string", "description": "of it"}
    assert named["Loose"]["properties"]["size"] == {"type": "integer", "description": "in pixels"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*Outer.__annotations__, "x"]), inner),
    max_leaves=8,
)


@given(JSON)
@example({"rate": 1, "kind": "x - at `$.foo` - at `$.bar"})
@example({"rate": 1, "colour": " - at `$.colour`"})
def test_nothing_but_a_value_error_comes_out(value: Any) -> None:
    with contextlib.suppress(ValueError):
        typed(value, Outer)
