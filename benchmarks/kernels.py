"""What a device does by itself: launches, copies, attention, products, norms, rotations, rounding, dequantization.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --small --device cpu

Sizes are those of a step of Flux.1 at 1024 pixels (4,608 tokens of 3,072 numbers, 24 heads) and of SDXL's outermost
level; `--small` has small ones, for a rehearsal. The first table says which of the project's Triton kernels run here,
and if not, why. A way that the device or this version of torch lacks has a row that
says so. Rates of products and attention are in TFLOP/s, those of copies and of dequantization in GB/s; the bytes of a
dequantization are its codes read and its weight written once, those of rotations and of rounding input and result,
which is all that one kernel moves.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb as diffusers_rotation
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.bases import clock_of, machine
from benchmarks.results import Results, add_json
from lorasmith.bench.measure import pass_seconds
from lorasmith.core.choices import Quantization
from lorasmith.core.pinned_memory import PinnedBuffer
from lorasmith.core.printable import first_line
from lorasmith.core.quantization import packed, scaled_at_once
from lorasmith.core.quantized_products import (
    PRODUCT_KINDS,
    int8_product_on,
    rounded_by_torch,
    rounded_rows,
    transposing_on,
)
from lorasmith.training.memory.backward_passes import apply_rotary_emb
from lorasmith.training.memory.compilation import triton_kernels

_LAUNCHES = 200
"""Operations between two readings of the clock."""

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything that is measured."""

    heads: int = 24
    tokens: int = 4608
    width: int = 128  # of a head
    inner: int = 3072
    outer: int = 12288
    channels: int = 320
    side: int = 128  # of latents
    copied: int = 2**30  # bytes


SMALL = Sizes(heads=2, tokens=64, width=32, inner=128, outer=256, channels=32, side=16, copied=2**22)


@dataclass(frozen=True)
class Measured:
    """One row: what in which way, the work of a call in units of the rate, and how many calls are one reading."""

    what: str
    way: str
    once: Callable[[], object]
    work: float = 0.0
    unit: str = ""
    calls: int = 1


def main() -> None:
    arguments = _arguments()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    facts = {"torch": torch.__version__, "machine": machine(device), "python": platform.python_version()}
    if on_gpu:
        facts |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        facts |= {"allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")}
        with contextlib.suppress(Exception):
            facts |= {"triton": version("triton")}
    results = Results(arguments, **facts)
    results.table({"kernel": "", "why it is not used": ""})
    for kernel in triton_kernels(device):
        results.add(kernel.name, kernel.refusal)
    results.table({"what": "", "way": "", "ms": ".4f", "rate": ",.1f", "unit": ""})
    sizes = SMALL if arguments.small else Sizes()
    for kind in (launches, copies, attention, products, norms, rotations, rounding, dequantization):
        for make in kind(sizes, device):
            one = None
            try:
                one = make()
                spread = pass_seconds(one.once, steps=arguments.steps, warmup=2, device=device, clock=clock_of(device))
            except (RuntimeError, ValueError, NotImplementedError) as error:  # what a device lacks
                what, way = (one.what, one.way) if one else (kind.__name__, "")
                results.add(what, f"{way}: {first_line(error)[:80]}", None, None, "")
                continue
            seconds = spread.median / one.calls
            rate = one.work / seconds if one.unit and seconds else None
            results.add(one.what, one.way, 1000 * seconds, rate, one.unit)
        if on_gpu:
            torch.cuda.empty_cache()


Rows = Iterator[Callable[[], Measured]]
"""Rows that are made one by one, so that only one has its tensors."""


def launches(sizes: Sizes, device: torch.device) -> Rows:
    """A small operation after the other."""

    def row() -> Measured:
        one = torch.zeros(1, device=device)

        def many() -> None:
            for _ in range(_LAUNCHES):
                one.add_(1)

        return Measured("launch", "add to one number", many, 1e-3, "thousand a second", _LAUNCHES)

    yield row

    def functions() -> Measured:
        one = torch.zeros(1, device=device, requires_grad=True)

        def many() -> None:
            for _ in range(_LAUNCHES):
                _Same.apply(one)

        return Measured("launch", "an autograd function", many, 1e-3, "thousand a second", _LAUNCHES)

    yield functions

    def kernel() -> Measured:
        one = torch.zeros(1, 16, device=device)

        def many() -> None:
            for _ in range(_LAUNCHES):
                rounded_rows(one, torch.int8)

        return Measured(
            "launch", "rounding a row, a Triton kernel on a GPU", many, 1e-3, "thousand a second", _LAUNCHES
        )

    yield kernel


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def copies(sizes: Sizes, device: torch.device) -> Rows:
    """Between host memory of each kind and the device."""

    def row(way: str, made: Callable[[Tensor], Tensor]) -> Measured:
        host = made(torch.zeros(sizes.copied, dtype=torch.uint8))
        there = torch.empty_like(host, device=device)
        back = way.endswith("back")
        source, target = (there, host) if back else (host, there)
        return Measured("copy", way, lambda: target.copy_(source, non_blocking=True), sizes.copied / GIGA, "GB/s")

    yield partial(row, "pageable", lambda host: host)
    if device.type == "cuda":
        registered = PinnedBuffer(sizes.copied, device)
        yield partial(row, "pinned by torch", lambda host: host.pin_memory())
        yield partial(row, "registered", lambda host: registered.bytes)
        yield partial(row, "pinned by torch, back", lambda host: host.pin_memory())
        registered.free()


