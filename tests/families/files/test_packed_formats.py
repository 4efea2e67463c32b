"""Packed formats: the numbers of the plain formulas and of comfy-kitchen, whole and in rows, in every dtype."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from pathlib import Path

import packed_files
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import seeded
from torch import Tensor

from lorasmith.core.quantization import Packed, tiled, tiled_size, untiled
from lorasmith.families.files.checkpoint import open_tensors
from lorasmith.families.files.packed_weights import PackedWeights

GOLDEN = Path(__file__).parents[2] / "golden" / "comfy_kitchen_weights.safetensors"
KITCHEN = ("fp8_e4m3", "int8", "int8_rows", "convrot_4", "convrot_16", "convrot_64", "convrot_256", "nvfp4", "mxfp8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BYTES = {"nvfp4": 0.5 + 1 / 16, "nvfp4 with factors": 0.5 + 1 / 16, "mxfp8": 1 + 1 / 32}
SIZES = ((160, 96), (12, 32), (258, 64))


def swapped(rows: Tensor) -> Tensor:
    return torch.cat(tuple(reversed(rows.chunk(2))))


CHOICES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": operator.itemgetter(slice(4, 11)),
    "first third": lambda rows: rows[: len(rows) // 3],
    "halves swapped": swapped,
}


@cache
def case(kind: str, size: tuple[int, int]) -> tuple[Packed, Tensor]:
    """A packed weight as it is read, and the plain one."""
    parts, meant = packed_files.pack(kind, seeded(kind, size, seed=0, std=0.05))
    read = PackedWeights("x", {f"a.{leaf}": tensor for leaf, tensor in parts.items()}, {}).read("a.weight")
    assert isinstance(read, Packed)
    return read, meant


def test_weights_are_those_of_comfy_kitchen() -> None:
    for layer in KITCHEN:
        file = open_tensors(GOLDEN)
        ((_, packed), (_, expected)) = file.read([f"{layer}.weight", f"expected.{layer}"])
        assert isinstance(packed, Packed)
        assert isinstance(expected, Tensor)
        assert file.shapes[f"{layer}.weight"] == packed.shape == expected.shape
        torch.testing.assert_close(packed.weight(), expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=150)
@given(
    st.sampled_from(list(packed_files.KINDS)),
    st.sampled_from(SIZES),
    st.lists(st.sampled_from(list(CHOICES)), max_size=2),
    st.sampled_from(DTYPES),
)
def test_rows_of_a_weight_are_packed_and_those_of_the_plain_one(
    kind: str, size: tuple[int, int], choices: list[str], dtype: torch.dtype
) -> None:
    packed, plain = case(kind, size)
    for choice in choices:
        if len(plain) < 12 or len(plain) % 2:
            break
        plain = CHOICES[choice](plain)
        cut = packed.of_rows(CHOICES[choice])
        assert isinstance(cut, Packed)
        packed = cut
    assert packed.shape == plain.shape
    whole = packed.weight()
    torch.testing.assert_close(whole, plain, rtol=1e-6, atol=1e-7)
    found = packed.to(torch.device("cpu"), dtype).weight()
    assert found.dtype == dtype
    assert torch.equal(found, whole.to(dtype)), "rounded once"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_unpacks_the_same_weight() -> None:
    for dtype in DTYPES:
        for kind in packed_files.KINDS:
            packed, _ = case(kind, (160, 96))
            here, there = (packed.to(torch.device(device), dtype).weight() for device in ("cpu", "cuda"))
            assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("kind", packed_files.KINDS)
def test_codes_and_scales_are_all_that_is_kept_and_unpacking_changes_none(kind: str) -> None:
    packed, plain = case(kind, (160, 96))
    scales = {"int8 by row": 160, "int8 with ConvRot": 160, "mxfp8": 0, "nvfp4 with factors": 97}.get(kind, 1)
    assert packed.size_bytes == BYTES.get(kind, 1) * plain.numel() + 4 * scales

    before = [tensor.clone() for tensor in packed.tensors]
    assert torch.equal(packed.weight(), packed.weight())
    for tensor, was in zip(packed.tensors, before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), was.view(torch.uint8))

    weight = seeded(kind, (160, 96), seed=0, std=0.05)
    assert (plain - weight).norm() < packed_files.ROUNDING[kind] * weight.norm()

    assert packed.format is not None
    assert packed.format.products == kind.partition(" ")[0]
    assert (packed.format.rotated_by is not None) == (kind == "int8 with ConvRot")


@given(st.integers(1, 300), st.integers(1, 9))
@settings(max_examples=30)
def test_tiles_hold_each_scale_once(rows: int, columns: int) -> None:
    size = tiled_size(rows, columns)
    places = untiled(torch.arange(size), rows, columns)
    assert places.shape == (rows, columns)
    assert len(places.unique()) == rows * columns
    assert int(places.max()) < size
    back = tiled(places.to(torch.uint8))
    assert torch.equal(untiled(back, rows, columns), places.to(torch.uint8)) and len(back) == size
    row = (rows - 1) % 128
    assert int(places[row, 0]) == 16 * (row % 32) + 4 * (row // 32)
