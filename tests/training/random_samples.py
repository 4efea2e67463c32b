"""Samples of random latents with real captions, for the built-in model."""

from __future__ import annotations

import torch

from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.model import Model

CAPTIONS = ("a cat", "a dog", "a red apple, noto style", "", "a lion", "(a bus:1.3) on a blue background")


def of_one_size(model: Model) -> EncodedDataset:
    """Six samples."""
    g = torch.Generator().manual_seed(0)
    return EncodedDataset(
        tuple(
            Sample(torch.randn(4, 8, 8, generator=g), model.text_encoder.encode(caption), f"{index}.png")
            for index, caption in enumerate(CAPTIONS)
        )
    )


def of_several_sizes(model: Model, first: EncodedDataset) -> EncodedDataset:
    """Those of one size and further ones, with a caption of three chunks."""
    g = torch.Generator().manual_seed(1)
    long = model.text_encoder.encode("a penguin on a pink background, " * 20)
    assert long.tensors["context"].shape[1] > 77
    extra = [Sample(torch.randn(4, 8, 12, generator=g), long, "wide.png")]
    extra.append(Sample(torch.randn(4, 8, 8, generator=g), long, "long.png"))
    return EncodedDataset((*first.samples, *extra))
