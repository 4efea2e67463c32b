"""CLIP's image encoder, whose states some denoisers attend to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorasmith.core.errors import ModelError
from lorasmith.core.placement import device_of
from lorasmith.families.files.original_weights import PartSource, block_count, build
from lorasmith.families.parts.encoders import ENCODERS, EncoderKind, TokenizerSource

_SIDE = 224  # pixels of the square that a picture is scaled to
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_START = "vision_model."  # in front of names; in files of transformers' newer versions it is not
_LAYERS = "encoder.layers."
_PATCHES, _POSITIONS = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
_INNER = f"{_LAYERS}0.mlp.fc1.weight"
_HEAD = 80  # width of a head of ViT-H


class ClipVision(EncoderKind):
    """OpenCLIP ViT-H, in transformers' naming."""

    name = "clip_vision_h"
    title = "image encoder"
    longest = 0
    dtype = torch.float32

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        start = _START if f"{_START}{_PATCHES}" in shapes else ""
        patches = shapes.get(f"{start}{_PATCHES}", ())
        return len(patches) == 4 and min(patches) > 0 and f"{start}embeddings.class_embedding" in shapes

    def build(self, source: PartSource) -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        tensors = {name.removeprefix(_START): tensor for name, tensor in source.tensors.items()}
        if missing := [name for name in (_PATCHES, _POSITIONS, _INNER) if name not in tensors]:
            raise ModelError(f"{source.where} lacks {missing[0]}; it is incomplete, so get it again")
        width, _, patch = tuple(tensors[_PATCHES].shape)[:3]
        if tensors[_POSITIONS].shape[0] != (_SIDE // patch) ** 2 + 1:
            raise ModelError(
                f"{source.where} must be an image encoder of pictures of {_SIDE}×{_SIDE} px, but has "
                f"{tensors[_POSITIONS].shape[0]} positions for patches of {patch} px; give clip_vision_h.safetensors"
            )
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=tensors[_INNER].shape[0],
            num_hidden_layers=block_count(list(tensors), _LAYERS),
            num_attention_heads=max(1, width // _HEAD),
            image_size=_SIDE,
            patch_size=patch,
            hidden_act="gelu",
        )

        def named(model: nn.Module) -> dict[str, Any]:
            needed = model.state_dict()  # of which the names, too, begin otherwise in older versions
            found = {name if name in needed else f"{_START}{name}": tensor for name, tensor in tensors.items()}
            return {name: tensor for name, tensor in found.items() if name in needed}

        return build(lambda: CLIPVisionModel(config), named, where=source.where)

    def own_tokenizer(self, source: TokenizerSource, rows: int) -> Any:
        raise NotImplementedError("it reads no text")


@torch.no_grad()
def picture_states(encoder: nn.Module, pixels: Tensor, *, crop: bool = False) -> Tensor:
    """States before the last layer, (batch, tokens, width), of pixels (batch, 3, height, width) in [−1, 1].

    Pictures that are no squares are squashed, or cropped around their centre.
    """
    pictures = pixels.to(device_of(encoder)).float() / 2 + 0.5
    rows, columns = pictures.shape[-2:]
    scale = _SIDE / min(rows, columns)
    size = (round(scale * rows), round(scale * columns)) if crop else (_SIDE, _SIDE)
    pictures = functional.interpolate(pictures, size, mode="bicubic", antialias=True)
    top, left = ((side - _SIDE) // 2 for side in size)
    eight_bit = (255 * pictures[..., top : top + _SIDE, left : left + _SIDE]).clamp(0, 255).round() / 255
    mean, deviation = (eight_bit.new_tensor(one).view(1, 3, 1, 1) for one in (_MEAN, _DEVIATION))
    states: Tensor = encoder((eight_bit - mean) / deviation, output_hidden_states=True).hidden_states[-2]
    return states


ENCODERS.register(ClipVision.name)(ClipVision())
