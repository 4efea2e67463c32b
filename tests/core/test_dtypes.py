"""Names of number formats."""

from __future__ import annotations

import pytest
import torch

from lorasmith.core.errors import OptionError
from lorasmith.core.placement import chosen_dtype, dtype_from_name, dtype_name


def test_names_and_long_names_are_read_in_any_case() -> None:
    for name, dtype in [
        ("fp32", torch.float32),
        ("BF16", torch.bfloat16),
        ("fp16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("Float16", torch.float16),
    ]:
        assert dtype_from_name(name) == dtype


def test_short_names_go_there_and_back() -> None:
    for name in ["fp32", "bf16", "fp16"]:
        assert dtype_name(dtype_from_name(name)) == name


def test_other_dtypes_keep_torchs_name() -> None:
    assert dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(OptionError, match=r"^a dtype is one of fp32, bf16, fp16, got 'fp8'$"):
        dtype_from_name("fp8")


def test_none_keeps_the_format_of_the_model() -> None:
    model = torch.nn.Linear(2, 2, dtype=torch.float16)
    assert chosen_dtype("none", model) == torch.float16
    assert chosen_dtype("bf16", model) == torch.bfloat16
