"""Nodes for plain values, lists, text, the texts of data sets, and regular expressions.

A pattern of an untrusted graph may take forever on some text, so it runs in a process with a time limit.
"""

from __future__ import annotations

import json
import operator
import re
import string as letters
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorasmith.core.errors import OptionError
from lorasmith.workflow import ANY, MATCH, Grow, NodeContext, Output, node, socket

_LIMIT = 2**63 - 1


def _declare_primitive(id: str, display_name: str, description: str, value: Any) -> None:
    """Declare a node that passes on the value of its input."""

    def primitive(context: NodeContext, *, value: Any = value) -> tuple[Any]:
        return (value,)

    primitive.__doc__ = description
    node(id, display_name, "utilities/primitive", outputs=[value.type])(primitive)


_declare_primitive(
    "PrimitiveInt",
    "Int",
    "A whole number.",
    socket("INT", min=-_LIMIT, max=_LIMIT, extras={"control_after_generate": "fixed"}),
)
_declare_primitive("PrimitiveFloat", "Float", "A number.", socket("FLOAT", min=-_LIMIT, max=_LIMIT, step=0.1))
_declare_primitive("PrimitiveString", "Text", "Text on one line.", socket("STRING", multiline=False))
_declare_primitive(
    "PrimitiveStringMultiline", "Text (Multiline)", "Text on several lines.", socket("STRING", multiline=True)
)
_declare_primitive("PrimitiveBoolean", "Boolean", "True or false.", socket("BOOLEAN"))


@node("CreateList", "Create List", "utilities", outputs=[Output(MATCH, "list", is_list=True)], is_input_list=True)
def create_list(
    context: NodeContext, *, inputs: Mapping[str, list[Any]] = socket(MATCH, grow=Grow("input", min=1, max=10))
) -> tuple[list[Any]]:
    """Join values of one type, or lists of them, into a list whose items are processed one by one."""
    return ([item for items in inputs.values() for item in items],)


_STRING = socket("STRING", multiline=True)
_CASES = {"UPPERCASE": str.upper, "lowercase": str.lower, "Capitalize": str.capitalize, "Title Case": str.title}
_TRIMS = {"Both": str.strip, "Left": str.lstrip, "Right": str.rstrip}
_COMPARISONS: Mapping[str, Callable[[str, str], bool]] = {
    "Starts With": str.startswith,
    "Ends With": str.endswith,
    "Equal": operator.eq,
}
_LONGEST = 1_000_000  # most characters of a text that a node makes, as those that double texts could fill any memory


@node(
    "StringConcatenate",
    "Concatenate Text",
    "text",
    outputs=["STRING"],
    search_aliases=["join text", "merge text", "append text"],
)
def string_concatenate(
    context: NodeContext,
    *,
    string_a: str = socket("STRING", multiline=True),
    string_b: str = socket("STRING", multiline=True),
    delimiter: str = socket("STRING", default="", multiline=False, tooltip="Text between the two."),
) -> tuple[str]:
    """Join two texts."""
    return (f"{string_a}{delimiter}{string_b}",)


@node("StringSubstring", "Substring", "text", outputs=["STRING"], search_aliases=["cut text", "slice"])
def string_substring(
    context: NodeContext,
    *,
    string: str = _STRING,
    start: int = socket("INT", tooltip="First character, counted from 0; negative ones count from the end."),
    end: int = socket("INT", tooltip="Character after the last one; negative ones count from the end."),
) -> tuple[str]:
    """A part of a text."""
    return (string[start:end],)


@node("StringLength", "Text Length", "text", outputs=[Output("INT", "length")])
def string_length(context: NodeContext, *, string: str = _STRING) -> tuple[int]:
    """Number of characters of a text."""
    return (len(string),)


@node("CaseConverter", "Convert Text Case", "text", outputs=["STRING"])
def case_converter(
    context: NodeContext, *, string: str = _STRING, mode: str = socket("COMBO", options=tuple(_CASES))
) -> tuple[str]:
    """Change capital and small letters."""
    return (_CASES[mode](string),)


@node("StringTrim", "Trim Text", "text", outputs=["STRING"])
def string_trim(
    context: NodeContext, *, string: str = _STRING, mode: str = socket("COMBO", options=tuple(_TRIMS))
) -> tuple[str]:
    """Remove spaces and line breaks around a text."""
    return (_TRIMS[mode](string),)


