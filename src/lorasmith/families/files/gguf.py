"""GGUF files of denoisers and text encoders, as they are published for ComfyUI: weights in blocks of a few bits.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, read by the package `gguf`. diffusers' functions
(`diffusers.quantizers.gguf`) dequantize blocks on the device of the codes. A row of a matrix is a whole
number of blocks. Where it is not, writers store the numbers in rows of 256 and the shape in the metadata:

    comfy.gguf.orig_shape.NAME     array of integers

Weights in blocks stay codes. F32, F16, BF16 and F64 are plain numbers. Denoisers have their original names. Those of
text encoders are llama.cpp's, and are translated to ComfyUI's, which are transformers'. For Llama and Mistral its
converter reorders the rows of queries and keys: in each head, rotary positions turn neighbouring rows there, and rows
half a head apart in transformers. To the weights of Gemma's norms, which transformers keeps without it, it adds the 1
by which they scale.
"""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.errors import ModelError
from lorasmith.core.files import open_regular
from lorasmith.core.mapped_files import MappedFile
from lorasmith.core.placement import dtype_name
from lorasmith.core.quantization import Packed, of_rows

_MAGIC = b"GGUF"
_SHAPE = "comfy.gguf.orig_shape."
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_TEXT, _ARRAY = 8, 9
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Types of values in the header, and the bytes of those of fixed size."""

_MOST_ELEMENTS = 4_000_000
"""Elements of all arrays: those of the largest vocabularies are a million."""

_MOST_ENTRIES, _MOST_DIMENSIONS, _DEEPEST_ARRAY = 100_000, 8, 2


def is_gguf(path: Path) -> bool:
    """Whether a file has GGUF's magic number; False for one that cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


class GgufFile:
    """A GGUF file, of which no tensor has been read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        reader = _reader(path)
        self._file = MappedFile(path)
        stored = {one.name: one for one in reader.tensors}
        try:
            self.metadata: Mapping[str, str] = dict(_texts(reader))
            names = names_of(self.metadata.get("general.architecture", ""), stored)
            self._tensors = {name: stored[original] for name, original in names.original.items()}
            self.shapes: Mapping[str, tuple[int, ...]] = {
                name: _shape(path, reader, one) for name, one in self._tensors.items()
            }
            self.stored: Mapping[str, tuple[str, int]] = {
                name: (_format(one.tensor_type.name), int(one.n_bytes)) for name, one in self._tensors.items()
            }
            self._raised = names.raised
            self._heads = {
                name: _heads(path, reader, key, self.shapes[name][0]) for name, key in names.permuted.items()
            }
        except (IndexError, ValueError) as error:  # UnicodeDecodeError is one
            raise ModelError(f"{path} has damaged GGUF metadata ({error}); get the file again") from error

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | Packed]]:
        """Tensors by name, in the file's dtype; those in blocks stay packed."""
        for name in names:
            heads = self._heads.get(name)
            tensor = self._tensor(name)
            if name in self._raised and isinstance(tensor, Tensor):
                tensor = tensor - 1
            yield name, tensor if heads is None else of_rows(tensor, functools.partial(halves_apart, heads=heads))

    def _tensor(self, name: str) -> Tensor | Packed:
        one = self._tensors[name]
        kind = one.tensor_type.name
        if kind in _PLAIN:
            return self._file.tensor(int(one.data_offset), _PLAIN[kind], self.shapes[name])
        packed = self._packed(name, kind, self._file.tensor(int(one.data_offset), torch.uint8, one.data.shape))
        return packed if len(packed.shape) > 1 else packed.weight()

    def _packed(self, name: str, kind: str, codes: Tensor) -> Packed:
        if kind not in _decoders():
            known = ", ".join((*_PLAIN, *sorted(_decoders())))
            raise ModelError(
                f"{name} of {self._path.name} is stored as {kind}, which is not supported (supported are {known}); "
                "get a version of the model in one of these"
            )
        shape = torch.Size(self.shapes[name])
        unpack = functools.partial(_from_blocks, kind=kind, inside=tuple(shape[1:]))
        return Packed((codes.reshape(-1, codes.shape[-1]),), unpack, torch.float32, shape)


