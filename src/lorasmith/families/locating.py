"""Where a base model or a part of one is: a file, a folder, a built-in model, or a download from the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lorasmith.core.errors import ModelError
from lorasmith.core.folders import BUILT_IN_BASE, MODEL_EXTENSIONS

BUILT_IN = "lorasmith-tiny"
"""Name of the small model in the package, for demonstrations and tests."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, as in `load_model`."""

    model: str  # file, folder, hub id or built-in name of the denoiser or of the whole model
    text_encoders: tuple[str, ...] = ()  # files or folders of text encoders
    vae: str | None = None  # file or folder of the autoencoder


_CHECKPOINTS = BUILT_IN_BASE / "models" / "checkpoints"


def built_in_models() -> dict[str, Path]:
    """Models in the package, by name."""
    return {path.stem: path for path in sorted(_CHECKPOINTS.glob("*.safetensors"))}


def located(source: str | os.PathLike[str]) -> Path:
    """The file or folder of a source, downloaded if it is a hub id."""
    path = built_in_models().get(str(source), Path(source))
    # By extension, because names on hubs have dots too (FLUX.1-dev).
    if os.path.exists(path) or path.suffix.casefold() in MODEL_EXTENSIONS:  # noqa: PTH110 - for any text
        return path
    if str(source).count("/") == 1:
        return _downloaded(str(source))
    raise ModelError(
        f"there is no model at {source}; give a .safetensors checkpoint, a diffusers folder, "
        f"a hub id such as owner/name, or {', '.join(built_in_models())} for a first try"
    )


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
