"""Schemas say of a type what `typed` accepts of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypedDict

import pytest

from lorasmith.core.typed_json import json_schema


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Loose(TypedDict, total=False):
    """What may be there.

    Attributes:
        size: in pixels, over
            two lines.
    """

    size: int


@dataclass(frozen=True, kw_only=True)
class Base:
    """Of all.

    Attributes:
        at: seconds.
    """

    at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Whole(Base):
    """All there is, on
    two lines.

    Attributes:
        low, high: bounds.
        name: of it: a text.

    Raises:
        ValueError: never.
    """

    low: float
    high: float
    name: str | None = None
    loose: Loose = field(default_factory=Loose)


@pytest.mark.parametrize(
    "kind, schema",
    [
        (Any, {}),
        (bool, {"type": "boolean"}),
        (int, {"type": "integer"}),
        (None | float, {"anyOf": [{"type": "null"}, {"type": "number"}]}),
        (Literal["a", "b"], {"enum": ["a", "b"]}),
        (Colour, {"enum": ["red", "blue"]}),
        (list[str], {"type": "array", "items": {"type": "string"}}),
        (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
        (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
        (
            tuple[int, str],
            {
                "type": "array",
                "prefixItems": [{"type": "integer"}, {"type": "string"}],
                "minItems": 2,
                "maxItems": 2,
            },
        ),
    ],
)
def test_types_have_their_schema(kind: Any, schema: dict[str, Any]) -> None:
    assert json_schema(kind) == schema


def test_fields_are_described_and_those_without_a_default_required() -> None:
    found = json_schema(Whole)
    assert found["required"] == ["low", "high"]
    assert found["description"] == "All there is, on two lines."
    said = {name: one.get("description") for name, one in found["properties"].items()}
    assert said == {"at": "seconds.", "low": "bounds.", "high": "bounds.", "name": "of it: a text.", "loose": None} | {
        "loose": "What may be there."
    }
    assert found["properties"]["loose"]["properties"] == {
        "size": {"type": "integer", "description": "in pixels, over two lines."}
    }
