"""The text encoder of UMT5 (Chung et al. 2023, arXiv:2304.09151), and prompts encoded with it.

T5's layout with biases by relative position in every block, and a larger vocabulary, which the package does not have:
ComfyUI's files of the encoder hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.core.placement import device_of
from lorasmith.families.files.original_weights import PartSource
from lorasmith.families.parts.encoders import ENCODERS, EncoderKind
from lorasmith.families.parts.prompt_weights import weighted_states
from lorasmith.families.parts.t5_encoders import T5_BIAS, built_t5, t5_tokens
from lorasmith.families.parts.tokenizers import TokenizerSource, folder_tokenizer, spiece_tokenizer


class UMT5Encoder(EncoderKind):
    """UMT5, of which video models use the XXL size."""

    name = "umt5xxl"
    longest = 512

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return T5_BIAS.format(1) in shapes

    def width(self, encoder: Any) -> int:
        return int(encoder.config.d_model)

    def build(self, source: PartSource) -> nn.Module:
        from transformers import UMT5Config, UMT5EncoderModel

        # A file with its vocabulary has it among the tensors.
        tensors = {name: one for name, one in source.tensors.items() if name != "spiece_model"}
        part = PartSource(source.where, tensors, source.settings, source.config)
        return built_t5(part, lambda config: UMT5EncoderModel(UMT5Config(**config)))

    def tokenizer(self, encoder: Any, source: TokenizerSource) -> Any:
        if source.folder is not None:
            return folder_tokenizer(source.folder)
        return spiece_tokenizer(source, beside="spiece.model", rows=encoder.config.vocab_size, adds_eos=True)


ENCODERS.register(UMT5Encoder.name)(UMT5Encoder())


def encode_umt5(
    text: str,
    tokenizer: Any,
    encoder: nn.Module,
    *,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    min_padding: int = 0,
) -> Tensor:
    """States after the last layer for one prompt, and zeros for padding, (1, tokens, width).

    Padding is masked in the encoder, so that only the prompt has to be encoded.
    """
    tokens = t5_tokens(text, tokenizer, max_tokens=max_tokens)
    states = _states(encoder, [token for token, _ in tokens])
    weights = [weight for _, weight in tokens]
    if any(weight != 1.0 for weight in weights):
        # The empty prompt is the end alone; the rest of it is padding.
        empty = F.pad(_states(encoder, [tokenizer.eos_token_id]), (0, 0, 0, len(tokens) - 1))
        states = weighted_states(states, empty, [weights])
    return F.pad(states, (0, 0, 0, max(min_padding, min_tokens - len(tokens))))


@torch.no_grad()
def _states(encoder: nn.Module, tokens: list[int]) -> Tensor:
    """(1, tokens, width) in fp32."""
    states: Tensor = encoder(input_ids=torch.tensor([tokens], device=device_of(encoder))).last_hidden_state
    return states.float()
