"""Nodes for text."""

from __future__ import annotations

import json
import operator
import string as letters
from collections.abc import Callable, Mapping
from typing import Any

from lorasmith.core.errors import OptionError
from lorasmith.workflow import ANY, Grow, Input, NodeContext, Output, node

_STRING = Input("string", "STRING", multiline=True)
_CASES = {"UPPERCASE": str.upper, "lowercase": str.lower, "Capitalize": str.capitalize, "Title Case": str.title}
_TRIMS = {"Both": str.strip, "Left": str.lstrip, "Right": str.rstrip}
_COMPARISONS: Mapping[str, Callable[[str, str], bool]] = {
    "Starts With": str.startswith,
    "Ends With": str.endswith,
    "Equal": operator.eq,
}
_LONGEST = 1_000_000  # most characters of a formatted value


def _case_sensitive() -> Input:
    return Input("case_sensitive", "BOOLEAN", default=True)


@node(
    "StringConcatenate",
    display_name="Concatenate Text",
    category="text",
    inputs=[
        Input("string_a", "STRING", multiline=True),
        Input("string_b", "STRING", multiline=True),
        Input("delimiter", "STRING", default="", multiline=False, tooltip="Text between the two."),
    ],
    outputs=[Output("STRING")],
    search_aliases=["join text", "merge text", "append text"],
)
def string_concatenate(context: NodeContext, *, string_a: str, string_b: str, delimiter: str) -> tuple[str]:
    """Join two texts."""
    return (f"{string_a}{delimiter}{string_b}",)


@node(
    "StringSubstring",
    display_name="Substring",
    category="text",
    inputs=[
        _STRING,
        Input("start", "INT", tooltip="First character, counted from 0; negative ones count from the end."),
        Input("end", "INT", tooltip="Character after the last one; negative ones count from the end."),
    ],
    outputs=[Output("STRING")],
    search_aliases=["cut text", "slice"],
)
def string_substring(context: NodeContext, *, string: str, start: int, end: int) -> tuple[str]:
    """A part of a text."""
    return (string[start:end],)


@node(
    "StringLength",
    display_name="Text Length",
    category="text",
    inputs=[_STRING],
    outputs=[Output("INT", "length")],
)
def string_length(context: NodeContext, *, string: str) -> tuple[int]:
    """Number of characters of a text."""
    return (len(string),)


@node(
    "CaseConverter",
    display_name="Convert Text Case",
    category="text",
    inputs=[_STRING, Input("mode", "COMBO", options=tuple(_CASES))],
    outputs=[Output("STRING")],
)
def case_converter(context: NodeContext, *, string: str, mode: str) -> tuple[str]:
    """Change capital and small letters."""
    return (_CASES[mode](string),)


@node(
    "StringTrim",
    display_name="Trim Text",
    category="text",
    inputs=[_STRING, Input("mode", "COMBO", options=tuple(_TRIMS))],
    outputs=[Output("STRING")],
)
def string_trim(context: NodeContext, *, string: str, mode: str) -> tuple[str]:
    """Remove spaces and line breaks around a text."""
    return (_TRIMS[mode](string),)


@node(
    "StringReplace",
    display_name="Replace Text",
    category="text",
    inputs=[
        _STRING,
        Input("find", "STRING", multiline=True),
        Input("replace", "STRING", multiline=True),
    ],
    outputs=[Output("STRING")],
    search_aliases=["find and replace", "substitute"],
)
def string_replace(context: NodeContext, *, string: str, find: str, replace: str) -> tuple[str]:
    """Replace each occurrence of a text."""
    return (string.replace(find, replace),)


@node(
    "StringContains",
    display_name="Contains Text",
    category="text",
    inputs=[_STRING, Input("substring", "STRING", multiline=True), _case_sensitive()],
    outputs=[Output("BOOLEAN", "contains")],
)
def string_contains(context: NodeContext, *, string: str, substring: str, case_sensitive: bool) -> tuple[bool]:
    """Whether a text contains another."""
    return (_folded(substring, case_sensitive) in _folded(string, case_sensitive),)


@node(
    "StringCompare",
    display_name="Compare Text",
    category="text",
    inputs=[
        Input("string_a", "STRING", multiline=True),
        Input("string_b", "STRING", multiline=True),
        Input("mode", "COMBO", options=tuple(_COMPARISONS)),
        _case_sensitive(),
    ],
    outputs=[Output("BOOLEAN")],
)
def string_compare(
    context: NodeContext, *, string_a: str, string_b: str, mode: str, case_sensitive: bool
) -> tuple[bool]:
    """Compare two texts."""
    return (_COMPARISONS[mode](_folded(string_a, case_sensitive), _folded(string_b, case_sensitive)),)


@node(
    "StringFormat",
    display_name="Format Text",
    category="text",
    inputs=[
        Input("values", ANY, grow=Grow("value", min=0, names=tuple(letters.ascii_lowercase))),
        Input("f_string", "STRING", default="{a}", multiline=True, tooltip="{a} is the first value, {b:.2f} a number."),
    ],
    outputs=[Output("STRING")],
)
def string_format(context: NodeContext, *, values: Mapping[str, Any], f_string: str) -> tuple[str]:
    """Fill values into a text, as Python's `str.format` does."""
    try:
        return (_Formatter().vformat(f_string, (), values),)
    except (KeyError, IndexError) as error:
        given = ", ".join(values) or "none"
        raise OptionError(f"f_string names the value {error}, but there are {given}; link one or correct it") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise OptionError(f"f_string must be a format of Python, got {f_string!r}: {error}; correct it") from error


@node(
    "JsonExtractString",
    display_name="Extract Text from JSON",
    category="text",
    inputs=[
        Input("json_string", "STRING", multiline=True),
        Input("key", "STRING", multiline=False, tooltip="Of an entry of the outermost object."),
    ],
    outputs=[Output("STRING")],
    search_aliases=["json", "parse json"],
)
def json_extract_string(context: NodeContext, *, json_string: str, key: str) -> tuple[str]:
    """An entry of a JSON object as text, or an empty text if there is none."""
    try:
        found = json.loads(json_string)
    except (ValueError, RecursionError):
        context.warn("json_string is no JSON, so the text is empty")
        return ("",)
    value = found.get(key) if isinstance(found, dict) else None
    return ("" if value is None else str(value),)


class _Formatter(letters.Formatter):
    """`str.format` for untrusted formats: without access to attributes, and with bounded widths."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        if "." in field_name or "[" in field_name:
            raise ValueError(f"{{{field_name}}} reaches into a value")
        return super().get_field(field_name, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> str:
        numbers = "".join(one if one.isdigit() else " " for one in format_spec).split()
        if any(len(number) >= 20 or int(number) > _LONGEST for number in numbers):
            raise ValueError(f"{format_spec!r} is wider than {_LONGEST:,} characters")
        return str(super().format_field(value, format_spec))


def _folded(text: str, case_sensitive: bool) -> str:
    return text if case_sensitive else text.lower()
