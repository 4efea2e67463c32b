"""GGUF files as the converters for ComfyUI write them, made with the package `gguf`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    kind: Kind,
    *,
    architecture: str = "flux",
    metadata: Mapping[str, str | int] | None = None,
) -> dict[str, Tensor]:
    """Write a file; returns the tensors that it stands for."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    meant = {}
    for name, tensor in tensors.items():
        stored, numbers = (Kind.F32 if tensor.ndim < 2 else kind), tensor.numpy()
        block = gguf.GGML_QUANT_SIZES[stored][0]
        if numbers.shape[-1] % block and numbers.size % 256 == 0 and tensor.ndim > 1:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(numbers.shape))
            numbers = numbers.reshape(-1, 256)
        elif numbers.shape[-1] % block:
            stored = Kind.F16
        codes = gguf.quants.quantize(numbers, stored)
        writer.add_tensor(name, codes, raw_dtype=stored)
        meant[name] = torch.from_numpy(gguf.quants.dequantize(codes, stored).reshape(tuple(tensor.shape)).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant
