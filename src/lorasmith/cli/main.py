"""The command line: `lorasmith COMMAND`. Each command is one module; heavy imports happen inside them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lorasmith.cli import (
    bench,
    check,
    convert,
    data_cache,
    data_caption,
    data_check,
    demo,
    diff,
    doctor,
    extract,
    generate,
    inspect,
    merge,
    models,
    nodes,
    plan,
    report,
    reproduce,
    resize,
    resume,
    serve,
    targets,
    train,
    workflow,
)
from lorasmith.cli.console import echo, other_output_made_printable, print_error
from lorasmith.cli.help import HelpGroup, with_readable_help
from lorasmith.core.allocator import keep_freed_memory
from lorasmith.core.errors import CancelledError, LorasmithError
from lorasmith.core.printable import printable

__all__ = ["app", "main"]


class _Commands(HelpGroup):
    """The commands, whose complaints about arguments (names of files, mostly) are printable."""

    def make_context(self, *args: Any, **keywords: Any) -> Any:
        """The context of the group."""
        with _complaints_printable():
            return super().make_context(*args, **keywords)

    def invoke(self, ctx: Any) -> Any:
        """Parse a command's arguments and run it."""
        with _complaints_printable():
            return super().invoke(ctx)


@contextlib.contextmanager
def _complaints_printable() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # click's, which newer versions of typer contain under another name
        if isinstance(message := getattr(error, "message", None), str):
            error.message = printable(message)  # type: ignore[attr-defined]
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
    no_args_is_help=True,
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


demo.register(app)
train.register(app)
resume.register(app)
reproduce.register(app)
report.register(app)
targets.register(app)
models.register(app)
plan.register(app)
workflow.register(app)
nodes.register(app)
generate.register(app)
inspect.register(app)
check.register(app)
convert.register(app)
merge.register(app)
resize.register(app)
extract.register(app)
diff.register(app)
bench.register(app)
doctor.register(app)
serve.register(app)

data = typer.Typer(
    cls=HelpGroup, help="Images and captions before training: checked, captioned, encoded.", no_args_is_help=True
)
app.add_typer(data, name="data")
data_caption.register(data)
data_cache.register(data)
data_check.register(data)
for group in (app, data):
    with_readable_help(group)


def main() -> None:
    """Entry point: prints a LorasmithError as one sentence, and ends quietly when interrupted."""
    keep_freed_memory()
    other_output_made_printable()
    try:
        app()
    except CancelledError as stopped:
        print_error(str(stopped), kind="stopped")
        sys.exit(getattr(stopped, "exit_code", 130))
    except LorasmithError as error:
        print_error(str(error), kind="error")
        sys.exit(1)
