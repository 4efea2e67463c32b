"""`lorasmith generate`: pictures from a prompt, with LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.console import console, counting, say, stoppable
from lorasmith.cli.flags import split_strength

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(generate)


def generate(
    model: Annotated[str, typer.Option(help="Base model, as for train.")],
    prompt: Annotated[list[str], typer.Option(help="What to show; (word:1.2) weighs words. Repeat for more pictures.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:STRENGTH]", help="LoRA to apply, such as my.safetensors:0.8. Repeatable."),
    ] = None,
    negative: Annotated[str, typer.Option(help="What not to show.")] = "",
    seed: Annotated[int, typer.Option(help="The same seed starts from the same noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    cfg: Annotated[
        float | None, typer.Option(help="Guidance scale: how strictly to follow the prompt. Left out: the model's own.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="Sampler, by ComfyUI's name.")] = "euler",
    scheduler: Annotated[str, typer.Option(help="Schedule of noise levels, by ComfyUI's name.")] = "normal",
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own if left out.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own if left out.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Number format of the denoiser, fp32 or bf16: bf16 takes half the memory.")
    ] = "fp32",
    output: Annotated[
        Path, typer.Option(help="Folder for the pictures; files are numbered, none is overwritten.")
    ] = Path("output"),
) -> None:
    """Make pictures from prompts."""
    from PIL.PngImagePlugin import PngInfo

    from lorasmith.core.dtypes import dtype_from_name
    from lorasmith.core.files import atomic_path
    from lorasmith.core.folders import next_counter
    from lorasmith.families.loading import load_model
    from lorasmith.sampling.generate import generate as sample
    from lorasmith.training.lora_handle import Lora

    number_format = dtype_from_name(dtype)
    with console.status(f"Loading {model}"):
        base = load_model(model)
        denoiser, encoder = base.denoiser, base.text_encoder
        for path, strength in map(split_strength, lora or []):
            one = Lora.load(path, base)
            denoiser = one.applied_to(denoiser, strength=strength)
            encoder = one.applied_to_text(encoder, strength=strength)
    with stoppable() as stop, counting("Sampling") as progress:
        images = sample(
            denoiser,
            prompt,
            text_encoder=encoder,
            negative=negative,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler=sampler,
            scheduler=scheduler,
            width=width,
            height=height,
            dtype=number_format,
            progress=progress,
            cancelled=stop.is_set,
        )
    made_with = (
        f"Negative prompt: {negative}\nSteps: {steps}, Sampler: {sampler} {scheduler}, Seed: {seed}, "
        f"Model: {base.title}, LoRA: {', '.join(lora or ['none'])}"
    )
    counter = next_counter(output, "lorasmith")
    for number, (image, text) in enumerate(zip(images, prompt, strict=True), start=counter):
        info = PngInfo()
        info.add_itxt("parameters", f"{text}\n{made_with}")
        target = output / f"lorasmith_{number:05}_.png"
        with atomic_path(target) as temporary:
            image.save(temporary, format="png", pnginfo=info)
        say(target)
