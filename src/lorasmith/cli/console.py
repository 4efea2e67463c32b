"""Shared by commands: the console, progress bars, and handling of Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lorasmith.core.errors import CancelledError

__all__ = [
    "console",
    "echo",
    "errors",
    "print_error",
    "print_note",
    "progress_bar",
    "progress_shown",
    "stoppable",
]

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def echo(text: object) -> None:
    """Print text without markup and line breaks, so that paths and captions can be copied."""
    console.print(str(text), markup=False, soft_wrap=True)


def print_note(sentence: str, *, kind: str = "Note", colour: str = "yellow", indent: int = 0) -> None:
    """Print a labelled sentence in one piece, so that no progress bar interferes.

    Args:
        sentence: the text.
        kind: its label.
        colour: of the label.
        indent: number of blanks in front.
    """
    console.print(Text.assemble(" " * indent, (f"{kind}:", colour), f" {sentence}"), soft_wrap=True)


def print_error(sentence: str, *, kind: str) -> None:
    """Print a sentence on standard error."""
    errors.print(f"[bold red]{kind}:[/] ", end="")
    errors.print(sentence, markup=False, soft_wrap=True)


@contextlib.contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Inside the context, the first Ctrl-C or SIGTERM sets the yielded event; a second one interrupts at once.

    Raises:
        CancelledError: the work was interrupted. The sentence says what was saved.
    """
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        echo("Stopping after this step and saving the result. Press Ctrl-C again to stop at once.")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except KeyboardInterrupt as interrupted:  # typer would exit silently
        kept = getattr(interrupted, "__notes__", ())
        remedy = ["the same command resumes the run"] if kept else []
        raise CancelledError("; ".join(["interrupted", *kept, *remedy])) from interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_shown(what: str) -> Iterator[Callable[..., None]]:
    """Inside the context, a progress bar is shown; the yielded function takes (done, total, ...)."""
    with progress_bar(TextColumn("{task.description}")) as progress:
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
