"""Output about a folder of images: what to look at, sizes, steps and a mended copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasmith.cli.console import echo, heading, print_note
from lorasmith.core.printable import count_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasmith.data.findings import Finding
    from lorasmith.data.mended_folder import MendedFolder
    from lorasmith.data.preflight import Preflight
    from lorasmith.runs.data_check import DataCheck

_SIZES = 6


def print_findings(findings: Sequence[Finding], *, most: int | None = None, indent: int = 0) -> None:
    """Print at most `most` findings, a line each with `indent` blanks in front; they are sorted, the gravest first."""
    shown = findings if most is None or len(findings) <= most else findings[: most - 1]
    for finding in shown:
        print_note(f"{finding.sentence}.", kind="Look at", indent=indent)
    if more := len(findings) - len(shown):
        print_note(f"{more} more; lorasmith data check lists them.", kind="Look at", indent=indent)


def print_check(check: DataCheck) -> None:
    """Print a checked folder: images, sizes, steps, and what to look at."""
    from lorasmith.runs.data_check import step_lines

    found = check.preflight
    heading(count_text(len(found.images), "image"), f"in {found.folder}")
    assumed = ", assumed; --model or --resolution decides" if check.is_size_assumed else ""
    sides = " and ".join(f"{side}×{side}" for side in found.resolutions)
    lines = {
        "Model": check.model or "",
        "Pictures": f"about {sides} pixels, sides are multiples of {found.multiple}{assumed}",
        "Sizes": _sizes(found),
        "Captions": _captions(found),
        **step_lines(found),
    }
    for label, text in lines.items():
        if text:
            echo(f"{label:<10}{text}")
    for note in found.notes:
        print_note(note)
    print_findings(found.findings)
    if not found.findings:
        echo("Nothing to look at: the images are fit for training.")


def print_mended(mended: MendedFolder) -> None:
    """Print what a mended folder holds, and what was changed."""
    from lorasmith.data.folder_listing import CHANGES

    captions = f"with {count_text(mended.captions, 'caption')} " if mended.captions else ""
    heading(count_text(mended.pictures, "picture"), f"{captions}written to {mended.folder}")
    for change, names in mended.changes.items():
        more = f" and {len(names) - 8:,} more" if len(names) > 8 else ""
        echo(f"  {len(names):,} {change}: {', '.join(names[:8])}{more}")
    if mended.changes:
        echo(f"  {CHANGES} in it says what was done to each file.")


def _sizes(found: Preflight) -> str:
    shown = [f"{one.width}×{one.height} × {one.images:,}" for one in found.buckets[:_SIZES]]
    more = len(found.buckets) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more sizes" if more > 0 else "")


def _captions(found: Preflight) -> str:
    lengths = [one.tokens for one in found.images if one.tokens is not None]
    tokens = f", up to {max(lengths):,} tokens" if lengths else ""
    trigger = f", trigger {found.trigger!r}" if found.trigger else ""
    return f"{found.captioned:,} of {len(found.images):,} have their own{trigger}{tokens}"
