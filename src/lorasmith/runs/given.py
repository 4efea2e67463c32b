"""What a caller of the library gave as a model or as data, as what training needs, or refused with the remedy."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from lorasmith.core.errors import DataError, ModelError
from lorasmith.core.printable import described
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.loading import load_model
from lorasmith.families.model import Denoiser, Model
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from lorasmith.training.trainable import Trainable, TrainableDenoiser


def trainable_of(given: object) -> Trainable:
    """What is trained on: a `Trainable` as it is, or that of a model. Raises ModelError."""
    return given if isinstance(given, Trainable) else TrainableDenoiser(denoiser_of(given))


def denoiser_of(given: object) -> Denoiser:
    """The denoiser of a model, with its LoRAs. Raises ModelError."""
    return given if isinstance(given, Denoiser) else model_of(given).denoiser


def model_of(given: object) -> Model:
    """A model as it is, or loaded: of a denoiser, a name or path, or a pipeline of diffusers. Raises ModelError."""
    if isinstance(given, Model):
        return given
    if isinstance(given, Denoiser):
        return given.base
    if isinstance(given, str | os.PathLike) or _is_pipeline(given):
        return load_model(given)  # type: ignore[arg-type]
    remedy = next((remedy for types, remedy in _NO_MODELS.items() if isinstance(given, types)), _LOAD)
    raise ModelError(
        f"a model must be a Model, the name or path of one, or a pipeline of diffusers, got {described(given)}; "
        f"{remedy}"
    )


def check_data(given: object) -> None:
    """Raise DataError for a model in place of pictures, and for samples, which are encoded already."""
    if isinstance(given, EncodedDataset | Sample):
        raise DataError(f"images must not be encoded yet, got {described(given)}; give it to train as it is")
    if isinstance(given, Model | Denoiser | Trainable | nn.Module) or _is_pipeline(given):
        raise DataError(
            f"data must be samples or pictures, got {described(given)}; give the model and the data in the order of "
            "the arguments"
        )


def samples_of(given: object, load: Callable[[object], EncodedDataset]) -> EncodedDataset:
    """A dataset as it is, of samples, or of whatever else `load` encodes. Raises DataError."""
    if isinstance(given, EncodedDataset):
        return given
    if isinstance(given, Sample):
        given = [given]
    if isinstance(given, list | tuple | Iterator):
        items = iter(given)
        first = next(items, items)
        if first is items:
            raise DataError(
                "training needs at least one sample, got none; a list may be empty, a generator read before"
            )
        if isinstance(first, Sample):
            return EncodedDataset((first, *items), origin="samples made one by one")
        if given is items:
            given = itertools.chain([first], items)
    return load(given)


def _is_pipeline(given: object) -> bool:
    return not isinstance(given, type) and hasattr(given, "components") and hasattr(given, "config")


_LOAD = "load one: lorasmith.load_model('sd15.safetensors')"
_NO_MODELS: dict[Any, str] = {
    nn.Module: "describe a module of your own by a lorasmith.Trainable",
    (EncodedDataset, Sample, list, tuple, DataLoader): "the model comes first, then the data",
    (Lora, TrainResult): "give its base model, and the LoRA's file as existing_lora",
    Trainable: "a Trainable is trained on alone: make a lorasmith.Sample of each of its inputs, and call its module",
    dict: "tensors alone do not say what computes with them; save them as a checkpoint and load that",
}
"""What is given instead of a model, and what to do about it."""