def attention(sizes: Sizes, device: torch.device) -> Rows:
    """Scaled dot-product attention of each backend, forward and with its backward pass."""
    shape = (1, sizes.heads, sizes.tokens, sizes.width)
    flops = 4 * sizes.heads * sizes.tokens**2 * sizes.width / TERA

    def row(backend: SDPBackend, backward: bool, masked: bool = False) -> Measured:
        mask = torch.ones(sizes.tokens, sizes.tokens, dtype=torch.bool, device=device).tril_() if masked else None
        query, key, value = (
            torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=backward) for _ in range(3)
        )
        gradient = torch.randn(shape, device=device, dtype=torch.bfloat16)

        def once() -> None:
            with sdpa_kernel(backend):
                result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
                if backward:
                    torch.autograd.grad(result, (query, key, value), gradient)

        passes = "forward and backward" if backward else "forward"
        way = f"{backend.name.removesuffix('_ATTENTION').lower()}, {passes}{', with a mask' * masked}"
        # The backward pass has five products for the forward pass's two.
        return Measured(f"attention {shape}", way, once, flops * (3.5 if backward else 1), "TFLOP/s")

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        yield partial(row, backend, False)
        yield partial(row, backend, True)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        yield partial(row, backend, True, masked=True)


def products(sizes: Sizes, device: torch.device) -> Rows:
    """A Linear layer's product in each number format."""
    tokens, inner, outer = sizes.tokens, sizes.inner, sizes.outer
    what, work = f"product {tokens}×{inner}×{outer}", 2 * tokens * inner * outer / TERA
    random = partial(torch.randn, device=device)

    def plain(dtype: torch.dtype) -> Measured:
        a, b = random(tokens, inner).to(dtype), random(outer, inner).to(dtype)
        return Measured(what, str(dtype).removeprefix("torch."), lambda: a @ b.t(), work, "TFLOP/s")

    def int8() -> Measured:
        a, b = (random(*size).mul_(30).to(torch.int8) for size in ((tokens, inner), (outer, inner)))
        return Measured(what, "int8 (_int_mm)", lambda: torch._int_mm(a, b.t()), work, "TFLOP/s")

    def fp8(by_row: bool) -> Measured:
        a, b = (random(*size).to(torch.float8_e4m3fn) for size in ((tokens, inner), (outer, inner)))
        left = torch.ones((tokens, 1) if by_row else (), device=device)
        right = torch.ones((1, outer) if by_row else (), device=device)

        def once() -> Tensor:
            return torch._scaled_mm(a, b.t(), scale_a=left, scale_b=right, out_dtype=torch.bfloat16)

        scales = "a scale per row" if by_row else "one scale"
        return Measured(what, f"fp8_e4m3 (_scaled_mm), {scales}", once, work, "TFLOP/s")

    def int8_kernel(in_columns: bool) -> Measured:
        a, b = (random(*size).mul_(30).to(torch.int8) for size in ((tokens, inner), (outer, inner)))
        b = b.t() if in_columns else b.t().contiguous()
        scales = torch.ones(tokens, 1, device=device), torch.ones(1, outer, device=device)
        multiply = int8_product_on(device).run
        order = "columns, as in a run" if in_columns else "rows"
        way = f"int8 kernel, codes in {order}"
        return Measured(what, way, lambda: multiply(a, scales[0], b, scales[1], torch.bfloat16), work, "TFLOP/s")

    def layer(kind: Quantization, backward: bool) -> Measured:
        weight = packed(random(outer, inner), kind, torch.bfloat16)
        assert weight.format is not None
        layer = PRODUCT_KINDS[weight.format.products].make(weight.format, weight.shape, device)
        bias = random(outer).bfloat16()
        x = random(tokens, outer if backward else inner).bfloat16()
        once = (lambda: layer.backward(weight, x)) if backward else (lambda: layer.forward(weight, x, bias))
        return Measured(
            what, f"{kind}, a layer {'backward' if backward else 'forward, with bias'}", once, work, "TFLOP/s"
        )

    def transpose() -> Measured:
        codes = random(outer, inner).to(torch.int8)
        moved = 2 * codes.nbytes / GIGA
        return Measured(
            f"codes {outer}×{inner}", "transposed", lambda: transposing_on(device).run(codes), moved, "GB/s"
        )

    def low_rank() -> Measured:
        y, inner_rows, up = random(tokens, outer), random(tokens, 16), random(16, outer)
        y, inner_rows, up = y.bfloat16(), inner_rows.bfloat16(), up.bfloat16()
        moved = 2 * y.nbytes / GIGA
        return Measured(
            f"product {tokens}×16×{outer}", "added in place", lambda: y.addmm_(inner_rows, up), moved, "GB/s"
        )

    yield partial(plain, torch.bfloat16)
    yield partial(plain, torch.float16)
    yield int8
    yield partial(int8_kernel, True)
    yield partial(int8_kernel, False)
    yield partial(fp8, False)
    yield partial(fp8, True)
    for kind in ("fp8_e4m3", "int8"):
        yield partial(layer, kind, False)
        yield partial(layer, kind, True)
    yield transpose
    yield low_rank


