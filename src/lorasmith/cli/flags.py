"""Command-line flags from option declarations, so that a setting is described in one place only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from lorasmith.core.options import Option

__all__ = ["arguments_for", "with_flags"]


def with_flags(
    command: Callable[..., None], options: Mapping[str, Option], *, aliases: Mapping[str, str] | None = None
) -> Callable[..., None]:
    """`command` with a flag for each option, where it has `**settings`.

    Args:
        command: takes its own parameters and `**settings` (the options by name).
        options: declarations by name.
        aliases: further flags by option name, such as `{"training_dtype": "--dtype"}`.
    """
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    flags = [_flag(one, (aliases or {}).get(name)) for name, one in options.items()]

    def run(**arguments: Any) -> None:
        command(**arguments)

    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own, *flags)}
    return run


def arguments_for(values: Mapping[str, Any]) -> list[str]:
    """What to type for options to have `values`, by name; a switch is True or False."""
    arguments: list[str] = []
    for name, value in values.items():
        arguments += [_off(name)] if value is False else [_name(name)] if value is True else [_name(name), str(value)]
    return arguments


def _name(option: str) -> str:
    return "--" + option.replace("_", "-")


def _off(option: str) -> str:
    return "--no-" + option.replace("_", "-")


def _flag(option: Option, alias: str | None) -> inspect.Parameter:
    # Types are converted by typer; ranges and choices are checked, and worded, by the option itself. A switch that is
    # off by default needs no flag that turns it off.
    name, off = _name(option.name), f"/{_off(option.name)}" if option.default is True else ""
    declared = [name + off, *([alias] if alias else [])]
    details: dict[str, Any] = {"help": _described(option), "rich_help_panel": option.group or None}
    if option.type is not bool:
        details["metavar"] = {int: "N", float: "X", str: "NAME" if option.choices else "TEXT"}[option.type]
    annotation = option.type | None if option.default is None else option.type
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=option.default,
        annotation=Annotated[annotation, typer.Option(*declared, **details)],
    )


def _described(option: Option) -> str:
    """The option's help with what it accepts."""
    if option.choices:
        return f"{option.help} One of {', '.join(option.choices)}."
    if option.min is not None and option.max is not None and option.max < 2**32:
        return f"{option.help} {option.min:g} to {option.max:g}."
    return option.help
