"""JSON values in declared types, and the schemas of these, by msgspec: records of runs, run states, events, and bodies
and answers of the HTTP API.

Fields that are missing get their defaults, and unknown ones, from later versions, are dropped. A text in `Annotated`
describes a field in schemas. msgspec is imported when it is needed, so that commands start fast.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

Scalar = bool | int | float | str | None  # a setting or another single value

DIALECT = "https://json-schema.org/draft/2020-12/schema"  # of `json_schemas`

_T = TypeVar("_T")


def typed(value: Any, kind: type[_T], place: str = "") -> _T:
    """A parsed JSON value in a type; raises ValueError with the location, `place` being that of `value`."""
    import msgspec

    try:
        found = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_sentence(str(error), value, kind, place)) from error
    except SystemError:  # msgspec before 0.22, of an integer that no float holds
        _refuse_large_integers(value, place)
        raise
    _refuse_large_integers(value, place)
    return found


def json_values(value: Any, enc_hook: Callable[[Any], Any] | None = None) -> Any:
    """Typed values as JSON values. Fields that `typed` gave their defaults are among them, which msgspec leaves out."""
    import msgspec

    return msgspec.to_builtins(_whole(value), enc_hook=enc_hook)


def _whole(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float, bytes)):
        return value
    if isinstance(value, (list, tuple)):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value):
        return {field.name: _whole(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def _refuse_large_integers(value: Any, place: str) -> None:
    """msgspec accepts integers of any size, which JSON readers, SQLite and tensors do not."""
    level = [value]
    while level:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, int) and not -(2**63) <= item < 2**64:
                raise ValueError(f"{place or 'it'} must have integers of 64 bits")
            if isinstance(item, (dict, list, tuple)):
                inner += item.values() if isinstance(item, dict) else item
        level = inner


def json_schemas(kinds: Sequence[Any], folder: str = "#/$defs/") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Schemas of types, and those that they refer to by name, in `folder`."""
    import msgspec

    schemas, named = msgspec.json.schema_components(kinds, ref_template=f"{folder}{{name}}")
    _alike((schemas, named))
    for kind in _declared(kinds):
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            if typing.get_origin(hint) is Annotated:
                named[kind.__name__]["properties"][name]["description"] = hint.__metadata__[0]
    return list(schemas), named


def _alike(schema: Any) -> None:
    """Change schemas to what all versions of msgspec make: one line of text, and no defaults that are empty objects."""
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("default") == {}:
                del value["default"]
            if isinstance(text := value.get("description"), str):
                value["description"] = " ".join(text.split())
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()


def _declared(kinds: Sequence[Any]) -> set[Any]:
    """The dataclasses and typed dictionaries in some types."""
    found: set[Any] = set()
    waiting = list(kinds)
    while waiting:
        kind = waiting.pop()
        if _has_fields(kind) and kind not in found:
            found.add(kind)
            waiting += typing.get_type_hints(kind).values()
        waiting += typing.get_args(kind)
    return found


def _has_fields(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or typing.is_typeddict(kind)


_PLACE = re.compile(r" - at (?:`key` in )?`\$([^`]*)`\Z")
_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "an integer",
    "null": "null",
    "object": "an object",
    "str": "text",
}


def _sentence(error: str, value: Any, kind: Any, place: str) -> str:
    """msgspec's message as a sentence with place, rule and value."""
    at = _PLACE.search(error)
    message, path = (error[: at.start()], at[1]) if at else (error, "")
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path):
        kind = _inner(kind, name)
        if index == "...":  # at a name of a mapping, which msgspec does not tell
            name = next(key for key, member in value.items() if not _fits(member, kind))
        value = value[name or int(index)]
        place += f"[{index}]" if not name else f".{name}" if place else name
    if missing := re.match(r"Object missing required field `(\w+)`", message):
        return f"{place}.{missing[1]} is missing".removeprefix(".")
    if message.startswith("Invalid enum value"):
        choices = typing.get_args(kind) or [choice.value for choice in kind]
        rule = f"one of {', '.join(map(str, choices))}"
    elif message == "Number out of range":
        return f"{place} must be a number of 64 bits"
    elif expected := re.match(r"Expected `([^`]+)`(?: of length (\d+))?", message):
        *others, last = (_WORDS.get(word, word) for word in expected[1].removesuffix(" | null").split(" | "))
        rule = f"{', '.join(others)} or {last}" if others else last
        rule += f" of {expected[2]}" if expected[2] else ""
    else:
        return message  # of `__post_init__`
    shown = repr(value)
    return f"{place or 'it'} must be {rule}, got {shown if len(shown) <= 60 else f'{shown[:60]}…'}"


def _inner(kind: Any, name: str) -> Any:
    """The type of a field, or else of the values of a list or mapping, in a type or one of a union."""
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    for arg in typing.get_args(kind) if union else (kind,):
        if name and _has_fields(arg):
            return typing.get_type_hints(arg)[name]
        if not name and (arguments := [each for each in typing.get_args(arg) if each is not ...]):
            return arguments[-1]
    return Any


def _fits(value: Any, kind: Any) -> bool:
    import msgspec

    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True
