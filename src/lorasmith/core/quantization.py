"""Quantized frozen weights: codes and scales, from which a weight is unpacked whenever it is used.

    kind               codes                                    scale (fp32)                 bytes for each number
    int8               round(w / s), s = max |row| / 127        one for each output          1 + 4 / row
    int8_convrot       as int8, of rotated rows                 one for each output          1 + 4 / row
    fp8_e4m3           w / s in float8, s = max |row| / 448     one for each output          1 + 4 / row
    fp8_e5m2           w / s in float8, s = max |row| / 57344   one for each output          1 + 4 / row
    fp8_e4m3_tensor    as fp8_e4m3, s = max |w| / 448           one for the weight           1
    fp8_e5m2_tensor    as fp8_e5m2, s = max |w| / 57344         one for the weight           1
    mxfp8              w / s in float8 e4m3, max ≤ 448          2^n for 32 inputs            1 + 1 / 32
    nf4                nearest of 16 levels, two codes a byte   max |block| of 64 numbers    0.5 + 4 / 64
    nvfp4              w / s in e2m1, max = 6, two a byte       e4m3 for 16 inputs · fp32    0.5 + 1 / 16 + 4 / row

mxfp8 is of the OCP Microscaling specification (2023), with scales rounded up, so that no number is beyond the format's
largest (Mishra et al. 2025, arXiv:2506.08027). In nvfp4 (NVIDIA 2025, arXiv:2509.25149) the scale of a block is in
e4m3, times one in fp32: for each output here, so that rows do not depend on others, and for the weight in files.
Weights whose inputs are not whole blocks, and those of convolutions, are as in `fp8_e4m3` and `nf4`.

NF4 is the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E) without the second
quantization of its scales; codes are ordered as in bitsandbytes, the first of a pair in the upper half. A row is the
weights of one output of a Linear or convolution; blocks are consecutive in the weight's memory.

ConvRot (Huang et al. 2025, arXiv:2512.03673) rotates each group of G inputs of a matrix W by an orthogonal matrix R,
which spreads outliers over the group: the codes are those of W R, and W is (W R) R. R is H / √G, where H is the
Kronecker power of a Hadamard matrix of order 4, which is symmetric, so that R is its own inverse. G is the largest of
256, 64, 16 and 4 that divides the inputs; without one, and of convolutions, weights are as in `int8`.

Tensors are not divided by a Python number, unless it is a power of two, but multiplied by its reciprocal: torch does
so on CUDA and divides on a CPU, which gives other bits.

Checkpoints with quantized weights of other formats (`families.files`) give `Packed` weights too. A layer whose weight
is packed has it, or another `WeightSource`, under `WEIGHT_SOURCE`, and a `placeholder` as its parameter.
"""

from __future__ import annotations

import contextlib
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.core.choices import ProductFormat, Quantization
from lorasmith.core.kernels import Kernel, kernel_or
from lorasmith.core.pinned_memory import DeviceCopies

WEIGHT_SOURCE = "weight_source"
"""Attribute of a layer whose weight is not in its parameter: a `WeightSource`."""

BLOCK = 64  # numbers that share a scale in nf4

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution, scaled to [−1, 1], with an exact zero."""

MXFP8_BLOCK = 32
"""Inputs that share a scale in mxfp8."""

NVFP4_BLOCK = 16
"""Inputs that share a scale in nvfp4."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_LEVELS = (*_E2M1, *(-level for level in _E2M1))
"""Numbers of the 4-bit float by its code; the upper half are the negative ones."""

_TILE = (128, 4)

_BY_ROW = torch.contiguous_format
"""Of codes in blocks: products take rows, and a transposed matrix would keep its columns."""


@dataclass(frozen=True)
class CodeFormat:
    """What is to be known of codes before they are multiplied (`core.quantized_products`)."""

    products: ProductFormat  # in which they are multiplied
    dtype: torch.dtype
    rotated_by: int | None = None  # inputs of each rotated group (ConvRot); None for no rotation


