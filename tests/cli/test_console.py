"""What a stranger wrote is printed literally and without control characters, however it gets to the terminal."""

from __future__ import annotations

import ast
import dataclasses
import io
import itertools
import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.progress import TextColumn
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from lorasmith.cli import console as screen
from lorasmith.cli.main import app
from lorasmith.core.errors import GraphError, LorasmithError, OptionError
from lorasmith.core.progress_lines import PROGRESS_VARIABLE, ProgressLines
from lorasmith.training.events import Outcome

HOSTILE = "\x1b]0;title\x07\x9b31m a[/]b [bold]c[/bold] :smile: \u202e d\ne"
SHOWN = r"\u001b]0;title\u0007\u009b31m a[/]b [bold]c[/bold] :smile: \u202e d\ne"
CLI = sorted(Path(screen.__file__).parent.glob("*.py"))


@dataclasses.dataclass(frozen=True)
class Facts:
    """A result."""

    path: Path
    reason: Outcome
    losses: tuple[float, ...]


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Both streams of the console, as a narrow terminal with colours."""
    file = io.StringIO()
    for one in (screen.console, screen.errors):
        monkeypatch.setattr(one, "_file", file)
        monkeypatch.setattr(one, "_width", 400)
    yield file
    assert not set("\x1b\x07\x9b\u202e") & set(file.getvalue())


class Terminal(io.StringIO):
    """Takes what a terminal is sent."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal with colours in place of standard output."""
    file = Terminal()
    for name, value in {"_file": file, "_width": 400, "_force_terminal": True}.items():
        monkeypatch.setattr(screen.console, name, value)
    return file


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
    text = out.getvalue()
    assert text.count(SHOWN) == 8  # in a `Text` a line break stays one
    assert text.count("a[/]b [bold]c[/bold] :smile:") >= 9


def test_bars_are_literal_and_printable(terminal: Terminal) -> None:
    with screen.progress_shown(HOSTILE) as progress:
        progress(1, 2)
    with screen.progress_bar(TextColumn("{task.fields[text]}", markup=False)) as bar:
        bar.add_task("", total=2, text=HOSTILE)
    with screen.console.status(HOSTILE):
        pass
    text = terminal.getvalue()
    assert "\x1b]0;" not in text and "\x9b" not in text
    assert text.count("[bold]c[/bold") >= 2, "no markup"


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
        for library in ("matplotlib", "torchvision.io"):
            logging.getLogger(library).warning("created a temporary cache directory")
            with warnings.catch_warnings(record=True) as shown:
                warnings.warn_explicit(
                    "Failed to load image Python extension", UserWarning, "image.py", 1, module=library
                )
            assert shown == []
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
            "super().print",
            "super(_LiteralConsole, plain).print",
            "super(_LiteralConsole, errors).print",
            "echo",
        }:
            pytest.fail(f"{ast.unparse(call)} must print with the console")


def print_all() -> None:
    """A line, a note, and a result."""
    screen.echo("on the way")
    screen.print_result(
        lambda: Facts(Path("a/b"), Outcome.STOPPED, (1.0, float("nan"))), lambda: screen.echo("the result")
    )


def test_output_is_text_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with screen.output_as():
        print_all()
    assert capsys.readouterr() == ("on the way\nthe result\n", "")


def test_json_has_standard_output_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with screen.output_as(as_json=True):
        print_all()
    caught = capsys.readouterr()
    assert json.loads(caught.out) == {"path": "a/b", "reason": "stopped", "losses": [1.0, None]}
    assert caught.err == "on the way\n"
    screen.echo("afterwards")
    assert capsys.readouterr().out == "afterwards\n", "the console is as before"


def test_quiet_prints_the_result_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with screen.output_as(quiet=True, log_file=tmp_path / "log"):
        print_all()
        with screen.progress_shown("Counting") as progress:
            progress(2, 3)
    assert capsys.readouterr() == ("the result\n", "")
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line[21:] for line in lines] == ["on the way", "the result", "Counting: 2 of 3"]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)


@pytest.mark.parametrize(
    ("raised", "expected", "code"),
    [
        (OptionError("rank must be small"), {"kind": "OptionError", "message": "rank must be small"}, 1),
        (screen.StoppedError("stopped", 15), {"kind": "CancelledError", "message": "stopped"}, 143),
        (KeyboardInterrupt(), {"kind": "CancelledError", "message": "interrupted"}, 130),
        (GraphError("it has", ("a", "b")), {"kind": "GraphError", "message": "it has", "findings": ["a", "b"]}, 1),
    ],
)
def test_an_error_takes_the_place_of_the_result(
    raised: BaseException, expected: dict[str, object], code: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(typer.Exit) as ended, screen.output_as(as_json=True, quiet=True, log_file=tmp_path / "log"):
        raise raised
    caught = capsys.readouterr()
    assert ended.value.exit_code == code
    assert json.loads(caught.out) == {"error": {**expected, "exit_code": code}}
    assert str(expected["message"]) in caught.err, "errors are printed however quiet it is"
    assert str(expected["message"]) in (tmp_path / "log").read_text()


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), screen.output_as(as_json=True, log_file=tmp_path / "log"):
        _ = 1 / 0
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "InternalError"
    assert "Traceback" in (tmp_path / "log").read_text()


