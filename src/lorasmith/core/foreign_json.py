"""Untrusted JSON: headers and metadata of files, configurations, records of runs, workflows.

`json.loads` accepts more than JSON (NaN, lone surrogates, repeated names), raises more than ValueError
(RecursionError), and builds whatever fits into memory. What passes here is plain data: finite numbers, valid UTF-8,
bounded depth and size.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 100
"""Maximum nesting of lists and objects, far below where recursive code would fail."""


def parse_foreign_json(text: str | bytes, *, finite: bool = True) -> Any:
    """The value of a JSON text, in time and memory proportional to its length.

    Raises ValueError if it is not JSON in UTF-8, is nested deeper than `MAX_DEPTH`, has more than two million values,
    repeats a name in an object, or holds half of a surrogate pair, or (if `finite`) a number that is not finite or an
    integer beyond 64 bits, which configurations of diffusers and transformers do: their long integers become
    floats. The message is a clause without a subject: "is not valid JSON".
    """
    try:
        text = text if isinstance(text, str) else str(text, "utf-8")
        text.encode("utf-8")
    except UnicodeError:
        raise ValueError("is not text in UTF-8") from None
    if _count(text) > _MAX_VALUES and _count(_STRING.sub("", text)) > _MAX_VALUES:
        raise ValueError(f"has more than {_MAX_VALUES:,} values")
    try:
        value = (_DECODER if finite else _LENIENT_DECODER).decode(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except json.JSONDecodeError:
        raise ValueError("is not valid JSON") from None
    _refuse_depth(value)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair, which is not text") from None
    return value


_MAX_VALUES = 2_000_000  # ten times those of the header of a large model; up to 200 bytes each in memory
_TOO_DEEP = f"has lists or objects nested deeper than {MAX_DEPTH}"
# A string without its end matches, too, and nothing is tried twice: each character is read once, whatever the text.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _count(text: str) -> int:
    """An upper bound of the number of values."""
    return text.count(",") + text.count("[") + text.count("{")


def _refuse_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [value for value in level if isinstance(value, (dict, list))]
        if not containers:
            return
        level = [
            inner
            for container in containers
            for inner in (container.values() if isinstance(container, dict) else container)
        ]
    raise ValueError(_TOO_DEEP)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("has a name twice in one object")
    return result


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS or not -(2**63) <= (number := int(digits)) < 2**64:
        raise ValueError("has an integer beyond 64 bits")
    return number


def _lenient_integer(digits: str) -> int | float:
    return float(digits) if _MAX_DIGITS < len(digits) < 2 * _MAX_DIGITS else _integer(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("has a number that is not finite")
    return number


def _constant(name: str) -> float:
    raise ValueError(f"has a number that is not finite, {name}")


_MAX_DIGITS = len(str(-(2**63)))
_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_duplicates, parse_int=_integer, parse_float=_float, parse_constant=_constant
)
_LENIENT_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_int=_lenient_integer)