class WeightSource(ABC):
    """Where a layer's weight, and its bias, come from if not from its parameters.

    Set as the attribute `WEIGHT_SOURCE` of a linear-like layer; everything that multiplies with it then asks here.
    """

    @property
    def format(self) -> CodeFormat | None:
        """Format of the codes; None for those that are only unpacked."""
        return None

    @abstractmethod
    def use(self) -> AbstractContextManager[Packed]:
        """The packed weight on the device of its use, acquired on entry and released on exit.

        After the release, its tensors may be reused or freed as soon as the device has done what is queued by then.
        """

    def bias(self, layer: nn.Module) -> Tensor | None:
        """The bias (out,) on the device of its use, or None: the layer's parameter, if not overridden."""
        bias: Tensor | None = getattr(layer, "bias", None)
        return bias


@dataclass(frozen=True)
class Packed(WeightSource):
    """A packed weight."""

    tensors: tuple[Tensor, ...]  # the codes, then scales and the like
    unpack: Callable[..., Tensor]  # from those tensors, on any device, and `dtype` to the weight
    dtype: torch.dtype  # of the unpacked weight
    shape: torch.Size

    @property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def format(self) -> CodeFormat | None:
        """See `WeightSource.format`."""
        dtype = self.tensors[0].dtype
        if isinstance(self.unpack, _FromRotated):
            return CodeFormat("int8", dtype, self.unpack.group)
        if self.unpack is _from_scaled:
            return CodeFormat("int8" if dtype == torch.int8 else "fp8", dtype)
        if self.unpack is _from_mxfp8:
            return CodeFormat("mxfp8", dtype)
        return CodeFormat("nvfp4", dtype) if self.unpack is _from_nvfp4 else None

    @property
    def is_cast(self) -> bool:
        """Whether it is a plain weight (`cast_on_use`)."""
        return self.unpack is _converted

    def use(self) -> AbstractContextManager[Packed]:
        return AlwaysHere(self)

    def weight(self) -> Tensor:
        """The unpacked weight, a new tensor."""
        return self.unpack(*self.tensors, dtype=self.dtype)

    def to(
        self, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format = torch.preserve_format
    ) -> Packed:
        """The packed weight on `device`, unpacking to `dtype`; `memory_format` applies to 4-D codes."""
        with contextlib.closing(DeviceCopies(device)) as copies:
            return self.copied(copies, dtype, memory_format)

    def copied(self, copies: DeviceCopies, dtype: torch.dtype, memory_format: torch.memory_format) -> Packed:
        """As `to`, for one weight of many."""
        formats = (memory_format if tensor.ndim == 4 else torch.preserve_format for tensor in self.tensors)
        moved = (copies.to(one, one.dtype, wanted) for one, wanted in zip(self.tensors, formats, strict=True))
        return replace(self, tensors=tuple(moved), dtype=dtype)

    def of_rows(self, choose: Callable[[Tensor], Tensor]) -> Packed | Tensor:
        """`choose` applied to the weight's rows: packed if each row has its own codes, otherwise unpacked."""
        if any(len(tensor) not in (1, self.shape[0]) for tensor in self.tensors):
            return choose(self.weight())
        chosen = tuple(choose(tensor) if len(tensor) == self.shape[0] else tensor for tensor in self.tensors)
        return replace(self, tensors=chosen, shape=torch.Size((len(chosen[0]), *self.shape[1:])))


class AlwaysHere:
    """A packed weight that needs no acquisition. As a `nullcontext`, torch.compile would not look through it."""

    def __init__(self, weight: Packed) -> None:
        self._weight = weight

    def __enter__(self) -> Packed:
        return self._weight

    def __exit__(self, *error: object) -> None:
        return


def of_rows(tensor: Tensor | Packed, choose: Callable[[Tensor], Tensor]) -> Tensor | Packed:
    """`choose` applied to the rows of a tensor; see `Packed.of_rows`."""
    return tensor.of_rows(choose) if isinstance(tensor, Packed) else choose(tensor)


def plain_weights(tensors: Mapping[str, Tensor | Packed]) -> dict[str, Tensor]:
    """The tensors, packed weights unpacked."""
    return {name: tensor.weight() if isinstance(tensor, Packed) else tensor for name, tensor in tensors.items()}


