"""`lorasmith doctor`: what this machine and this installation can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from lorasmith.cli.console import console, echo, heading, print_note, print_result
from lorasmith.cli.flags import BaseDir, ExtraModelPaths, folders_of
from lorasmith.core.printable import memory_text

if TYPE_CHECKING:
    from lorasmith.runs.doctor import Checkup


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(base_dir: BaseDir = None, extra_model_paths: ExtraModelPaths = None) -> None:
    """Show versions, devices, memory, disks, model folders and optional packages, and what to do about problems.

    The exit status is 1 if something is wrong with machine or installation.
    """
    from lorasmith.runs.doctor import check_up

    with console.status("Looking"):
        found = check_up(folders_of(base_dir, extra_model_paths))
    print_result(lambda: found, lambda: _print(found))
    if any(one.is_fault for one in found.problems):
        raise typer.Exit(1)


def _print(found: Checkup) -> None:
    heading("Versions", ", ".join(f"{name} {version}" for name, version in found.versions.items()))
    for device in found.devices:
        heading("Device  ", f"{device.name}: {device.title}, {memory_text(device.memory_bytes)}")
        emulated = [name for name in ("bf16", "fp16") if name not in device.products]
        slow = f" ({' and '.join(emulated)} only emulated, so that fp32 is used instead)" if emulated else ""
        echo(f"         products in {', '.join(device.products)}{slow}; compiler {device.compiler}")
    heading("Memory  ", f"{memory_text(found.free_memory_bytes)} of {memory_text(found.memory_bytes)} are free")
    heading("Models  ", f"in {found.base_dir}: {', '.join(f'{kind} {n}' for kind, n in found.folders.items())}")
    for folder, free in found.disks.items():
        heading("Disk    ", f"{memory_text(free)} are free for {folder}")
    for extra in found.extras:
        remedy = f'; pip install "lorasmith[{extra.name}]" adds {", ".join(extra.missing)}' if extra.missing else ""
        heading("Extra   ", f"{extra.name}: {', '.join(extra.present) or 'none of its packages'}{remedy}")
    for one in found.problems:
        kind, colour = ("Problem", "red") if one.is_fault else ("Note", "yellow")
        print_note(f"{one.problem}; {one.remedy}.", kind=kind, colour=colour)
    if not found.problems:
        echo("No problem was found.")
