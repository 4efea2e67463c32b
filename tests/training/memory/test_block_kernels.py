"""Kernels of what blocks compute between products: in Triton's interpreter, and compiled for GPUs not here."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.training.memory import block_kernels
from lorasmith.training.memory.fused_blocks import by_torch
from tests.core.triton_kernels import Traffic, compiled, interpreted

pytest.importorskip("triton", reason="Triton is not installed")

DTYPES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2**-7}
"""With the largest error, as a share: the interpreter truncates to bf16."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module's function, run by the interpreter."""
    return interpreted("lorasmith.training.memory.block_kernels", monkeypatch).run


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def turns(tokens: int, features: int) -> Tensor:
    angles = torch.linspace(-3, 3, tokens * features // 2).view(tokens, -1)
    return torch.polar(torch.ones_like(angles), angles)


def assert_same(run: Any, dtype: torch.dtype, name: str, *args: Any) -> None:
    """As torch's operations in fp32, each result rounded once."""
    wide = [one.float() if isinstance(one, Tensor) and not one.is_complex() else one for one in args]
    expected, found = by_torch(name, *wide), run(name, *args)
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    for one, other in pairs:
        if other is None:
            assert one is None
            continue
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=DTYPES[dtype], atol=DTYPES[dtype] / 4 + 1e-6)


@pytest.mark.pairwise(
    dtype=list(DTYPES), shape=[(1, 1, 48), (2, 3, 40), (1, 2, 1030)], scales=[1, 2], has_gate=[False, True],
    has_total=[False, True],
)  # fmt: skip
def test_modulated_norms_and_gates_are_those_of_torch(
    run: Any, dtype: torch.dtype, shape: tuple[int, int, int], scales: int, has_gate: bool, has_total: bool
) -> None:
    batch, _, features = shape
    x, out, grad = (some(*shape, dtype=dtype) + number for number in range(3))
    rows = min(scales, batch)
    scale, shift, gate = some(rows, 3 * features, dtype=dtype).chunk(3, dim=1)  # not contiguous
    total = x
    if has_gate:
        total = run("gated_sum", x, out, gate)
        assert_same(run, dtype, "gated_sum", x, out, gate)
        assert torch.equal(total, run("modulated", x, scale, shift, 1e-6, out, gate)[0])
        y, of_kept = (
            run("modulated", *one)[1]
            for one in ((x, scale, shift, 1e-6, out, gate), (total, scale, shift, 1e-6, None, None))
        )
        assert torch.equal(y, of_kept)
    else:
        assert run("modulated", x, scale, shift, 1e-6, None, None)[0] is x
        assert_same(run, dtype, "modulated", x, scale, shift, 1e-6, None, None)
    assert_same(
        run, dtype, "modulated_gradient", grad, x if has_total else None, total, scale, 1e-6, gate if has_gate else None
    )


