"""What a stranger wrote is printed literally and without control characters, however it gets to the terminal."""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.progress import TextColumn
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from lorasmith.cli import console as screen
from lorasmith.cli.main import app
from lorasmith.core.errors import GraphError

HOSTILE = "\x1b]0;title\x07\x9b31m a[/]b [bold]c[/bold] :smile: \u202e d\ne"
SHOWN = r"\u001b]0;title\u0007\u009b31m a[/]b [bold]c[/bold] :smile: \u202e d\ne"
CLI = sorted(Path(screen.__file__).parent.glob("*.py"))


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Both streams of the console, as a narrow terminal with colours."""
    file = io.StringIO()
    for one in (screen.console, screen.errors):
        monkeypatch.setattr(one, "_file", file)
        monkeypatch.setattr(one, "_width", 400)
    yield file
    assert not set("\x1b\x07\x9b\u202e") & set(file.getvalue())


def test_every_way_to_print_is_literal_and_printable(out: io.StringIO) -> None:
    table = Table(HOSTILE, box=None)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    for show in (screen.echo, screen.heading, screen.print_note, screen.console.print):
        show(HOSTILE)
    screen.print_error(HOSTILE, kind="error")
    screen.print_note(HOSTILE, kind="Fault", indent=3)
    screen.console.print(table)
    with screen.progress_shown(HOSTILE) as progress:
        progress(1, 2)
    with screen.progress_bar(TextColumn("{task.fields[text]}", markup=False)) as bar:
        bar.add_task("", total=2, text=HOSTILE)
    with screen.console.status(HOSTILE):
        pass

    text = out.getvalue()
    assert text.count(SHOWN) == 7  # in a `Text` and in a bar's column a line break stays one
    assert text.count("a[/]b [bold]c[/bold] :smile:") >= 9


def test_json_stays_json(out: io.StringIO) -> None:
    value = {HOSTILE: [HOSTILE + "\ud800", "x" * 20_000]}
    screen.console.print_json(json.dumps(value))

    assert json.loads(out.getvalue()) == value


def test_a_line_is_a_line_and_not_endless(out: io.StringIO) -> None:
    screen.echo("a\nb" + "x" * 10**6)

    assert out.getvalue().count("\n") == 1
    assert len(out.getvalue()) < 11_000


def test_findings_of_a_workflow_have_lines_of_their_own(out: io.StringIO) -> None:
    screen.print_error(str(GraphError("it has 2 faults", ("one \x1b[31m", "two\n"))), kind="error")

    assert out.getvalue().splitlines() == ["error: it has 2 faults", r"  - one \u001b[31m", r"  - two\n"]


def test_warnings_and_logs_of_other_packages_are_printable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    before = logging.getLogRecordFactory()
    try:
        screen.other_output_made_printable()
        logging.getLogger("other").warning("reads %s", HOSTILE)
        assert warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "", 1) == f"UserWarning: {SHOWN}\n"
        print("→")
    finally:
        logging.setLogRecordFactory(before)

    assert caplog.messages == [f"reads {SHOWN}"]


@pytest.mark.parametrize(
    "argv", [["inspect", "a", HOSTILE], [HOSTILE], ["inspect", f"--{HOSTILE}"], ["demo", "--steps", HOSTILE]]
)
def test_complaints_about_arguments_are_printable(argv: list[str]) -> None:
    ran = CliRunner().invoke(app, argv, env={"TERM": "dumb", "COLUMNS": "300"})

    assert ran.exit_code == 2
    assert not set("\x1b\x07\x9b\u202e") & set(ran.output)
    assert "]0;title" in ran.output or "--steps" in argv


@pytest.mark.parametrize("path", CLI, ids=lambda path: path.stem)
def test_markup_is_nowhere_interpreted(path: Path) -> None:
    """Rich interprets it in columns and `Text.from_markup`; the console's own methods do not."""
    for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func).rpartition(".")[2]
        keywords = {one.arg: ast.unparse(one.value) for one in call.keywords}
        assert name not in {"from_markup", "from_ansi", "Console", "print_exception"}, ast.unparse(call)
        assert keywords.get("markup", "False") == "False", ast.unparse(call)
        if name == "TextColumn" and not isinstance(call.args[0], ast.Constant):
            pytest.fail(f"{ast.unparse(call)} must have a literal format")
        if name == "TextColumn" and "{" in str(call.args[0].value):  # type: ignore[attr-defined]
            assert keywords.get("markup") == "False", ast.unparse(call)
        if name in {"print", "secho", "echo"} and ast.unparse(call.func) not in {
            "console.print",
            "errors.print",
            "echo",
        }:
            pytest.fail(f"{ast.unparse(call)} must print with the console")
