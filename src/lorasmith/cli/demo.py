"""`lorasmith demo`: a LoRA trained and seen at work in two minutes, with nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.console import console, counting, say
from lorasmith.cli.train import free_folder, prepare, report, run_prepared, source_of
from lorasmith.core.folders import ASSETS
from lorasmith.training.config import TrainConfig
from lorasmith.training.outcome import Outcome

__all__ = ["register"]

_EXAMPLES = ASSETS / "input" / "high-contrast"
_PROMPTS = (
    "a lion",
    "a penguin",
    "a skull",
    "a red heart",
    "a robot",
    "a panda",
    "a cactus",
    "a light bulb",
)  # none of these subjects is among the training pictures
_STRENGTHS = (0.0, 0.5, 1.0)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Training steps, of eight pictures each.")] = 150,
    seed: Annotated[int, typer.Option(help="Seed of training and pictures.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; a new one under runs/ if left out.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to train, such as cuda or cpu.")] = None,
) -> None:
    """Teach the built-in model a drawing style from sixteen pictures, and show what it learnt.

    Takes about two minutes on two processor cores and needs no network.
    """
    from lorasmith.core.files import atomic_path
    from lorasmith.families.loading import BUILT_IN
    from lorasmith.report.contact_sheet import contact_sheet
    from lorasmith.sampling.generate import generate

    console.print(
        f"Lorasmith comes with a small model, {BUILT_IN}, that draws coloured emoji.\n"
        "It has never seen black line art. From sixteen such pictures it now learns\n"
        "the style, and then draws subjects in it that are not among them.\n"
    )
    config = TrainConfig(steps=steps, batch_size=8, rank=8, seed=seed, validation_share=0.0)
    prepared = prepare(source_of(_EXAMPLES, BUILT_IN, device=device, config=config), config)
    model = prepared.base
    folder = output or free_folder(Path("runs"), "demo")
    result = run_prepared(prepared, output=folder, fresh=True)
    if result.reason is Outcome.CANCELLED:
        report(result)
        return
    with counting("Drawing") as progress:
        rows = []
        for index, strength in enumerate(_STRENGTHS):
            before = index * len(_PROMPTS) * 20

            def show(done: int, total: int, before: int = before) -> None:
                progress(before + done, total * len(_STRENGTHS))

            adapted = result.lora.applied_to(model.denoiser, strength=strength)
            rows.append(generate(adapted, _PROMPTS, seed=seed, progress=show))
    sheet = folder / "before-and-after.png"
    labels = ["base" if strength == 0 else f"LoRA {strength:g}" for strength in _STRENGTHS]
    with atomic_path(sheet) as temporary:
        contact_sheet(rows, labels, _PROMPTS).save(temporary, format="png")
    console.print()
    report(result)
    console.print("[bold]Look at   [/]", end=" ")
    say(sheet)
    console.print(
        "\nThe same with your own pictures and a real model:\n"
        '  lorasmith train ./photos --model sd15.safetensors --trigger "sks dog"',
        markup=False,
    )
