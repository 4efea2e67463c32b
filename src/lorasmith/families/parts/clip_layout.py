"""CLIP text encoders in checkpoints: OpenAI's in transformers' naming, OpenCLIP's in another."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.core.quantization import Packed, of_rows

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
_PROJECTION = "text_projection.weight"
_LAYER = re.compile(r"(?:text_model\.)?(?:encoder\.layers|transformer\.resblocks)\.(\d+)\.")
_FUSED = re.compile(r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")


def depth_of(names: Iterable[str]) -> int:
    """Layers of a CLIP text encoder with tensors of these names, in either naming; 0 where it is none."""
    return 1 + max((int(match[1]) for name in names if (match := _LAYER.match(name))), default=-1)


def in_transformers_naming(
    tensors: Mapping[str, Tensor | Packed], *, layers: int, is_projected: bool
) -> dict[str, Tensor | Packed]:
    """A text encoder's tensors under transformers' names, without `text_model.` in front.

    Tables of positions and temperatures, for which transformers' models have no parameters, are left out.
    """
    if any(name.startswith("transformer.resblocks.") for name in tensors):
        named = _from_openclip(tensors)
    else:
        named = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    left = ("position_ids", "logit_scale", *(() if is_projected else (_PROJECTION,)))
    beyond = tuple(f"encoder.layers.{index}." for index in range(layers, depth_of(named)))
    return {name: one for name, one in named.items() if not name.endswith(left) and not name.startswith(beyond)}


def _from_openclip(tensors: Mapping[str, Tensor | Packed]) -> dict[str, Tensor | Packed]:
    """OpenCLIP's tensors under transformers' names, its fused attention projections split."""
    converted: dict[str, Tensor | Packed] = {}
    for name, tensor in tensors.items():
        if match := _FUSED.match(name):
            rows = tensor.shape[0] // 3
            for number, part in enumerate("qkv"):
                piece = of_rows(tensor, operator.itemgetter(slice(number * rows, (number + 1) * rows)))
                converted[f"encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}"] = piece
            continue
        if name == "text_projection":  # a matrix that is multiplied with from the right
            converted[_PROJECTION] = (tensor.weight() if isinstance(tensor, Packed) else tensor).t().contiguous()
            continue
        for pattern, replacement in _OPENCLIP:
            new, hits = re.subn(pattern, replacement, name)
            if hits:
                converted[new] = tensor
                break
    return converted


def clip_config(tensors: Mapping[str, Tensor | Packed], *, activation: str, pad_token_id: int | None) -> dict[str, Any]:
    """Configuration of transformers' CLIPTextModel for tensors under its names; heads are 64 channels wide."""
    for needed in ("embeddings.token_embedding", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1"):
        if f"{needed}.weight" not in tensors:
            raise ModelError(f"the checkpoint's text encoder lacks {needed}.weight; it is incomplete or was cut short")
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": depth_of(tensors),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": tensors["embeddings.position_embedding.weight"].shape[0],
        "hidden_act": activation,
        "projection_dim": tensors[_PROJECTION].shape[0] if _PROJECTION in tensors else width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1 if pad_token_id is None else pad_token_id,
    }


def renamed_for(encoder: nn.Module, tensors: Mapping[str, Tensor | Packed]) -> dict[str, Tensor | Packed]:
    """Tensors without `text_model.`, under the names that this version of transformers uses."""
    nested = any(name.startswith("text_model.") for name in encoder.state_dict())
    return {f"text_model.{name}" if nested and name != _PROJECTION else name: one for name, one in tensors.items()}


def released_paths(layers: int, *, is_projected: bool = False) -> tuple[str, ...]:
    """`written_paths` of a CLIP text encoder with this number of layers, for models without text encoder."""
    parts = (*(f"self_attn.{part}_proj" for part in ("k", "v", "q", "out")), "mlp.fc1", "mlp.fc2")
    paths = (f"text_model.encoder.layers.{layer}.{part}" for layer in range(layers) for part in parts)
    return (*paths, *(("text_projection",) if is_projected else ()))


def written_paths(encoder: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that a LoRA can name, in files: those of layers begin with `text_model.`.

    transformers 5.6 dropped the prefix from CLIPTextModel; files keep it. The projection of the pooled vector has none.
    """
    paths = (path for path, module in encoder.named_modules() if isinstance(module, nn.Linear))
    return tuple(f"text_model.{path}" if path.startswith("encoder.layers.") else path for path in paths)
