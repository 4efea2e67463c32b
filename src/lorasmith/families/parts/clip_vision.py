"""Image encoders, whose states some denoisers attend to: CLIP's and SigLIP's (Zhai et al. 2023, arXiv:2303.15343)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorasmith.core.errors import ModelError
from lorasmith.core.placement import device_of
from lorasmith.families.files.original_weights import PartSource, block_count, build
from lorasmith.families.parts.clip import CLIP_MEAN, CLIP_STD
from lorasmith.families.parts.encoders import ENCODERS, EncoderKind, TokenizerSource

_SIDE = 224  # pixels of the square that a picture is scaled to
_START = "vision_model."  # in front of names; in files of transformers' newer versions it is not
_LAYERS = "encoder.layers."
_PATCHES, _POSITIONS = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
_INNER = f"{_LAYERS}0.mlp.fc1.weight"
_HEAD = 80  # width of a head of ViT-H


class ImageEncoderKind(EncoderKind):
    """A vision transformer in transformers' naming."""

    title = "image encoder"
    dtype = torch.float32

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        start = _START if f"{_START}{_PATCHES}" in shapes else ""
        has_class = f"{start}embeddings.class_embedding" in shapes
        patches = shapes.get(f"{start}{_PATCHES}", ())
        is_whole = len(patches) == 4 and min(patches) > 0
        return is_whole and self.is_kind(shapes.get(f"{start}{_POSITIONS}") or (0,), has_class=has_class)

    @abstractmethod
    def is_kind(self, positions: tuple[int, ...], *, has_class: bool) -> bool:
        """Whether it has positions of this shape, and a token for the whole picture."""

    @abstractmethod
    def network(self, tensors: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> Callable[[], nn.Module]:
        """What makes the network for tensors without a prefix. Raises ModelError for those of another size."""

    def build(self, source: PartSource) -> nn.Module:
        tensors = {name.removeprefix(_START): tensor for name, tensor in source.tensors.items()}
        if missing := [name for name in (_PATCHES, _POSITIONS, _INNER) if name not in tensors]:
            raise ModelError(f"{source.where} lacks {missing[0]}; it is incomplete, so get it again")
        sizes = {
            "hidden_size": tensors[_PATCHES].shape[0],
            "intermediate_size": tensors[_INNER].shape[0],
            "num_hidden_layers": block_count(list(tensors), _LAYERS),
            "patch_size": tensors[_PATCHES].shape[2],
        }

        def named(model: nn.Module) -> dict[str, Any]:
            needed = model.state_dict()  # whose names begin with `vision_model.` in older versions
            found = {name if name in needed else f"{_START}{name}": tensor for name, tensor in tensors.items()}
            return {name: tensor for name, tensor in found.items() if name in needed}

        return build(self.network(tensors, sizes, source.where), named, where=source.where)

    def own_tokenizer(self, source: TokenizerSource, rows: int) -> Any:
        raise NotImplementedError("it reads no text")


class ClipVision(ImageEncoderKind):
    """OpenCLIP ViT-H."""

    name = "clip_vision_h"

    def is_kind(self, positions: tuple[int, ...], *, has_class: bool) -> bool:
        return has_class

    def network(self, tensors: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> Callable[[], nn.Module]:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        patch, positions = sizes["patch_size"], tensors[_POSITIONS].shape[0]
        if positions != (_SIDE // patch) ** 2 + 1:
            raise ModelError(
                f"{where} must be an image encoder of pictures of {_SIDE}×{_SIDE} px, but has {positions} positions "
                f"for patches of {patch} px; give clip_vision_h.safetensors"
            )
        heads = max(1, sizes["hidden_size"] // _HEAD)
        config = CLIPVisionConfig(**sizes, num_attention_heads=heads, image_size=_SIDE, hidden_act="gelu")
        return lambda: CLIPVisionModel(config)


class SiglipVision(ImageEncoderKind):
    """SigLIP so400m of pictures of 384×384 px, without the head that pools its states."""

    name = "siglip_384"

    def is_kind(self, positions: tuple[int, ...], *, has_class: bool) -> bool:
        return positions[0] == _PLACES and not has_class

    def network(self, tensors: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> Callable[[], nn.Module]:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        config = SiglipVisionConfig(**sizes, num_attention_heads=16, image_size=_SIGLIP_SIDE, vision_use_head=False)
        return lambda: SiglipVisionModel(config)


_SIGLIP_SIDE, _PLACES = 384, 729


@torch.no_grad()
def picture_states(encoder: Any, pixels: Tensor, *, crop: bool = False) -> Tensor:
    """States (batch, tokens, width) of pixels (batch, 3, height, width) in [−1, 1]: CLIP's before the last layer,
    SigLIP's last ones.

    Pictures that are not square are squashed, or cropped around their centre.
    """
    squares = _squares(pixels.to(device_of(encoder)), encoder.config.image_size, crop=crop)
    if encoder.config.model_type == "siglip_vision_model":
        return encoder(2 * squares - 1).last_hidden_state  # type: ignore[no-any-return]
    mean, deviation = (squares.new_tensor(constants).view(1, 3, 1, 1) for constants in (CLIP_MEAN, CLIP_STD))
    return encoder((squares - mean) / deviation, output_hidden_states=True).hidden_states[-2]  # type: ignore[no-any-return]


def _squares(pixels: Tensor, side: int, *, crop: bool) -> Tensor:
    """Squares in [0, 1], in steps of 8 bit."""
    rows, columns = pixels.shape[-2:]
    scale = side / min(rows, columns)
    size = (round(scale * rows), round(scale * columns)) if crop else (side, side)
    scaled = functional.interpolate(pixels.float() / 2 + 0.5, size, mode="bicubic", antialias=True)
    top, left = ((length - side) // 2 for length in size)
    return (255 * scaled[..., top : top + side, left : left + side]).clamp(0, 255).round() / 255


for _kind in (ClipVision(), SiglipVision()):
    ENCODERS.register(_kind.name)(_kind)
