"""`lorasmith report`: the page about a run, made again from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.console import console, say

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report")(report)


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/photos-001; it may still be going on.")],
) -> None:
    """Write report.html into the folder of a run: how it went, what came out, and how to do it again.

    The page is one file that loads nothing else. Every run makes it at its end; this makes it while a run goes on, and
    again after a run was killed.
    """
    from lorasmith.app.run_page import write_report

    path = write_report(run)
    console.print("[bold]Look at[/]", end=" ")
    say(path)
