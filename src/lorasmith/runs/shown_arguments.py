"""Signatures, documentation and arguments of the library's functions whose settings are declared elsewhere."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from lorasmith.core.arguments import check_arguments
from lorasmith.core.options import Option, options_of

A = TypeVar("A")

_WIDTH = 96  # columns: `help` indents by four


def shown(function: Callable[..., Any], arguments: Any) -> Any:
    """The function with the fields of the dataclass in place of `**arguments`, non-options first, and explained."""
    plain, hints = inspect.signature(function, eval_str=True), get_type_hints(arguments)
    first = [one for one in plain.parameters.values() if one.kind is not one.VAR_KEYWORD]
    others = [one.replace(annotation=hints[one.name]) for one in inspect.signature(arguments).parameters.values()]
    settings = options_of(arguments)
    others.sort(key=lambda one: one.name in settings)
    function.__signature__ = plain.replace(parameters=[*first, *others])  # type: ignore[attr-defined]
    if (own := inspect.getdoc(function)) is not None:  # None with -OO
        around = (inspect.getdoc(arguments) or "").partition("\nAttributes:\n")[2]
        further = f"Further arguments:\n{around}".replace("\n\n", "\n").rstrip()
        function.__doc__ = "\n\n".join((_narrow(own), _narrow(further), settings_text(arguments)))
    return function


def settings_text(arguments: Any) -> str:
    """The declarations of a class's options: name, type, default, range and meaning, by group."""
    groups: dict[str, list[str]] = {}
    for declared in options_of(arguments).values():
        text = f"    {declared.name} ({_facts(declared)}): {declared.help}"
        groups.setdefault(declared.group or "Settings", []).append(text)
    return "\n\n".join(_narrow("\n".join([f"{group}:", *texts])) for group, texts in groups.items())


def _narrow(text: str) -> str:
    """A docstring wrapped again: paragraphs, headings that end in a colon, and indented items below them."""
    lines: list[tuple[int, str]] = []
    for line in text.splitlines():
        indent, words = len(line) - len(line.lstrip()), line.strip()
        before, last = lines[-1] if lines else (0, "")
        if words and last and (indent > before or indent == before == 0) and not (before == 0 and last.endswith(":")):
            lines[-1] = (before, f"{last} {words}")
        else:
            lines.append((indent, words))
    return "\n".join(
        textwrap.fill(words, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent and indent + 4))
        for indent, words in lines
    )


def _facts(declared: Option) -> str:
    facts = [declared.type.__name__, f"default {declared.default!r}"]
    if declared.choices:
        facts.append(f"one of {', '.join(map(repr, declared.choices))}")
    elif declared.min is not None or declared.max is not None:
        facts.append(declared.range_text())
    return ", ".join(facts)


def taken(kind: type[A], function: str, arguments: Mapping[str, Any]) -> tuple[A, dict[str, Any]]:
    """The arguments that are no settings, by their class and checked, and the settings."""
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name not in options_of(kind)}
    own = {name: value for name, value in arguments.items() if name in hints}
    check_arguments(own, hints, function)
    return kind(**own), {name: value for name, value in arguments.items() if name not in hints}
