"""Pictures and clips from prompts with LoRA files, and saving them as numbered files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lorasmith.core.errors import CancelledError, OptionError
from lorasmith.core.folders import Folders, next_counter
from lorasmith.families.forms import Expert
from lorasmith.families.locating import ModelFiles
from lorasmith.families.model import Denoiser, Model, TextEncoder
from lorasmith.families.model_search import FoundPart, load_completed
from lorasmith.report.pictures import PictureOrClip, write_drawn
from lorasmith.sampling.generate import Experts, Sampling, generate_clips
from lorasmith.training.lora_handle import Lora

EXPERTS = ("high_noise", "low_noise")
"""Two experts of a model in the order of sampling, by the names that families and files have for them."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with LoRAs applied to its denoiser and text encoders."""

    title: str  # of the base model
    denoiser: Denoiser
    text_encoder: TextEncoder
    found: tuple[FoundPart, ...] = ()  # parts found in the model folders
    notes: tuple[str, ...] = ()  # files there that cannot be read, and parts of LoRAs that do not apply


def load_with_loras(
    files: ModelFiles,
    loras: Sequence[tuple[Path, float]],
    folders: Folders | None = None,
    *,
    strict: bool = False,
) -> LoadedModel:
    """Load a model and apply LoRA files at their strengths; parts that the model lacks are searched in `folders`.

    With `strict`, a LoRA is refused if part of it does not apply; otherwise that is one of the notes.
    """
    loaded = load_completed(files, folders)
    base = loaded.model
    denoiser, encoder, notes = _with_loras(base.denoiser, base.text_encoder, loras, strict=strict)
    return LoadedModel(base.title, denoiser, encoder, loaded.found, (*loaded.notes, *notes))


def experts_of(noisy: Denoiser, clean: Denoiser) -> Experts:
    """Both experts, each with its LoRAs. OptionError if the family has no experts, or a file's name says otherwise."""
    boundary = 0.0
    for denoiser, name in zip((noisy, clean), EXPERTS, strict=True):
        expert = expert_named(denoiser.base, name)
        boundary = boundary or expert.noise_range[0]
    return Experts(noisy, clean, boundary)


def expert_named(base: Model, name: str) -> Expert:
    """`base` as one of `EXPERTS`; OptionError if the family has no such expert, or the file's name says otherwise."""
    expert = next((expert for expert in base.family.experts if expert.name == name), None)
    if expert is None:
        raise OptionError(
            f"low_noise_model is for models of two experts, such as Wan 2.2 A14B, got {base.title} "
            f"({base.family.title}); leave it out"
        )
    if (named := base.named_expert) is not None and named.name != name:
        raise OptionError(
            f"the {name} model must be that expert, but {base.title} is the {named.name} one by its name; swap them"
        )
    return expert


def with_loras(
    denoiser: Denoiser,
    encoder: TextEncoder,
    loras: Sequence[tuple[str | os.PathLike[str] | Lora, float]],
    *,
    strict: bool = False,
) -> tuple[Denoiser, TextEncoder]:
    """A denoiser and text encoders with LoRAs applied at their strengths.

    A LoRA of which a part does not apply is refused with `strict`, else there is a Python warning.
    """
    denoiser, encoder, notes = _with_loras(denoiser, encoder, loras, strict=strict)
    for note in notes:
        warnings.warn(note, stacklevel=4)  # of who calls `generate`, behind the check of its arguments
    return denoiser, encoder


def _with_loras(
    denoiser: Denoiser,
    encoder: TextEncoder,
    loras: Sequence[tuple[str | os.PathLike[str] | Lora, float]],
    *,
    strict: bool,
) -> tuple[Denoiser, TextEncoder, list[str]]:
    notes = []
    for source, strength in loras:
        lora = source if isinstance(source, Lora) else Lora.load(source, denoiser.base)
        applied = lora.applied(denoiser, encoder, strength=strength, strict=strict)
        denoiser, encoder = applied.denoiser, applied.encoder
        notes += [applied.note] if applied.note else []
    return denoiser, encoder, notes


def draw_beside(
    denoiser: Denoiser,
    lora: Path,
    prompt: str,
    sampling: Sampling,
    *,
    strengths: Sequence[float],
    folder: Path,
    name: str = "",
    controls: Sequence[Image.Image] = (),
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
    saved: Callable[[Sequence[Path]], object] = lambda paths: None,
    cancelled: Callable[[], bool] | None = None,
) -> tuple[list[Path], str]:
    """Draw a prompt without and with a LoRA file at each strength, from the same noise, and save as `save_pictures`.

    `name` is the LoRA's in the pictures' parameters. `saved` receives the paths when the first two are there, and with
    each further one. Returns the paths, and a note on what of the LoRA does not apply. Raises as `generate_clips`
    before the first two are there, after which nothing is left; later, cancelling leaves out the rest.
    """
    base, loaded = denoiser.base, Lora.load(lora, denoiser.base)
    paths: list[Path] = []
    unsaved: list[tuple[str, PictureOrClip]] = []
    note = ""
    for number, strength in enumerate((None, *strengths)):
        used, drawn_by, encoder = "none", denoiser, base.text_encoder
        if strength is not None:
            applied = loaded.applied(denoiser, base.text_encoder, strength=strength)
            used, drawn_by, encoder = f"{name or lora.name}:{strength:g}", applied.denoiser, applied.encoder
            note = note or applied.note

        def tell(done: int, total: int, before: int = number) -> None:
            if progress is not None:
                progress(before * total + done, (1 + len(strengths)) * total)

        try:
            (clip,) = generate_clips(
                drawn_by,
                prompt,
                sampling,
                text_encoder=encoder,
                controls=controls,
                device=device,
                progress=tell,
                cancelled=cancelled,
            )
        except CancelledError:
            if not paths:
                raise
            break
        unsaved.append((used, clip if sampling.frames > 1 else clip.frames[0]))
        if number:
            for drawn_with, picture in unsaved:
                made_with = f"Steps: {sampling.steps}, Seed: {sampling.seed}, Model: {base.title}, LoRA: {drawn_with}"
                paths += save_pictures([picture], [prompt], folder, made_with=made_with)
            unsaved.clear()
            saved(paths)
    return paths, note


def save_pictures(
    images: Sequence[PictureOrClip], prompts: Sequence[str], folder: Path, *, made_with: str
) -> list[Path]:
    """Write numbered PNG files with their parameters, and clips as animated WebP files; none is overwritten.

    `made_with` is the `parameters` entry below the prompt, in A1111's format.
    """
    paths, first = [], next_counter(folder, "lorasmith")
    for number, (image, prompt) in enumerate(zip(images, prompts, strict=True), start=first):
        paths.append(write_drawn(image, folder / f"lorasmith_{number:05}_", f"{prompt}\n{made_with}"))
    return paths
