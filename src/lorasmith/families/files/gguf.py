"""GGUF files of denoisers and text encoders, as they are published for ComfyUI: weights in blocks of a few bits.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the package `gguf` has its types, and diffusers'
functions (`diffusers.quantizers.gguf`) dequantize blocks on the device of the codes. A row of a matrix is a whole
number of blocks. Where it is not, writers store the numbers in rows of 256 and the shape in the metadata:

    comfy.gguf.orig_shape.NAME     array of integers

Weights in blocks stay codes. F32, F16, BF16 and F64 are plain numbers. Denoisers have their original names. Those of
text encoders are llama.cpp's, and are translated to ComfyUI's, which are transformers'. For Llama and Mistral its
converter reorders the rows of queries and keys: in each head, rotary positions turn neighbouring rows there, and rows
half a head apart in transformers. To the weights of Gemma's norms, which transformers keeps without it, it adds the 1
by which they scale.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lorasmith.core.errors import ModelError
from lorasmith.core.files import open_regular
from lorasmith.core.kernels import Kernel, kernel_or
from lorasmith.core.mapped_files import MappedFile
from lorasmith.core.placement import dtype_name
from lorasmith.core.printable import printable
from lorasmith.core.quantization import Packed, of_rows

_MAGIC = b"GGUF"
_SHAPE = "comfy.gguf.orig_shape."
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_TEXT, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)
"""Types of values in the header, those of fixed size with their code in `struct`."""

_MOST_ELEMENTS = 4_000_000
"""Texts and arrays in all arrays: the largest vocabularies are a million."""

_MOST_ENTRIES, _MOST_DIMENSIONS, _DEEPEST_ARRAY = 100_000, 8, 2
_ALIGNMENT = "general.alignment"


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
        header = _header(path)
        self._file = MappedFile(path)
        self.metadata: Mapping[str, str] = header.texts
        names = names_of(header.texts.get("general.architecture", ""), header.tensors)
        self._tensors = {name: header.tensors[original] for name, original in names.original.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: _shape(path, original, header) for name, original in names.original.items()
        }
        self.stored: Mapping[str, tuple[str, int]] = {
            name: (_format(stored.kind), stored.size_bytes) for name, stored in self._tensors.items()
        }
        self._raised = names.raised
        self._heads = {name: _heads(path, header, key, self.shapes[name]) for name, key in names.permuted.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | Packed]]:
        """Tensors by name, in the file's dtype; those in blocks stay packed."""
        for name in names:
            heads = self._heads.get(name)
            tensor = self._tensor(name)
            if name in self._raised and isinstance(tensor, Tensor):
                tensor = tensor - 1
            yield name, tensor if heads is None else of_rows(tensor, functools.partial(halves_apart, heads=heads))

    def _tensor(self, name: str) -> Tensor | Packed:
        stored = self._tensors[name]
        if stored.kind in _PLAIN:
            return self._file.tensor(stored.offset, _PLAIN[stored.kind], self.shapes[name])
        rows = math.prod(stored.shape[:-1])
        codes = self._file.tensor(stored.offset, torch.uint8, (rows, stored.size_bytes // rows))
        packed = self._packed(name, stored.kind, codes)
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
        return Packed((codes,), unpack, torch.float32, shape)


def _format(kind: str) -> str:
    """The name of a type: ours for plain numbers."""
    return dtype_name(_PLAIN[kind]) if kind in _PLAIN else kind


def _from_blocks(codes: Tensor, *, dtype: torch.dtype, kind: str, inside: tuple[int, ...]) -> Tensor:
    """The weight (out, *inside) of codes (rows, bytes of a row)."""
    decode, size, size_bytes = _decoders()[kind]
    on_gpu = codes.is_cuda and not torch.compiler.is_compiling()
    if on_gpu and kind in _PARTS and codes.is_contiguous() and not (found := unpacking_on(codes.device, kind)).refusal:
        y = codes.new_empty(codes.numel() // size_bytes * size, dtype=dtype)
        return found.run(codes, y).view(-1, *inside)  # type: ignore[no-any-return]
    with _constants_kept() if on_gpu else contextlib.nullcontext():
        numbers: Tensor = decode(codes.reshape(-1, size_bytes), size, size_bytes, torch.float32)
    return numbers.to(dtype).reshape(-1, *inside)


_PARTS = {
    "Q2_K": 16, "Q3_K": 16, "Q4_K": 8, "Q5_K": 8, "Q6_K": 16, "Q4_0": 1, "Q4_1": 1, "Q5_0": 1, "Q5_1": 1, "Q8_0": 1
}  # fmt: skip
"""Types that `gguf_kernel` has, with the parts of a block that have scales of their own."""


@functools.cache
def unpacking_on(device: torch.device, kind: str) -> Kernel:
    """`gguf_kernel.unpacked` for a type on a GPU, of codes and y, which is refused unless it gives a CPU's numbers."""
    _, size, size_bytes = _decoders()[kind]
    generator = torch.Generator().manual_seed(0)
    most = 0x7C  # so that scales in fp16 are finite
    codes = torch.randint(0, most, (5, size_bytes), generator=generator, dtype=torch.uint8)
    expected = _from_blocks(codes, dtype=torch.float32, kind=kind, inside=()).view(-1)

    def load() -> Callable[..., Tensor]:
        from lorasmith.families.files.gguf_kernel import unpacked

        return functools.partial(unpacked, kind, _PARTS[kind], size, size_bytes)

    trial = (codes.to(device), torch.empty(5 * size, device=device))
    return kernel_or(f"unpacking {kind}", lambda *_: expected, load, [trial])


@functools.cache
def _decoders() -> dict[str, tuple[Callable[..., Tensor], int, int]]:
    """Type → function that dequantizes blocks, numbers and bytes of a block."""
    from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, dequantize_functions

    return {kind.name: (decode, *GGML_QUANT_SIZES[kind]) for kind, decode in dequantize_functions.items()}


class _constants_kept(TorchFunctionMode):  # noqa: N801 - a context
    """Inside the context, `torch.tensor` gives one tensor for the same numbers: copies of them wait for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _constant(tuple(*args), **kwargs) if func is torch.tensor else func(*args, **(kwargs or {}))


@functools.cache
def _constant(numbers: tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, device=device, dtype=dtype)


class _Stored(NamedTuple):
    """A tensor in the file: name of its type, shape in torch's order, and its place."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class _GgufHeader(NamedTuple):
    """What is used of a header: text entries, integers and short lists of them (empty for others), and tensors."""

    texts: dict[str, str]
    integers: dict[str, tuple[int, ...]]
    tensors: dict[str, _Stored]


def _header(path: Path) -> _GgufHeader:
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            f"{path} is a GGUF file, which needs the package gguf; install it with: pip install gguf"
        ) from error
    types = {
        int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind])
        for kind in gguf.GGMLQuantizationType
        if kind in gguf.GGML_QUANT_SIZES
    }
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header(types)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read as a GGUF file ({printable(error, limit=200)}); it is cut short, damaged or of a "
            "newer kind, so get it again or use another version of the model"
        ) from error


