"""Packed weights: how near they come, what they take, and that they agree with other programs' numbers."""

from __future__ import annotations

from collections.abc import Callable

import packed_files
import pytest
import torch
from torch import Tensor, nn

from lorasmith.core.quantization import BLOCK, FP8_CODES, NF4_LEVELS, PACKINGS, packed, scaled_at_once
from tests.cuda.arithmetic import CudaDivision

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(96, 80),
    "odd linear": lambda: nn.Linear(33, 5),
    "conv 1x1": lambda: nn.Conv2d(24, 32, 1),
    "conv 3x3 stride 2": lambda: nn.Conv2d(32, 48, 3, stride=2),
    "conv in groups": lambda: nn.Conv2d(64, 32, 3, groups=4),
}
# Largest error as a share of the largest number that the scale is for: half the widest gap between two codes.
ERROR = {
    "none": 0.0,
    "int8": 0.5 / 127,
    "int8_convrot": 8 / 127,  # sums of the errors of 16 numbers, divided by 4, of rows that are up to 4 times as large
    "fp8_e4m3": 16 / 448,
    "fp8_e5m2": 4096 / 57344,
    "fp8_e4m3_tensor": 16 / 448,
    "fp8_e5m2_tensor": 4096 / 57344,
    "mxfp8": 32 / 448,  # of a block's largest number, whose scale is up to twice the least one
    "nf4": 0.152,
    "nvfp4": 1 / 6 * (1 + 1 / 16),
}
# Kinds with one scale for the whole weight, whose other numbers are only as good as codes near zero.
BY_TENSOR = {kind for kind in PACKINGS if kind.endswith("_tensor")}
FOUR_BITS = ("nf4", "nvfp4")
BYTES = {kind: 0.5 if kind in FOUR_BITS else 1.0 for kind in PACKINGS if kind != "none"}


def weight_of(layer: str, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weight = LAYERS[layer]().get_parameter("weight").detach()
    return weight.to(memory_format=memory_format) if weight.ndim == 4 else weight


def test_a_weight_comes_back_within_half_a_step() -> None:
    for layout in [torch.contiguous_format, torch.channels_last]:
        for layer in LAYERS:
            for kind in PACKINGS:
                weight = weight_of(layer, layout)
                back = packed(weight, kind, torch.float32).weight()

                assert back.stride() == weight.stride()
                by_row = kind not in FOUR_BITS and kind not in BY_TENSOR
                largest = (
                    weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) if by_row else weight.abs().max()
                )
                assert ((back - weight).abs() <= ERROR[kind] * largest * (1 + 1e-5)).all()
                assert kind == "none" or not torch.equal(back, weight)


def test_codes_and_scales_are_all_that_is_kept() -> None:
    for kind in BYTES:
        weight = weight_of("conv 3x3 stride 2")
        scales = weight.numel() // BLOCK if kind in FOUR_BITS else 1 if kind in BY_TENSOR else len(weight)
        assert packed(weight, kind, torch.float32).size_bytes == BYTES[kind] * weight.numel() + 4 * scales


def test_products_in_half_precision_see_the_numbers_rounded_once() -> None:
    for kind in PACKINGS:
        for dtype in [torch.bfloat16, torch.float16]:
            weight = weight_of("linear")
            half = packed(weight, kind, dtype).weight()
            assert half.dtype == dtype
            assert torch.equal(half, packed(weight, kind, torch.float32).weight().to(dtype))


def test_zeros_stay_zeros_and_the_largest_number_of_a_row_stays_exact() -> None:
    for kind in PACKINGS:
        weight = torch.zeros(3, 128)
        weight[1, 5], weight[2, 70] = 2.0, -0.375
        rtol = 0.125 if kind in BY_TENSOR else 1e-6
        torch.testing.assert_close(packed(weight, kind, torch.float32).weight(), weight, rtol=rtol, atol=0)


