"""Packed weights in safetensors files: what a file says about them, and the `Packed` weights that they are.

A packed weight is a tensor of codes with companions, as ComfyUI writes them:

    X.weight            codes; a plain weight in fp8 has no companion
    X.weight_scale      scale, or scales of blocks; X.scale_weight in older files, which have a tensor `scaled_fp8`
    X.weight_scale_2    nvfp4: the scale of all blocks
    X.pre_quant_scale   nvfp4, optional: factors of the layer's input, here multiplied into the columns of the weight
    X.input_scale       of activations (X.scale_input in older files); changes no weight
    X.comfy_quant       JSON as bytes, with the `format` and its parameters; or those of all layers are in the metadata

A file may mix the formats, with plain layers between. Others (of 4 bits with rotated activations, for example) are
refused by name.

    format              codes                         scales                                   weight
    fp8                 float8_e4m3fn, float8_e5m2    one, or one for each output              code · scale
    int8                int8                          one, or one for each output              code · scale
    int8 with ConvRot   int8                          one, or one for each output              (code · scale) R
    nvfp4               e2m1, two in a byte           e4m3 for each 16 inputs, and one fp32    code · block · scale
    mxfp8               float8_e4m3fn                 a power of two for each 32 inputs        code · 2^(e − 127)

R rotates groups of inputs (`core.quantization`). All formats are packed row by row of the weight, so that rows of a
`Packed` are packed too; scales of blocks, which files store in cuBLAS' tiles, are untiled for that. The weights are
`scaled_codes`, `rotated_codes`, `mxfp8_codes` and `nvfp4_codes` of `core.quantization`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from lorasmith.core.errors import ModelError
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.placement import dtype_name
from lorasmith.core.quantization import (
    FP8_CODES,
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    Packed,
    mxfp8_codes,
    nvfp4_codes,
    rotated_codes,
    scaled_codes,
    tiled_size,
    untiled,
)

_SCALE = "weight_scale"
_SCALES = (_SCALE, "scale_weight")
_SAID = "comfy_quant"
_COMPANIONS = (*_SCALES, "weight_scale_2", "pre_quant_scale", "scale_input", "input_scale", _SAID)
_MARK = "scaled_fp8"
_METADATA = "_quantization_metadata"
_E8M0 = torch.float8_e8m0fnu
_LONGEST_SAID = 2**16  # bytes of JSON about one layer
_MOST_PREFIXES = 16
_LARGEST_GROUP = 4096  # whose rotation is a matrix of that size
_REMEDY = "the file was damaged or edited, so get it again or use the bf16 or fp16 version of the model"


def scale_name(weight: str, names: Collection[str]) -> str | None:
    """Name of a packed weight's scale, or None for a weight without."""
    stem = _stem(weight)
    return None if stem is None else next((f"{stem}.{end}" for end in _SCALES if f"{stem}.{end}" in names), None)


