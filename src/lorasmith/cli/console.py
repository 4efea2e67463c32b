"""What the commands share: the console, progress bars, and a first Ctrl-C that asks instead of kills."""

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
    "complain",
    "console",
    "counting",
    "errors",
    "progress_bar",
    "remark",
    "say",
    "stoppable",
]

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def say(text: object) -> None:
    """Print text as it is, unbroken: paths and captions may look like markup, and people copy them."""
    console.print(str(text), markup=False, soft_wrap=True)


def remark(sentence: str, *, kind: str = "Note", colour: str = "yellow", indent: int = 0) -> None:
    """Print a sentence that people should not overlook; in one piece, so that no progress bar gets in between."""
    console.print(Text.assemble(" " * indent, (f"{kind}:", colour), f" {sentence}"), soft_wrap=True)


def complain(sentence: str, *, kind: str) -> None:
    """Print a sentence on standard error."""
    errors.print(f"[bold red]{kind}:[/] ", end="")
    errors.print(sentence, markup=False, soft_wrap=True)


@contextlib.contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one interrupts at once.

    Raises:
        CancelledError: it was interrupted so. What a run has kept is in its sentence.
    """
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("Stopping after this step; what there is will be saved. Press Ctrl-C again to stop at once.")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except KeyboardInterrupt as interrupted:  # typer would end without a word
        kept = getattr(interrupted, "__notes__", ())
        on = ["the same command goes on"] if kept else []
        raise CancelledError("; ".join(["interrupted", *kept, *on])) from interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[..., None]]:
    """A progress bar; the yielded function takes (done, in all) and ignores what follows."""
    with progress_bar(TextColumn("{task.description}")) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total, *_: progress.update(task, completed=done, total=total)


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A bar on the shared console: the first column, the bar and its counts, the other columns, the times."""
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
