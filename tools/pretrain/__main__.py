"""`python -m tools.pretrain STAGE`: makes the built-in model from scratch, stage by stage. README.md has the times."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lorasmith.core.folders import BUILT_IN_BASE, BUILT_IN_SAMPLE
from lorasmith.core.placement import best_device

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

Work = Annotated[Path, typer.Option(help="Folder for intermediate files.")]
Steps = Annotated[int, typer.Option(min=1, help="Total number of updates, those of earlier runs included.")]
DEFAULT_WORK = Path("build/pretrain")

CHECKPOINT = BUILT_IN_BASE / "models" / "checkpoints" / "lorasmith-tiny.safetensors"
CONFIGS = BUILT_IN_BASE / "models" / "configs" / "lorasmith-tiny"

SAMPLES, SAMPLE_EDGE = 8, 96
GRID = (
    "a cat, noto style", "a red apple, twemoji style", "a hamburger, flat style", "a lion, soft shaded style",
    "a bus", "a penguin", "a blue heart", "a banana, on a black background",
    "a sunflower, blue background", "an octopus, on a pink background", "a house", "a t-shirt",
    "a skull", "an evergreen tree", "a snowman, red background", "a birthday cake",
)  # fmt: skip


@app.command()
def data(node_modules: Annotated[Path, typer.Argument(help="npm's folder.")], work: Work = DEFAULT_WORK) -> None:
    """Draw all icons."""
    from tools.pretrain.data import render_icons

    print(f"{render_icons(node_modules, work)} drawings")


@app.command()
def examples(node_modules: Annotated[Path, typer.Argument(help="npm's folder.")]) -> None:
    """Draw the example pictures that come with the package."""
    from tools.pretrain.examples import render_examples

    render_examples(node_modules, BUILT_IN_BASE / "input")


@app.command()
def subjects(node_modules: Annotated[Path, typer.Argument(help="npm's folder.")]) -> None:
    """Draw the subjects of `benchmarks/quality`."""
    from benchmarks.quality.subjects import DRAWINGS
    from tools.pretrain.subjects import render_subjects

    render_subjects(node_modules, DRAWINGS)


@app.command()
def autoencoder(work: Work = DEFAULT_WORK, steps: Steps = 3600) -> None:
    """Train the autoencoder, and encode the pictures that the UNet learns from."""
    from tools.pretrain.autoencoder import train_autoencoder
    from tools.pretrain.unet import encode_pictures

    encode_pictures(work, train_autoencoder(work, steps, best_device())).save_pretrained(work / "vae")


@app.command()
def text(work: Work = DEFAULT_WORK, steps: Steps = 4000) -> None:
    """Train the text encoder."""
    from tools.pretrain.text_encoder import train_text_encoder

    train_text_encoder(work, steps, best_device()).save_pretrained(work / "text_encoder")


@app.command()
def unet(
    work: Work = DEFAULT_WORK,
    steps: Steps = 2300,
    shipped: Annotated[
        bool, typer.Option(help="Start from the model in the package, autoencoder and text encoder included.")
    ] = False,
) -> None:
    """Train the UNet from its last saved state; then write the model into WORK/model."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    from tools.pretrain import export
    from tools.pretrain.unet import encode_pictures, train_unet

    start = None
    if shipped:
        pipe = shipped_pipeline()
        vae, text_encoder, start = pipe.vae, pipe.text_encoder, pipe.unet
        if not (work / "latents.npy").exists():
            encode_pictures(work, vae).save_pretrained(work / "vae")
            text_encoder.save_pretrained(work / "text_encoder")
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    text_encoder = CLIPTextModel.from_pretrained(work / "text_encoder").eval()

    def write(average: Any, step: int) -> None:
        checkpoint, configs = model_files(work)
        export.save(export.pipeline(average, vae, text_encoder), checkpoint, configs)
        _grid(checkpoint).save(work / "unet" / f"step-{step:06d}.png")

    train_unet(work, text_encoder, steps, best_device(), start=start, show=write)


