"""Shared by commands: the console, progress bars, and handling of Ctrl-C.

What commands print comes mostly from others' files. The console takes text literally (no markup, no `:emoji:`) and
shows control characters as escapes, whatever is printed by whichever way.
"""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

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

from lorasmith.core.errors import CancelledError
from lorasmith.core.printable import printable

__all__ = [
    "StopRequest",
    "StoppedError",
    "console",
    "echo",
    "errors",
    "heading",
    "other_output_made_printable",
    "print_error",
    "print_note",
    "progress_bar",
    "progress_shown",
    "stoppable",
]


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

    def status(self, status: RenderableType, **settings: Any) -> Status:
        """A spinner with text, which rich would take for markup."""
        return super().status(self.render_str(status) if isinstance(status, str) else status, **settings)


console = _LiteralConsole()
errors = _LiteralConsole(stderr=True)


def other_output_made_printable() -> None:
    """From here on, also what other packages print is: their warnings and log records.

    Characters that the terminal's encoding lacks become escapes, too.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    made = logging.getLogRecordFactory()

    def record(*args: Any, **keywords: Any) -> logging.LogRecord:
        one = made(*args, **keywords)
        one.msg, one.args = printable(one.getMessage()), ()
        return one

    logging.setLogRecordFactory(record)
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {printable(message)}\n"


def echo(text: object = "") -> None:
    """Print text on one line that is not wrapped, so that paths and captions can be copied."""
    console.print(str(text), soft_wrap=True)


def heading(text: str, then: object = "") -> None:
    """Print text in bold, and more on the same line that is not."""
    console.print(Text.assemble((printable(text), "bold"), f" {printable(then)}" if then else ""), soft_wrap=True)


def print_note(sentence: str, *, kind: str = "Note", colour: str = "yellow", indent: int = 0) -> None:
    """Print a labelled sentence in one piece, so that no progress bar interferes.

    Args:
        sentence: the text.
        kind: its label.
        colour: of the label.
        indent: number of blanks in front.
    """
    console.print(Text.assemble(" " * indent, (f"{kind}:", colour), f" {printable(sentence)}"), soft_wrap=True)


def print_error(sentence: str, *, kind: str) -> None:
    """Print a sentence on standard error; each finding of a workflow is on a line of its own."""
    first, *findings = sentence.split("\n")
    errors.print(Text.assemble((f"{kind}:", "bold red"), f" {printable(first)}"), soft_wrap=True)
    for finding in findings:
        errors.print(finding, soft_wrap=True)


class StoppedError(CancelledError):
    """A signal ended the command.

    Args:
        message: what was saved, in a sentence.
        number: of the signal.

    Attributes:
        exit_code: 128 and the number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM.
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
    """Inside the context, the first Ctrl-C or SIGTERM sets the yielded event; a second one interrupts at once.

    Args:
        at_once: whether the first one interrupts.

    Raises:
        StoppedError: the work was interrupted or cancelled. The sentence says what was saved.
    """
    stop = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.number = number
        if stop.is_set() or at_once:
            raise KeyboardInterrupt
        stop.set()
        echo("Stopping after this step and saving the result. Press Ctrl-C again to stop at once.")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
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
    """Inside the context, a progress bar is shown; the yielded function takes (done, total, ...)."""
    with progress_bar(TextColumn("{task.description}", markup=False)) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total, *_: progress.update(task, completed=done, total=total)


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A progress bar on the shared console: first column, bar, counts, other columns, times."""
    return Progress(
        columns[0],
        BarColumn(),
        MofNCompleteColumn(),
        *columns[1:],
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