def _format(kind: str) -> str:
    """The name of a type: ours for plain numbers."""
    return dtype_name(_PLAIN[kind]) if kind in _PLAIN else kind


def _from_blocks(codes: Tensor, *, dtype: torch.dtype, kind: str, inside: tuple[int, ...]) -> Tensor:
    """The weight (out, *inside) of codes (rows, bytes of a row)."""
    decode, size, size_bytes = _decoders()[kind]
    numbers: Tensor = decode(codes.reshape(-1, size_bytes), size, size_bytes, torch.float32)
    return numbers.to(dtype).reshape(-1, *inside)


@functools.cache
def _decoders() -> dict[str, tuple[Callable[..., Tensor], int, int]]:
    """Type → function that dequantizes blocks, numbers and bytes of a block."""
    from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, dequantize_functions

    return {kind.name: (decode, *GGML_QUANT_SIZES[kind]) for kind, decode in dequantize_functions.items()}


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            f"{path} is a GGUF file, which needs the package gguf; install it with: pip install gguf"
        ) from error
    try:
        _check_lengths(path)
        return GGUFReader(path)
    except (
        ArithmeticError,
        AttributeError,
        IndexError,
        KeyError,
        MemoryError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        # Any error of the package's parser: a wrong version, a type without a name, sizes beyond the file's end.
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path} cannot be read as a GGUF file ({reason}); it is cut short, damaged or of a newer kind, so get it "
            "again or use another version of the model"
        ) from error


def _check_lengths(path: Path) -> None:
    """Raises ValueError if a count or length in the header exceeds the file or a bound, which the package ignores.

    Scalars have the sizes of `_SCALARS`, a text its length before it, an array type and count of its elements.
    """
    size, elements = path.stat().st_size, 0
    with open_regular(path) as file:

        def number(code: str) -> int:
            data = file.read(struct.calcsize(code))
            if len(data) < struct.calcsize(code):
                raise ValueError("it ends within its header")
            return int(struct.unpack(code, data)[0])

        def skip(length: int) -> None:
            if length > size - file.tell():
                raise ValueError(f"a length of {length:,} bytes is more than the file has left")
            file.seek(length, 1)

        def skip_value(kind: int, depth: int = 0) -> None:
            nonlocal elements
            if depth > _DEEPEST_ARRAY:
                raise ValueError("arrays are nested too deeply")
            if kind == _TEXT:
                skip(number("<Q"))
            elif kind == _ARRAY:
                inside, count = number("<I"), number("<Q")
                elements += count
                if elements > _MOST_ELEMENTS:
                    raise ValueError(f"its arrays have more than {_MOST_ELEMENTS:,} elements")
                if inside in _SCALARS:
                    skip(count * _SCALARS[inside])
                    return
                for _ in range(count):
                    skip_value(inside, depth + 1)
            elif kind in _SCALARS:
                skip(_SCALARS[kind])
            else:
                raise ValueError(f"type {kind} is not known")

        skip(len(_MAGIC))
        version, tensors, entries = number("<I"), number("<Q"), number("<Q")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not known")
        if max(tensors, entries) > _MOST_ENTRIES:
            raise ValueError(f"{max(tensors, entries):,} entries are more than the {_MOST_ENTRIES:,} of any model")
        for _ in range(entries):
            skip_value(_TEXT)
            skip_value(number("<I"))
        for _ in range(tensors):
            skip_value(_TEXT)
            if (dimensions := number("<I")) > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions:,} dimensions")
            skip(8 * dimensions + 12)  # with type and place


def _texts(reader: Any) -> Iterator[tuple[str, str]]:
    """Text entries of the metadata."""
    from gguf import GGUFValueType

    for name, entry in reader.fields.items():
        if list(entry.types) == [GGUFValueType.STRING]:
            yield name, bytes(entry.parts[entry.data[0]]).decode("utf-8")