@pytest.mark.pairwise(dtype=list(DTYPES), shape=[(1, 1, 1, 2), (2, 5, 3, 24), (1, 17, 2, 16)], is_swapped=[False, True])
def test_norms_of_heads_are_turned_as_by_torch(
    run: Any, dtype: torch.dtype, shape: tuple[int, ...], is_swapped: bool
) -> None:
    def laid_out(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if is_swapped else x

    x, grad = laid_out(some(*shape, dtype=dtype)), laid_out(some(*shape, dtype=dtype) + 1)
    weight, table = some(shape[-1], dtype=dtype), turns(shape[1], shape[-1])
    whole = torch.zeros(shape[0], shape[1] + 3, *shape[2:], dtype=dtype)
    y, expected = whole[:, 2:-1], torch.empty(shape)
    run("turned_norm", x, weight, table, 1e-6, y)
    by_torch("turned_norm", x.float(), weight.float(), table, 1e-6, expected)
    torch.testing.assert_close(y.float(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])
    assert not whole[:, :2].any() and not whole[:, -1:].any()
    atol = 4 * DTYPES[dtype]
    found = run("turned_norm_gradient", grad, x, weight, table, 1e-6)
    wide = by_torch("turned_norm_gradient", grad.float(), x.float(), weight.float(), table, 1e-6)
    torch.testing.assert_close(found.float(), wide, rtol=DTYPES[dtype], atol=atol)


@pytest.mark.pairwise(dtype=list(DTYPES), kind=["gelu", "silu"], shape=[(1, 2), (2, 3, 80), (3, 2060)])
def test_gated_activations_are_those_of_torch(run: Any, dtype: torch.dtype, kind: str, shape: tuple[int, ...]) -> None:
    h = 3 * some(*shape, dtype=dtype)
    assert_same(run, dtype, "gated", h, kind)
    assert_same(run, dtype, "gated_gradient", some(*shape, dtype=dtype)[..., : shape[-1] // 2].contiguous(), h, kind)


@pytest.mark.pairwise(dtype=list(DTYPES), sizes=[(1, 2), (48, 40), (1000, 1100)])
def test_gelu_is_joined_to_what_comes_first(run: Any, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    first, h = (4 * some(1, 2, size, dtype=dtype) for size in sizes)
    assert_same(run, dtype, "joined", first, h)
    assert torch.equal(run("joined", first, h)[..., : sizes[0]], first)


def test_they_move_what_they_must(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, scale = some(1, 4, 3072, dtype=torch.float16), some(1, 3072, dtype=torch.float16)
    h, heads, weight = some(4, 6144, dtype=torch.float16), some(1, 8, 4, 128, dtype=torch.float16), some(128).half()
    row, y = 2 * 3072, torch.empty_like(heads)
    calls = {
        "modulated": ((x, scale, scale, 1e-6, x, scale), 4 * x.nbytes + 3 * 4 * row),
        "modulated_gradient": ((x, x, x, scale, 1e-6, scale), 5 * x.nbytes + 2 * 4 * row),
        "gated_sum": ((x, x, scale), 3 * x.nbytes + 4 * row),
        "gated": ((h, "gelu"), 3 * h.nbytes // 2),
        "gated_gradient": ((x.view(4, 3072), h, "gelu"), 5 * h.nbytes // 2),
        "joined": ((x, x), 4 * x.nbytes),
        "turned_norm": ((heads, weight, turns(8, 128), 1e-6, y), 2 * heads.nbytes + 8 * 512 + 2 * 256),
    }
    for name, (args, needed) in calls.items():
        traffic = Traffic(monkeypatch)
        run(name, *args)
        assert traffic.size_bytes <= 1.05 * needed, name


ROWS = {"tokens", "rows", "heads", "blocks", "eps"}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "modulated": ("modulated_kernel", {"has_gate": 1, "has_norm": 1, "block": 4096}),
    "gradient": ("gradient_kernel", {"has_total": 1, "has_gate": 1, "block": 4096}),
    "norms of heads": ("norm_kernel", {"features": 128, "padded": 128, **block_kernels.HEADS}),
    "gradient of these": ("norm_gradient_kernel", {"features": 128, "padded": 128, **block_kernels.HEADS}),
    "gated": ("gated_kernel", {"kind": "gelu", **block_kernels.BLOCK}),
    "gradient of gated": ("gated_gradient_kernel", {"kind": "silu", **block_kernels.BLOCK}),
    "joined": ("joined_kernel", {**block_kernels.BLOCK}),
}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_they_compile_for_gpus(variant: str, capability: int) -> None:
    """With loads and stores of 16 bytes, or of 8 where features are fewer than threads, and in registers."""
    name, fixed = VARIANTS[variant]
    kernel = getattr(block_kernels, name)
    tensors = set(kernel.arg_names) - set(fixed) - ROWS - {"features", "before", "after"}
    tensors = {one for one in tensors if not re.search("_(sample|batch|token|head)$", one)}
    types = {**dict.fromkeys(tensors, "*bf16"), "table": "*fp32", "eps": "fp32"}
    launch = block_kernels._ROW_LAUNCH if fixed.get("block") == 4096 else block_kernels.LAUNCH
    found = compiled(block_kernels, fixed, types, ROWS, capability, kernel=kernel, options=launch)
    ptx = found.asm["ptx"]
    assert re.search(r"ld\.global\S*\.v[24]", ptx) and re.search(r"st\.global\S*\.v[24]", ptx)
    assert ".local" not in ptx and found.metadata.shared <= 16 * 1024
