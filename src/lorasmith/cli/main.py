"""The command line: `lorasmith COMMAND`. Each command is one module; heavy imports happen inside them."""

from __future__ import annotations

import sys

import typer

from lorasmith.cli import (
    bench,
    check,
    convert,
    demo,
    diff,
    extract,
    generate,
    inspect,
    merge,
    models,
    plan,
    report,
    reproduce,
    resize,
    resume,
    targets,
    train,
    workflow,
)
from lorasmith.cli.console import print_error
from lorasmith.core.allocator import keep_freed_memory
from lorasmith.core.errors import CancelledError, LorasmithError

__all__ = ["app", "main"]

app = typer.Typer(
    name="lorasmith",
    help="Train LoRAs for diffusion models, from a folder of images or from a ComfyUI workflow.",
    epilog="Start with: lorasmith demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
demo.register(app)
train.register(app)
resume.register(app)
reproduce.register(app)
report.register(app)
targets.register(app)
models.register(app)
plan.register(app)
workflow.register(app)
generate.register(app)
inspect.register(app)
check.register(app)
convert.register(app)
merge.register(app)
resize.register(app)
extract.register(app)
diff.register(app)
bench.register(app)


def main() -> None:
    """Entry point: prints a LorasmithError as one sentence, and ends quietly when interrupted."""
    keep_freed_memory()
    try:
        app()
    except CancelledError as stopped:
        print_error(str(stopped), kind="stopped")
        sys.exit(130)
    except LorasmithError as error:
        print_error(str(error), kind="error")
        sys.exit(1)
