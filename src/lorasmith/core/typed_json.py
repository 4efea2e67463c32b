"""JSON values in declared types: one codec for records of runs, run states and events, and the types' JSON schemas.

Types are `bool`, `int` (of 64 bits), `float`, `str`, `None`, literals, enums, `Any`, unions, lists, tuples, mappings by
text, dataclasses and typed dictionaries. Writing and reading gives an equal object. Missing fields get their defaults;
unknown fields, from later versions, are dropped by dataclasses and kept in typed dictionaries.

Schemas are of draft 2020-12, with descriptions from the `Attributes` in the docstrings of dataclasses and typed
dictionaries.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, TypeVar

Scalar = bool | int | float | str | None  # a setting or another single value

_T = TypeVar("_T")
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    type(None): ((type(None),), "null"),
}


def typed(value: Any, kind: type[_T], place: str = "") -> _T:
    """A parsed JSON value in a type; raises ValueError with the location, `place` being that of `value`."""
    found: _T = _typed(value, kind, place)
    return found


def _typed(value: Any, kind: Any, place: str) -> Any:
    if kind is Any:
        return value
    if kind in _KINDS:
        classes, words = _KINDS[kind]
        if not isinstance(value, classes) or (isinstance(value, bool) and kind is not bool):
            raise _other(value, words, place)
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise ValueError(f"{place or 'it'} must be a number of 64 bits")
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _of_union(value, arguments, place)
    if origin is Literal:
        if value not in arguments:
            raise _other(value, f"one of {', '.join(map(str, arguments))}", place)
        return value
    if origin is list:
        return [_typed(one, arguments[0], f"{place}[{index}]") for index, one in _items(value, place)]
    if origin is tuple:
        return _of_tuple(value, arguments, place)
    if origin in (dict, Mapping):
        return {name: _typed(one, arguments[1], _inside(place, name)) for name, one in _fields(value, place).items()}
    if typing.is_typeddict(kind):
        hints = _hints(kind)
        fields = _fields(value, place).items()
        return {name: _typed(one, hints.get(name, Any), _inside(place, name)) for name, one in fields}
    if dataclasses.is_dataclass(kind):
        return _of_dataclass(value, kind, place)
    assert issubclass(kind, Enum), f"{kind} is no type of JSON values"
    if value not in [one.value for one in kind]:
        raise _other(value, f"one of {', '.join(str(one.value) for one in kind)}", place)
    return kind(value)


def _of_union(value: Any, kinds: tuple[Any, ...], place: str) -> Any:
    """The value in the first type that it fits. The error is that of the first type besides null."""
    errors = []
    for kind in sorted(kinds, key=lambda kind: kind is type(None)):
        try:
            return _typed(value, kind, place)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _of_tuple(value: Any, kinds: tuple[Any, ...], place: str) -> tuple[Any, ...]:
    items = _items(value, place)
    if kinds[-1] is ...:
        kinds = kinds[:1] * len(items)
    if len(items) != len(kinds):
        raise ValueError(f"{place or 'it'} must be a list of {len(kinds)}, got {len(items)} values")
    return tuple(_typed(one, kind, f"{place}[{index}]") for (index, one), kind in zip(items, kinds, strict=True))


def _of_dataclass(value: Any, kind: Any, place: str) -> Any:
    fields, hints = _fields(value, place), _hints(kind)
    own = {one.name: one for one in dataclasses.fields(kind)}
    required = [name for name, one in own.items() if one.default is one.default_factory is dataclasses.MISSING]
    if missing := next((name for name in required if name not in fields), None):
        raise ValueError(f"{_inside(place, missing)} is missing")
    given = {name: _typed(fields[name], hints[name], _inside(place, name)) for name in own if name in fields}
    return kind(**given)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _items(value: Any, place: str) -> list[tuple[int, Any]]:
    if not isinstance(value, (list, tuple)):
        raise _other(value, "a list", place)
    return list(enumerate(value))


def _fields(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _other(value, "an object", place)
    return value


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _other(value: Any, words: str, place: str) -> ValueError:
    shown = repr(value)
    return ValueError(f"{place or 'it'} must be {words}, got {shown if len(shown) <= 60 else f'{shown[:60]}…'}")


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