@node("StringReplace", "Replace Text", "text", outputs=["STRING"], search_aliases=["find and replace", "substitute"])
def string_replace(
    context: NodeContext,
    *,
    string: str = _STRING,
    find: str = socket("STRING", multiline=True),
    replace: str = socket("STRING", multiline=True),
) -> tuple[str]:
    """Replace each occurrence of a text."""
    return (string.replace(find, replace),)


@node("StringContains", "Contains Text", "text", outputs=[Output("BOOLEAN", "contains")])
def string_contains(
    context: NodeContext,
    *,
    string: str = _STRING,
    substring: str = socket("STRING", multiline=True),
    case_sensitive: bool = socket("BOOLEAN", default=True),
) -> tuple[bool]:
    """Whether a text contains another."""
    return (_folded(substring, case_sensitive) in _folded(string, case_sensitive),)


@node("StringCompare", "Compare Text", "text", outputs=["BOOLEAN"])
def string_compare(
    context: NodeContext,
    *,
    string_a: str = socket("STRING", multiline=True),
    string_b: str = socket("STRING", multiline=True),
    mode: str = socket("COMBO", options=tuple(_COMPARISONS)),
    case_sensitive: bool = socket("BOOLEAN", default=True),
) -> tuple[bool]:
    """Compare two texts."""
    return (_COMPARISONS[mode](_folded(string_a, case_sensitive), _folded(string_b, case_sensitive)),)


@node("StringFormat", "Format Text", "text", outputs=["STRING"])
def string_format(
    context: NodeContext,
    *,
    values: Mapping[str, Any] = socket(ANY, grow=Grow("value", min=0, names=tuple(letters.ascii_lowercase))),
    f_string: str = socket(
        "STRING", default="{a}", multiline=True, tooltip="{a} is the first value, {b:.2f} a number."
    ),
) -> tuple[str]:
    """Fill values into a text, as Python's `str.format` does."""
    try:
        return (_Formatter().vformat(f_string, (), values),)
    except (KeyError, IndexError) as error:
        names = ", ".join(values) or "none"
        raise OptionError(f"f_string names the value {error}, but there are {names}; link one or correct it") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise OptionError(f"f_string must be a format of Python, got {f_string!r}: {error}; correct it") from error


@node("JsonExtractString", "Extract Text from JSON", "text", outputs=["STRING"], search_aliases=["json", "parse json"])
def json_extract_string(
    context: NodeContext,
    *,
    json_string: str = socket("STRING", multiline=True),
    key: str = socket("STRING", multiline=False, tooltip="Of an entry of the outermost object."),
) -> tuple[str]:
    """An entry of a JSON object as text, or an empty text if there is none."""
    try:
        content = json.loads(json_string)
    except (ValueError, RecursionError):
        context.warn("json_string is no JSON, so the text is empty")
        return ("",)
    value = content.get(key) if isinstance(content, dict) else None
    return ("" if value is None else str(value),)


