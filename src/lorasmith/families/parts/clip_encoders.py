"""Text encoders of CLIP and OpenCLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorasmith.families.files.original_weights import PartSource, build
from lorasmith.families.parts import clip_layout
from lorasmith.families.parts.clip_text import CONTEXT_LENGTH, clip_tokenizer
from lorasmith.families.parts.encoders import ENCODERS, EncoderKind
from lorasmith.families.parts.tokenizers import TokenizerSource, folder_tokenizer


class ClipEncoder(EncoderKind):
    """A text encoder of CLIP (Radford et al. 2021, arXiv:2103.00020) or OpenCLIP."""

    dtype = torch.float32
    longest = 3 * (CONTEXT_LENGTH - 2)  # chunks beyond the third are rare in the captions of released models

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
        return build(
            lambda: kind(CLIPTextConfig(**config)),
            lambda model: clip_layout.renamed_for(model, named),
            where=source.where,
        )

    def width(self, encoder: Any) -> int:
        return int(encoder.config.hidden_size)

    def tokenizer(self, encoder: nn.Module, source: TokenizerSource) -> Any:
        if source.folder is not None:
            return folder_tokenizer(source.folder)
        size = encoder.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return clip_tokenizer(pad_token=self._pad_token, size=size)


for _kind in (
    ClipEncoder("clip_l", activation="quick_gelu", pad_token="<|endoftext|>", depth=12),
    ClipEncoder("clip_h", activation="gelu", pad_token="!", depth=24, unused_layers=1),
    ClipEncoder("clip_g", activation="gelu", pad_token="!", depth=32, is_projected=True),
):
    ENCODERS.register(_kind.name)(_kind)