def _heads(path: Path, reader: Any, key: str, rows: int) -> int:
    """A number of attention heads, of even width, from the metadata; grouped keys have their own."""
    entry = reader.fields.get(key) or reader.fields.get(key.removesuffix("_kv"))
    heads = 0 if entry is None else int(entry.parts[entry.data[0]][0])
    if heads < 1 or rows % (2 * heads):
        raise ModelError(
            f"{path} must say in {key} how many heads its {rows} rows are, but says {heads}; the file was damaged or "
            "edited, so get it again"
        )
    return heads


def _shape(path: Path, reader: Any, tensor: Any) -> tuple[int, ...]:
    """A tensor's shape in torch's order, which is the reverse of the file's."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if 0 in shape:
        raise ValueError(f"{tensor.name} has no numbers")
    entry = reader.fields.get(f"{_SHAPE}{tensor.name}")
    if entry is None:
        return shape
    said = tuple(int(entry.parts[place][0]) for place in entry.data)
    if math.prod(said) != math.prod(shape):
        raise ModelError(
            f"{tensor.name} of {path} must have as many numbers as its shape {said} says, but has {math.prod(shape)}; "
            "the file was damaged or edited, so get it again"
        )
    return said


_LANGUAGE = {"token_embd": "embed_tokens", "output_norm": "norm"}
_LANGUAGE_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK = {
    **_LANGUAGE_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_T5 = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
_T5_BLOCK = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
_PREFIXES = {
    "qwen2vl": "model.",
    "qwen3": "model.",
    "qwen3vl": "model.language_model.",
    "llama": "model.",
    "mistral3": "model.",
    "gemma2": "model.",
}
"""Language models by `general.architecture`, and the prefix of their names in ComfyUI's files."""

_PERMUTED = ("llama", "mistral3")
_GEMMAS = ("gemma2",)
_T5_ARCHITECTURES = ("t5", "t5encoder")
_UNUSED = re.compile(r"dec\.|output\.weight$|rope_freqs\.")
"""T5's decoder, heads that predict tokens, and what follows from the configuration."""


@dataclass(frozen=True)
class GgufNames:
    """How the names of a file are read."""

    original: Mapping[str, str]  # name in the file by ComfyUI's name
    # ComfyUI's names of tensors with reordered rows, and the key of the metadata that says their heads
    permuted: Mapping[str, str]
    raised: Collection[str] = ()  # ComfyUI's names of tensors that are 1 larger in the file


def names_of(architecture: str, names: Iterable[str]) -> GgufNames:
    """Names of a file; those of others than llama.cpp's text encoders are their own."""
    found = list(names)
    is_t5 = architecture in _T5_ARCHITECTURES
    if "token_embd.weight" not in found or not (is_t5 or architecture in _PREFIXES):
        return GgufNames({name: name for name in found}, {})
    original = {
        _t5_name(name) if is_t5 else _language_name(name, architecture): name
        for name in found
        if not _UNUSED.match(name)
    }
    heads = {".q_proj.": "attention.head_count", ".k_proj.": "attention.head_count_kv"}
    permuted = {
        name: f"{architecture}.{key}"
        for name in original
        for part, key in heads.items()
        if architecture in _PERMUTED and part in name
    }
    raised = {name for name in original if architecture in _GEMMAS and name.endswith("norm.weight")}
    return GgufNames(original, permuted, raised)


def halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in transformers' order. rows: (heads · width, ...) in llama.cpp's order."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _language_name(name: str, architecture: str) -> str:
    prefix, parts = _PREFIXES[architecture], _GEMMA_BLOCK if architecture in _GEMMAS else _LANGUAGE_BLOCK
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if block and block[2] in parts:
        return f"{prefix}layers.{block[1]}.{parts[block[2]]}.{block[3]}"
    stem, _, leaf = name.rpartition(".")
    return f"{prefix}{_LANGUAGE[stem]}.{leaf}" if stem in _LANGUAGE else name


def _t5_name(name: str) -> str:
    block = re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.(\w+)", name)
    if block and block[2] in _T5_BLOCK:
        return f"encoder.block.{block[1]}.{_T5_BLOCK[block[2]]}.{block[3]}"
    stem, _, leaf = name.rpartition(".")
    return f"{_T5[stem]}.{leaf}" if stem in _T5 else name
