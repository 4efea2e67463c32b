"""Modules that another program loaded, as sources of parts on the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.families.files.original_weights import PartSource

__all__ = ["source_of_module"]

_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def source_of_module(module: nn.Module, title: str, part: str) -> PartSource:
    """The tensors of a loaded module, uncopied, and its configuration.

    Args:
        module: of diffusers or transformers.
        title: of the pipeline, for messages.
        part: its name there.

    Raises:
        ModelError: its weights are not there (sequential offloading), are quantized, or have LoRAs on them.
    """
    module = getattr(module, "_orig_mod", module)  # of what torch.compile wraps
    if (reason := next(_obstacles(module), None)) is not None:
        raise ModelError(f"the {part} of {title} must have plain weights in memory, but {reason}")
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    config: Any = module.config
    return PartSource(
        f"the {part} of {title}", tensors, config=config.to_dict() if hasattr(config, "to_dict") else dict(config)
    )


def _obstacles(module: nn.Module) -> Iterator[str]:
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    if any(".base_layer." in name for name in parameters):
        yield "LoRAs are loaded on it; unload them (pipe.unload_lora_weights()), and load them as lorasmith.Lora"
    if any(one.is_meta for one in parameters.values()):
        yield "they were moved away by sequential offloading; load the pipeline without it"
    if getattr(module, "hf_quantizer", None) is not None or any(
        type(one) is not nn.Parameter or one.dtype not in _PLAIN for one in parameters.values()
    ):
        yield "they are quantized; load them in bf16 or fp16, and quantize in training (quantization=...)"
