"""Write docs/settings.md and docs/commands.md from the declarations of settings and commands.

    python -m tools.reference

A test compares them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from lorasmith.cli.main import app
from lorasmith.core.options import Option
from lorasmith.runs.spec import SETTINGS

DOCS = Path(__file__).parents[1] / "docs"
_SETTINGS = """# Settings

<!-- written by tools/reference.py -->

Each setting is a flag of `lorasmith train`, with dashes; a keyword of `lorasmith.train` or `lorasmith.load_dataset`,
with underscores; and a key of a [file of settings](data.md#sources). A preset and [the recipe](subjects.md) replace
some defaults. *Automatic* defaults depend on model, pictures or machine.
"""
_COMMANDS = """# Commands

<!-- written by tools/reference.py -->

`--help` of a command prints the same. [files.md](files.md#output-for-programs) has the flags of all commands and
the exit codes; [settings.md](settings.md) has the settings of `train`.
"""


def pages() -> Mapping[str, str]:
    """Each page by its file name."""
    return {
        "settings.md": _SETTINGS + "".join(_settings()),
        "commands.md": _COMMANDS + "".join(_commands(typer.main.get_command(app), "lorasmith")),
    }


def _settings() -> Iterator[str]:
    declared = {one.group: None for one in SETTINGS.values()}
    by_group = sorted(SETTINGS.values(), key=lambda one: [*declared].index(one.group))
    for group, members in groupby(by_group, key=lambda one: one.group):
        yield f"\n## {group}\n\n| setting | default | values | meaning |\n|---|---|---|---|\n"
        for one in members:
            yield f"| `{one.name}` | {_default(one)} | {_values(one)} | {_cell(one.help)} |\n"


def _default(option: Option) -> str:
    if option.default is None:
        return "automatic"
    if option.default in ("", ()):
        return "none"
    return f"`{_number(option.default)}`"


def _values(option: Option) -> str:
    if option.choices:
        return ", ".join(f"`{one}`" for one in option.choices) + (", your own" if option.code else "")
    if option.type is bool:
        return "yes or no"
    if option.type is str:
        return "text, repeatable" if option.is_many else "text"
    low, high = option.min, option.max
    if high is not None and high >= 2**32:
        high = None
    kind = "number" if option.type is float else "integer"
    if low is None and high is None:
        return kind
    return f"{kind}, {_number(low)} to {_number(high)}" if high is not None else f"{kind}, from {_number(low)}"


def _number(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else f"{value}"


def _commands(group: Any, path: str) -> Iterator[str]:
    context = group.make_context("lorasmith", [], resilient_parsing=True)
    for name, command in sorted(group.commands.items()):
        words = f"{path} {name}"
        if hasattr(command, "commands"):
            yield from _commands(command, words)
            continue
        own = [one for one in command.get_params(context) if one.name not in SETTINGS and _is_own(one)]
        places = " ".join((one.metavar or one.name.upper()) for one in own if one.param_type_name == "argument")
        yield f"\n## {words.removeprefix('lorasmith ')}\n\n    {words} {places}".rstrip()
        yield f"\n\n{' '.join((command.help or '').split())}\n"
        if own:
            yield "\n| | |\n|---|---|\n"
        for one in own:
            called = one.name if one.param_type_name == "argument" else "`, `".join([*one.opts, *one.secondary_opts])
            yield f"| `{called}` | {_cell(getattr(one, 'help', '') or '')} |\n"


_GENERAL = ("help", "help_all", "json", "quiet", "log_file")


def _is_own(param: Any) -> bool:
    return param.name not in _GENERAL and not any(one.lstrip("-").replace("-", "_") in _GENERAL for one in param.opts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
