"""Products with quantized frozen weights in the format of their codes: fp8, int8, mxfp8 and nvfp4.

In fp8 and int8, for codes C (out, in) with scales s, one for each output or one for all, activations x and gradients g
are rounded row by row to the same format, each row scaled so that its maximum is the format's:

    forward     x Wᵀ = sx · (x / sx) Cᵀ · s            one sx for each row of x
    backward    g W  = sg · ((g ∘ s) / sg) C           one sg for each row of g ∘ s

In the backward product s is along the summed dimension, so it is multiplied into the gradient first. Weights rotated
by R (ConvRot) are (C · s) R with R = Rᵀ = R⁻¹: `x R` is rounded in place of x, and the backward product is rotated.

    format    device                                                            product
    fp8       NVIDIA, compute capability 8.9 (Ada) or later                     `torch._scaled_mm`
    int8      NVIDIA, compute capability 8.0 (Ampere) or later                  `core.int8_kernel`, or `torch._int_mm`
              processors with VNNI                                              `torch._int_mm`
    mxfp8     NVIDIA, compute capability 10.0 (Blackwell) or later              `torch._scaled_mm`
    nvfp4     NVIDIA, compute capability 10.0 (Blackwell) or later              `torch._scaled_mm`

They need a Linear layer whose sizes are multiples of 16, in mxfp8 and nvfp4 of 32; the others are dequantized.

fp8: activations and gradients are in e4m3. Gradients are often in e5m2 for its range (Micikevicius et al. 2022,
arXiv:2209.05433), but rows with scales of their own need none, and its error is twice as large
(docs/lab-log.md). Support of scales per row depends on GPU and version (often only with results in bf16), so
it is tried once for each shape; without it the scales are multiplied afterwards.

The second matrix of a product is in column order on a GPU: `torch._scaled_mm` takes no other, and in int8 tensor cores
read it so, and any other byte by byte. So backward products make a temporary copy of the codes
(`core.transpose_kernel`). What several layers with one input round of it is rounded once (`Shared`), and biases are
added inside of the product where the device can.

int8: sums are exact, so that all ways to compute them give the same ones, except on processors without VNNI, whose
products saturate in pairs: there is none there.

mxfp8 and nvfp4 have scales for blocks along the summed dimension, of both matrices. Forward, activations are packed as
the weight is. Backward, the sum is over outputs, along which the weight has no blocks: it is unpacked, and packed in
mxfp8 along them, as the gradient is. A copy that is kept would take as much memory as a weight in bf16. From mxfp8
that changes only numbers below 2⁻¹³ of the largest of their new block, as powers of two shift codes exactly; from nvfp4
it rounds again. Gradients in nvfp4 have an error more than three times as large (docs/lab-log.md). The product is, by
definition, the one of the unpacked matrices in fp32, which is what other devices compute.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.core.choices import ProductFormat, Quantization
from lorasmith.core.kernels import Kernel, is_refusal, kernel_or
from lorasmith.core.quantization import E2M1_LEVELS, CodeFormat, Packed, level_pairs, packed, rotated, rotation, tiled


def has_products(kind: ProductFormat, device: torch.device) -> bool:
    """Whether a device has units for products in a format."""
    if kind == "training_dtype":
        return True
    if device.type == "cpu":
        return kind == "int8" and _sums_exactly()
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    facts = PRODUCT_KINDS[kind]
    if torch.cuda.get_device_capability(device) < facts.capability:
        return False
    return facts.make is not BlockProducts or _multiplies_blocks(device)


@functools.cache
def _sums_exactly() -> bool:
    """Whether this processor sums int8 products without saturation, as it does by the instructions made for them."""
    most = torch.full((16, 16), 127, dtype=torch.int8)
    try:
        return bool((torch._int_mm(most, -most) == -16 * 127**2).all())
    except RuntimeError:
        return False


Shared = dict[object, Any]
"""What products with one input have rounded of it, by format; empty at first."""


class Narrow(NamedTuple):
    """A product that is added, `factor · part second`, such as that of a LoRA."""

    part: Tensor  # (n, rank)
    second: Tensor  # (rank, m)
    factor: float = 1.0


class Fp8Products:
    """The products of a Linear layer whose packed weight has fp8 codes and an fp32 scale, on a device."""

    def __init__(self, codes: CodeFormat, shape: torch.Size, device: torch.device) -> None:
        # Decided here, outside of compiled code, for which a probe is neither a constant nor an operation.
        code, (out, inside) = codes.dtype, shape
        self._forward = _dtypes_scaled_by_row(device, ACTIVATION, code, inside, out)
        self._backward = _dtypes_scaled_by_row(device, GRADIENT, code, out, inside)

    def forward(self, weight: Packed, x: Tensor, bias: Tensor | None, shared: Shared | None = None) -> Tensor:
        """`x Wᵀ + b` of x (..., in), in its dtype."""
        codes, scale = weight.tensors
        found = None if shared is None else shared.get(ACTIVATION)
        rows, row_scale = found or rounded_rows(x.reshape(-1, x.shape[-1]), ACTIVATION)
        if shared is not None:
            shared[ACTIVATION] = rows, row_scale
        y = _fp8_product(rows, row_scale, codes.t(), scale.reshape(1, -1), x.dtype, self._forward, bias, fast=True)
        return y.view(*x.shape[:-1], len(codes))

    def backward(self, weight: Packed, grad: Tensor) -> Tensor:
        """`grad W` of grad (..., out), in its dtype."""
        codes, _ = weight.tensors
        (rows, row_scale), left = _rounded_gradient(weight, grad, GRADIENT, codes.shape[1])
        y = _fp8_product(rows, row_scale, _in_columns(codes), left, grad.dtype, self._backward, None, fast=False)
        return y.view(*grad.shape[:-1], codes.shape[1])


class Int8Products:
    """The products of a Linear layer whose packed weight has int8 codes and an fp32 scale, rotated or not."""

    def __init__(self, codes: CodeFormat, shape: torch.Size, device: torch.device) -> None:
        kernel = int8_product_on(device)
        self._product = kernel.run
        self._rotation = None if codes.rotated_by is None else rotation(codes.rotated_by, device)
        self._format = torch.int8, codes.rotated_by
        # A rotated product would rotate what is added to it.
        self.adds_narrow = device.type == "cuda" and not kernel.refusal and self._rotation is None

    def forward(
        self,
        weight: Packed,
        x: Tensor,
        bias: Tensor | None,
        shared: Shared | None = None,
        narrow: Narrow | None = None,
    ) -> Tensor:
        """`x Wᵀ + b` of x (..., in), in its dtype, and a narrow product if `adds_narrow`."""
        codes, scale = weight.tensors
        found = None if shared is None else shared.get(self._format)
        rows, row_scale = found or rounded_rows(self._rotated(x.reshape(-1, x.shape[-1])), torch.int8)
        if shared is not None:
            shared[self._format] = rows, row_scale
        added = (narrow,) if self.adds_narrow else ()
        y: Tensor = self._product(rows, row_scale, codes.t(), scale.reshape(1, -1), x.dtype, bias, *added)
        return y.view(*x.shape[:-1], len(codes))

    def backward(
        self, weight: Packed, grad: Tensor, narrow: Narrow | None = None, total: Tensor | None = None
    ) -> Tensor:
        """`grad W` of grad (..., out), in its dtype; if `adds_narrow`, also a narrow product, and `total` in place."""
        codes, _ = weight.tensors
        (rows, row_scale), left = _rounded_gradient(weight, grad, torch.int8, codes.shape[1])
        second = _in_columns(codes) if codes.device.type == "cuda" else codes
        added = (narrow, total) if self.adds_narrow else ()
        y = self._rotated(self._product(rows, row_scale, second, left, grad.dtype, None, *added))
        return y.view(*grad.shape[:-1], codes.shape[1])

    def _rotated(self, rows: Tensor) -> Tensor:
        return rows if self._rotation is None else rotated(rows, self._rotation)


class BlockProducts:
    """The products of a Linear layer whose packed weight has scales for blocks of inputs, in mxfp8 or nvfp4."""

    def __init__(self, codes: CodeFormat, shape: torch.Size, device: torch.device) -> None:
        self._kind = PRODUCT_KINDS[codes.products].quantization
        if self._kind == "nvfp4":
            level_pairs(E2M1_LEVELS, device)  # kept, so that the first backward pass does not wait for its copy

    def forward(self, weight: Packed, x: Tensor, bias: Tensor | None, shared: Shared | None = None) -> Tensor:
        """`x Wᵀ + b` of x (..., in), in its dtype."""
        smoothing = weight.tensors[3:]  # see `nvfp4_codes`
        shared = None if smoothing else shared
        rows: Packed | None = None if shared is None else shared.get(self._kind)
        if rows is None:
            flat = x.reshape(-1, x.shape[-1])
            for factor in smoothing:
                flat = flat * factor
            rows = packed(flat, self._kind, torch.float32)
        if shared is not None:
            shared[self._kind] = rows
        bare = replace(weight, tensors=weight.tensors[:3], dtype=torch.float32)
        y = _block_product(rows, bare, x.dtype)
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], len(bare.tensors[0]))

    def backward(self, weight: Packed, grad: Tensor) -> Tensor:
        """`grad W` of grad (..., out), in its dtype."""
        flat = grad.reshape(-1, grad.shape[-1])
        across = packed(weight.weight().t(), GRADIENT_BLOCKS, torch.float32)
        y = _block_product(packed(flat, GRADIENT_BLOCKS, torch.float32), across, grad.dtype)
        return y.view(*grad.shape[:-1], len(across.tensors[0]))


@dataclass(frozen=True)
class ProductKind:
    """Products in a format, and what they need."""

    make: type[Fp8Products] | type[Int8Products] | type[BlockProducts]
    capability: tuple[int, int]  # of NVIDIA's GPUs, at least
    quantization: Quantization  # with which weights have the codes, the best
    others: str = ""  # devices beside these, in words
    multiple: int = 16  # of which the sizes of a weight must be multiples

    def needs_compiler(self, device: torch.device) -> bool:
        """Whether products without one take longer than those of the unpacked weight, as activations are packed in many
        operations, which move 33 to 147 bytes a number."""
        return self.make is BlockProducts and device.type == "cuda"

    @property
    def device(self) -> str:
        """What has such products, in words."""
        return f"NVIDIA, compute capability {'.'.join(map(str, self.capability))} or later{self.others}"


PRODUCT_KINDS: Mapping[ProductFormat, ProductKind] = {
    "fp8": ProductKind(Fp8Products, (8, 9), "fp8_e4m3"),
    "int8": ProductKind(Int8Products, (8, 0), "int8", ", or a processor with VNNI"),
    "mxfp8": ProductKind(BlockProducts, (10, 0), "mxfp8", multiple=32),
    "nvfp4": ProductKind(BlockProducts, (10, 0), "nvfp4", multiple=32),
}
"""By the value of the setting `products`."""

ACTIVATION = torch.float8_e4m3fn
"""Format of activations in products with fp8 weights."""

GRADIENT = torch.float8_e4m3fn
"""Format of gradients there, never e5m2 with weights in e5m2, of which hardware has no product."""

GRADIENT_BLOCKS: Quantization = "mxfp8"
"""Format of gradients, and of weights they are multiplied with, in products with weights in mxfp8 and nvfp4."""


def _rounded_gradient(
    weight: Packed, grad: Tensor, kind: torch.dtype, columns: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """`rounded_rows` of a gradient with the scales of outputs multiplied in, and the scales of columns that are left:
    (1, columns), or (1, 1)."""
    scale = weight.tensors[1]
    flat = grad.reshape(-1, grad.shape[-1])
    if scale.numel() > 1:
        left = scale.new_ones(1, columns) if torch.compiler.is_compiling() else _ones(columns, scale.device)
        return rounded_rows(flat, kind, scale.reshape(-1)), left
    return rounded_rows(flat, kind), scale.reshape(1, 1)


@functools.cache
def _ones(columns: int, device: torch.device) -> Tensor:
    return torch.ones(1, columns, device=device)


def _in_columns(codes: Tensor) -> Tensor:
    """A copy of codes (rows, columns) in column order, by `core.transpose_kernel` on a GPU."""
    if torch.compiler.is_compiling():
        return codes.t().contiguous().t()
    copy: Tensor = transposing_on(codes.device).run(codes.contiguous())
    return copy.t()


@functools.cache
def transposing_on(device: torch.device) -> Kernel:
    """What transposes contiguous codes of a byte on a device."""
    name = "transposing codes"
    if device.type != "cuda":
        return Kernel(name, _transposed_by_torch)
    codes = torch.arange(48 * 144, device=device).reshape(48, 144).to(torch.int8)

    def load() -> Callable[..., Any]:
        from lorasmith.core.transpose_kernel import transposed

        return transposed

    return kernel_or(name, _transposed_by_torch, load, [(codes,)])


def _transposed_by_torch(codes: Tensor) -> Tensor:
    return codes.t().contiguous()


def rounded_rows(rows: Tensor, kind: torch.dtype, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows (n, k), times factors (k,), in a format, scaled so that each maximum is the format's; scales (n, 1) in fp32.

    By `core.rounding_kernel` on a GPU.
    """
    round_rows = rounded_by_torch if torch.compiler.is_compiling() else rounding_on(rows.device, kind).run
    return round_rows(rows, kind, _largest(kind), factors)


