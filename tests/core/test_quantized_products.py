"""Products in quantized formats, against those with the dequantized weight; torch on the CPU has fp8 and int8 too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import packed_files
import pytest
import torch
from torch import Tensor

from lorasmith.adapters.frozen_layer import Products
from lorasmith.core import quantized_products
from lorasmith.core.quantization import PACKINGS, Packed, packed, rotated_codes, scaled_codes
from lorasmith.core.quantized_products import PRODUCT_KINDS, has_products
from lorasmith.families.files.packed_weights import PackedWeights
from tests.cuda.arithmetic import CudaDivision

CPU = torch.device("cpu")


@functools.cache
def _has_fp8_products() -> bool:
    a, b = (torch.zeros(size, 96, dtype=torch.float8_e4m3fn) for size in (7, 64))
    try:
        for second in (b.t(), b.t().contiguous()):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                torch._scaled_mm(a, second, torch.ones(()), torch.ones(()), out_dtype=dtype)
    except RuntimeError:
        return False
    return True


def needing(kind: str) -> Any:
    """A kind of quantization, whose tests are skipped where this processor has no products with it."""
    if kind.startswith("int8"):
        return pytest.param(
            kind, marks=pytest.mark.skipif(not has_products("int8", CPU), reason="sums of int8 products saturate here")
        )
    if not _has_fp8_products():
        return pytest.param(kind, marks=pytest.mark.skip(reason="this torch has no products in fp8 on this processor"))
    return kind


FP8 = [needing(kind) for kind in PACKINGS if kind.startswith("fp8")]
INT8 = [needing(kind) for kind in PACKINGS if kind.startswith("int8")]
BLOCKS = ["mxfp8", "nvfp4"]
KINDS = [*FP8, *INT8, *BLOCKS]
OUT, IN = 64, 96


@pytest.fixture(params=[True, False], ids=["scales by row", "no scales"])
def scales_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both ways to come by the product in fp8: with scales inside, and multiplied with them afterwards."""
    if not request.param:
        monkeypatch.setattr(quantized_products, "_dtypes_scaled_by_row", lambda *_: {})
    return request.param


def numbers(*shape: int, seed: int) -> Tensor:
    """Normal numbers whose rows and columns differ in size by factors of a hundred."""
    g = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.linspace(-1, 1, shape[-1])[torch.randperm(shape[-1], generator=g)]
    rows = 10 ** torch.linspace(-1, 1, shape[-2])[torch.randperm(shape[-2], generator=g)]
    return torch.randn(shape, generator=g) * sizes * rows.unsqueeze(-1)


def products(weight: Packed) -> Products:
    assert weight.format is not None
    return PRODUCT_KINDS[weight.format.products].make(weight.format, weight.shape, CPU)


