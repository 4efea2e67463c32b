"""Checkpoints in fp8, whose weights stay in fp8: plain ones, whose codes are the weights, and scaled ones.

A scaled weight is `code · scale`, one scale for the tensor or one for each row, as ComfyUI writes them:

    X.weight          float8_e4m3fn or float8_e5m2
    X.scale_weight    the scale, in files that have a tensor `scaled_fp8`; X.weight_scale in newer ones
    X.scale_input     of activations, for products in fp8 (X.input_scale in newer ones); changes no weight
    X.comfy_quant     newer files: JSON as bytes, with the `format`; or all formats are in the metadata

Other formats with the same marks (nvfp4, int8, rotated ones) are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lorasmith.core.errors import ModelError
from lorasmith.core.fp8_products import CODES
from lorasmith.core.quantization import Packed, scaled_codes

__all__ = ["check_formats", "companions", "packed_fp8", "scale_name"]

_SCALES = (".scale_weight", ".weight_scale")
_COMPANIONS = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant")
_MARK = "scaled_fp8"
_METADATA = "_quantization_metadata"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")


def companions(names: Collection[str]) -> set[str]:
    """Names of tensors that describe others (scales, formats) and are no weights themselves."""
    return {
        name
        for name in names
        if name.rpartition(".")[2] == _MARK
        or any(name.endswith(end) and f"{name.removesuffix(end)}.weight" in names for end in _COMPANIONS)
    }


def scale_name(weight: str, names: Collection[str]) -> str | None:
    """Name of a tensor's scale, or None."""
    stem = weight.removesuffix(".weight")
    return None if stem == weight else next((stem + end for end in _SCALES if stem + end in names), None)


def check_formats(file: str, names: Iterable[str], metadata: Mapping[str, str], read: Callable[[str], Tensor]) -> None:
    """Raises ModelError if a file declares another format than fp8 for a weight.

    Args:
        file: name, for messages.
        names: of its tensors.
        metadata: of its header.
        read: returns a tensor by name.
    """
    for layer, kind in _formats(file, names, metadata, read):
        if kind not in _FORMATS:
            raise ModelError(
                f"weights must be plain numbers or fp8, but {layer} of {file} is stored as {kind}; get the bf16, "
                "fp16 or fp8 version of the model"
            )


def packed_fp8(code: Tensor, scale: Tensor | None, name: str) -> Packed | None:
    """A packed weight in fp8; None for a plain weight in another dtype.

    Args:
        code: (out, ...), in fp8 or a plain weight.
        scale: one number or one for each output, or None.
        name: of the weight, for messages.

    Raises:
        ModelError: the scale does not fit, or the weight is not in fp8.
    """
    if code.dtype not in CODES:
        if scale is None:
            return None
        raise ModelError(f"{name} has a scale and must be fp8, but is {code.dtype}; get the bf16 version of the model")
    if scale is None:
        scale = torch.ones(1)
    if scale.numel() not in (1, len(code)):
        raise ModelError(
            f"the scale of {name} must be one number or one for each of {len(code)} rows, got {scale.numel()}; "
            "get the bf16 version of the model"
        )
    return scaled_codes(code, scale.float().reshape(-1, *(1,) * (code.ndim - 1)), torch.float32)


def _formats(
    file: str, names: Iterable[str], metadata: Mapping[str, str], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, str]]:
    try:
        for layer, said in json.loads(metadata.get(_METADATA, "{}")).get("layers", {}).items():
            yield layer, str(said["format"])
        for name in names:
            if name.endswith(".comfy_quant"):
                said = json.loads(bytes(read(name).tolist()))
                yield name.removesuffix(".comfy_quant"), str(said["format"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"what {file} says about its quantized weights must be JSON with a format for each; the file was damaged "
            "or edited, so get it again"
        ) from error