def _largest(kind: torch.dtype) -> float:
    return 127.0 if kind == torch.int8 else torch.finfo(kind).max


@functools.cache
def rounding_on(device: torch.device, kind: torch.dtype) -> Kernel:
    """What rounds rows to a format on a device, with the signature of `rounded_by_torch`."""
    name = f"rounding to {'int8' if kind == torch.int8 else 'fp8'}"
    if device.type != "cuda":
        return Kernel(name, rounded_by_torch)
    rows = torch.linspace(-3, 2, 5 * 144, device=device).reshape(5, 144)
    factors = torch.linspace(1, 2, 144, device=device)

    def load() -> Callable[..., Any]:
        from lorasmith.core.rounding_kernel import rounded

        return rounded

    return kernel_or(name, rounded_by_torch, load, [(rows, kind, _largest(kind), factors)])


def rounded_by_torch(rows: Tensor, kind: torch.dtype, largest: float, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """`rounded_rows` in several operations, with the largest number of the format."""
    rows = rows if factors is None else rows * factors
    is_int8 = kind == torch.int8
    scale = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True, dtype=torch.float32) * (1 / largest)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # of a row of zeros
    scaled = rows / scale
    scaled = scaled.round_() if is_int8 else scaled.clamp_(-largest, largest)  # rounded, none is beyond 127
    # Rows of channels-last activations are columns, and CUDA's product takes rows.
    return scaled.to(kind, memory_format=torch.contiguous_format), scale