def row_error(found: Tensor, expected: Tensor) -> float:
    """Largest error of a row as a share of its length."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
def test_a_gpu_rounds_rows_to_the_same_codes(kind: torch.dtype) -> None:
    rows = numbers(64, 96, seed=0)
    here = quantized_products.rounded_rows(rows, kind)
    with CudaDivision():
        there = quantized_products.rounded_rows(rows, kind)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(there, here, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_product_with_the_weight(kind: str, dtype: torch.dtype, scales_rows: bool) -> None:
    weight = packed(numbers(OUT, IN, seed=0), kind, torch.float32)
    x, bias = numbers(2, 9, IN, seed=1).to(dtype), torch.arange(OUT).to(dtype)
    y = products(weight).forward(weight, x, bias)
    assert y.dtype == dtype
    assert y.shape == (2, 9, OUT)
    # A number in e4m3 is off by a sixteenth of itself at most; int8 has fewer steps where a row's numbers differ.
    limit = {"int8": 1 / 8, "nvfp4": 1 / 5}.get(kind, 1 / 16)
    assert row_error(y.float() - bias.float(), x.float() @ weight.weight().t()) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_backward_is_the_product_with_the_weight_untransposed(kind: str, dtype: torch.dtype, scales_rows: bool) -> None:
    weight = packed(numbers(OUT, IN, seed=0), kind, torch.float32)
    grad = (1e-3 * numbers(2, 9, OUT, seed=2)).to(dtype)
    found = products(weight).backward(weight, grad)
    assert found.dtype == dtype
    assert found.shape == (2, 9, IN)
    # In blocks across, a weight in nvfp4 is rounded a second time.
    limit = 1 / 8 if kind == "nvfp4" else 1 / 16
    assert row_error(found.float(), grad.float() @ weight.weight()) < limit


@pytest.mark.parametrize("kind", KINDS)
def test_what_layers_with_one_input_round_is_rounded_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = (packed(numbers(OUT, IN, seed=seed), kind, torch.float32) for seed in (0, 1))
    x, bias = numbers(9, IN, seed=2), torch.arange(OUT).float()
    apart = [products(one).forward(one, x, bias) for one in (q, k)]
    calls = list[int]()
    for name in ("rounded_rows", "packed"):
        plain = getattr(quantized_products, name)
        monkeypatch.setattr(quantized_products, name, lambda *given, plain=plain: calls.append(0) or plain(*given))
    shared = dict[object, Any]()
    together = [products(one).forward(one, x, bias, shared) for one in (q, k)]
    assert len(calls) == 1
    assert all(map(torch.equal, together, apart))


@pytest.mark.parametrize("kind", FP8)
def test_numbers_that_fp8_holds_come_out_exactly(kind: str, scales_rows: bool) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-4, 5, (OUT, IN), generator=g).float()
    weight[:, 0] = (
        torch.finfo(packed(weight, kind, torch.float32).tensors[0].dtype).max / 64
    )  # a power of two as the scale
    x, grad = (torch.randint(-4, 5, (3, size), generator=g).float() for size in (IN, OUT))
    x[:, 0] = 448.0
    codes = packed(weight, kind, torch.float32)
    assert torch.equal(codes.weight(), weight)
    torch.testing.assert_close(products(codes).forward(codes, x, None), x @ weight.t(), rtol=1e-5, atol=1e-3)
    grad[:, 0] = 448.0 / 64
    torch.testing.assert_close(products(codes).backward(codes, grad), grad @ weight, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(OUT, 1), (1, 1)], ids=["scales", "one scale"])
@pytest.mark.parametrize("group", [None, 4, 16])
@pytest.mark.skipif(not has_products("int8", CPU), reason="sums of int8 products saturate here")
def test_products_in_int8_are_the_formula(shape: tuple[int, int], group: int | None) -> None:
    """Row by row, in exact integers: codes as in files, whose rotation is a matrix of its own here."""
    g = torch.Generator().manual_seed(0)
    codes, scale = torch.randint(-127, 128, (OUT, IN), generator=g, dtype=torch.int8), torch.rand(shape, generator=g)
    weight, turn = scaled_codes(codes, scale, torch.float32), torch.eye(IN)
    if group is not None:
        weight = rotated_codes(codes, scale, torch.float32, group=group)
        quarter = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
        block = quarter if group == 4 else torch.kron(quarter, quarter)
        turn = torch.block_diag(*[block] * (IN // group))
    x, grad = numbers(5, IN, seed=1), numbers(5, OUT, seed=2)

    def rounded(row: Tensor) -> Tensor:
        step = row.abs().max() / 127
        return (row / step).round() * step

    own = products(weight)
    turn = turn.double()
    forward = torch.stack([rounded(row) for row in x.double() @ turn]) @ (codes * scale).double().t()
    torch.testing.assert_close(own.forward(weight, x, None), forward.float(), rtol=1e-4, atol=1e-2)
    backward = torch.stack([rounded(row) for row in grad.double() * scale.view(1, -1)]) @ codes.double() @ turn
    torch.testing.assert_close(own.backward(weight, grad), backward.float(), rtol=1e-4, atol=1e-2)


@pytest.mark.skipif(not has_products("int8", CPU), reason="sums of int8 products saturate here")
def test_rotation_keeps_a_product_whose_inputs_have_outliers() -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(OUT, 256, generator=g), torch.randn(20, 256, generator=g)
    x[:, ::64] *= 50
    errors = []
    for kind in ("int8", "int8_convrot"):
        own = packed(weight, kind, torch.float32)
        y = products(own).forward(own, x, None)
        errors.append(((y - x @ own.weight().t()).norm() / (x @ own.weight().t()).norm()).item())
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("kind", [needing("fp8_e4m3"), *INT8, *BLOCKS])
def test_zeros_and_faults_come_through(kind: str) -> None:
    weight = packed(numbers(OUT, IN, seed=0), kind, torch.float32)
    rows = torch.zeros(3, IN)
    rows[1, 2], rows[2, 5] = torch.nan, torch.inf
    y = products(weight).forward(weight, rows, None)
    assert not y[0].any()
    assert not y[1:].isfinite().any()


@pytest.mark.parametrize("kind", FP8[:1])
def test_e5m2_never_meets_e5m2_and_rows_are_rows(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What hardware lacks, and torch on the CPU has."""
    seen: list[tuple[torch.dtype, ...]] = []
    original: Callable[..., Tensor] = torch._scaled_mm

    def recorded(a: Tensor, b: Tensor, **settings: Any) -> Tensor:
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        seen.append((a.dtype, b.dtype))
        return original(a, b, **settings)

    monkeypatch.setattr(torch, "_scaled_mm", recorded)
    for kind in ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3_tensor", "fp8_e5m2_tensor"):
        weight = packed(numbers(OUT, IN, seed=0), kind, torch.float32)
        for rows in (1, 5):  # and channels-last activations, whose rows are columns
            products(weight).forward(weight, torch.ones(IN, rows).t(), None)
            products(weight).backward(weight, torch.ones(OUT, rows).t())
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    assert set(seen) == {(e4m3, e4m3), (e4m3, e5m2)}


