"""Quantized frozen weights: codes and scales, from which a weight is unpacked whenever it is used, and fp8 products.

    kind               codes                                    scale (fp32)                 bytes for each number
    int8               round(w / s), s = max |row| / 127        one for each output          1 + 4 / row
    fp8_e4m3           w / s in float8, s = max |row| / 448     one for each output          1 + 4 / row
    fp8_e5m2           w / s in float8, s = max |row| / 57344   one for each output          1 + 4 / row
    fp8_e4m3_tensor    as fp8_e4m3, s = max |w| / 448           one for the weight           1
    fp8_e5m2_tensor    as fp8_e5m2, s = max |w| / 57344         one for the weight           1
    nf4                nearest of 16 levels, two codes a byte   max |block| of 64 numbers    0.5 + 4 / 64

NF4 is the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E) without the second
quantization of its scales; codes are ordered as in bitsandbytes, the first of a pair in the upper half. A row is the
weights of one output of a Linear or convolution; blocks are consecutive in the weight's memory.

Checkpoints with quantized weights of other formats (`families.files`) give `Packed` weights too. A layer whose weight
is packed has it, or another `WeightSource`, under `WEIGHT_SOURCE`, and a `placeholder` as its parameter.

Products of fp8 codes C (out, in), with scales s, and activations or gradients, which are rounded to fp8:

    forward     x Wᵀ = sx · (x / sx) Cᵀ · s            x / sx in e4m3, one sx for each row of x
    backward    g W  = sg · ((g ∘ s) / sg) C           in e5m2, one sg for each row of g ∘ s

In the backward product s is along the summed dimension, so it is multiplied into the gradient first. Gradients need
range more than precision, so they are in e5m2 (Micikevicius et al. 2022, arXiv:2209.05433), unless the weight is:
hardware has no product of e5m2 with e5m2. `torch._scaled_mm` needs the second matrix in column order and sizes that are
multiples of 16, so the backward product makes a temporary copy of the codes. Support of scales per row depends on GPU
and version (often only with results in bf16), so it is tried once for each shape; without it the scales are multiplied
afterwards.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.core.choices import Quantization

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


class WeightSource(ABC):
    """Where a layer's weight, and its bias, come from if not from its parameters.

    Set as the attribute `WEIGHT_SOURCE` of a linear-like layer; everything that multiplies with it then asks here.
    """

    @property
    @abstractmethod
    def code(self) -> torch.dtype:
        """dtype of the codes."""

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
    def code(self) -> torch.dtype:
        """dtype of the codes."""
        return self.tensors[0].dtype

    @property
    def is_plain(self) -> bool:
        """Whether it is a weight in another dtype (`as_stored`), which may be `changed`."""
        return self.unpack is _converted or isinstance(self.unpack, _Changed)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """The plain weight with `change`, from a weight to a new one, applied whenever it is unpacked."""
        return replace(self, unpack=_Changed(self.unpack, change))

    def use(self) -> AbstractContextManager[Packed]:
        return AlwaysHere(self)

    def weight(self) -> Tensor:
        """The unpacked weight, a new tensor."""
        return self.unpack(*self.tensors, dtype=self.dtype)

    def to(
        self, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format = torch.preserve_format
    ) -> Packed:
        """The packed weight on `device`, unpacking to `dtype`; `memory_format` applies to 4-D codes."""
        formats = (memory_format if tensor.ndim == 4 else torch.preserve_format for tensor in self.tensors)
        moved = (tensor.to(device, memory_format=wanted) for tensor, wanted in zip(self.tensors, formats, strict=True))
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
    kept = weight if weight.dtype.itemsize < dtype.itemsize else weight.to(dtype)
    return Packed((kept,), _converted, dtype, weight.shape)


def _converted(tensor: Tensor, *, dtype: torch.dtype) -> Tensor:
    # One function for all weights, so that equal blocks share compiled code.
    return tensor.to(dtype)


@dataclass(frozen=True)
class _Changed:
    unpack: Callable[..., Tensor]
    change: Callable[[Tensor], Tensor]

    def __call__(self, *tensors: Tensor, dtype: torch.dtype) -> Tensor:
        return self.change(self.unpack(*tensors, dtype=dtype))


def _scaled_int8(weight: Tensor, dtype: torch.dtype) -> Packed:
    codes, scale = _scaled(weight, 127.0)
    return scaled_codes(codes.round_().to(torch.int8), scale, dtype)


def _scaled_fp8(weight: Tensor, dtype: torch.dtype, *, code: torch.dtype, by_row: bool) -> Packed:
    codes, scale = _scaled(weight, torch.finfo(code).max, by_row=by_row)
    return scaled_codes(codes.to(code), scale, dtype)


def scaled_codes(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Packed:
    """The packed weight `codes · scale`: codes (out, ...), scale (out, 1, ...) or (1, 1, ...) in fp32."""
    return Packed((codes, scale), _from_scaled, dtype, codes.shape)


def _scaled(weight: Tensor, largest: float, *, by_row: bool = True) -> tuple[Tensor, Tensor]:
    """The weight scaled so that the maximum of each row, or of all, is ±`largest` (a new tensor), and the scales."""
    full = weight.float()
    scale = full.abs().amax(tuple(range(by_row, full.ndim)), keepdim=True) / largest
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # of a row of zeros
    return (full / scale).clamp_(-largest, largest), scale


def _from_scaled(codes: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
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
    pairs = F.embedding(codes.int(), level_pairs(NF4_LEVELS, codes.device))
    flat = pairs.view(-1, BLOCK).mul_(scale).view(-1)[: math.prod(shape)]
    back = sorted(range(len(order)), key=order.__getitem__)
    return flat.to(dtype).view(shape).permute(back)


@functools.cache
def level_pairs(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The two numbers of each byte of two 4-bit codes, (256, 2) fp32, the upper half's first; `levels` is by code."""
    numbers = torch.tensor(levels, device=device)
    return torch.cartesian_prod(numbers, numbers)