def _block_product(a: Packed, b: Packed, dtype: torch.dtype) -> Tensor:
    """`A Bᵀ` in `dtype` of matrices (n, k) and (m, k) that are packed in one format, and unpack to fp32."""
    if a.tensors[0].device.type == "cuda":
        return _block_product_on_gpu(a, b, dtype)
    return (a.weight() @ b.weight().t()).to(dtype)


def _block_product_on_gpu(a: Packed, b: Packed, dtype: torch.dtype) -> Tensor:
    (codes_a, scales_a, *whole), (codes_b, scales_b, *other) = a.tensors, b.tensors
    # Bytes are pairs of e2m1. The product reads the lower half first; these are swapped in both matrices.
    is_fp4 = codes_a.dtype == torch.uint8
    code, scale = (torch.float4_e2m1fn_x2, scales_a.dtype) if is_fp4 else (codes_a.dtype, torch.float8_e8m0fnu)
    y = torch._scaled_mm(
        codes_a.view(code),
        codes_b.view(code).t(),
        scale_a=tiled(scales_a).view(scale),
        scale_b=tiled(scales_b).view(scale),
        out_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
    )
    for by_row, by_column in zip(whole, other, strict=True):
        y.mul_(by_row).mul_(by_column.reshape(1, -1))
    return y.to(dtype)


