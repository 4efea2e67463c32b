"""Products in fp8, against those with the dequantized weight; on the CPU torch has them too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.core import quantization
from lorasmith.core.quantization import PACKINGS, Fp8Products, Packed, has_fp8_products, packed

try:
    torch._scaled_mm(*torch.zeros(2, 16, 16, dtype=torch.float8_e4m3fn), torch.ones(()), torch.ones(()))
except NotImplementedError:
    pytest.skip("this torch has no products in fp8 on the CPU", allow_module_level=True)

KINDS = [kind for kind in PACKINGS if kind.startswith("fp8")]
OUT, IN = 48, 64


@pytest.fixture(params=[True, False], ids=["scales by row", "no scales"])
def scales_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both ways to come by the product: with scales inside, and multiplied with them afterwards."""
    if not request.param:
        monkeypatch.setattr(quantization, "_dtypes_scaled_by_row", lambda *_: ())
    return request.param


def numbers(*shape: int, seed: int) -> Tensor:
    """Normal numbers whose rows and columns differ in size by factors of a hundred."""
    g = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.linspace(-1, 1, shape[-1])[torch.randperm(shape[-1], generator=g)]
    rows = 10 ** torch.linspace(-1, 1, shape[-2])[torch.randperm(shape[-2], generator=g)]
    return torch.randn(shape, generator=g) * sizes * rows.unsqueeze(-1)


def products(weight: Packed) -> Fp8Products:
    codes = weight.tensors[0]
    return Fp8Products(codes.dtype, codes.shape, codes.device)


def row_error(found: Tensor, expected: Tensor) -> float:
    """Largest error of a row as a share of its length."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_product_with_the_weight(kind: str, dtype: torch.dtype, scales_rows: bool) -> None:
    weight = packed(numbers(OUT, IN, seed=0), kind, torch.float32)
    x, bias = numbers(2, 9, IN, seed=1).to(dtype), torch.arange(OUT).to(dtype)
    y = products(weight).forward(weight, x, bias)
    assert y.dtype == dtype
    assert y.shape == (2, 9, OUT)
    # A number in e4m3 is off by a sixteenth of itself at most.
    assert row_error(y.float() - bias.float(), x.float() @ weight.weight().t()) < 1 / 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_backward_is_the_product_with_the_weight_untransposed(kind: str, dtype: torch.dtype, scales_rows: bool) -> None:
    weight = packed(numbers(OUT, IN, seed=0), kind, torch.float32)
    grad = (1e-3 * numbers(2, 9, OUT, seed=2)).to(dtype)
    found = products(weight).backward(weight, grad)
    assert found.dtype == dtype
    assert found.shape == (2, 9, IN)
    tolerance = 1 / 16 if "e5m2" in kind else 1 / 8  # the gradient has the format that the weight has not
    assert row_error(found.float(), grad.float() @ weight.weight()) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_fp8_holds_come_out_exactly(kind: str, scales_rows: bool) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-4, 5, (OUT, IN), generator=g).float()
    weight[:, 0] = torch.finfo(packed(weight, kind, torch.float32).code).max / 64  # a power of two as the scale
    x, grad = (torch.randint(-4, 5, (3, size), generator=g).float() for size in (IN, OUT))
    x[:, 0] = 448.0
    codes = packed(weight, kind, torch.float32)
    assert torch.equal(codes.weight(), weight)
    torch.testing.assert_close(products(codes).forward(codes, x, None), x @ weight.t(), rtol=1e-5, atol=1e-3)
    largest = 448.0 if "e5m2" in kind else 57344.0
    grad[:, 0] = largest / 64
    torch.testing.assert_close(products(codes).backward(codes, grad), grad @ weight, rtol=1e-5, atol=1e-3)


def test_zeros_and_faults_come_through() -> None:
    weight = packed(numbers(OUT, IN, seed=0), "fp8_e4m3", torch.float32)
    rows = torch.zeros(3, IN)
    rows[1, 2], rows[2, 5] = torch.nan, torch.inf
    y = products(weight).forward(weight, rows, None)
    assert not y[0].any()
    assert not y[1:].isfinite().any()


def test_e5m2_never_meets_e5m2_and_rows_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hardware lacks, and torch on the CPU has."""
    seen: list[tuple[torch.dtype, ...]] = []
    original: Callable[..., Tensor] = torch._scaled_mm

    def recorded(a: Tensor, b: Tensor, **settings: Any) -> Tensor:
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        seen.append((a.dtype, b.dtype))
        return original(a, b, **settings)

    monkeypatch.setattr(torch, "_scaled_mm", recorded)
    for kind in KINDS:
        weight = packed(numbers(OUT, IN, seed=0), kind, torch.float32)
        for rows in (1, 5):  # and channels-last activations, whose rows are columns
            products(weight).forward(weight, torch.ones(IN, rows).t(), None)
            products(weight).backward(weight, torch.ones(OUT, rows).t())
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    assert set(seen) == {(e4m3, e4m3), (e5m2, e4m3), (e4m3, e5m2)}


@pytest.mark.parametrize(("capability", "there"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_capability_decides(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_fp8_products(torch.device("cuda")) is there
    assert not has_fp8_products(torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_they_are_one_graph(kind: str) -> None:
    from torch._dynamo.utils import counters

    weight, x = packed(numbers(OUT, IN, seed=0), kind, torch.float32), numbers(9, IN, seed=1)
    own = products(weight)
    counters.clear()
    compiled = torch.compile(lambda x: own.backward(weight, own.forward(weight, x, None)), backend="aot_eager")
    torch.testing.assert_close(compiled(x), own.backward(weight, own.forward(weight, x, None)))
    assert not counters["graph_break"]
