"""`lorasmith generate`: pictures from a prompt, with LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.console import console, echo, print_note, print_result, progress_shown, stoppable
from lorasmith.cli.flags import (
    BaseDir,
    EditModel,
    ExtraModelPaths,
    TextEncoderFiles,
    VaeFile,
    folders_of,
    split_strength,
)
from lorasmith.core.errors import OptionError
from lorasmith.core.files import check_writable


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(generate)


def generate(
    model: Annotated[str, typer.Option(help="Base model, as for train.")],
    prompt: Annotated[list[str], typer.Option(help="Prompt; (word:1.2) weights words. Repeat for more pictures.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:STRENGTH]", help="LoRA to apply, such as my.safetensors:0.8. Repeatable."),
    ] = None,
    low_noise_model: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Second expert of a model of two, which draws the last part, such as Wan 2.2 A14B's."
        ),
    ] = None,
    low_noise_lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:STRENGTH]", help="LoRA to apply to the second expert. Repeatable."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a LoRA of which a part does not apply, instead of a note.")
    ] = False,
    text_encoder: TextEncoderFiles = None,
    vae: VaeFile = None,
    edit: EditModel = None,
    control: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Picture that an edit model edits or refers to, for all prompts. Repeatable."
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Mask of the --control, for models that fill masks: white is painted."),
    ] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps. Default: 20, and fewer of a distilled model.")
    ] = None,
    cfg: Annotated[
        float | None, typer.Option(help="Guidance scale: how closely to follow the prompt. Default: the model's own.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="Sampler, by ComfyUI's name.")] = "euler",
    scheduler: Annotated[str, typer.Option(help="Schedule of noise levels, by ComfyUI's name.")] = "normal",
    width: Annotated[
        int | None, typer.Option(help="Width in pixels. Default: that of the first --control, or the model's own.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Height in pixels. Default: that of the first --control, or the model's own.")
    ] = None,
    frames: Annotated[
        int, typer.Option(min=1, help="Frames of a clip, for models of videos: 5, 9, 13, ... 1 draws a picture.")
    ] = 1,
    frame_rate: Annotated[
        float | None, typer.Option(min=0.1, max=120, help="Frames a second of the clip. Default: the model's own.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format of the denoiser's products: fp32, bf16 or fp16. Default: that of the weights on a GPU; "
            "on a CPU fp32, or bf16 for large models in 16 bits if the CPU has units for it. fp32 casts such weights "
            "in every pass."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for the pictures; files are numbered, none is overwritten.")
    ] = Path("output"),
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
) -> None:
    """Generate pictures from prompts, or with --frames clips, as animated WebP files."""
    from lorasmith.core.placement import dtype_from_name
    from lorasmith.data.image_files import open_image, open_mask
    from lorasmith.families.locating import ModelFiles
    from lorasmith.families.model import Denoiser
    from lorasmith.runs.drawing import experts_of, load_with_loras, save_pictures
    from lorasmith.sampling.generate import Experts, Sampling, generate_clips

    check_writable(output)
    controls, covering = [open_image(path) for path in control or ()], None if mask is None else open_mask(mask)
    number_format = None if dtype is None else dtype_from_name(dtype)
    loras = [split_strength(text) for text in lora or []]
    with console.status(f"Loading {model}"):
        files = ModelFiles(model, tuple(text_encoder or ()), vae, edit)
        loaded = load_with_loras(files, loras, folders_of(base_dir, extra_model_paths), strict=strict)
        drawing: Denoiser | Experts = loaded.denoiser
        steps = steps or loaded.denoiser.base.defaults.steps
        if low_noise_model is not None:
            second = load_with_loras(
                ModelFiles(low_noise_model), [split_strength(text) for text in low_noise_lora or []], strict=strict
            )
            drawing = experts_of(loaded.denoiser, second.denoiser)
        elif low_noise_lora:
            raise OptionError("--low-noise-lora is for --low-noise-model, which is missing; name it, or use --lora")
    for note in loaded.notes:
        print_note(note)
    for part in loaded.found:
        echo(part.line)
    if frame_rate is not None and frames == 1:
        print_note("--frame-rate has no effect without --frames.")
    with stoppable() as stop, progress_shown("Sampling") as progress:
        progress(0, steps * len(prompt))
        drawn = generate_clips(
            drawing,
            prompt,
            Sampling(
                seed=seed,
                steps=steps,
                cfg=cfg,
                sampler=sampler,
                scheduler=scheduler,
                width=width,
                height=height,
                dtype=number_format,
                frames=frames,
                frame_rate=frame_rate,
            ),
            text_encoder=loaded.text_encoder,
            negative=negative,
            controls=controls,
            mask=covering,
            progress=progress,
            cancelled=stop.is_set,
        )
    images = [clip if frames > 1 else clip.frames[0] for clip in drawn]
    made_with = (
        f"Negative prompt: {negative}\nSteps: {steps}, Sampler: {sampler} {scheduler}, Seed: {seed}, "
        f"Model: {loaded.title}, LoRA: {', '.join([*(lora or ()), *(low_noise_lora or ())] or ['none'])}"
    )
    paths = list(save_pictures(images, prompt, output, made_with=made_with))

    def show() -> None:
        for path in paths:
            echo(path)

    print_result(lambda: {"pictures": paths, "notes": loaded.notes}, show)
