"""Last blocks without what no layer after them reads: Flux.1's network drops the text's tokens behind its last block.

Without them that block has no feed-forward product of the text. Of 57 blocks at 512 pixels, where a third of the tokens
are text, that is about 0.4 % of a step; with smaller pictures, or in shallower models, it is more. What is read is the
same, up to the order of sums.
"""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.inject import forward_replaced


def last_block_shortened(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside the context, the last block of a network computes no more than is read of it."""
    blocks = getattr(module, "single_transformer_blocks", [])
    if len(blocks) and type(blocks[-1]).__name__ == "FluxSingleTransformerBlock":
        return forward_replaced(blocks[-1], types.MethodType(_of_the_picture, blocks[-1]))
    return contextlib.nullcontext()


def _of_the_picture(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward of a single block of Flux.1, whose tokens of text come back as they were."""
    text = encoder_hidden_states.shape[1]
    both, gate = block.norm(torch.cat((encoder_hidden_states, hidden_states), dim=1), emb=temb)
    mixed = block.attn(hidden_states=both, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    own = torch.cat((mixed[:, text:], block.act_mlp(block.proj_mlp(both[:, text:]))), dim=2)
    states = hidden_states + gate.unsqueeze(1) * block.proj_out(own)
    return encoder_hidden_states, states.clip(-65504, 65504) if states.dtype == torch.float16 else states