def weight_source(module: nn.Module) -> WeightSource | None:
    """The source of a layer's packed weight; None if the parameter is the weight."""
    source: WeightSource | None = module.__dict__.get(WEIGHT_SOURCE)
    return source


def placeholder(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An expanded NaN in place of a packed weight, which shows wherever the parameter is read by mistake."""
    return torch.full((), torch.nan, device=device, dtype=dtype).expand(shape)


def packed(weight: Tensor, kind: Quantization, dtype: torch.dtype) -> Packed:
    """Pack a weight (out, ...) by a method of `PACKINGS`; it unpacks to `dtype` in the same memory format."""
    return PACKINGS[kind](weight.detach(), dtype)


def as_stored(weight: Tensor, dtype: torch.dtype) -> Packed:
    """A plain weight that is cast to `dtype` where it is used, stored in its own dtype if that is narrower."""
    return cast_on_use(weight if weight.dtype.itemsize < dtype.itemsize else weight.to(dtype), dtype)


def cast_on_use(weight: Tensor, dtype: torch.dtype) -> Packed:
    """A plain weight in its own dtype, cast to `dtype` where it is used."""
    return Packed((weight,), _converted, dtype, weight.shape)


def _converted(tensor: Tensor, *, dtype: torch.dtype) -> Tensor:
    # One function for all weights, so that equal blocks share compiled code.
    return tensor.to(dtype)


def _scaled_int8(weight: Tensor, dtype: torch.dtype) -> Packed:
    codes, scale = _scaled(weight, 127.0)
    return scaled_codes(codes.round_().to(torch.int8), scale, dtype)


def _rotated_int8(weight: Tensor, dtype: torch.dtype) -> Packed:
    group = next((size for size in _GROUPS if weight.shape[-1] % size == 0), None) if weight.ndim == 2 else None
    if group is None:
        return _scaled_int8(weight, dtype)
    codes, scale = _scaled(rotated(weight.float(), rotation(group, weight.device)), 127.0)
    return rotated_codes(codes.round_().to(torch.int8), scale, dtype, group=group)


_GROUPS = (256, 64, 16, 4)
"""Sizes of groups that are rotated together, the best first."""


def _scaled_fp8(weight: Tensor, dtype: torch.dtype, *, code: torch.dtype, by_row: bool) -> Packed:
    codes, scale = _scaled(weight, torch.finfo(code).max, by_row=by_row)
    return scaled_codes(codes.to(code), scale, dtype)


def scaled_codes(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Packed:
    """The packed weight `codes · scale`: codes (out, ...), scale (out, 1, ...) or (1, 1, ...) in fp32."""
    return Packed((codes, scale), _from_scaled, dtype, codes.shape)


def rotated_codes(codes: Tensor, scale: Tensor, dtype: torch.dtype, *, group: int) -> Packed:
    """The packed weight `(codes · scale) R`: codes (out, in) of integers, R in groups of `group`, a power of 4."""
    return Packed((codes, scale), _FromRotated(group), dtype, codes.shape)


def rotated(rows: Tensor, by: Tensor) -> Tensor:
    """`rows R` for rows (..., in), in their dtype; `by` is the `rotation` of a group."""
    return (rows.reshape(-1, len(by)) @ by.to(rows.dtype)).view(rows.shape)


def rotation(group: int, device: torch.device) -> Tensor:
    """R of a group, (group, group) in fp32; its numbers are exact in all formats."""
    return _hadamard(group, device) / math.sqrt(group)


@dataclass(frozen=True)
class _FromRotated:
    group: int

    def __call__(self, codes: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
        # Sums of codes are integers that every fp32 product computes exactly, so only the scale is rounded.
        sums = codes.float().reshape(-1, self.group) @ _hadamard(self.group, codes.device)
        return sums.view(codes.shape).mul_(scale / math.sqrt(self.group)).to(dtype)


@functools.cache
def _hadamard(group: int, device: torch.device) -> Tensor:
    """H of a group, (group, group) of ±1 in fp32."""
    quarter = (1 - 2 * torch.eye(4, device=device)).flip(1)
    matrix = quarter
    while len(matrix) < group:
        matrix = torch.kron(matrix, quarter)
    return matrix


def _scaled(weight: Tensor, largest: float, *, by_row: bool = True) -> tuple[Tensor, Tensor]:
    """The weight scaled so that the maximum of each row, or of all, is ±`largest` (a new tensor), and the scales."""
    full = weight.float()
    scale = full.abs().amax(tuple(range(by_row, full.ndim)), keepdim=True) * (1 / largest)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # of a row of zeros
    return (full / scale).clamp_(-largest, largest), scale


def _from_scaled(codes: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    if (kernel := _kernel(_SCALED.get(codes.dtype), codes, scale)) is not None:
        return kernel(torch.empty_like(codes, dtype=dtype), codes, scale)
    # The CPU takes ten times as long for operands of several dtypes, and a compiler fuses anyway.
    if codes.device.type == "cuda" and not torch.compiler.is_compiling():
        return scaled_at_once(codes, scale, dtype)
    return codes.float().mul_(scale).to(dtype)


def scaled_at_once(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`codes · scale` rounded to `dtype` once, without a tensor of fp32: int8 in one kernel, fp8 in two.

    A kernel for operands of several dtypes computes in fp32. fp8 numbers, which have no such kernels, are exact in all
    dtypes of products.
    """
    if codes.dtype in FP8_CODES:
        return codes.to(dtype).mul_(scale)
    return torch.mul(codes, scale, out=torch.empty_like(codes, dtype=dtype))


def _normal_float(weight: Tensor, dtype: torch.dtype) -> Packed:
    order = sorted(range(weight.ndim), key=weight.stride, reverse=True)
    laid = weight.permute(order)
    flat = F.pad(laid.float().reshape(-1), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    codes = torch.bucketize(flat / scale, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    pairs = codes.view(-1, 2).to(torch.uint8)
    return Packed(
        ((pairs[:, 0] << 4) | pairs[:, 1], scale),
        functools.partial(_from_levels, shape=laid.shape, order=order),
        dtype,
        weight.shape,
    )


def _from_levels(codes: Tensor, scale: Tensor, *, shape: torch.Size, order: list[int], dtype: torch.dtype) -> Tensor:
    if (kernel := _kernel("nf4", codes, scale)) is not None:
        flat = kernel(codes.new_empty(2 * len(codes), dtype=dtype), codes, scale, levels_on(codes.device))
    else:
        pairs = F.embedding(codes.int(), level_pairs(NF4_LEVELS, codes.device))
        flat = pairs.view(-1, BLOCK).mul_(scale).view(-1)
    back = sorted(range(len(order)), key=order.__getitem__)
    return flat[: math.prod(shape)].to(dtype).view(shape).permute(back)


@functools.cache
def levels_on(device: torch.device) -> Tensor:
    """The levels of nf4, (16,) fp32."""
    return torch.tensor(NF4_LEVELS, device=device)


@functools.cache
def level_pairs(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The two numbers of each byte of two 4-bit codes, (256, 2) fp32, the upper half's first; `levels` is by code."""
    numbers = torch.tensor(levels, device=device)
    return torch.cartesian_prod(numbers, numbers)


def _blocks_of_e4m3(weight: Tensor, dtype: torch.dtype) -> Packed:
    if weight.ndim != 2 or weight.shape[1] % MXFP8_BLOCK:
        return _scaled_fp8(weight, dtype, code=torch.float8_e4m3fn, by_row=True)
    blocks = weight.float().reshape(len(weight), -1, MXFP8_BLOCK)
    least = blocks.abs().amax(2) * (1 / torch.finfo(torch.float8_e4m3fn).max)
    # The next power of two, as its bits in fp32: all of the exponent, which is e8m0's. Infinity becomes a NaN.
    exponents = (least.view(torch.int32).clamp(1, 255 << 23) + ((1 << 23) - 1)) >> 23
    scaled = blocks / (exponents << 23).view(torch.float32).unsqueeze(-1)
    codes = scaled.view(weight.shape).to(torch.float8_e4m3fn, memory_format=_BY_ROW)
    return mxfp8_codes(codes, exponents.to(torch.uint8, memory_format=_BY_ROW), dtype)


def mxfp8_codes(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Packed:
    """The packed weight `codes · 2^(exponents − 127)`: codes (out, in) in e4m3, exponents (out, in / 32), bytes."""
    return Packed((codes, exponents), _from_mxfp8, dtype, codes.shape)


def _from_mxfp8(codes: Tensor, exponents: Tensor, *, dtype: torch.dtype) -> Tensor:
    if (kernel := _kernel("mxfp8", codes, exponents)) is not None:
        return kernel(torch.empty_like(codes, dtype=dtype), codes, exponents)
    scale = exponents.view(torch.float8_e8m0fnu).float().unsqueeze(-1)  # 2^(e − 127); 255 is not a number
    return codes.float().view(len(codes), -1, MXFP8_BLOCK).mul_(scale).view(codes.shape).to(dtype)


def _blocks_of_e2m1(weight: Tensor, dtype: torch.dtype) -> Packed:
    if weight.ndim != 2 or weight.shape[1] % NVFP4_BLOCK:
        return _normal_float(weight, dtype)
    blocks = weight.float().reshape(len(weight), -1, NVFP4_BLOCK)
    largest = blocks.abs().amax(2) * (1 / _E2M1[-1])
    scale = (largest.amax(1, keepdim=True) * (1 / torch.finfo(torch.float8_e4m3fn).max)).clamp(min=2.0**-100)
    least = 2**-9  # that is not zero
    by_block = (largest / scale).clamp(min=least).to(torch.float8_e4m3fn, memory_format=_BY_ROW)
    numbers = blocks / (by_block.float() * scale).unsqueeze(-1)
    size = numbers.abs()
    # Codes as a function of numbers are three lines, which get flatter; halves are rounded to even codes.
    codes = torch.minimum(torch.minimum(2 * size, size + 2), size / 2 + 4).round_().clamp_(max=7)
    pairs = (codes + 8 * (numbers < 0)).to(torch.uint8, memory_format=_BY_ROW).view(len(weight), -1, 2)
    return nvfp4_codes((pairs[..., 0] << 4) | pairs[..., 1], by_block, scale, dtype)


def nvfp4_codes(codes: Tensor, blocks: Tensor, scale: Tensor, dtype: torch.dtype, *smoothing: Tensor) -> Packed:
    """The packed weight `codes · blocks · scale`, times `smoothing` if there is one.

    codes: (out, in / 2), uint8, the first of two in the upper half; blocks: (out, in / 16), float8_e4m3fn; scale:
    (out, 1) or (1, 1), fp32; smoothing: (1, in), fp32, factors of the layer's input, and so of the weight's columns.
    """
    shape = torch.Size((len(codes), 2 * codes.shape[1]))
    return Packed((codes, blocks, scale, *smoothing), _from_nvfp4, dtype, shape)


def _from_nvfp4(codes: Tensor, blocks: Tensor, scale: Tensor, *smoothing: Tensor, dtype: torch.dtype) -> Tensor:
    if (kernel := _kernel("nvfp4", codes, blocks, scale, *smoothing)) is not None:
        return kernel(codes.new_empty(len(codes), 2 * codes.shape[1], dtype=dtype), codes, blocks, scale, *smoothing)
    pairs = F.embedding(codes.int(), level_pairs(E2M1_LEVELS, codes.device))
    weight = pairs.view(len(codes), -1, NVFP4_BLOCK).mul_((blocks.float() * scale).unsqueeze(-1)).view(len(codes), -1)
    for factor in smoothing:
        weight = weight.mul_(factor)
    return weight.to(dtype)


KERNEL_KINDS: Mapping[str, Quantization] = {
    "int8": "int8",
    "e4m3": "fp8_e4m3",
    "e5m2": "fp8_e5m2",
    "mxfp8": "mxfp8",
    "nf4": "nf4",
    "nvfp4": "nvfp4",
}
"""Kinds of `core.unpacking_kernel`, with a method that packs so."""

_SCALED = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
"""Those of codes with scales for rows."""


def _kernel(kind: str | None, codes: Tensor, *others: Tensor) -> Callable[..., Tensor] | None:
    """What unpacks codes in one kernel; None where torch's operations do, as on a CPU and in compiled code."""
    if kind is None or codes.device.type != "cuda" or torch.compiler.is_compiling() or codes.numel() >= _MOST_CODES:
        return None
    # Rows must follow one another in memory, as they do in a result that is made like them.
    order = sorted(range(codes.ndim), key=codes.stride, reverse=True)
    if order[0] != 0 or not codes.permute(order).is_contiguous() or not all(one.is_contiguous() for one in others):
        return None
    found = unpacking_on(codes.device, kind)
    return None if found.refusal else found.run


_MOST_CODES = 2**30
"""Codes from which a kernel could not count a row's numbers in 32 bits."""


@functools.cache
def unpacking_on(device: torch.device, kind: str) -> Kernel:
    """`core.unpacking_kernel.unpacked` of a kind on a GPU, which is refused unless it gives the numbers of a CPU."""
    generator = torch.Generator().manual_seed(0)
    here = packed(
        torch.randn(3, 2112, generator=generator), KERNEL_KINDS[kind], torch.float32
    )  # more than two blocks of it
    expected = here.weight()
    there = [tensor.to(device) for tensor in here.tensors]
    further = [levels_on(device)] if kind == "nf4" else []

    def load() -> Callable[..., Tensor]:
        from lorasmith.core.unpacking_kernel import unpacked

        return functools.partial(unpacked, kind)

    y = torch.empty(expected.numel() if kind == "nf4" else expected.shape, device=device)
    trial = (y, *there, *further)
    return kernel_or(f"unpacking {KERNEL_KINDS[kind]}", lambda *_: expected.view(y.shape), load, [trial])


def tiled(scales: Tensor) -> Tensor:
    """Scales of blocks (rows, columns), of one byte each, in the tiles of `untiled`, padded with zeros; flat."""
    height, width = (-(-size // tile) for size, tile in zip(scales.shape, _TILE, strict=True))
    missing = (0, width * _TILE[1] - scales.shape[1], 0, height * _TILE[0] - scales.shape[0])
    whole = F.pad(scales.view(torch.uint8), missing).view(height, 4, 32, width, 4)
    return whole.permute(0, 3, 2, 1, 4).reshape(-1).view(scales.dtype)


def tiled_size(rows: int, columns: int) -> int:
    """Number of scales in tiles for a matrix of rows × columns of them, which is padded to whole tiles."""
    return math.prod(_TILE[i] * -(-size // _TILE[i]) for i, size in enumerate((rows, columns)))


def untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales of blocks (rows, columns) from the tiles of cuBLAS.

    A tile has 128 rows and 4 columns; its row r is stored in place r mod 32 and there in quarter r div 32
    (https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout).

    scales: as many bytes as `tiled_size` says, in any shape.
    """
    height, width = -(-rows // _TILE[0]), -(-columns // _TILE[1])
    tiles = scales.reshape(height, width, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(height * _TILE[0], width * _TILE[1])[:rows, :columns].contiguous()


PACKINGS: dict[Quantization, Callable[[Tensor, torch.dtype], Packed]] = {
    "none": as_stored,
    "fp8_e4m3": functools.partial(_scaled_fp8, code=torch.float8_e4m3fn, by_row=True),
    "fp8_e5m2": functools.partial(_scaled_fp8, code=torch.float8_e5m2, by_row=True),
    "fp8_e4m3_tensor": functools.partial(_scaled_fp8, code=torch.float8_e4m3fn, by_row=False),
    "fp8_e5m2_tensor": functools.partial(_scaled_fp8, code=torch.float8_e5m2, by_row=False),
    "int8": _scaled_int8,
    "int8_convrot": _rotated_int8,
    "mxfp8": _blocks_of_e4m3,
    "nf4": _normal_float,
    "nvfp4": _blocks_of_e2m1,
}
"""By name of the setting `quantization`."""


FP8_CODES = (torch.float8_e4m3fn, torch.float8_e5m2)  # dtypes of the weights
