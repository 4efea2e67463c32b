"""Shared by commands: the console, results and errors as text or JSON, progress, and handling of Ctrl-C.

What commands print comes mostly from files that are untrusted. The console takes text literally (no markup, no
`:emoji:`) and shows control characters as escapes, by whichever method it is printed.

A command prints its result with `print_result`; all other output is progress. `output_as` derives `--json`, `--quiet`
and `--log-file` from this difference, so that no command handles them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import io
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from lorasmith.core.errors import CancelledError, GraphError, LorasmithError, OptionError
from lorasmith.core.printable import printable
from lorasmith.core.progress_lines import ProgressLines, seconds_between_lines

if TYPE_CHECKING:
    from lorasmith.data.findings import Finding

_LOG_WIDTH = 160


class _LiteralConsole(Console):
    """A console that shows text of any origin as it is, on one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """A string, of a line or of a table's cell, as rich text."""
        return super().render_str(printable(text), **settings | {"markup": False, "emoji": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything that is printed, progress bars and JSON included, in pieces of one style."""
        for piece in super().render(renderable, options):
            shown = piece.text if piece.control else printable(piece.text, limit=sys.maxsize, keep="\n")
            yield Segment(shown, piece.style, piece.control)

    def print(self, *objects: Any, **settings: Any) -> None:
        super().print(*objects, **settings)
        if _output.log is not None:
            _output.log.add(*objects, **settings)

    def status(self, status: RenderableType, **settings: Any) -> Status:
        """A spinner with literal text, which rich would parse as markup, or lines now and then where none is drawn."""
        shown = self.render_str(status) if isinstance(status, str) else status
        if _output.log is not None:
            _output.log.add(shown)
        if not self.draws:
            return _StatusInLines(shown, console=_LiteralConsole(file=io.StringIO()), **settings)
        return super().status(shown, **settings)

    @property
    def draws(self) -> bool:
        """Whether spinners and bars can be drawn; in a file they cannot, whatever FORCE_COLOR says."""
        return self.is_terminal and not self.is_dumb_terminal and self.file.isatty()

    def on_standard_error(self, is_asked: bool) -> None:
        """Print on standard error, or on standard output if False, in the colours that the stream supports."""
        self.stderr = is_asked
        self._color_system = self._detect_color_system()


class _LogFile:
    """A file for output as plain text, each line with its time. A failed write ends the log, not the work."""

    def __init__(self, path: Path) -> None:
        try:
            self._file: TextIO | None = path.open("a", encoding="utf-8", errors="backslashreplace")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OptionError(f"--log-file must be a file that can be written, but {path}: {reason}") from error
        self._path = path
        self._lock = threading.Lock()

    def add(self, *objects: Any, **settings: Any) -> None:
        """Append the output of `Console.print` for these arguments."""
        plain = _LiteralConsole(file=(text := io.StringIO()), width=_LOG_WIDTH, color_system=None, force_terminal=False)
        super(_LiteralConsole, plain).print(*objects, **settings)
        self.add_text(text.getvalue())

    def add_text(self, text: str) -> None:
        """Append lines, without empty ones."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = [
            f"{now}  {_output.source}{line.rstrip().removeprefix(_output.source)}\n"
            for line in text.splitlines()
            if line.strip()
        ]
        with self._lock:
            if self._file is None or not lines:
                return
            try:
                self._file.write("".join(lines))
                self._file.flush()
            except OSError as error:
                self.close()
                super(_LiteralConsole, errors).print(f"--log-file {self._path} is not written further: {error}")

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


@dataclasses.dataclass
class _Output:
    """How the running command prints."""

    as_json: bool = False  # its result is JSON on standard output
    log: _LogFile | None = None
    is_complete: bool = False  # the JSON document is printed
    source: str = ""  # prefix of lines of errors and logs: which of several processes prints


_output = _Output()
console = _LiteralConsole()
errors = _LiteralConsole(stderr=True)


@contextlib.contextmanager
def output_as(*, as_json: bool = False, quiet: bool = False, log_file: Path | None = None) -> Iterator[None]:
    """Inside the context, commands print in this way; errors and Ctrl-C end the command with their exit code
    (typer.Exit).

    With `as_json`, the result, or an error, is one JSON document on standard output, and the rest is on standard error.
    `quiet` prints the result alone. `log_file` gets everything all the same, and warnings and log records of other
    packages.
    """
    before = vars(_output).copy(), console.quiet
    _output.as_json, _output.is_complete, console.quiet = as_json, False, quiet
    console.on_standard_error(as_json)
    try:
        with _ending_with_a_sentence(), contextlib.ExitStack() as stack:
            seconds_between_lines()
            if log_file is not None:
                _output.log = _LogFile(log_file)
                stack.callback(_output.log.close)
                stack.enter_context(_others_logged(_output.log))
            # Errors are appended to the log, too.
            with _ending_with_a_sentence():
                yield
    finally:
        vars(_output).update(before[0])
        console.quiet = before[1]
        console.on_standard_error(_output.as_json)


@contextlib.contextmanager
def _ending_with_a_sentence() -> Iterator[None]:
    try:
        yield
    except CancelledError as stopped:
        end_with(stopped, getattr(stopped, "exit_code", 128 + signal.SIGINT), kind="stopped")
    except LorasmithError as error:
        end_with(error, getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        end_with(CancelledError("interrupted"), 128 + signal.SIGINT, kind="stopped")
    except Exception as error:
        if not hasattr(error, "exit_code"):  # a bug: neither typer.Exit nor a usage error
            print_json_error("InternalError", f"{type(error).__name__}: {error}", 1)
            if _output.log is not None:
                _output.log.add_text(printable(traceback.format_exc(), limit=sys.maxsize, keep="\n"))
        raise


@contextlib.contextmanager
def _others_logged(log: _LogFile) -> Iterator[None]:
    """Inside the context, warnings and log records of other packages are also appended to the log."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.add_text(printable(self.format(record), limit=sys.maxsize, keep="\n"))

    root, handler, shown = logging.getLogger(), Handler(logging.WARNING), warnings.showwarning
    last = [] if root.handlers or logging.lastResort is None else [logging.lastResort]  # unused beside other handlers

    def show(message: Any, category: Any, *place: Any, **keywords: Any) -> None:
        shown(message, category, *place, **keywords)
        log.add_text(f"{category.__name__}: {printable(message, limit=sys.maxsize)}")

    warnings.showwarning = show
    for own_handler in (handler, *last):
        root.addHandler(own_handler)
    try:
        yield
    finally:
        warnings.showwarning = shown
        for own_handler in (handler, *last):
            root.removeHandler(own_handler)


@contextlib.contextmanager
def result_shown() -> Iterator[None]:
    """Inside the context, what is printed is part of the result, which --quiet shows."""
    was, console.quiet = console.quiet, False
    try:
        yield
    finally:
        console.quiet = was


def name_output(source: str) -> None:
    """Prefix errors, warnings and log lines with a text until the command ends."""
    _output.source = f"[{source}] "


@contextlib.contextmanager
def output_silenced() -> Iterator[None]:
    """Inside the context, only errors are printed."""
    was, console.quiet = console.quiet, True
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        console.quiet = was


def print_result(document: Callable[[], object], text: Callable[[], object] = lambda: None) -> None:
    """Print the result of the command: `document()` as JSON on standard output, or `text()`, which prints it.

    The document may contain dataclasses, enums and paths; non-finite numbers become null.
    """
    with result_shown():
        if _output.as_json:
            _print_document(document())
        else:
            text()


def print_json_error(kind: str, message: str, code: int, **more: object) -> None:
    """Print an error as the JSON document, if the result would be JSON, besides its sentence on standard error.

    `kind` is its class in `core.errors`, `UsageError` for a wrong command line, or `InternalError` for a bug; `more`
    are fields that errors of this kind have.
    """
    if _output.as_json and not _output.is_complete:
        with result_shown():
            _print_document({"error": {"kind": kind, "message": message, "exit_code": code, **more}})


def end_with(error: LorasmithError, code: int = 1, *, kind: str = "error") -> NoReturn:
    """Print an error, labelled `kind`, and end the command by typer.Exit."""
    name = next(base.__name__ for base in type(error).__mro__ if base.__module__ == LorasmithError.__module__)
    findings = {"findings": error.findings} if isinstance(error, GraphError) else {}
    print_json_error(name, str(error).split("\n", 1)[0], code, **findings)
    print_error(str(error), kind=kind)
    raise typer.Exit(code) from error


def _print_document(value: object) -> None:
    _output.is_complete = True
    console.on_standard_error(False)
    try:
        console.print_json(json.dumps(_plain(value), allow_nan=False), highlight=console.draws)
    finally:
        console.on_standard_error(_output.as_json)


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        known = (str, int, float, bool, type(None))
        return {key if isinstance(key, known) else str(key): _plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    return str(value)


def other_output_made_printable() -> None:
    """From here on, warnings and log records of other packages are printable.

    Characters that the encoding of a standard stream lacks become escapes, too.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    made = logging.getLogRecordFactory()

    def record(*args: Any, **keywords: Any) -> logging.LogRecord:
        entry = made(*args, **keywords)
        entry.msg, entry.args = _output.source + printable(entry.getMessage()), ()
        return entry

    logging.setLogRecordFactory(record)
    warnings.formatwarning = lambda message, category, *_: (
        f"{_output.source}{category.__name__}: {printable(message)}\n"
    )
    for name in ("matplotlib", "torchvision"):  # about fonts, caches and codecs, which runs do not need
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")


def echo(text: object = "") -> None:
    """Print text on one line that is not wrapped, so that paths and captions can be copied."""
    console.print(str(text), soft_wrap=True)


def heading(text: str, then: object = "") -> None:
    """Print text in bold, then more on the same line in plain."""
    console.print(Text.assemble((printable(text), "bold"), f" {printable(then)}" if then else ""), soft_wrap=True)


def print_note(sentence: str, *, kind: str = "Note", colour: str = "yellow", indent: int = 0) -> None:
    """Print a labelled sentence in one piece, so that no progress bar interferes; `indent` is in blanks."""
    console.print(Text.assemble(" " * indent, (f"{kind}:", colour), f" {printable(sentence)}"), soft_wrap=True)


def print_problem(problem: str, remedy: str, *, kind: str | None) -> None:
    """Print what is wrong with its remedy, labelled `kind` in red; of what is only noted the kind is None."""
    print_note(f"{problem}; {remedy}.", kind=kind or "Note", colour="yellow" if kind is None else "red")


def print_facts(facts: Mapping[str, str], width: int, below: Mapping[str, Iterable[object]] | None = None) -> None:
    """Print labelled lines, those without text left out, each with further lines below its label."""
    for label, text in facts.items():
        if text:
            echo(f"{label:<{width}}{text}")
        for more in (below or {}).get(label, ()):
            echo(f"{'':<{width}}{more}")


def print_findings(findings: Sequence[Finding], *, most: int | None = None) -> None:
    """Print at most `most` findings, a line each; they are sorted, the gravest first."""
    shown = findings if most is None or len(findings) <= most else findings[: most - 1]
    for finding in shown:
        print_note(f"{finding.sentence}.", kind="Look at")
    if more := len(findings) - len(shown):
        print_note(f"{more} more; lorasmith data check lists them.", kind="Look at")


def print_error(sentence: str, *, kind: str) -> None:
    """Print a sentence on standard error; each finding of a workflow is on a line of its own."""
    first, *findings = sentence.split("\n")
    errors.print(Text.assemble(_output.source, (f"{kind}:", "bold red"), f" {printable(first)}"), soft_wrap=True)
    for finding in findings:
        errors.print(finding, soft_wrap=True)


class StoppedError(CancelledError):
    """A signal ended the command; the message says what was saved.

    `exit_code` is 128 and the signal's number, as in shells: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: object, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest(threading.Event):
    """Set by Ctrl-C or SIGTERM."""

    number: int = signal.SIGINT

    def exit_if_set(self) -> None:
        """End the command with the exit code of the signal, if one arrived; all output is printed before."""
        if self.is_set():
            raise typer.Exit(128 + self.number)


@contextlib.contextmanager
def stoppable(*, at_once: bool = False) -> Iterator[StopRequest]:
    """Inside, the first Ctrl-C or SIGTERM sets the yielded event; the second one, or the first if `at_once`,
    interrupts.

    Raises StoppedError if the work was interrupted or cancelled; the message says what was saved.
    """
    stop = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.number = number
        if stop.is_set() or at_once:
            raise KeyboardInterrupt
        stop.set()
        echo("Stopping after this step and saving the result. Press Ctrl-C again to stop at once.")

    is_main = threading.current_thread() is threading.main_thread()  # others, as in a worker of Ray Train, get none
    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM) if is_main}
    try:
        yield stop
    except KeyboardInterrupt as interrupted:  # typer would exit silently
        kept = getattr(interrupted, "__notes__", ())
        remedy = ["the same command resumes the run"] if kept else []
        raise StoppedError("; ".join(["interrupted", *kept, *remedy]), stop.number) from interrupted
    except CancelledError as cancelled:
        if not stop.is_set() or isinstance(cancelled, StoppedError):
            raise
        raise StoppedError(cancelled, stop.number) from cancelled
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_shown(what: str) -> Iterator[Callable[..., None]]:
    """Inside the context, progress is shown as a bar or in lines; the yielded function takes (done, total, ...)."""
    lines = progress_lines(what)
    try:
        with progress_bar(TextColumn("{task.description}", markup=False)) as progress:
            task = progress.add_task(what, total=None)

            def show(done: int, total: int, *_: object, more: str = "") -> None:
                progress.update(task, completed=done, total=total, description=f"{what}{more}")
                lines.report(f"{what}: {done:,} of {total:,}{more}", done / max(1, total))

            yield show
    finally:
        lines.close()


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A progress bar on the shared console, if it can draw: first column, bar, counts, other columns, times."""
    return Progress(
        columns[0],
        BarColumn(),
        MofNCompleteColumn(),
        *columns[1:],
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.draws,
    )


def progress_lines(state: str = "") -> ProgressLines:
    """Lines about progress on the console, where it draws no bar, and in the log file."""
    return ProgressLines(_print_progress, state)


def _print_progress(line: str) -> None:
    if not console.draws:
        echo(line)
    elif _output.log is not None:
        _output.log.add_text(printable(line, limit=sys.maxsize))


class _StatusInLines(Status):
    """A spinner's place where none can be drawn: a line now and then."""

    _lines: ProgressLines | None = None

    def start(self) -> None:
        self._lines = progress_lines(str(self.status))

    def update(self, status: RenderableType | None = None, **settings: Any) -> None:
        super().update(status, **settings)
        if self._lines is not None and status is not None:
            self._lines.begin(str(status))

    def stop(self) -> None:
        if self._lines is not None:
            self._lines.close()
