"""The contract of text encoders: how a kind is recognised by its tensors, built from them, and tokenized for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorasmith.core.errors import ModelError
from lorasmith.core.quantization import weight_source
from lorasmith.core.registry import Registry
from lorasmith.families.files.original_weights import PartSource
from lorasmith.families.parts.tokenizers import TokenizerSource


class EncoderKind(ABC):
    """A kind of text encoder.

    Attributes:
        name: registered name, as ComfyUI calls it.
        longest: tokens of a prompt that models with this encoder were made for; longer ones are read, but worse.
        dtype: in which it runs; None for that of its weights, where packed and fp16 ones count as bf16.
    """

    name: str
    longest: int
    dtype: torch.dtype | None = None

    @abstractmethod
    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether these are the tensors of a file that holds such an encoder alone."""

    @abstractmethod
    def build(self, source: PartSource) -> nn.Module:
        """The encoder.

        Args:
            source: its tensors, in any naming in use.

        Raises:
            ModelError: tensors are missing or of the wrong shape.
        """

    @abstractmethod
    def width(self, encoder: Any) -> int:
        """Width of its states."""

    def width_in(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Width of the states of the encoder in a file with these tensors. Raises ModelError as `build`."""
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return self.width(self.build(PartSource("the file", tensors)))

    @abstractmethod
    def tokenizer(self, encoder: nn.Module, source: TokenizerSource) -> Any:
        """Its tokenizer. Raises ModelError if there is none at the source."""

    def dtype_of(self, encoder: nn.Module) -> torch.dtype:
        """The number format in which an encoder runs."""
        if self.dtype is not None:
            return self.dtype
        floats = {p.dtype for p in encoder.parameters() if p.is_floating_point()}
        is_plain = floats == {torch.float32} and not any(weight_source(layer) for layer in encoder.modules())
        return torch.float32 if is_plain else torch.bfloat16


ENCODERS: Registry[EncoderKind] = Registry("text encoder", ModelError)
"""Kinds by name; `families.known` imports the modules that register them."""


def recognised_encoder(shapes: Mapping[str, tuple[int, ...]]) -> EncoderKind | None:
    """The kind of encoder with these tensors; None if no registered kind recognises them."""
    return next((kind for _, kind in ENCODERS.items() if kind.recognises(shapes)), None)
