"""`lorasmith plan`: the memory that a run needs, and the settings with which it fits a card."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import console, echo, print_note, print_result
from lorasmith.cli.flags import (
    BaseDir,
    BaseModel,
    ExtraModelPaths,
    TextEncoderFiles,
    VaeFile,
    folders_of,
    with_flags,
)
from lorasmith.core.printable import memory_text
from lorasmith.training.config import TrainConfig, cost_options

if TYPE_CHECKING:
    from lorasmith.runs.memory_estimate import MemoryEstimate

_LEFT = (
    "batch_size", "algorithm", "rank", "targets", "differences", "dora", "tucker", "training_dtype"
)  # fmt: skip
"""Options that affect memory and are not proposed by the command itself."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    options = {name: one for name, one in cost_options().items() if name in _LEFT}
    app.command("plan", help=plan.__doc__)(
        with_flags(plan, options, aliases={"training_dtype": "--dtype", "batch_size": "--batch"})
    )


def plan(
    model: BaseModel,
    memory: Annotated[float, typer.Option(min=1, help="Memory of the graphics card in GB, as cards are sold.")],
    text_encoder: TextEncoderFiles = None,
    vae: VaeFile = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the square pictures in pixels. Default: the model's own.")
    ] = None,
    frames: Annotated[
        int, typer.Option(min=1, help="Frames of a clip, for models of videos. 1 is for training on pictures.")
    ] = 1,
    cards: Annotated[
        int, typer.Option(min=1, help="Cards of that memory that train together; each may keep a part of the weights.")
    ] = 1,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
    **settings: Any,
) -> None:
    """Estimate the memory of a run, and propose the cheapest settings that fit a card.

    No weights are loaded: shapes suffice. Activations are counted as `--activations auto` does. Settings that change no
    numbers are proposed first (of several cards, sharding is one), then quantization, then offloading. The exit status
    is 1 if training or the text encoders do not fit.
    """
    from lorasmith.families.locating import ModelFiles
    from lorasmith.runs.memory_estimate import estimate_memory

    files = ModelFiles(model, tuple(text_encoder or ()), vae)
    with console.status(f"Estimating {model}"):
        found = estimate_memory(
            files,
            TrainConfig(**settings),
            card_bytes=int(memory * 2**30),
            resolution=resolution,
            frames=frames,
            cards=cards,
            folders=folders_of(base_dir, extra_model_paths),
        )
    print_result(lambda: _plain(found), lambda: _print(found))
    if not (found.fits and found.encoders_fit):
        raise typer.Exit(1)


def _plain(found: MemoryEstimate) -> dict[str, Any]:
    proposal = {**dataclasses.asdict(found.proposal), "settings": found.proposal.settings}
    return {
        **dataclasses.asdict(found),
        "proposal": proposal,
        "fits": found.fits,
        "encoders_fit": found.encoders_fit,
    }


def _print(found: MemoryEstimate) -> None:
    plans = [
        f"{f'checkpointing at depth {one.checkpoint_depth}' if one.checkpoint_depth else one.activations} "
        f"{memory_text(one.needed_bytes)}"
        for one in found.plans
    ]
    encoders = [f"{name} {memory_text(size)}" for name, size in found.text_encoders.items()]
    encoders += [f"{name} is missing (usually {file})" for name, file in found.missing.items()]
    for label, text in {
        "Model": f"{found.model} ({found.family})",
        "Trains": found.trained,
        "Pictures": f"{found.pixels}×{found.pixels} pixels{f', {found.frames} frames' if found.frames > 1 else ''}, "
        f"batch {found.batch_size}, products in {found.dtype}",
        "Weights": _by_kind(found.weights),
        "Offloaded": _by_kind(found.offloaded),
        **({"Sharded": _by_kind(found.sharded)} if found.sharded else {}),
        "Trained": f"{memory_text(found.trained_bytes)} of weights, gradients and optimizer state",
        "Step": ", ".join(plans),
        "Before": f"text encoders, which are used before training: {', '.join(encoders)}",
    }.items():
        echo(f"{label:<10}{text}")
        if label == "Model":
            for part in found.found:
                echo(f"{'':<10}{part.line}")
    proposal, card = found.proposal, memory_text(found.card_bytes)
    flags = " ".join(proposal.flags) or "the defaults"
    echo()
    if found.fits:
        echo(f"Fits {card} with {flags}: about {memory_text(proposal.needed_bytes)}.")
    else:
        echo(
            f"Does not fit {card}: with {flags} it needs about {memory_text(proposal.needed_bytes)}, "
            f"{memory_text(proposal.short_bytes)} too much; use smaller pictures, a smaller batch or fewer targets."
        )
    if not found.encoders_fit:
        size = memory_text(sum(found.text_encoders.values()))
        print_note(f"The text encoders need {size} at once, more than {card} has free; give them in fp8 or GGUF.")


def _by_kind(sizes: Any) -> str:
    return ", ".join(
        f"{'as in the file' if kind == 'none' else kind} {memory_text(size)}" for kind, size in sizes.items()
    )
