"""A kernel stands for a function of torch where it runs and is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.core.kernels import kernel_or


def doubled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x, (2 * y).to(torch.int8)


def near(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x + 1e-3, (2 * y).to(torch.int8)


def wrong(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x, (2 * y + (y > 1)).to(torch.int8)


def broken(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no compiler")


def missing() -> Any:
    raise ImportError("no Triton")


TRIALS = [(torch.ones(2), torch.ones(3)), (torch.zeros(2), 2 * torch.ones(3))]


@pytest.mark.parametrize(
    ("load", "tolerance", "is_taken"),
    [
        (lambda: near, 0.0, False),
        (lambda: near, 1e-2, True),
        (lambda: wrong, 1e-2, False),
        (lambda: broken, 1.0, False),
        (missing, 1.0, False),
    ],
    ids=["near", "near enough", "wrong in one trial", "broken", "missing"],
)
def test_what_runs_and_is_right_is_taken(load: Callable[[], Any], tolerance: float, is_taken: bool) -> None:
    found = kernel_or(doubled, load, TRIALS, tolerance=tolerance)
    assert found is (near if is_taken else doubled)


def test_another_function_may_say_what_is_right() -> None:
    assert kernel_or(wrong, lambda: doubled, TRIALS) is wrong
    assert kernel_or(wrong, lambda: doubled, TRIALS, expected=doubled) is doubled
