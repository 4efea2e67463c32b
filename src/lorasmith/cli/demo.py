"""`lorasmith demo`: train and use a LoRA in two minutes, without downloads."""

from __future__ import annotations

from typing import Annotated

import typer

from lorasmith.cli.console import echo, heading, print_result, progress_shown, stoppable
from lorasmith.cli.flags import RunOutput
from lorasmith.cli.run_output import plain_result, preparation_shown, report_result, training_shown
from lorasmith.cli.together import check_alone
from lorasmith.training.outcome import Outcome


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Training steps, of eight pictures each.")] = 150,
    seed: Annotated[int, typer.Option(help="Seed of training and pictures.")] = 1,
    output: RunOutput = None,
    device: Annotated[str | None, typer.Option(help="Where to train, such as cuda or cpu.")] = None,
) -> None:
    """Train a drawing style from sixteen pictures on the built-in model, and draw before and after.

    Takes about two minutes on two processor cores and needs no network.
    """
    check_alone("demo")
    from lorasmith.app.demo import before_and_after, demo_folder, demo_spec
    from lorasmith.app.folder_run import RUNS, prepare, train_prepared
    from lorasmith.families.locating import BUILT_IN

    echo(f"Lorasmith comes with a small model, {BUILT_IN}, that draws coloured emoji.")
    echo("It was not trained on black line art. This trains the style from sixteen")
    echo("pictures, and then draws subjects that are not among them.")
    echo()
    with preparation_shown() as show:
        spec = demo_spec(steps=steps, seed=seed, device=device)
        prepared = prepare(spec, output=output, runs=RUNS, on_event=show)
    with training_shown() as (show, stop):
        result = train_prepared(
            prepared, output=output or (lambda _: demo_folder()), fresh=True, on_event=show, cancelled=stop.is_set
        )
    if result.reason is Outcome.CANCELLED:
        print_result(lambda: plain_result(result), lambda: report_result(result))
    stop.exit_if_set()
    with stoppable(at_once=True), progress_shown("Drawing") as progress:
        sheet = before_and_after(prepared.base, result, seed=seed, progress=progress)

    def show_result() -> None:
        report_result(result)
        heading("Sheet     ", sheet)

    echo()
    print_result(lambda: plain_result(result, sheet=sheet), show_result)
    echo()
    echo("The same with your own pictures and a real model:")
    echo('  lorasmith train ./photos --model sd15.safetensors --trigger "sks dog"')
