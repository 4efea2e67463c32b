"""Small random vision towers, in the files of text encoders that see pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tiny_parts import randomized, under
from torch import Tensor, nn

_SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_heads": 16, "out_hidden_size": 32}


@cache
def tower_of(kind: str) -> nn.Module:
    """The tower of an encoder of a kind, as transformers has it."""
    if kind == "qwen25vl":  # of as many blocks as bring one with attention beyond windows
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen25

        config = qwen25.Qwen2_5_VLVisionConfig(**_SIZES, depth=8)
        return randomized(qwen25.Qwen2_5_VisionTransformerPretrainedModel(config))
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

    deep = {"deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 36}
    return randomized(qwen3.Qwen3VLVisionModel(qwen3.Qwen3VLVisionConfig(**_SIZES, **deep, depth=18)))


def with_tower(kind: str, start: str, tower_start: str) -> Callable[[nn.Module], dict[str, Tensor]]:
    """Names an encoder's tensors as its file does, with those of its tower."""

    def named(encoder: nn.Module) -> dict[str, Tensor]:
        return {**under(start)(encoder), **under(tower_start)(tower_of(kind))}

    return named