class PackedWeights:
    """The weights of a safetensors file, of which some are packed. `empty`: them on the meta device."""

    def __init__(
        self,
        file: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        empty: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._file = file
        self._tensors = tensors
        self._empty = empty or tensors
        self._formats = dict(_formats(file, tensors, self._empty, metadata))
        for stem, format_ in self._formats.items():
            if format_.name not in _KINDS:
                raise ModelError(
                    f"weights must be plain numbers or one of {', '.join(_KINDS)}, but {stem} of {file} is stored as "
                    f"{format_.name}; get the bf16, fp16 or fp8 version of the model"
                )
        companions = {
            name
            for name in tensors
            if name.rpartition(".")[2] == _MARK
            or any(name.endswith(f".{end}") and _of(name, end) in tensors for end in _COMPANIONS)
        }
        self.shapes = {name: self._shape(name) for name in tensors if name not in companions}

    def read(self, name: str) -> Tensor | Packed:
        """A weight by name: packed, or plain in the file's dtype."""
        tensor = self._tensors[name]
        format_ = self._said(name)
        scale = scale_name(name, self._tensors)
        if format_ is not None:
            return _KINDS[format_.name](_Layer(name, self._file, self._tensors, format_))
        if scale is not None:  # older files do not say the format
            return _scaled_fp8(_Layer(name, self._file, self._tensors, _Format("float8_e4m3fn")))
        if tensor.dtype not in FP8_CODES:
            return tensor
        if _stem(name) is None or tensor.ndim < 2:  # layers unpack matrices and kernels alone
            return tensor.float()
        return scaled_codes(tensor, torch.ones((1,) * tensor.ndim), torch.float32)

    def format_of(self, name: str) -> str:
        """The format in which a weight is stored: `int8_tensorwise`, say, or the short name of a dtype."""
        format_, codes = self._said(name), self._empty[name].dtype
        return dtype_name(codes) if format_ is None or codes in FP8_CODES else format_.name

    def _said(self, name: str) -> _Format | None:
        stem = _stem(name)
        return None if stem is None else self._formats.get(stem)

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight, which has two numbers for each code in nvfp4."""
        format_, shape = self._said(name), tuple(self._empty[name].shape)
        return (*shape[:-1], 2 * shape[-1]) if format_ is not None and format_.name == "nvfp4" and shape else shape


@dataclass(frozen=True)
class _Format:
    """What a file says about the format of a layer."""

    name: str
    rotated: int | None = None  # inputs rotated together (ConvRot); None for none


@dataclass(frozen=True)
class _Layer:
    """A packed weight in a file."""

    weight: str
    file: str  # for messages
    tensors: Mapping[str, Tensor]
    said: _Format

    def codes(self, *dtypes: torch.dtype, ndim: int | None = None) -> Tensor:
        """Its codes, in one of `dtypes` and with `ndim` dimensions."""
        codes = self.tensors[self.weight]
        if codes.dtype not in dtypes:
            self.refuse(f"must have codes in {_listed(dtypes)}, but has {_short(codes.dtype)}")
        if codes.ndim < 2 or (ndim is not None and codes.ndim != ndim):
            self.refuse(f"must have {ndim or '2 or more'} dimensions, but has {codes.ndim}")
        return codes

    def companion(self, leaf: str) -> Tensor | None:
        """The tensor beside it with this name; None if there is none."""
        return self.tensors.get(f"{_stem(self.weight)}.{leaf}")

    def scale(self, *leaves: str, sizes: Collection[int]) -> Tensor:
        """The first companion of these names, flat and in fp32."""
        scale = next((companion for leaf in leaves if (companion := self.companion(leaf)) is not None), None)
        if scale is None:
            self.refuse(f"must have a {leaves[0]}, but has none")
        if not scale.is_floating_point():
            self.refuse(f"must have a {leaves[0]} of floating-point numbers, but it is {_short(scale.dtype)}")
        if scale.numel() not in sizes:
            self.refuse(f"must have a {leaves[0]} of {_listed(sizes)} numbers, but it has {scale.numel()}")
        return scale.float().flatten()

    def block_scales(self, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        """Its scales of blocks, untiled, as bytes (rows, columns). dtype: their format; files without it have bytes."""
        scale = self.companion(_SCALE)
        if scale is None:
            self.refuse(f"must have a {_SCALE}, but has none")
        if scale.dtype not in (dtype, torch.uint8):
            self.refuse(f"must have a {_SCALE} in {_short(dtype)}, but it is {_short(scale.dtype)}")
        if scale.numel() != (size := tiled_size(rows, columns)):
            self.refuse(f"must have a {_SCALE} of {size} numbers, but it has {scale.numel()}")
        return untiled(scale.contiguous().view(torch.uint8), rows, columns)

    def refuse(self, fault: str) -> NoReturn:
        raise ModelError(f"{self.weight} of {self.file} is stored as {self.said.name} and {fault}; {_REMEDY}")


def _scaled_fp8(layer: _Layer) -> Packed:
    codes = layer.codes(*FP8_CODES)
    return scaled_codes(codes, _row_scale(layer, codes), torch.float32)


def _scaled_int8(layer: _Layer) -> Packed:
    group = layer.said.rotated
    codes = layer.codes(torch.int8, ndim=None if group is None else 2)
    scale = _row_scale(layer, codes)
    if group is None:
        return scaled_codes(codes, scale, torch.float32)
    if not 4 <= group <= _LARGEST_GROUP or 4 ** round(math.log(group, 4)) != group or codes.shape[1] % group:
        layer.refuse(
            f"its inputs must be rotated in groups of a power of 4 that divides their number {codes.shape[1]}, but the "
            f"group is {group}"
        )
    return rotated_codes(codes, scale, torch.float32, group=group)


def _nvfp4(layer: _Layer) -> Packed:
    codes = layer.codes(torch.uint8, ndim=2)
    width = _whole_blocks(layer, 2 * codes.shape[1], NVFP4_BLOCK)
    blocks = layer.block_scales(torch.float8_e4m3fn, len(codes), width // NVFP4_BLOCK).view(torch.float8_e4m3fn)
    scale = layer.scale("weight_scale_2", sizes=(1,)).view(1, 1)
    smoothing = []
    if layer.companion("pre_quant_scale") is not None:
        smoothing.append(layer.scale("pre_quant_scale", sizes=(width,)).view(1, width))
    return nvfp4_codes(codes, blocks, scale, torch.float32, *smoothing)


def _mxfp8(layer: _Layer) -> Packed:
    codes = layer.codes(torch.float8_e4m3fn, ndim=2)
    width = _whole_blocks(layer, codes.shape[1], MXFP8_BLOCK)
    return mxfp8_codes(codes, layer.block_scales(_E8M0, len(codes), width // MXFP8_BLOCK), torch.float32)


_KINDS: dict[str, Callable[[_Layer], Packed]] = {
    "float8_e4m3fn": _scaled_fp8,
    "float8_e5m2": _scaled_fp8,
    "int8_tensorwise": _scaled_int8,
    "nvfp4": _nvfp4,
    "mxfp8": _mxfp8,
}
"""Formats by ComfyUI's names."""


def _row_scale(layer: _Layer, codes: Tensor) -> Tensor:
    """The scale of codes that have one, or one for each row, in the form of `scaled_codes`."""
    return layer.scale(*_SCALES, sizes=(1, len(codes))).reshape(-1, *(1,) * (codes.ndim - 1))


def _whole_blocks(layer: _Layer, width: int, block: int) -> int:
    if width % block:
        layer.refuse(f"must have a multiple of {block} inputs, but has {width}")
    return width


def _formats(
    file: str, tensors: Mapping[str, Tensor], empty: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[tuple[str, _Format]]:
    """Formats of layers by name, from the header of a file."""
    try:
        for name in tensors:
            if name.endswith(f".{_SAID}"):
                if empty[name].dtype != torch.uint8 or empty[name].numel() > _LONGEST_SAID:
                    raise ValueError(f"{name} is not text")
                yield (
                    name.removesuffix(f".{_SAID}"),
                    _format(parse_foreign_json(bytes(tensors[name].flatten().tolist()))),
                )
        layers = parse_foreign_json(metadata.get(_METADATA, "{}")).get("layers", {})
        stems = {stem for name in tensors if (stem := _stem(name)) is not None}
        prefix = _prefix(layers, stems)
        for layer, declared in layers.items():  # which count where both say something
            yield f"{prefix}{layer}", _format(declared)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ModelError(
            f"what {file} says about its quantized weights must be JSON with a format for each; {_REMEDY}"
        ) from error


def _format(declared: Any) -> _Format:
    """A format from its JSON, whose parameters may be in an object `params`."""
    inner = declared.get("params")
    every = {**(inner if isinstance(inner, Mapping) else {}), **declared}
    return _Format(str(declared["format"]), int(every.get("convrot_groupsize", 256)) if every.get("convrot") else None)


def _prefix(layers: Collection[str], stems: Collection[str]) -> str:
    """What stands before the names of the metadata in a file, which may leave out the denoiser's prefix."""
    first = next(iter(layers), "")
    ends = {stem.removesuffix(first) for stem in stems if stem.endswith(first)} if first else set()
    prefixes = sorted(ends, key=len)[:_MOST_PREFIXES]
    return max(prefixes, key=lambda prefix: sum(f"{prefix}{layer}" in stems for layer in layers), default="")


def _stem(weight: str) -> str | None:
    """Name of the layer of a weight; None for other tensors."""
    stem = weight.removesuffix(".weight")
    return None if stem == weight else stem


def _of(companion: str, leaf: str) -> str:
    """Name of the weight beside a companion."""
    return f"{companion.removesuffix(leaf)}weight"


def _listed(values: Collection[object]) -> str:
    return " or ".join(_short(value) for value in dict.fromkeys(values))


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")
