"""Kinds of text encoders: how each is recognised by its tensors, built from them, and tokenized for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasmith.core.errors import ModelError
from lorasmith.core.registry import Registry
from lorasmith.families.files.original_weights import PartSource, build
from lorasmith.families.parts import clip_layout
from lorasmith.families.parts.clip_text import clip_tokenizer

__all__ = ["ENCODERS", "EncoderKind", "recognised_encoder"]


class EncoderKind(ABC):
    """A kind of text encoder.

    Attributes:
        name: registered name, as ComfyUI calls it.
        dtype: in which it runs, independent of its file's.
    """

    name: str
    dtype: torch.dtype = torch.float32

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
    def tokenizer(self, encoder: nn.Module, folder: Path | None) -> Any:
        """Its tokenizer, from a folder, or from the package's files if `folder` is None."""


class ClipEncoder(EncoderKind):
    """A text encoder of CLIP (Radford et al. 2021, arXiv:2103.00020) or OpenCLIP.

    Args:
        name: registered name.
        activation: transformers' name of its feed-forward networks' activation.
        pad_token: with which prompts are padded to 77 tokens.
        unused_layers: last layers of the released encoder that are never used, and left out.
        depth: layers of the released encoder, by which a file of the encoder alone is recognised.
        is_projected: whether its pooled vector is projected.
    """

    def __init__(
        self,
        name: str,
        *,
        activation: str,
        pad_token: str,
        depth: int,
        unused_layers: int = 0,
        is_projected: bool = False,
    ) -> None:
        self.name = name
        self._activation = activation
        self._pad_token = pad_token
        self._depth = depth
        self._unused_layers = unused_layers
        self._is_projected = is_projected

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return clip_layout.depth_of(shapes) in (self._depth, self._depth - self._unused_layers)

    def build(self, source: PartSource) -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        kind = CLIPTextModelWithProjection if self._is_projected else CLIPTextModel
        depth, config = clip_layout.depth_of(source.tensors), source.config
        # Files that were converted back from diffusers, and its folders, lack the unused layers already.
        is_cut = config is not None or depth == self._depth - self._unused_layers
        named = clip_layout.in_transformers_naming(
            source.tensors, layers=depth if is_cut else depth - self._unused_layers, is_projected=self._is_projected
        )
        if config is None:
            # The padding token is that of OpenAI's vocabulary, or token 0.
            pad = 0 if self._pad_token == "!" else None
            config = clip_layout.clip_config(named, activation=self._activation, pad_token_id=pad) | dict(
                source.settings
            )
        wanted = CLIPTextConfig(**config)
        return build(lambda: kind(wanted), lambda model: clip_layout.renamed_for(model, named), where=source.where)

    def tokenizer(self, encoder: nn.Module, folder: Path | None) -> Any:
        if folder is not None:
            from transformers import CLIPTokenizer

            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        size = encoder.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return clip_tokenizer(pad_token=self._pad_token, size=size)


ENCODERS: Registry[EncoderKind] = Registry("text encoder", ModelError)
for _kind in (
    ClipEncoder("clip_l", activation="quick_gelu", pad_token="<|endoftext|>", depth=12),
    ClipEncoder("clip_h", activation="gelu", pad_token="!", depth=24, unused_layers=1),
    ClipEncoder("clip_g", activation="gelu", pad_token="!", depth=32, is_projected=True),
):
    ENCODERS.register(_kind.name)(_kind)


def recognised_encoder(shapes: Mapping[str, tuple[int, ...]]) -> EncoderKind | None:
    """The kind of encoder with these tensors; None if no registered kind recognises them."""
    return next((kind for _, kind in ENCODERS.items() if kind.recognises(shapes)), None)
