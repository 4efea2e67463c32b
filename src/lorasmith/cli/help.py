"""Help of commands in plain text: sentences reflow, names are never cut, and what matters first comes first.

Commands with many options show the first of them with `--help`, and all, in groups, with `--help-all`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lorasmith.cli.console import echo

OUTPUT = "Output"  # group of the options that all commands have

_MANY = 20  # options from which a command has `--help-all`

_NAMES = 28  # columns of names and their values; longer ones have a line of their own
_SUMMARY = 400  # characters of a command's summary in a list


class HelpCommand(TyperCommand):
    """A command whose help is plain text."""

    first: tuple[str, ...] = ()  # the options, in order, that `--help` shows of many; if empty, those in no group
    _shows_all = False

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, `--help` and, of a command with many options, `--help-all`."""
        params = super().get_params(ctx)
        about = self.get_help_option(ctx)
        return params if len(params) <= _MANY or about is None else [*params, _help_all(about, self)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super(TyperCommand, self).format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        params = self.get_params(ctx)
        is_short = len(params) > _MANY and not self._shows_all
        if is_short:
            params = self._first_of(params)
        groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for param in params:
            if (record := param.get_help_record(ctx)) is not None:
                is_argument = param.param_type_name == "argument"
                group = "" if is_short else getattr(param, "rich_help_panel", None)
                groups["Arguments" if is_argument else group or "Options"].append(record)
        for group in sorted(groups, key=OUTPUT.__eq__):  # last
            with formatter.section(group):
                formatter.write_dl(groups[group], col_max=_NAMES)

    def _first_of(self, params: list[Any]) -> list[Any]:
        kept = {param.name: param for param in params}
        arguments = [param for param in params if param.param_type_name == "argument"]
        if self.first:
            options = [kept[name] for name in self.first]
        else:
            options = [one for one in params if one not in arguments and not getattr(one, "rich_help_panel", None)]
        about = [param for param in params if param.name in ("help", "help_all") and param not in options]
        return [*arguments, *options, *about]


class HelpGroup(TyperGroup):
    """A group of commands whose help is plain text, with their whole summaries."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super(TyperGroup, self).format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records = [record for param in self.get_params(ctx) if (record := param.get_help_record(ctx)) is not None]
        with formatter.section("Options"):
            formatter.write_dl(records, col_max=_NAMES)
        found = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(_SUMMARY)) for name, one in found if one is not None])


def with_first(*options: str) -> type[HelpCommand]:
    """The class of a command whose `--help` shows these options first."""
    return type("FirstOptions", (HelpCommand,), {"first": options})


def with_readable_help(app: typer.Typer) -> None:
    """Give all commands of a group plain-text help."""
    for command in app.registered_commands:
        if command.cls is None or not issubclass(command.cls, HelpCommand):
            command.cls = HelpCommand


def _help_all(help_option: Any, command: HelpCommand) -> Any:
    """The option `--help-all`, made of the option `--help`."""

    def show(ctx: Any, param: Any, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            whole = copy.copy(command)
            whole._shows_all = True
            for line in whole.get_help(ctx).splitlines():
                echo(line)
            ctx.exit()

    option = copy.copy(help_option)
    option.name, option.opts, option.callback = "help_all", ["--help-all"], show
    number = sum(param.param_type_name == "option" for param in command.params)
    option.help = f"Show all {number} options and exit."
    return option
