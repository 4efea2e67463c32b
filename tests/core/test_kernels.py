"""A kernel stands for a function of torch where it runs and is right."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.core import kernels
from lorasmith.core.kernels import kernel_or


def doubled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x, (2 * y).to(torch.int8)


def near(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x + 1e-3, (2 * y).to(torch.int8)


def wrong(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x, (2 * y + (y > 1)).to(torch.int8)


def broken(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no driver")


def missing() -> Any:
    raise ImportError("no Triton")


def without_compiler(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


def without_headers(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    raise subprocess.CalledProcessError(1, ["gcc", "main.c"])


def on_such_a_mount(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    raise ImportError("/tmp/triton/launcher.so: failed to map segment from shared object")


def not_writable(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    raise PermissionError(13, "Permission denied", "/.triton")


@pytest.fixture(autouse=True)
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(kernels, "_REFUSALS", found)
    return found


TRIALS = [(torch.ones(2), torch.ones(3)), (torch.zeros(2), 2 * torch.ones(3))]


@pytest.mark.parametrize(
    ("load", "tolerance", "reason"),
    [
        (lambda: near, 0.0, "its numbers are not torch's"),
        (lambda: near, 1e-2, ""),
        (lambda: wrong, 1e-2, "its numbers are not torch's"),
        (lambda: broken, 1.0, r"RuntimeError \(no driver\)"),
        (lambda: without_compiler, 1.0, "install them .gcc and python3-dev"),
        (lambda: without_headers, 1.0, "install them .gcc and python3-dev"),
        (lambda: on_such_a_mount, 1.0, r"may be written and executed, but fails .*; set TRITON_CACHE_DIR"),
        (lambda: not_writable, 1.0, r"may be written and executed, but fails .*; set TRITON_CACHE_DIR"),
        (missing, 1.0, r"ImportError \(no Triton\)"),
    ],
    ids=["near", "near enough", "wrong in one trial", "broken", "compiler", "headers", "mount", "folder", "missing"],
)
def test_what_runs_and_is_right_is_taken_and_else_the_reason_is_said(
    load: Callable[[], Any], tolerance: float, reason: str, refusals: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    found = kernel_or("doubling", doubled, load, TRIALS, tolerance=tolerance)
    assert found.run is (doubled if reason else near)
    assert refusals == ([found.refusal] if reason else [])
    assert re.search(f"kernel for doubling is not used.*{reason}" if reason else "^$", found.refusal)


def test_without_triton_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert "install triton" in kernel_or("doubling", doubled, missing, TRIALS).refusal


@pytest.mark.parametrize(
    "text", ["CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA error: an illegal memory access"]
)
def test_a_device_without_memory_or_that_is_lost_says_nothing_of_a_kernel(text: str, refusals: list[str]) -> None:
    def tried(x: Tensor, y: Tensor) -> None:
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=re.escape(text)):
        kernel_or("doubling", doubled, lambda: tried, TRIALS)
    assert not refusals


def test_another_function_may_say_what_is_right() -> None:
    assert kernel_or("doubling", wrong, lambda: doubled, TRIALS).run is wrong
    assert kernel_or("doubling", wrong, lambda: doubled, TRIALS, expected=doubled).run is doubled


def test_the_image_keeps_compiled_code_where_it_may_be_executed() -> None:
    """Containers mount /tmp without execution, and the root file system may be read-only."""
    text = (Path(__file__).parents[2] / "Dockerfile").read_text(encoding="utf-8")
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert re.search(rf"^ +{name}=/data/\S+ \\$", text, flags=re.MULTILINE), name
