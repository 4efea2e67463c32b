"""Factors are multiplied in without rounding. What algorithms declare is tested over all of them (tests/adapters)."""

from __future__ import annotations

import pytest
import torch

from lorasmith.core.adapter_state import multiplied


@pytest.mark.parametrize(("factor", "dtype"), [(1.0, torch.bfloat16), (0.25, torch.bfloat16), (3.1, torch.float32)])
def test_a_product_has_a_dtype_that_holds_it(factor: float, dtype: torch.dtype) -> None:
    tensor = torch.tensor([1.0, 0.3, -7.0]).bfloat16()
    product = multiplied(tensor, factor)
    assert product.dtype == dtype
    assert torch.equal(product.float(), tensor.float() * factor)
