"""JSON schemas (draft 2020-12) of the types that `typed_json.typed` reads.

Descriptions are taken from the `Attributes` in the docstrings of dataclasses and typed dictionaries.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_PLAIN: dict[Any, dict[str, Any]] = {
    Any: {},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    type(None): {"type": "null"},
}


def json_schema(kind: Any) -> dict[str, Any]:
    """The schema of a type's values; fields with a default may be missing, and unknown ones are allowed."""
    if kind in _PLAIN:
        return dict(_PLAIN[kind])
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [json_schema(one) for one in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list or (origin is tuple and arguments[-1] is ...):
        return {"type": "array", "items": json_schema(arguments[0])}
    if origin is tuple:
        items = [json_schema(one) for one in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": json_schema(arguments[1])}
    if dataclasses.is_dataclass(kind):
        return _of_fields(kind, [one.name for one in dataclasses.fields(kind)], _required(kind))
    if typing.is_typeddict(kind):
        return _of_fields(kind, list(typing.get_type_hints(kind)), [])
    assert issubclass(kind, Enum), f"{kind} is no type of JSON values"
    return {"enum": [one.value for one in kind]}


def _of_fields(kind: Any, names: list[str], required: list[str]) -> dict[str, Any]:
    hints, said = typing.get_type_hints(kind), _descriptions(kind)
    properties = {}
    for name in names:
        schema = json_schema(hints[name])
        properties[name] = schema | {"description": said[name]} if name in said else schema
    found: dict[str, Any] = {"type": "object", "properties": properties}
    first = (inspect.getdoc(kind) or "").split("\n\n")[0]
    return (
        found
        | ({"description": " ".join(first.split())} if first else {})
        | ({"required": required} if required else {})
    )


def _required(kind: Any) -> list[str]:
    fields = dataclasses.fields(kind)
    return [one.name for one in fields if one.default is one.default_factory is dataclasses.MISSING]


def _descriptions(kind: Any) -> dict[str, str]:
    """Descriptions by name from the `Attributes` in the docstrings of a type and its bases."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(one.__doc__ or "").partition("Attributes:\n")
        lines = re.split(r"\n\s*\n", section)[0]
        for entry in re.split(r"\n(?= {4}\S)", f"\n{lines}"):
            names, _, text = entry.strip().partition(": ")
            found |= {name.strip(): " ".join(text.split()) for name in names.split(",") if text}
    return found