@functools.cache
def _multiplies_blocks(device: torch.device) -> bool:
    """Whether a device and its libraries have products in mxfp8 and nvfp4, and these are right."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, 96, generator=generator) for size in (160, 64))

    def is_right(kind: Quantization) -> bool:
        left, right = (packed(one, kind, torch.float32) for one in (a, b))
        found = _block_product(left.to(device, torch.float32), right.to(device, torch.float32), torch.float32)
        return torch.allclose(found.cpu(), _block_product(left, right, torch.float32), rtol=0.01, atol=0.01)

    try:
        return is_right("mxfp8") and is_right("nvfp4")
    except (RuntimeError, ValueError) as error:
        if not is_refusal(error):
            raise
        return False


@functools.cache
def int8_product_on(device: torch.device) -> Kernel:
    """What multiplies int8 matrices on a device, with the signature of `_int8_product`."""
    name = "products in int8"
    if device.type != "cuda":
        return Kernel(name, _int8_product)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (32, 32), generator=generator, dtype=torch.int8) for _ in range(2))
    scale = torch.ones(32, 1, device=device)

    def load() -> Callable[..., Any]:
        from lorasmith.core.int8_kernel import product

        return product

    orders = (b.to(device), b.t().to(device).t())
    bias, part, total = torch.arange(32.0), torch.ones(32, 3), torch.ones(32, 32)
    narrow = Narrow(part.to(device), part.to(device).t(), 2.0)
    trials: list[tuple[Any, ...]] = [
        (a.to(device), scale, order, scale.t(), torch.float32, *more)
        for order in orders
        for more in ((None,), (bias.to(device),), (None, narrow), (None, narrow, total.to(device)))
    ]

    def expected(*trial: Any) -> Tensor:
        product = a.float() @ b.float()
        added, *others = trial[5:]
        return product + (0 if added is None else bias) + (6.0 if others else 0) + (1.0 if len(others) > 1 else 0)

    return kernel_or(name, _int8_product, load, trials, expected=expected)


def _int8_product(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """`(a · scale_a) (b · scale_b) + bias` for a (n, k), scale_a (n, 1), b (k, m) in any order, scale_b (1, m) or
    (1, 1), bias (m,)."""
    y = torch._int_mm(*(_as_on_cuda(a, b) if a.device.type == "cuda" else (a, b)))[: len(a)]
    y = (y * scale_a).mul_(scale_b).to(dtype)
    return y if bias is None else y.add_(bias)


def _as_on_cuda(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices as `torch._int_mm` takes them on CUDA: more than 16 rows, and a second one in column order."""
    return F.pad(a, (0, 0, 0, max(0, 17 - len(a)))), b if b.stride(0) == 1 else b.t().contiguous().t()


