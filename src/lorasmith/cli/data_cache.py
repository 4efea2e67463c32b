"""`lorasmith data cache`: what is kept of encoded images and captions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.console import console, echo, print_result
from lorasmith.cli.help import HelpGroup, with_readable_help
from lorasmith.core.printable import memory_text

if TYPE_CHECKING:
    from lorasmith.data.encoding_cache import EncoderSummary

OlderThan = Annotated[
    float | None,
    typer.Option(
        "--older-than",
        metavar="DAYS",
        min=0,
        help="Remove only what was not used for this number of days. Default: everything.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    cache = typer.Typer(cls=HelpGroup, help="Encoded images and captions, kept between runs.", no_args_is_help=True)
    cache.command("list")(list_cache)
    cache.command("clear")(clear_cache)
    with_readable_help(cache)
    app.add_typer(cache, name="cache")


def list_cache() -> None:
    """List what the cache holds of each text encoder and autoencoder: entries, size and last use.

    The cache is in LORASMITH_CACHE_DIR, or in the system's folder for caches.
    """
    from lorasmith.data.encoding_cache import default_cache

    cache = default_cache()
    found = cache.summary()
    size = sum(one.size_bytes for one in found)

    def show() -> None:
        _print(found)
        echo(f"{memory_text(size)} in {cache.folder}")

    print_result(lambda: {"folder": cache.folder, "size_bytes": size, "encoders": found}, show)


def clear_cache(older_than: OlderThan = None) -> None:
    """Remove encodings from the cache. Runs encode again what they need; running ones lose nothing."""
    from lorasmith.data.encoding_cache import default_cache

    cache = default_cache()
    cleared = cache.clear(unused_days=older_than or 0.0)
    print_result(
        lambda: {"folder": cache.folder, "files": cleared.files, "size_bytes": cleared.size_bytes},
        lambda: echo(f"Removed {cleared.files:,} files, {memory_text(cleared.size_bytes)}, from {cache.folder}"),
    )


def _print(found: list[EncoderSummary]) -> None:
    from rich.table import Table

    if not found:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Encoder")
    for title in ("Entries", "Size", "Last use"):
        table.add_column(title, justify="right")
    for one in found:
        name = f"{one.title or 'unnamed'} ({one.encoder[:8]})"
        damaged = f" and {one.unreadable:,} unreadable files" if one.unreadable else ""
        table.add_row(name, f"{one.entries:,}{damaged}", memory_text(one.size_bytes), _ago(one.last_used))
    console.print(table)


def _ago(when: float) -> str:
    days = max(0.0, time.time() - when) / 86400
    return f"{days:.0f} days ago" if days >= 2 else f"{days * 24:.0f} hours ago"
