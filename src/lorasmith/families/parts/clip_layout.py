"""CLIP text encoders as checkpoints hold them: OpenAI's in transformers' own naming, OpenCLIP's in another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorasmith.core.errors import ModelError

__all__ = [
    "clip_config",
    "openclip_to_transformers",
    "released_paths",
    "renamed_for",
    "without_text_model",
    "written_paths",
]

_OPENCLIP = (
    (r"^token_embedding\.weight$", "embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.(\d+)\.ln_1\.", r"encoder.layers.\1.layer_norm1."),
    (r"^transformer\.resblocks\.(\d+)\.ln_2\.", r"encoder.layers.\1.layer_norm2."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
)
_FUSED = re.compile(r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")


def without_text_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI CLIP's tensors without `text_model.` in front, and without what CLIPTextModel has no parameter for.

    That is a table of positions, and the projection to the space shared with pictures, which some merges carry along.
    """
    cut = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return {name: t for name, t in cut.items() if not name.endswith(("position_ids", "text_projection.weight"))}


def openclip_to_transformers(tensors: Mapping[str, Tensor], *, layers: int) -> dict[str, Tensor]:
    """OpenCLIP's tensors under transformers' names, its fused attention projections split, the first `layers` only."""
    converted = {}
    for name, tensor in tensors.items():
        if match := _FUSED.match(name):
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}"] = piece
            continue
        for pattern, replacement in _OPENCLIP:
            new, hits = re.subn(pattern, replacement, name)
            if hits:
                converted[new] = tensor
                break
    beyond = {f"encoder.layers.{index}." for index in range(layers, layers + 64)}
    return {name: tensor for name, tensor in converted.items() if not any(name.startswith(layer) for layer in beyond)}


def clip_config(tensors: Mapping[str, Tensor], *, activation: str, pad_token_id: int | None) -> dict[str, Any]:
    """Configuration of transformers' CLIPTextModel for tensors under its names; heads are 64 channels wide.

    Texts are padded with `pad_token_id`, or with the end token if it is None.

    Raises:
        ModelError: tensors that fix the configuration are missing.
    """
    for needed in ("embeddings.token_embedding", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1"):
        if f"{needed}.weight" not in tensors:
            raise ModelError(f"the checkpoint's text encoder lacks {needed}.weight; it is incomplete or was cut short")
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layers."))
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": tensors["embeddings.position_embedding.weight"].shape[0],
        "hidden_act": activation,
        "projection_dim": width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1 if pad_token_id is None else pad_token_id,
    }


def renamed_for(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without `text_model.`, under the names that this version of transformers uses."""
    nested = any(name.startswith("text_model.") for name in encoder.state_dict())
    return {f"text_model.{name}" if nested else name: tensor for name, tensor in tensors.items()}


def released_paths(layers: int) -> tuple[str, ...]:
    """What `written_paths` gives for a CLIP text encoder of so many layers, for models that come without theirs."""
    parts = (*(f"self_attn.{part}_proj" for part in ("k", "v", "q", "out")), "mlp.fc1", "mlp.fc2")
    return tuple(f"text_model.encoder.layers.{layer}.{part}" for layer in range(layers) for part in parts)


def written_paths(encoder: nn.Module) -> tuple[str, ...]:
    """Paths of the modules a LoRA can name, as every program writes them: with `text_model.` in front.

    transformers 5.6 dropped that part from CLIPTextModel; files keep it.
    """
    paths = (path for path, module in encoder.named_modules() if isinstance(module, nn.Linear))
    return tuple(path if path.startswith("text_model.") else f"text_model.{path}" for path in paths)