def norms(sizes: Sizes, device: torch.device) -> Rows:
    """A UNet's norm and convolution in both memory formats, forward and backward."""
    shape = (1, sizes.channels, sizes.side, sizes.side)
    formats = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}

    def row(name: str, layer: torch.nn.Module, form: str) -> Measured:
        module = layer.to(device, torch.bfloat16, memory_format=formats[form]).requires_grad_(False)
        x = torch.randn(shape, device=device, dtype=torch.bfloat16).to(memory_format=formats[form]).requires_grad_()

        def once() -> None:
            y = module(x)
            torch.autograd.grad(y, x, torch.ones_like(y))

        kept = module(x).is_contiguous(memory_format=formats[form])
        return Measured(f"{name} {shape}", form if kept else f"{form}, result in the other", once)

    for form in formats:
        yield lambda form=form: row("GroupNorm", torch.nn.GroupNorm(min(32, sizes.channels // 4), sizes.channels), form)
        yield lambda form=form: row("Conv2d 3×3", torch.nn.Conv2d(sizes.channels, sizes.channels, 3, padding=1), form)


def rotations(sizes: Sizes, device: torch.device) -> Rows:
    """Rotary embeddings as diffusers has them, and forward as a run has them: the kernel, or complex products."""
    shape = (1, sizes.tokens, sizes.heads, sizes.width)

    def row(way: str, function: Callable[..., Tensor]) -> Measured:
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        angles = torch.rand(sizes.tokens, sizes.width // 2, device=device).repeat_interleave(2, -1)
        once = partial(function, x, (angles.cos(), angles.sin()), sequence_dim=1)
        return Measured(f"rotary embedding {shape}", way, once, 2 * x.nbytes / GIGA, "GB/s")

    yield partial(row, "diffusers", diffusers_rotation)
    yield partial(row, "as in a run", apply_rotary_emb)


def rounding(sizes: Sizes, device: torch.device) -> Rows:
    """Activations to int8 and fp8 with a scale for each row: by torch, and as in a run, which has a kernel on GPUs."""
    shape = (sizes.tokens, sizes.inner)

    def row(kind: torch.dtype, way: str) -> Measured:
        rows = torch.randn(shape, device=device, dtype=torch.bfloat16)
        largest = 127.0 if kind == torch.int8 else torch.finfo(kind).max
        once = (
            partial(rounded_rows, rows, kind)
            if way == "as in a run"
            else partial(rounded_by_torch, rows, kind, largest, None)
        )
        return Measured(f"rounding to {kind} {shape}", way, once, 1.5 * rows.nbytes / GIGA, "GB/s")

    for kind in (torch.int8, torch.float8_e4m3fn):
        for way in ("by torch", "as in a run"):
            yield partial(row, kind, way)


def dequantization(sizes: Sizes, device: torch.device) -> Rows:
    """A quantized weight to bf16: by three kernels, by one (int8) or two (fp8), and of nf4 as a run does it."""
    shape = (sizes.outer, sizes.inner)

    def row(kind: str, way: str) -> Measured:
        weight = packed(torch.randn(shape, device=device), kind, torch.bfloat16)  # type: ignore[arg-type]
        codes, scale = weight.tensors[:2]
        ways = {
            "three kernels": lambda: codes.float().mul_(scale).to(torch.bfloat16),
            "at once": lambda: scaled_at_once(codes, scale, torch.bfloat16),
            "as in a run": weight.weight,
        }
        moved = (weight.size_bytes + 2 * shape[0] * shape[1]) / GIGA
        return Measured(f"dequantization {kind} {shape[0]}×{shape[1]}", way, ways[way], moved, "GB/s")

    for kind in ("int8", "fp8_e4m3"):
        yield partial(row, kind, "three kernels")
        yield partial(row, kind, "at once")
    for kind in ("nf4", "nvfp4", "mxfp8"):
        yield partial(row, kind, "as in a run")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10, help="timed readings of each row")
    parser.add_argument("--small", action="store_true", help="small sizes, for a rehearsal")
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
