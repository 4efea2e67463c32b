"""Progress of the library's functions: bars in a terminal or a notebook, and a run's notes between them.

Bars are tqdm's, which draws them in both. Where standard error is neither, notes are written, and a line now and then.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from lorasmith.core.printable import printable
from lorasmith.core.progress_lines import ProgressLines
from lorasmith.runs.view import RunView, note_of
from lorasmith.training.events import Event, EventHandler, RunStarted


def note(sentence: str) -> None:
    """Write a sentence, made printable, above the bars."""
    _tqdm().write(printable(sentence, limit=2000), file=sys.stderr)


@contextlib.contextmanager
def counted(label: str, progress: bool | Callable[..., object] | None) -> Iterator[Callable[..., None] | None]:
    """Yield a function that shows (done, total, ...) as a bar, or calls `progress`; None if nothing is to be shown."""
    if callable(progress):
        report = progress
        yield lambda *counts: void(report(*counts))
        return
    if not progress:
        yield None
        return
    if not _has_audience():
        with contextlib.closing(ProgressLines(note, label, is_complete=False)) as lines:
            yield lambda done, total, *_: lines.report(f"{label}: {done:,} of {total:,}", done / max(1, total))
        return
    bar: Any = None

    def show(done: int, total: int, *_: object) -> None:
        nonlocal bar
        bar = bar if bar is not None else _bar(label, total)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()  # here, as the next bar would be drawn below it
            bar = None

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


@contextlib.contextmanager
def run_shown(progress: bool) -> Iterator[EventHandler]:
    """Inside the context, the yielded handler shows the events of a run: a bar with the loss, and notes."""
    if not progress:
        yield void
        return
    bar: Any = None
    lines: ProgressLines | None = None
    view = RunView()

    def show(event: Event) -> None:
        nonlocal bar, lines
        view.take(event)
        if isinstance(event, RunStarted) and _has_audience():
            bar = _bar("Training", view.steps)
        elif isinstance(event, RunStarted):
            lines = ProgressLines(note, f"Step {view.step:,} of {view.steps:,}", is_complete=False)
        elif (remark := note_of(event)) is not None and remark.kind != "Remark":
            note(remark.text)
        elif lines is not None:
            lines.report(f"Step {view.step:,} of {view.steps:,}, {view.line}")
        if bar is not None:
            bar.set_postfix_str(view.line, refresh=view.activity is not None)
            bar.update(view.step - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()
        if lines is not None:
            lines.close()


def void(_: object) -> None:
    """Nothing."""


def _has_audience() -> bool:
    """Whether a bar would be seen: standard error is a terminal, or this is a notebook."""
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def _bar(label: str, total: int) -> Any:
    return _tqdm()(total=total, desc=label, dynamic_ncols=True, file=sys.stderr)


def _tqdm() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in notebooks without ipywidgets, where bars are text
        from tqdm.auto import tqdm
    return tqdm
