"""Base models from files, folders and hubs. Families register themselves when this module is imported."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lorasmith.core.errors import ModelError
from lorasmith.core.folders import ASSETS, MODEL_EXTENSIONS
from lorasmith.families import flux, stable_diffusion  # noqa: F401  (register themselves)
from lorasmith.families.base import FAMILIES, Family
from lorasmith.families.files.checkpoint import LORA_MARKS, OriginalCheckpoint
from lorasmith.families.model import Model
from lorasmith.families.unsupported import looks_like
from lorasmith.formats.container import check_safetensors

__all__ = ["BUILT_IN", "built_in_models", "load_model", "recognise"]

BUILT_IN = "lorasmith-tiny"
"""Name of the small model that comes with the package, for trying things out and for tests."""

_CHECKPOINTS = ASSETS / "models" / "checkpoints"


def built_in_models() -> dict[str, Path]:
    """Models that come with the package, by name."""
    return {path.stem: path for path in sorted(_CHECKPOINTS.glob("*.safetensors"))}


def load_model(source: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> Model:
    """Load a base model.

    Args:
        source: a single-file checkpoint in the original layout, a diffusers folder, the name of a built-in model, or a
            hub id such as `stabilityai/stable-diffusion-2-1` where there is network.
        dtype: what the denoiser's weights are held in; text encoder and autoencoder stay in fp32.

    Raises:
        ModelError: it cannot be found, read or recognised.
    """
    _quieten()
    path = Path(source)
    if str(source) in built_in_models():
        path = built_in_models()[str(source)]
    if path.is_dir():
        return _from_folder(path, dtype)
    # By extension, because names on hubs have dots too (FLUX.1-dev).
    if path.is_file() or path.suffix.casefold() in MODEL_EXTENSIONS:
        checkpoint = OriginalCheckpoint(path)
        family = recognise(checkpoint)
        return Model(family, family.from_original(checkpoint, dtype), title=path.stem, path=path)
    if str(source).count("/") == 1:
        return _from_folder(_downloaded(str(source)), dtype, title=str(source))
    raise ModelError(
        f"there is no model at {source}; give a .safetensors checkpoint, a diffusers folder, "
        f"a hub id such as owner/name, or {', '.join(built_in_models())} to try things out"
    )


def recognise(checkpoint: OriginalCheckpoint) -> Family:
    """The family of a checkpoint. Raises ModelError when no family knows it."""
    shapes = checkpoint.denoiser_shapes
    # First, because some LoRAs carry a few of their model's own tensors as well.
    if any(mark in name for name in checkpoint.shapes for mark in LORA_MARKS):
        raise ModelError(f"{checkpoint.path.name} is a LoRA, not a base model; give it as the LoRA and choose a model")
    for _, family in FAMILIES.items():
        if family.recognises(shapes):
            return family
    titles = ", ".join(family.title for _, family in FAMILIES.items())
    if (found := looks_like(shapes)) is not None:
        raise ModelError(f"{checkpoint.path.name} looks like {found}, which cannot be loaded here; known are {titles}")
    raise ModelError(
        f"{checkpoint.path.name} is of no architecture known here (its first tensors are "
        f"{', '.join(sorted(shapes)[:3])}); known are {titles}"
    )


def _quieten() -> None:
    """No progress bars for the seconds that loading takes; a training run's own bar would tear them apart."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _from_folder(folder: Path, dtype: torch.dtype, *, title: str | None = None) -> Model:
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} is no diffusers model (it has no model_index.json); "
            "give the folder that holds it, or a .safetensors file"
        )
    for weights in folder.glob("*/*.safetensors"):
        check_safetensors(weights, error=ModelError)
    try:
        for _, family in FAMILIES.items():
            if family.recognises_folder(folder):
                return Model(family, family.from_folder(folder, dtype), title=title or folder.name, path=folder)
    except (OSError, ValueError, RuntimeError) as error:
        # What json, diffusers and transformers raise for missing, malformed or unfitting files says so at its start.
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder} cannot be read as a diffusers model: {reason}") from error
    titles = ", ".join(family.title for _, family in FAMILIES.items())
    raise ModelError(f"{folder} is a diffusers model of an architecture not known here; known are {titles}")


def _downloaded(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # The default variant of each part; repositories often hold half-precision and non-EMA copies beside it.
    wanted = ["*.json", "*.txt", "*.model", "*/*.safetensors"]
    unwanted = ["*.fp16.*", "*.bf16.*", "*non_ema*", "safety_checker/*"]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=unwanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise ModelError(
            f"the model {repository} could not be downloaded ({type(error).__name__}); "
            "check the name and the network, or give a file that is already on this computer"
        ) from error