def _fp8_product(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    by_row: Mapping[torch.dtype, bool],
    bias: Tensor | None,
    *,
    fast: bool,
) -> Tensor:
    """`(a · scale_a) (b · scale_b) + bias` for a (n, k), scale_a (n, 1), b (k, m) in columns, scale_b (1, m) or (1, 1).

    `by_row` are the dtypes of results with scales per row, and whether they take a bias; `fast` lets the GPU accumulate
    in fewer bits, which forward products tolerate.
    """
    scaled = dtype if dtype in by_row else torch.bfloat16
    if scaled in by_row:
        scale_b = scale_b.expand(1, b.shape[1]).contiguous()
        inside = bias if by_row[scaled] and bias is not None and bias.dtype == scaled == dtype else None
        y = torch._scaled_mm(
            a, b, scale_a=scale_a, scale_b=scale_b, bias=inside, out_dtype=scaled, use_fast_accum=fast
        ).to(dtype)
        return y if bias is inside else y.add_(bias)  # type: ignore[arg-type]
    one = scale_a.new_ones(())
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # the sums would overflow fp16
    y = torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=wide, use_fast_accum=fast)
    y = y.mul_(scale_a).mul_(scale_b).to(dtype)
    return y if bias is None else y.add_(bias)


@functools.cache
def _dtypes_scaled_by_row(
    device: torch.device, a: torch.dtype, b: torch.dtype, inner: int, columns: int
) -> Mapping[torch.dtype, bool]:
    """Dtypes of results for which a device supports scales per row with these formats and sizes, and is right, and
    whether it does with a bias in that dtype."""
    rows = torch.arange(1.0, 17, device=device).reshape(-1, 1) / inner  # results are in range of fp16
    across = torch.linspace(1, 2, columns, device=device).reshape(1, -1)
    left, right = torch.ones(len(rows), inner, device=device).to(a), torch.ones(columns, inner, device=device).to(b)

    def is_right(dtype: torch.dtype, bias: Tensor | None = None) -> bool:
        try:
            y = torch._scaled_mm(left, right.t(), scale_a=rows, scale_b=across, bias=bias, out_dtype=dtype)
        except (RuntimeError, ValueError) as error:
            if not is_refusal(error):
                raise
            return False
        expected = inner * rows * across + (0 if bias is None else bias.float())
        return bool(torch.allclose(y.float(), expected, rtol=0.01))

    bias = torch.linspace(3, 5, columns, device=device)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return {dtype: is_right(dtype, bias.to(dtype)) for dtype in dtypes if is_right(dtype)}
