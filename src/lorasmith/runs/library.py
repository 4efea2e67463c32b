"""The Python library's functions that show their progress: `lorasmith.load_dataset` and `lorasmith.generate`.

They add bars, and LoRAs by name, to the functions of the rooms below; `lorasmith.train` is in `model_run`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ParamSpec, Protocol

import torch
from PIL import Image

from lorasmith.core.placement import chosen_device
from lorasmith.data import encoding
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.picture_encoding import EncodingProgress
from lorasmith.families.model import Denoiser, Model, TextEncoder
from lorasmith.runs.drawing import with_loras
from lorasmith.runs.model_run import shown_signature
from lorasmith.runs.progress_bars import counted, note
from lorasmith.sampling import generate as sampling
from lorasmith.sampling.generate import Sampling
from lorasmith.training.lora_handle import Lora

P = ParamSpec("P")
_Lora = str | os.PathLike[str] | Lora
LoraStrengths = (
    Mapping[str, float] | Mapping[Path, float] | Mapping[str | Path, float] | Sequence[_Lora | tuple[_Lora, float]]
)
"""LoRAs with strengths: `{"dog.safetensors": 0.8}`, or a list of files, LoRAs and pairs of one and its strength."""


@dataclass(frozen=True, kw_only=True)
class DatasetArguments(DataConfig):
    """Keyword arguments of `load_dataset`: every setting of `DataConfig`, and these.

    Attributes:
        config: base settings; those passed as keywords override them.
        device: where to encode; the first GPU, or the CPU, if None.
        progress: True for bars of captions and images, False for none, or a function that is called after each image
            with (images done, total, name of the image).
    """

    config: DataConfig | None = None
    device: str | torch.device | None = None
    progress: bool | EncodingProgress | None = True


_SURROUNDINGS = [field.name for field in fields(DatasetArguments) if "option" not in field.metadata]


class _LoadDataset(Protocol[P]):
    def __call__(
        self,
        images: str | os.PathLike[str] | Sequence[ImageSource] | object,
        model: Model,
        *args: P.args,
        **arguments: P.kwargs,
    ) -> EncodedDataset: ...


def _with_arguments(
    arguments: Callable[P, DataConfig],
) -> Callable[[Callable[..., EncodedDataset]], _LoadDataset[P]]:
    """Decorator: `**arguments` get the signature of their dataclass, for type checkers and `help`."""
    return lambda function: shown_signature(function, arguments)


@_with_arguments(DatasetArguments)
def load_dataset(
    images: str | os.PathLike[str] | Sequence[ImageSource] | object, model: Model, **arguments: Any
) -> EncodedDataset:
    """Read and encode images with captions.

    Encodings are kept on disk, so that the next call with the same images, captions and encoders reads them.

    Args:
        images: a folder of images, a metadata file, a folder that `datasets` saved, a `datasets.Dataset` with a column
            of images, or several of these as `ImageSource`.
        model: its autoencoder and text encoders are used.
        **arguments: settings by name (`DataConfig`), such as trigger, resolution and flip, and those of
            `DatasetArguments`: config, device, progress.

    Returns:
        The samples: latents fp32 (channels, [frames,] height, width) on the CPU, and conditionings of the captions.

    Raises:
        DataError: the folder or its images cannot be used.
        ModelError: the model lacks a text encoder or an autoencoder.
        OptionError: a setting is unknown or out of range, or there is no such device.
    """
    given = DatasetArguments(**{name: arguments.pop(name) for name in _SURROUNDINGS if name in arguments})
    bars = given.progress if isinstance(given.progress, bool) else False
    with (
        counted("Hashing", bars) as hashing,
        counted("Captions", bars) as captions,
        counted("Images", given.progress) as pictures,
    ):
        data = encoding.load_dataset(
            images,
            model,
            device=given.device,
            progress=pictures,
            caption_progress=captions,
            hash_progress=hashing,
            config=given.config,
            **arguments,
        )
    for sentence in data.notes if given.progress is True else ():
        note(sentence)
    return data


def generate(
    model: Model | Denoiser,
    prompts: str | Sequence[str],
    *,
    loras: LoraStrengths = (),
    strict: bool = False,
    text_encoder: TextEncoder | None = None,
    negative: str = "",
    seed: int = Sampling.seed,
    steps: int = Sampling.steps,
    cfg: float | None = Sampling.cfg,
    sampler: str = Sampling.sampler,
    scheduler: str = Sampling.scheduler,
    width: int | None = Sampling.width,
    height: int | None = Sampling.height,
    dtype: torch.dtype = Sampling.dtype,
    device: str | torch.device | None = None,
    progress: bool | Callable[[int, int], None] | None = True,
    cancelled: Callable[[], bool] | None = None,
) -> list[Image.Image]:
    """Generate one picture per prompt, all from noise of the same seed.

    Args:
        model: the model, or its denoiser with LoRAs applied.
        prompts: one or more prompts, `(word:1.2)` weights included.
        loras: LoRAs with their strengths, `{"dog.safetensors": 0.8}`, or a list of files or `Lora`s, at strength 1
            unless each is a pair with its own. They are applied to denoiser and text encoders.
        strict: whether a LoRA of which a part does not apply is refused; else a Python warning says so.
        text_encoder: text encoders with LoRAs applied; the model's if None.
        negative: negative prompt.
        seed: of the noise.
        steps: sampling steps, from 1.
        cfg: guidance scale; the model's own if None.
        sampler, scheduler: names as in ComfyUI's KSampler.
        width, height: in pixels, multiples of the model's; its resolution if None.
        dtype: of the denoiser's weights and products; bf16 needs half of the memory and changes pictures slightly.
        device: where to sample; the first GPU, or the CPU, if None.
        progress: True for a bar, False for none, or a function that is called with (steps done, total) of all prompts
            together.
        cancelled: called between evaluations of the network; True ends sampling.

    Returns:
        RGB pictures, one per prompt.

    Raises:
        OptionError: a size does not fit the model, a name is unknown, or a strength is not finite.
        ModelError: the model lacks a text encoder or an autoencoder.
        LoraError: a LoRA cannot be read, is for another model, or is refused.
        CancelledError: `cancelled` returned True.
    """
    denoiser = model if isinstance(model, Denoiser) else model.denoiser
    encoder = text_encoder or denoiser.base.text_encoder
    denoiser, encoder = with_loras(denoiser, encoder, _pairs(loras), strict=strict)
    with counted("Sampling", progress) as shown:
        return sampling.generate(
            denoiser,
            prompts,
            text_encoder=encoder,
            negative=negative,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler=sampler,
            scheduler=scheduler,
            width=width,
            height=height,
            dtype=dtype,
            device=chosen_device(device),
            progress=shown,
            cancelled=cancelled,
        )


def _pairs(loras: LoraStrengths) -> list[tuple[_Lora, float]]:
    if isinstance(loras, Mapping):
        return list(loras.items())
    return [one if isinstance(one, tuple) else (one, 1.0) for one in loras]