class _Reader:
    """Reads the header of a file. Every count and length is checked before it is used; raises ValueError.

    The package's own reader makes two arrays of each element of an array, which takes a minute for a large vocabulary.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._elements = 0

    def header(self, types: Mapping[int, tuple[str, int, int]]) -> _GgufHeader:
        """The header. types: number → name, elements and bytes of a block."""
        header = _GgufHeader({}, {}, {})
        self._skip(len(_MAGIC))
        version, tensors, entries = self._number("I"), self._number("Q"), self._number("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not known")
        if max(tensors, entries) > _MOST_ENTRIES:
            raise ValueError(f"{max(tensors, entries):,} entries are more than the {_MOST_ENTRIES:,} of any model")
        names = set()
        for _ in range(entries):
            names.add(name := self._text())
            value = self._value(self._number("I"))
            if isinstance(value, str):
                header.texts[name] = value
            header.integers[name] = value if isinstance(value, tuple) else ()
        if len(names) < entries:
            raise ValueError("it has an entry twice")
        for _ in range(tensors):
            name = self._text()
            header.tensors[name] = self._tensor(types)
        if len(header.tensors) < tensors:
            raise ValueError("it has a tensor twice")
        alignment = sum(header.integers.get(_ALIGNMENT, (32,)))
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}, which is not a power of two")
        start = -(-self._at // alignment) * alignment
        placed = {name: stored._replace(offset=start + stored.offset) for name, stored in header.tensors.items()}
        end = start
        for stored in sorted(placed.values(), key=lambda stored: stored.offset):
            if stored.offset < end:
                raise ValueError("its tensors overlap")
            end = stored.offset + stored.size_bytes
        if end > len(self._data):
            raise ValueError(f"its tensors end at byte {end:,}, and it has {len(self._data):,}")
        return header._replace(tensors=placed)

    def _tensor(self, types: Mapping[int, tuple[str, int, int]]) -> _Stored:
        if (dimensions := self._number("I")) > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions:,} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        kind, offset = self._number("I"), self._number("Q")
        if kind not in types:
            raise ValueError(f"type {kind} of a tensor is not known")
        name, block, block_bytes = types[kind]
        if 0 in shape or (shape[-1] if shape else 1) % block:
            raise ValueError(f"a tensor of type {name} has the shape {shape}")
        return _Stored(name, shape, offset, math.prod(shape) // block * block_bytes)

    def _value(self, kind: int, depth: int = 0) -> str | tuple[int, ...] | None:
        """A text, an integer or a list of at most `_MOST_DIMENSIONS` integers; None for others, which are skipped."""
        if kind == _TEXT:
            return self._text()
        if kind in _SCALARS:
            return self._scalars(kind, 1)
        if kind != _ARRAY:
            raise ValueError(f"type {kind} is not known")
        inside, count = self._number("I"), self._number("Q")
        if depth == _DEEPEST_ARRAY and inside == _ARRAY:
            raise ValueError("arrays are nested too deeply")
        if inside in _SCALARS:
            return self._scalars(inside, count)
        self._elements += count
        if self._elements > _MOST_ELEMENTS:
            raise ValueError(f"its arrays have more than {_MOST_ELEMENTS:,} elements")
        for _ in range(count):
            if inside == _TEXT:
                self._skip(self._number("Q"))
            else:
                self._value(inside, depth + 1)
        return None

    def _scalars(self, kind: int, count: int) -> tuple[int, ...] | None:
        code = f"<{count if kind in _INTEGERS and count <= _MOST_DIMENSIONS else 0}{_SCALARS[kind]}"
        start = self._skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        return struct.unpack_from(code, self._data, start) or None

    def _text(self) -> str:
        length = self._number("Q")
        start = self._skip(length)
        return str(self._data[start : start + length], "utf-8")

    def _number(self, code: str) -> int:
        number: int = struct.unpack_from(f"<{code}", self._data, self._skip(struct.calcsize(f"<{code}")))[0]
        return number

    def _skip(self, length: int) -> int:
        """Moves beyond a number of bytes, and returns where they start."""
        start = self._at
        if length > len(self._data) - start:
            raise ValueError(f"a length of {length:,} bytes is more than the file has left")
        self._at += length
        return start


def _heads(path: Path, header: _GgufHeader, key: str, shape: tuple[int, ...]) -> int:
    """A number of attention heads, of even width, from the metadata; grouped keys have their own."""
    heads, *_ = header.integers.get(key) or header.integers.get(key.removesuffix("_kv")) or (0,)
    rows = shape[0] if shape else 1
    if heads < 1 or rows % (2 * heads):
        raise ModelError(
            f"{path} must say in {key} how many heads its {rows} rows are, but says {heads}; the file was damaged or "
            "edited, so get it again"
        )
    return heads


def _shape(path: Path, name: str, header: _GgufHeader) -> tuple[int, ...]:
    """A tensor's shape: that in the metadata, if there is one."""
    shape = header.tensors[name].shape
    integer = header.integers.get(f"{_SHAPE}{name}", shape)
    if min(integer, default=1) < 1 or math.prod(integer) != math.prod(shape):
        raise ModelError(
            f"{name} of {path} must have as many numbers as its shape {integer} says, but has {math.prod(shape)}; "
            "the file was damaged or edited, so get it again"
        )
    return integer


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
    if len(original) < sum(not _UNUSED.match(name) for name in found):
        raise ModelError(f"a GGUF file of {architecture} must not have a weight by two names; get it again")
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