def test_an_error_after_the_result_is_no_second_document(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), screen.output_as(as_json=True):
        print_all()
        raise LorasmithError("late")
    caught = capsys.readouterr()
    assert json.loads(caught.out)["reason"] == "stopped" and "late" in caught.err


def test_the_log_file_is_appended_to_and_has_no_control_codes(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    with screen.output_as(log_file=log):
        screen.heading("bold", HOSTILE)
        with screen.progress_shown("Counting") as progress:
            progress(2, 2)
        logging.getLogger("other").warning("of a package")
    text = log.read_text()
    assert "\x1b[1m" in terminal.getvalue() and "━" in terminal.getvalue()
    assert not set("\x1b\x07\x9b\u202e━") & set(text)
    assert [line[21:] for line in text.splitlines()[1:]] == [f"bold {SHOWN}", "Counting: 2 of 2", "of a package"]
    assert not logging.getLogger().handlers or logging.lastResort not in logging.getLogger().handlers


def test_lines_of_several_processes_name_theirs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(typer.Exit), screen.output_as(log_file=tmp_path / "log"):
        screen.name_output("rank 1 of 2, host-b")
        screen.echo("hello")
        raise OptionError("no")
    assert [line[21:] for line in (tmp_path / "log").read_text().splitlines()] == [
        "[rank 1 of 2, host-b] hello",
        "[rank 1 of 2, host-b] error: no",
    ]
    assert capsys.readouterr().err == "[rank 1 of 2, host-b] error: no\n"
    with pytest.raises(typer.Exit), screen.output_as():
        raise OptionError("no")
    assert capsys.readouterr().err == "error: no\n"


def test_a_log_file_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(typer.Exit), screen.output_as(as_json=True, log_file=tmp_path / "nowhere" / "log"):
        pytest.fail("the command runs")
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert message.startswith("--log-file must be a file that can be written") and "No such file" in message
    if Path("/dev/full").exists():
        with screen.output_as(log_file=Path("/dev/full")):
            print_all()
            screen.echo("more")
        caught = capsys.readouterr()
        assert "the result" in caught.out and caught.err.count("is not written further") == 1


def test_lines_come_at_intervals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS_VARIABLE, "10")
    now = 0.0
    lines = ProgressLines(screen.echo, clock=lambda: now)
    for second in range(25):
        now = float(second)
        lines.report(f"at {second}")
    lines.end()
    lines.end()
    assert capsys.readouterr().out.split("\n") == ["at 10", "at 20", "at 24", ""]


def test_work_that_reports_nothing_has_lines_with_the_time() -> None:
    now, printed = 0.0, list[str]()
    lines = ProgressLines(printed.append, "Loading", clock=lambda: now)

    def at(second: float, then: Callable[[], object]) -> list[str]:
        nonlocal now
        now = second
        then()
        found = printed[:]
        printed.clear()
        return found

    assert at(29, lines.beat) == [] and at(30, lines.beat) == ["Loading, 0:00:30 so far"]
    assert at(59, lines.beat) == [] and at(61, lines.beat) == ["Loading, 0:01:01 so far"]
    lines.begin("Sampling")
    assert at(62, lambda: lines.report("Sampling: 0 of 4")) == []
    assert at(91, lines.beat) == ["Sampling: 0 of 4, 0:00:30 so far"]
    assert at(100, lambda: lines.report("Sampling: 1 of 4", 1 / 4)) == []
    assert at(121, lines.beat) == ["Sampling: 1 of 4, 0:01:00 so far, about 0:03:00 left"]
    assert at(181, lambda: lines.report("Sampling: 2 of 4", 2 / 4)) == ["Sampling: 2 of 4, about 0:02:00 left"]
    assert at(190, lambda: lines.report("Sampling: 4 of 4", 1)) == [] and at(191, lines.end) == ["Sampling: 4 of 4"]
    assert at(300, lines.beat) == []
    lines.close()


class Beating(ProgressLines):
    """Whose thread is a test's: a state is printed at once."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        ticks = itertools.count(0, 60)
        super().__init__(*arguments, **settings, clock=lambda: float(next(ticks)))
        self.beat()


def test_each_command_has_these_lines_where_nothing_is_drawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "ProgressLines", Beating)
    with screen.console.status("Loading a model"):
        pass
    with screen.progress_shown("Merging"):
        pass
    with screen.output_as(as_json=True), screen.console.status("Reading"):
        pass
    out, err = capsys.readouterr()
    assert out.splitlines() == ["Loading a model, 0:02:00 so far", "Merging, 0:02:00 so far"]
    assert err.splitlines() == ["Reading, 0:02:00 so far"]


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan"])
def test_an_interval_that_is_none(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS_VARIABLE, given)
    with pytest.raises(OptionError, match=f"must be a number of seconds above 0, got '{given}'"):
        screen.progress_lines()


def test_colours_that_are_forced_make_no_terminal_of_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen.console, "_force_terminal", True)  # as FORCE_COLOR
    with screen.console.status("Loading"), screen.progress_shown("Counting") as progress:
        progress(1, 2)
    assert capsys.readouterr().out == "Counting: 1 of 2\n"


def test_a_command_in_a_thread_asks_for_no_signals() -> None:
    """As in a worker of Ray Train, which runs what it is given in a thread."""
    ended = []

    def work() -> None:
        with screen.stoppable() as stop:
            ended.append(stop.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [False]
