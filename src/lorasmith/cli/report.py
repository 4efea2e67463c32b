"""`lorasmith report`: the report of a run, from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.console import heading, print_result


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report")(report)


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/photos-001; it may still be running.")],
) -> None:
    """Write report.html into the folder of a run: losses, results, and commands to repeat it.

    The report is one self-contained file. Every run writes it at its end; this command writes it for a run that is
    still running or was killed.
    """
    from lorasmith.app.run_page import write_report

    path = write_report(run)
    print_result(lambda: {"report": path}, lambda: heading("Report", path))
