"""Keeps the model of the last training on a folder, for the next one on the same files."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from lorasmith.core.folders import Folders, fingerprint
from lorasmith.families.locating import ModelFiles, built_in_models
from lorasmith.families.model_search import (
    ENCODER_FOLDERS,
    MODEL_FOLDERS,
    VAE_FOLDERS,
    Completed,
    in_folders,
    load_completed,
)


class WarmModel:
    """At most one model. Training restores it, so that any number of runs can use it."""

    def __init__(self) -> None:
        self._kept: Completed | None = None
        self._identity: Any = None

    def load(self, files: ModelFiles, folders: Folders | None) -> Completed:
        """As `load_completed`; returns the kept model if its files are the same and unchanged."""
        identity = (files, _identity(files, folders))
        if self._kept is None or self._identity != identity:
            self.release()
            self._kept, self._identity = load_completed(files, folders), identity
        return self._kept

    def release(self) -> None:
        if self._kept is not None:
            self._kept = self._identity = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _identity(files: ModelFiles, folders: Folders | None) -> list[list[str | int]]:
    """Path, size and time of change of every file that decides what is loaded, including candidates for missing parts,
    so that a better one that is added later is found.
    """
    if folders is None:
        named = [files.model, *files.text_encoders, *([files.vae] if files.vae else [])]
    else:
        named = [
            in_folders(files.model, folders, MODEL_FOLDERS),
            *(in_folders(one, folders, ENCODER_FOLDERS) for one in files.text_encoders),
            *([in_folders(files.vae, folders, VAE_FOLDERS)] if files.vae else []),
            *(str(root) for kind in (*ENCODER_FOLDERS, *VAE_FOLDERS) for root in folders.roots(kind)),
        ]
    built_in = built_in_models()
    return [fact for name in named for fact in fingerprint(built_in.get(name, Path(name)))]