def test_a_gpu_packs_the_same_codes() -> None:
    for kind in PACKINGS:
        weight = torch.randn(96, 1024, generator=torch.Generator().manual_seed(0))
        here = packed(weight, kind, torch.float32)
        with CudaDivision():
            there = packed(weight, kind, torch.float32)
            unpacked = there.weight()
        assert all(map(torch.equal, _bits(there.tensors), _bits(here.tensors)))
        assert torch.equal(unpacked, here.weight())


def _bits(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [one.view(torch.uint8) for one in tensors]


def test_packing_again_changes_nothing() -> None:
    for kind in PACKINGS:
        once = packed(weight_of("linear"), kind, torch.float32).weight()
        torch.testing.assert_close(packed(once, kind, torch.float32).weight(), once, rtol=1e-6, atol=0)


def test_nf4_levels_are_the_papers_quantiles() -> None:
    """Appendix E: evenly spaced quantiles of each half of a normal distribution, cut off alike at both ends."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantile = torch.special.ndtri
    above = quantile(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -quantile(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((above, below, torch.zeros(1))).sort().values
    torch.testing.assert_close(torch.tensor(NF4_LEVELS).double(), levels / levels.max(), rtol=0, atol=1e-6)


def test_nf4_takes_the_nearest_level_of_each_block() -> None:
    weight = weight_of("linear")
    blocks = weight.view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS)
    nearest = levels[(blocks[..., None] / scale[..., None] - levels).abs().argmin(-1)] * scale
    torch.testing.assert_close(packed(weight, "nf4", torch.float32).weight(), nearest.view_as(weight), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_blocks_are_those_of_the_formula(kind: str) -> None:
    """By the nearest of all codes, row by row."""
    weight = weight_of("linear")
    found = packed(weight, kind, torch.float32)
    torch.testing.assert_close(found.weight(), packed_files.rounded(kind, weight), rtol=1e-6, atol=0)
    size = {"mxfp8": 1 + 1 / 32, "nvfp4": 0.5 + 1 / 16 + 4 / weight.shape[1]}[kind]
    assert found.size_bytes == size * weight.numel()


def test_halves_are_rounded_to_even_codes_in_nvfp4() -> None:
    halves, even = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    weight, expected = (torch.tensor([[*row, *(-one for one in row)]]) * 448 for row in (halves, even))
    assert torch.equal(packed(weight, "nvfp4", torch.float32).weight(), expected)


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(64, 2 * BLOCK, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    ours = packed(weight, "nf4", torch.float32)
    assert torch.equal(ours.tensors[0], codes.flatten())
    # Its dequantization on the CPU takes rows for whole blocks, so that they have to be here.
    assert torch.equal(ours.weight(), functional.dequantize_4bit(codes, state))


def test_int8_is_that_of_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(96, 80))
    weight = layer[0].weight.detach().clone()
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    theirs = layer[0].weight.dequantize()
    # Their scale divides by 127.5, so that codes reach from −128 to 127.
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((packed(weight, "int8", torch.float32).weight() - theirs).abs() <= step).all()


def test_scales_are_multiplied_without_fp32_tensors_to_the_same_bits() -> None:
    """All 256 codes, with scales over many magnitudes, in each layout of a weight."""
    for dtype in [torch.bfloat16, torch.float16, torch.float32]:
        for code in [torch.int8, *FP8_CODES]:
            generator = torch.Generator().manual_seed(0)
            scale = torch.exp(4 * torch.randn(64, 1, generator=generator))
            linear = torch.arange(256, dtype=torch.uint8).view(code).expand(64, 256).contiguous()
            kernel = linear.view(64, 16, 4, 4).contiguous(memory_format=torch.channels_last)
            for codes, factor in ((linear, scale), (kernel, scale.view(64, 1, 1, 1)), (linear, scale[:1])):
                expected = codes.float().mul_(factor).to(dtype)
                found = scaled_at_once(codes, factor, dtype)
                assert found.dtype == dtype and found.stride() == expected.stride()
                assert torch.equal(found.isnan(), expected.isnan())
                assert torch.equal(found.nan_to_num(), expected.nan_to_num())
