"""Where a base model or a part of one is: a file, a folder, a built-in model, or a download from the hub."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from lorasmith.core.errors import ModelError
from lorasmith.core.extras import TINY, model_packages
from lorasmith.core.folders import BUILT_IN_BASE, MODEL_EXTENSIONS, Folders

BUILT_IN = "lorasmith-tiny"
"""Name of the small model in `lorasmith-tiny`, for demonstrations and tests."""

MODEL_FOLDERS = ("checkpoints", "diffusion_models")
ENCODER_FOLDERS = ("text_encoders", "clip_vision")
VAE_FOLDERS = ("vae",)
"""Kinds of folders, as in `Folders`, that are searched for denoisers, text encoders and autoencoders."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, as in `load_model`."""

    model: str  # file, folder, hub id or built-in name of the denoiser or of the whole model
    text_encoders: tuple[str, ...] = ()  # files or folders of text encoders
    vae: str | None = None  # file or folder of the autoencoder
    edit: str | None = None  # the edit variant that it is; None if its name says so


def built_in_models() -> dict[str, Path]:
    """The built-in model by its name, if `lorasmith-tiny` is installed."""
    return {} if TINY.trouble else {BUILT_IN: BUILT_IN_BASE / "models" / "checkpoints" / f"{BUILT_IN}.safetensors"}


def named_path(source: str | os.PathLike[str]) -> Path:
    """The file of the built-in model for its name, else the source itself. Raises ModelError if it is not installed."""
    if str(source) != BUILT_IN:
        return Path(source)
    if TINY.trouble:
        raise ModelError(TINY.trouble)
    return built_in_models()[BUILT_IN]


def known_model(folders: Folders, name: str) -> str:
    """The model of a request, in the model folders or built in. Raises ModelError for other paths and downloads."""
    if name == BUILT_IN:
        named_path(name)  # raises if it is not installed
        return name
    for kind in MODEL_FOLDERS:
        with contextlib.suppress(ModelError):
            folders.find(kind, name)
            return name
    plain = Path(os.path.normpath(name))
    roots = (root for kind in MODEL_FOLDERS for root in folders.roots(kind))
    if Path(name).is_absolute() and any(map(plain.is_relative_to, roots)) and plain.exists():
        return name
    raise ModelError(f"there is no model {name!r} in the model folders; choose one of the list")


def located(source: str | os.PathLike[str]) -> Path:
    """The file or folder of a source, downloaded if it is a hub id."""
    path = named_path(source)
    # By extension, because names on hubs have dots too (FLUX.1-dev).
    if os.path.exists(path) or path.suffix.casefold() in MODEL_EXTENSIONS:  # noqa: PTH110 - for any text
        return path
    if str(source).count("/") == 1:
        return _downloaded(str(source))
    raise ModelError(
        f"there is no model at {source}; give a .safetensors checkpoint, a diffusers folder, "
        f"a hub id such as owner/name, or {BUILT_IN} for a first try"
    )


@model_packages("a model of a hub")
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
