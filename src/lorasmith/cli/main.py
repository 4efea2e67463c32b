"""The command line: `lorasmith COMMAND`. Each command is one module; heavy imports happen inside them."""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lorasmith.cli import (
    bench,
    card,
    data,
    evaluate,
    generate,
    lora_files,
    models,
    recorded_runs,
    serve,
    sweep,
    train,
    workflow,
)
from lorasmith.cli.console import echo, other_output_made_printable, output_as, print_json_error
from lorasmith.cli.flags import HelpGroup, with_general_flags, with_readable_help
from lorasmith.core.allocator import keep_freed_memory
from lorasmith.core.printable import printable
from lorasmith.core.processor import let_threads_sleep


class _Commands(HelpGroup):
    """The commands. Errors about arguments (file names, mostly) are made printable, and are JSON with --json."""

    def make_context(self, info_name: Any, args: list[str], *others: Any, **keywords: Any) -> Any:
        as_json = "--json" in args[: args.index("--") if "--" in args else None]
        with _complaints_printable(as_json=as_json):
            context = super().make_context(info_name, args, *others, **keywords)
        context.meta[_AS_JSON] = as_json
        return context

    def invoke(self, ctx: Any) -> Any:
        with _complaints_printable(as_json=ctx.meta[_AS_JSON]):
            return super().invoke(ctx)


_AS_JSON = "lorasmith.as_json"


@contextlib.contextmanager
def _complaints_printable(*, as_json: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # click's, which newer versions of typer contain under another name
        if isinstance(message := getattr(error, "message", None), str):
            error.message = printable(message)  # type: ignore[attr-defined]
            if as_json and isinstance(code := getattr(error, "exit_code", None), int):
                with output_as(as_json=True):
                    print_json_error("UsageError", printable(error.format_message()), code)  # type: ignore[attr-defined]
        raise


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        echo(f"lorasmith {version('lorasmith')}")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    name="lorasmith",
    help="Train LoRAs for diffusion models, from a folder of images or from a ComfyUI workflow.",
    epilog="Start with: lorasmith demo",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


_COMMANDS = (train, sweep, recorded_runs, models, workflow, generate, evaluate, lora_files, card, bench, serve, data)
for command in _COMMANDS:
    command.register(app)
with_general_flags(app)
with_readable_help(app)


def _spare_the_last_collection() -> None:
    """The interpreter's last one visits a million objects of torch, and takes most of the time of an exit.

    Bindings made by nanobind, as triton's are, print a page about each object that is left then.
    """
    if "triton" in sys.modules:
        gc.unfreeze()
    else:
        gc.freeze()


def main() -> None:
    """Entry point. `output_as` prints a LorasmithError as one sentence and handles interrupts."""
    let_threads_sleep()
    keep_freed_memory()
    other_output_made_printable()
    atexit.register(_spare_the_last_collection)
    app()