@app.command()
def transformer(work: Work = DEFAULT_WORK, steps: Steps = 1200) -> None:
    """Train the transformer from its last saved state, beside the other parts of the model in the package."""
    import lorasmith as ls
    from tools.pretrain.transformer import DRAWING_TRANSFORMER, DrawingTransformer, save, train_transformer
    from tools.pretrain.unet import encode_pictures

    ls.register("families", DRAWING_TRANSFORMER, DrawingTransformer)
    pipe, checkpoint = shipped_pipeline(), work / f"{DRAWING_TRANSFORMER}.safetensors"

    def write(average: Any, step: int) -> None:
        save(average, CHECKPOINT, checkpoint)
        _grid(checkpoint).save(work / "transformer" / f"step-{step:06d}.png")

    if not (work / "latents.npy").exists():
        encode_pictures(work, pipe.vae)
    train_transformer(work, pipe.text_encoder, steps, best_device(), show=write)


@app.command()
def judge(work: Work = DEFAULT_WORK) -> None:
    """Train the classifier that measures pictures."""
    from diffusers import AutoencoderKL

    from tools.pretrain.judge_training import train_judge

    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    subjects, styles = train_judge(work, vae)
    print(f"subjects of {subjects:.1%} and styles of {styles:.1%} of unseen drawings are classified correctly")


@app.command()
def identity(node_modules: Annotated[Path, typer.Argument(help="npm's folder.")], work: Work = DEFAULT_WORK) -> None:
    """Train the judge of `benchmarks/quality`, with the autoencoder of the model in the package."""
    from tools.pretrain.identity_training import train_identity

    train_identity(node_modules, work, shipped_pipeline().vae.eval().to(memory_format=torch.channels_last))


@app.command()
def quality(
    model: Annotated[str, typer.Option(help="Which model.")] = "lorasmith-tiny",
    grid: Annotated[Path | None, typer.Option(help="Where to draw the grid of the sixty captions.")] = None,
) -> None:
    """Measure a model: concepts, styles, backgrounds, and what a LoRA does to it."""
    from tools.pretrain.quality import measure

    measure(model, grid)


@app.command()
def sample() -> None:
    """Draw the pictures that the page shows beside the package's model: the first prompts of the grid, not chosen."""
    from PIL import Image

    from lorasmith.families.loading import load_model
    from lorasmith.sampling.generate import generate

    row = Image.new("RGB", (SAMPLES * SAMPLE_EDGE, SAMPLE_EDGE))
    for number, picture in enumerate(generate(load_model(CHECKPOINT), GRID[:SAMPLES], seed=1)):
        enlarged = picture.resize((SAMPLE_EDGE, SAMPLE_EDGE), Image.Resampling.LANCZOS)
        row.paste(enlarged, (number * SAMPLE_EDGE, 0))
    row.save(BUILT_IN_SAMPLE, quality=86, method=6)
    print(BUILT_IN_SAMPLE, row.size, BUILT_IN_SAMPLE.stat().st_size)


@app.command()
def ship(work: Work = DEFAULT_WORK) -> None:
    """Put the model in WORK into the package."""
    checkpoint, configs = model_files(work)
    shutil.copy2(checkpoint, CHECKPOINT)
    shutil.rmtree(CONFIGS, ignore_errors=True)
    shutil.copytree(configs, CONFIGS)


@app.command()
def unpack(folder: Annotated[Path, typer.Argument(help="Where to.")]) -> None:
    """Write the model that the package ships as a diffusers folder."""
    from tools.pretrain.export import DEFAULTS

    shipped_pipeline().save_pretrained(folder)
    (folder / "lorasmith.json").write_text(json.dumps(DEFAULTS), "utf-8")


def model_files(work: Path) -> tuple[Path, Path]:
    """Checkpoint and configurations of the model in `work`."""
    return work / "model" / CHECKPOINT.name, work / "model" / "configs"


def shipped_pipeline() -> Any:
    """diffusers' pipeline of the model that the package ships, in fp32."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_single_file(
        str(CHECKPOINT), config=str(CONFIGS), local_files_only=True, torch_dtype=torch.float32
    )


def _grid(checkpoint: Path) -> Any:
    from lorasmith.families.loading import load_model
    from lorasmith.report.contact_sheet import contact_sheet
    from lorasmith.sampling.generate import generate

    pictures = generate(load_model(checkpoint), GRID, seed=1)
    return contact_sheet([pictures[:8], pictures[8:]], (), ())


if __name__ == "__main__":
    app()