class _Formatter(letters.Formatter):
    """`str.format` for untrusted formats: without access to attributes, and with bounded widths."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        if "." in field_name or "[" in field_name:
            raise ValueError(f"{{{field_name}}} reaches into a value")
        return super().get_field(field_name, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> str:
        numbers = "".join(letter if letter.isdigit() else " " for letter in format_spec).split()
        if any(len(number) >= 20 or int(number) > _LONGEST for number in numbers):
            raise ValueError(f"{format_spec!r} is wider than {_LONGEST:,} characters")
        return str(super().format_field(value, format_spec))


def _folded(text: str, case_sensitive: bool) -> str:
    return text if case_sensitive else text.lower()


_TEXTS = socket("STRING", multiline=False)
_OUTPUT = Output("STRING", "texts")


def _line(tooltip: str) -> Any:
    return socket("STRING", default="", multiline=False, tooltip=tooltip)


def _declare_change(
    id: str, display_name: str, description: str, change: Callable[[str], str], search_aliases: Sequence[str] = ()
) -> None:
    """Declare a deprecated node that changes texts."""

    def changed(context: NodeContext, *, texts: str = _TEXTS) -> tuple[str]:
        return (change(texts),)

    changed.__doc__ = description
    node(id, f"{display_name} (DEPRECATED)", "text", outputs=[_OUTPUT], search_aliases=search_aliases, deprecated=True)(
        changed
    )


_declare_change("TextToLowercase", "Convert Text to Lowercase", "Texts in small letters.", str.lower, ["lowercase"])
_declare_change("TextToUppercase", "Convert Text to Uppercase", "Texts in capital letters.", str.upper, ["uppercase"])
_declare_change("StripWhitespace", "Strip Whitespace", "Texts without spaces and line breaks around them.", str.strip)


@node("TruncateText", "Truncate Text", "text", outputs=[_OUTPUT], search_aliases=["truncate", "cut", "shorten"])
def truncate_text(
    context: NodeContext,
    *,
    texts: str = _TEXTS,
    max_length: int = socket("INT", default=77, min=1, max=10000, tooltip="In characters."),
) -> tuple[str]:
    """Cut texts after a number of characters."""
    return (texts[:max_length],)


@node("AddTextPrefix", "Add Text Prefix (DEPRECATED)", "text", outputs=[_OUTPUT], deprecated=True)
def add_text_prefix(
    context: NodeContext, *, texts: str = _TEXTS, prefix: str = _line("Put in front, without a blank between.")
) -> tuple[str]:
    """Put a text in front of others, such as a trigger."""
    _check_length(len(prefix) + len(texts))
    return (prefix + texts,)


@node("AddTextSuffix", "Add Text Suffix (DEPRECATED)", "text", outputs=[_OUTPUT], deprecated=True)
def add_text_suffix(
    context: NodeContext, *, texts: str = _TEXTS, suffix: str = _line("Put behind, without a blank between.")
) -> tuple[str]:
    """Put a text behind others."""
    _check_length(len(texts) + len(suffix))
    return (texts + suffix,)


@node("ReplaceText", "Replace Text (DEPRECATED)", "text", outputs=[_OUTPUT], deprecated=True)
def replace_text(
    context: NodeContext,
    *,
    texts: str = _TEXTS,
    find: str = _line("To be replaced wherever it occurs."),
    replace: str = _line("To put there."),
) -> tuple[str]:
    """Replace each occurrence of a text."""
    _check_length(len(texts) + texts.count(find) * max(0, len(replace) - len(find)))
    return (texts.replace(find, replace),)


@node(
    "MergeTextLists",
    "Merge Text Lists (DEPRECATED)",
    "text",
    outputs=[Output("STRING", "texts", is_list=True)],
    is_input_list=True,
    deprecated=True,
)
def merge_text_lists(context: NodeContext, *, texts: list[str] = _TEXTS) -> tuple[list[str]]:
    """A list of texts as it is; Create List joins several lists."""
    return (texts,)


def _check_length(characters: int) -> None:
    if characters > _LONGEST:
        raise OptionError(f"a text must have at most {_LONGEST:,} characters, got {characters:,}; use shorter ones")


_SECONDS = 10.0  # time limit of a pattern
_BYTES = 1 << 30  # memory limit of its process, where the system has limits

# Matches are [whole, first group, ...]; standard input is {"pattern", "text", "flags", "replace", "count"}.
_PROGRAM = f"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({_BYTES}, {_BYTES}))
except (ImportError, ValueError, OSError):
    pass
job = json.load(sys.stdin)
try:
    pattern = re.compile(job["pattern"], job["flags"])
    if job["replace"] is None:
        result = [[one.group(0), *one.groups()] for one in pattern.finditer(job["text"])]
    else:
        result = pattern.sub(job["replace"], job["text"], count=job["count"])
    answer = {{"result": result}}
except (re.error, IndexError, OverflowError) as error:
    answer = {{"fault": str(error)}}
except (MemoryError, RecursionError):
    answer = {{"fault": "it takes too much memory"}}
json.dump(answer, sys.stdout)
"""


def _case_insensitive(*, optional: bool = False) -> Any:
    return socket(
        "BOOLEAN", default=True, optional=optional, tooltip="Ignore the difference of capital and small letters."
    )


def _multiline(*, optional: bool = False) -> Any:
    return socket("BOOLEAN", default=False, optional=optional, tooltip="^ and $ match at line breaks.")


def _dotall(*, optional: bool = False) -> Any:
    return socket("BOOLEAN", default=False, optional=optional, tooltip="A dot matches line breaks as well.")


