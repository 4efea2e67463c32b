"""The help of every command fits into 80 columns, with whole names and whole sentences."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lorasmith.cli.main import app
from lorasmith.cli.train import _FIRST
from lorasmith.core.options import options_of
from lorasmith.data.data_config import DataConfig
from lorasmith.training.config import TrainConfig

ROOT: Any = typer.main.get_command(app)


def commands(group: Any = ROOT, path: str = "") -> dict[str, Any]:
    found = {path: group}
    for name, one in getattr(group, "commands", {}).items():
        found |= commands(one, f"{path} {name}".strip())
    return found


COMMANDS = commands()
LEAVES = {path: one for path, one in COMMANDS.items() if not hasattr(one, "commands")}


@functools.cache
def shown(command: str, flag: str = "--help") -> str:
    env = {"COLUMNS": "80", "TERM": "dumb", "LORASMITH_BASE_DIR": ""}
    ran = CliRunner().invoke(app, [*command.split(), flag], env=env)
    assert ran.exit_code == 0, ran.output
    return ran.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_into_80_columns_and_cuts_nothing(command: str) -> None:
    text = shown(command)
    whole = shown(command, "--help-all") if "--help-all" in text else text
    for lines in (text, whole):
        assert max(map(len, lines.splitlines())) <= 80
        assert "…" not in lines
    for param in COMMANDS[command].params:
        for name in [one for one in (*param.opts, *param.secondary_opts) if one.startswith("-")]:
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", whole), name
    for one in getattr(COMMANDS[command], "commands", {}).values():
        assert one.get_short_help_str(400) in " ".join(text.split()), "summaries are whole"


@pytest.mark.parametrize("command", LEAVES)
def test_sentences_of_the_description_reflow(command: str) -> None:
    """No line ends early: the first word of the next one would not have fitted."""
    text = shown(command).partition("\n\n")[2].partition("\n\nArguments:")[0].partition("\n\nOptions:")[0]
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        for line, following in itertools.pairwise(lines):
            assert len(line) + 1 + len(following.split()[0]) > 78, line


def test_the_options_that_matter_come_first_and_all_are_behind_another_flag() -> None:
    text, whole = shown("train"), shown("train", "--help-all")
    flags = re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)
    assert flags == [*(f"--{name.replace('_', '-')}" for name in _FIRST), "--help", "--help-all"]
    assert len(text.splitlines()) < 60 < len(whole.splitlines())
    for name, option in {**options_of(DataConfig), **options_of(TrainConfig)}.items():
        assert f"--{name.replace('_', '-')}" in whole
        assert not option.group or f"\n{option.group}:\n" in whole


def test_a_command_of_few_options_has_one_help() -> None:
    assert "--help-all" not in shown("report")
    assert CliRunner().invoke(app, ["report", "--help-all"]).exit_code == 2


@pytest.mark.parametrize("group", [(), ("data",), ("data", "cache")], ids=" ".join)
def test_a_group_without_a_command_shows_its_help(group: tuple[str, ...]) -> None:
    bare, asked = (CliRunner().invoke(app, [*group, *more]) for more in ([], ["--help"]))
    assert "Commands:" in bare.output and bare.output == asked.output and bare.exit_code == 0
