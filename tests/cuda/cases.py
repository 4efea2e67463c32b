"""Small models of every family, and samples for them: a prompt each, of one length or of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import models
import torch
from safetensors.torch import save_file
from torch import nn
from transformer_models import TINY

from benchmarks.bases import MODELS
from lorasmith.bench.measure import synthetic_samples
from lorasmith.data.dataset import Sample
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from tests.cuda.tracing import MODE

FAMILIES = ("sd1", "sdxl", *TINY)

_SIDE = 8  # of latents


def small_model(family: str, folder: Path) -> Model:
    """A model of a family that has a denoiser alone, unless it is the built-in one."""
    if family == "sd1":
        return load_model(BUILT_IN)
    if family == "sdxl":
        tensors, name = models.checkpoint(models.SDXL_TINY, 0), "sdxl.safetensors"
    else:
        tiny = TINY[family]
        tensors, name = tiny.original(tiny.denoiser()), tiny.file
    path = folder / name
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return load_model(path)


def full_size(name: str, blocks: Sequence[int]) -> Model:
    """A model of `benchmarks.bases` in bf16 whose weights have no numbers; of a transformer the first blocks of either
    kind, or all if none are given."""
    model = MODELS[name].make(torch.bfloat16, torch.device("meta"))
    denoiser = model.components.denoiser
    for listed, count in zip(("transformer_blocks", "single_transformer_blocks"), blocks, strict=False):
        setattr(denoiser, listed, getattr(denoiser, listed)[:count])
    with MODE:
        for part in denoiser.modules():
            for key, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[key] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False
                    )
            for key, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def samples_of(model: Model, count: int, *, is_masked: bool) -> Sequence[Sample]:
    """Samples whose texts have one length or, if `is_masked`, each another one, the first behind a mask."""
    if not is_masked:
        return synthetic_samples(model, count, _SIDE, _SIDE)
    whole = model.family.conditioning_shapes(model.components.denoiser)["context"][1]
    lengths = [max(1, whole - 3 * index) for index in range(count)]
    samples = [synthetic_samples(model, 1, _SIDE, _SIDE, tokens=length)[0] for length in lengths]
    given = samples[0].conditioning
    mask = torch.ones(1, whole, dtype=torch.bool)
    mask[:, -1] = False
    named = [replace(one, name=f"random {index}") for index, one in enumerate(samples)]
    return [replace(named[0], conditioning=replace(given, mask=mask)), *named[1:]]