@node(
    "RegexMatch",
    "Match Text",
    "text",
    outputs=[Output("BOOLEAN", "matches")],
    search_aliases=["regex match", "regex", "pattern match"],
)
def regex_match(
    context: NodeContext,
    *,
    string: str = _STRING,
    regex_pattern: str = _STRING,
    case_insensitive: bool = _case_insensitive(),
    multiline: bool = _multiline(),
    dotall: bool = _dotall(),
) -> tuple[bool]:
    """Whether a pattern matches somewhere in a text; a malformed one does not."""
    return (bool(_matches(context, string, regex_pattern, _flags(case_insensitive, multiline, dotall))),)


@node(
    "RegexExtract", "Extract Text", "text", outputs=["STRING"], search_aliases=["regex extract", "regex", "parse text"]
)
def regex_extract(
    context: NodeContext,
    *,
    string: str = _STRING,
    regex_pattern: str = _STRING,
    mode: str = socket("COMBO", options=("First Match", "All Matches", "First Group", "All Groups")),
    case_insensitive: bool = _case_insensitive(),
    multiline: bool = _multiline(),
    dotall: bool = _dotall(),
    group_index: int = socket("INT", default=1, min=0, max=100, tooltip="Of the modes of groups; 0 is the match."),
) -> tuple[str]:
    """What a pattern matches, one match per line; an empty text if it does not match or is malformed.

    As in ComfyUI, All Matches of a pattern with several groups are its first groups, and of one with one group these.
    """
    matches = _matches(context, string, regex_pattern, _flags(case_insensitive, multiline, dotall))
    if mode.startswith("First"):
        matches = matches[:1]
    if mode == "First Match":
        chosen = [match[0] for match in matches]
    elif mode == "All Matches":
        chosen = [match[1] if len(match) > 1 else match[0] for match in matches]
    else:
        chosen = [match[group_index] for match in matches if len(match) > max(group_index, mode == "All Groups")]
    return ("\n".join(text or "" for text in chosen),)


@node(
    "RegexReplace",
    "Replace Text (Regex)",
    "text",
    outputs=["STRING"],
    search_aliases=["regex replace", "regex", "substitution"],
)
def regex_replace(
    context: NodeContext,
    *,
    string: str = _STRING,
    regex_pattern: str = _STRING,
    replace: str = socket("STRING", multiline=True, tooltip="\\1 is the first group."),
    case_insensitive: bool = _case_insensitive(optional=True),
    multiline: bool = _multiline(optional=True),
    dotall: bool = _dotall(optional=True),
    count: int = socket("INT", default=0, min=0, max=100, optional=True, tooltip="Most replacements; 0 is all."),
) -> tuple[str]:
    """Replace what a pattern matches."""
    answer = _run(string, regex_pattern, _flags(case_insensitive, multiline, dotall), replace, count)
    if "fault" in answer:
        raise OptionError(
            f"regex_pattern and replace must be a regular expression, got {regex_pattern!r}: {answer['fault']}; "
            "correct it"
        )
    return (answer["result"],)


def _flags(case_insensitive: bool, multiline: bool, dotall: bool) -> int:
    return re.IGNORECASE * case_insensitive | re.MULTILINE * multiline | re.DOTALL * dotall


def _matches(context: NodeContext, text: str, pattern: str, flags: int) -> list[list[str | None]]:
    """All matches, each with its groups; none, with a warning, if the pattern is malformed."""
    answer = _run(text, pattern, flags)
    if "fault" in answer:
        context.warn(f"regex_pattern {pattern!r} matches nothing: {answer['fault']}")
        return []
    found: list[list[str | None]] = answer["result"]
    return found


def _run(text: str, pattern: str, flags: int, replace: str | None = None, count: int = 0) -> dict[str, Any]:
    """The answer of `_PROGRAM`. Raises OptionError if it took too long."""
    job = {"pattern": pattern, "text": text, "flags": flags, "replace": replace, "count": count}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OptionError(
            f"regex_pattern must match within {_SECONDS:g} seconds, but {pattern!r} did not on {len(text):,} "
            "characters; avoid repetitions inside repetitions"
        ) from error
    if done.returncode:
        return {"fault": "its process ended early"}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