PACKINGS: dict[Quantization, Callable[[Tensor, torch.dtype], Packed]] = {
    "none": as_stored,
    "fp8_e4m3": functools.partial(_scaled_fp8, code=torch.float8_e4m3fn, by_row=True),
    "fp8_e5m2": functools.partial(_scaled_fp8, code=torch.float8_e5m2, by_row=True),
    "fp8_e4m3_tensor": functools.partial(_scaled_fp8, code=torch.float8_e4m3fn, by_row=False),
    "fp8_e5m2_tensor": functools.partial(_scaled_fp8, code=torch.float8_e5m2, by_row=False),
    "int8": _scaled_int8,
    "nf4": _normal_float,
}
"""By name of the setting `quantization`."""


FP8_CODES = (torch.float8_e4m3fn, torch.float8_e5m2)  # dtypes of the weights

FP8_MULTIPLE = 16  # of which a weight's sizes must be multiples


def has_fp8_products(device: torch.device) -> bool:
    """Whether a device multiplies in fp8: NVIDIA GPUs of compute capability 8.9 (Ada) or later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Products:
    """The products of a Linear layer whose packed weight has fp8 codes and an fp32 scale, on a device."""

    def __init__(self, code: torch.dtype, shape: torch.Size, device: torch.device) -> None:
        # Decided here, outside of compiled code, for which a probe is neither a constant nor an operation.
        out, inside = shape
        self._gradient = torch.float8_e4m3fn if code == torch.float8_e5m2 else torch.float8_e5m2
        self._forward = _dtypes_scaled_by_row(device, torch.float8_e4m3fn, code, inside, out)
        self._backward = _dtypes_scaled_by_row(device, self._gradient, code, out, inside)

    def forward(self, weight: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x Wᵀ + b` of x (..., in), in its dtype."""
        codes, scale = weight.tensors
        rows, row_scale = _rounded(x.reshape(-1, x.shape[-1]), torch.float8_e4m3fn)
        y = _product(rows, row_scale, codes.t(), scale.reshape(1, -1), x.dtype, self._forward, fast=True)
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], len(codes))

    def backward(self, weight: Packed, grad: Tensor) -> Tensor:
        """`grad W` of grad (..., out), in its dtype."""
        codes, scale = weight.tensors
        flat = grad.reshape(-1, grad.shape[-1])
        if per_output := scale.numel() > 1:
            flat = flat * scale.reshape(1, -1)
        rows, row_scale = _rounded(flat, self._gradient)
        columns = codes.t().contiguous().t()
        left = scale.new_ones(1, 1) if per_output else scale.reshape(1, 1)
        y = _product(rows, row_scale, columns, left, grad.dtype, self._backward, fast=False)
        return y.view(*grad.shape[:-1], codes.shape[1])


def _rounded(rows: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (n, k) in fp8, scaled so that each maximum is the format's, and the scales (n, 1) in fp32."""
    largest = torch.finfo(kind).max
    scale = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True, dtype=torch.float32) / largest
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # of a row of zeros
    # Rows of channels-last activations are columns, and CUDA's product takes rows.
    codes = (rows / scale).clamp_(-largest, largest).to(kind, memory_format=torch.contiguous_format)
    return codes, scale


def _product(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    by_row: tuple[torch.dtype, ...],
    *,
    fast: bool,
) -> Tensor:
    """`(a · scale_a) (b · scale_b)` for a (n, k), scale_a (n, 1), b (k, m) in columns, scale_b (1, m) or (1, 1).

    `by_row` are the dtypes of results with scales per row; `fast` lets the GPU accumulate in fewer bits, which forward
    products tolerate.
    """
    scaled = dtype if dtype in by_row else torch.bfloat16
    if scaled in by_row:
        scale_b = scale_b.expand(1, b.shape[1]).contiguous()
        y = torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=scaled, use_fast_accum=fast)
        return y.to(dtype)
    one = scale_a.new_ones(())
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # the sums would overflow fp16
    y = torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=wide, use_fast_accum=fast)
    return y.mul_(scale_a).mul_(scale_b).to(dtype)


@functools.cache
def _dtypes_scaled_by_row(
    device: torch.device, a: torch.dtype, b: torch.dtype, inner: int, columns: int
) -> tuple[torch.dtype, ...]:
    """Dtypes of results for which a device supports scales per row with these formats and sizes, and is right."""
    rows = torch.arange(1.0, FP8_MULTIPLE + 1, device=device).reshape(-1, 1) / inner  # results are in range of fp16
    across = torch.linspace(1, 2, columns, device=device).reshape(1, -1)
    left, right = torch.ones(len(rows), inner, device=device).to(a), torch.ones(columns, inner, device=device).to(b)

    def is_right(dtype: torch.dtype) -> bool:
        try:
            y = torch._scaled_mm(left, right.t(), scale_a=rows, scale_b=across, out_dtype=dtype)
        except (RuntimeError, ValueError):  # not supported
            return False
        return bool(torch.allclose(y.float(), inner * rows * across, rtol=0.01))

    return tuple(dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if is_right(dtype))