@pytest.mark.parametrize(
    ("capability", "there"),
    [
        ((7, 5), ()),
        ((8, 0), ("int8",)),
        ((8, 6), ("int8",)),
        ((8, 9), ("fp8", "int8")),
        ((9, 0), ("fp8", "int8")),
        ((10, 0), ("fp8", "int8", "mxfp8", "nvfp4")),
        ((12, 0), ("fp8", "int8", "mxfp8", "nvfp4")),
    ],
)
def test_capability_decides(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], there: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(quantized_products, "_multiplies_blocks", lambda device: True)
    gpu = torch.device("cuda")
    assert tuple(kind for kind in PRODUCT_KINDS if has_products(kind, gpu)) == there
    assert has_products("training_dtype", gpu)
    assert not any(has_products(kind, CPU) for kind in ("fp8", *BLOCKS))
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert not has_products("int8", gpu)


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers of a matrix (n, k) as hardware reads it: pairs of e2m1 lower half first, scales in cuBLAS' tiles."""
    width = codes.shape[1]
    numbers, block = codes.view(torch.uint8), 32
    if codes.dtype == torch.float4_e2m1fn_x2:
        numbers, width, block = torch.stack((numbers & 15, numbers >> 4), -1).flatten(1), 2 * width, 16
        sizes = torch.tensor(packed_files.E2M1)[(numbers & 7).long()]
        plain = torch.where(numbers >= 8, -sizes, sizes)
    else:
        plain = codes.float()
    row, column = torch.meshgrid(torch.arange(len(codes)), torch.arange(width // block), indexing="ij")
    tile = (row // 128) * -(-(width // block) // 4) + column // 4
    own = scales[512 * tile + 16 * (row % 32) + 4 * (row % 128 // 32) + column % 4].float()
    return (plain.view(len(codes), -1, block) * own.unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_gpu_is_given_the_numbers_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    """More than one tile of rows and of columns, and parts of tiles."""

    def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert a.is_contiguous() and b.t().is_contiguous()
        assert scale_a.is_contiguous() and scale_b.is_contiguous()
        assert a.dtype == b.dtype and scale_a.dtype == scale_b.dtype
        assert (a.dtype, scale_a.dtype) == {
            "mxfp8": (torch.float8_e4m3fn, torch.float8_e8m0fnu),
            "nvfp4": (torch.float4_e2m1fn_x2, torch.float8_e4m3fn),
        }[kind]
        return (decoded(a, scale_a) @ decoded(b.t(), scale_b).t()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    a, b = (packed(numbers(160, rows, seed=rows).t(), kind, torch.float32) for rows in (200, 64))
    found = quantized_products._block_product_on_gpu(a, b, dtype)
    assert found.dtype == dtype
    expected = quantized_products._block_product(a, b, torch.float32)
    torch.testing.assert_close(found.float(), expected, rtol=0.02 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4", "nvfp4 with factors"])
def test_products_in_blocks_are_the_formula(kind: str) -> None:
    """Weights as in files; activations in blocks as the weight's, gradients and the weight across in mxfp8."""
    x, grad = numbers(5, IN, seed=1), numbers(5, OUT, seed=2)
    parts, plain = packed_files.pack(kind, torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)))
    weight = PackedWeights("x", {f"a.{leaf}": tensor for leaf, tensor in parts.items()}, {}).read("a.weight")
    factors, base = parts.get("pre_quant_scale", torch.ones(IN)), kind.partition(" ")[0]
    rows, own = packed_files.rounded(base, x * factors), products(weight)
    torch.testing.assert_close(own.forward(weight, x, None), rows @ (plain / factors).t(), rtol=1e-4, atol=1e-3)
    rows, across = packed_files.rounded("mxfp8", grad), packed_files.rounded("mxfp8", plain.t())
    torch.testing.assert_close(own.backward(weight, grad), rows @ across.t(), rtol=1e-4, atol=1e-3)


def test_a_weight_in_mxfp8_is_the_same_in_blocks_across() -> None:
    weight = packed(numbers(OUT, IN, seed=0), "mxfp8", torch.float32).weight()
    across = packed(weight.t(), "mxfp8", torch.float32).weight().t()
    torch.testing.assert_close(across, weight, rtol=0, atol=2**-17 * weight.abs().max().item())


def test_a_processor_whose_sums_saturate_has_no_products_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's are such without VNNI: unsigned numbers times signed ones, of which two are summed in 16 bits."""

    def saturating(a: Tensor, b: Tensor) -> Tensor:
        pairs = (a.float() + 128).view(len(a), -1, 2, 1) * b.float().view(-1, 2, b.shape[1])
        return (pairs.sum(2).clamp(-(2**15), 2**15 - 1).sum(1) - 128 * b.float().sum(0)).int()

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not quantized_products._sums_exactly.__wrapped__()


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_a_gpu_without_the_kernel_is_given_what_its_product_takes(rows: int) -> None:
    a, b = torch.ones(rows, IN, dtype=torch.int8), torch.arange(IN * OUT).view(IN, OUT).to(torch.int8)
    for order in (b, b.t().contiguous().t()):
        left, right = quantized_products._as_on_cuda(a, order)
        assert len(left) == max(17, rows)
        assert torch.equal(left[:rows], a) and not left[rows:].any()
        assert right.t().is_contiguous() and torch.equal(right, b)


@pytest.mark.slow_after(2)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_they_are_one_graph(kind: str) -> None:
    from torch._dynamo.utils import counters

    weight, x = packed(numbers(OUT, IN, seed=0), kind, torch.float32), numbers(9, IN, seed=1)
    own = products(weight)
    counters.clear()
    compiled = torch.compile(lambda x: own.backward(weight, own.forward(weight, x, None)), backend="aot_eager")
    torch.testing.assert_close(compiled(x), own.backward(weight, own.forward(weight, x, None)))
    assert not counters["graph_break"]
