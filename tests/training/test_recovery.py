"""Faults of a step in words; what is done about them in a run is in test_loop.py."""

from __future__ import annotations

import math

import pytest

from lorasmith.training.recovery import CompileFailed, Diverged


class WrappedError(Exception):
    def __init__(self, inner: Exception) -> None:
        super().__init__("backend raised:\nmuch advice")
        self.inner_exception = inner


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (WrappedError(WrappedError(RuntimeError("\n  no compiler was found.\nSet CXX"))), "no compiler was found"),
        (ValueError(""), "ValueError"),
        (OSError("c++ is missing"), "c++ is missing"),
    ],
)
def test_a_compilers_error_is_its_innermost_first_line(error: Exception, text: str) -> None:
    assert str(CompileFailed(error)) == text


def test_a_step_that_diverged_names_its_images_or_layers() -> None:
    fault = Diverged(33, 12.3456, ("a.png", "b.png"), updated=True)
    assert str(fault) == "the loss exploded to 12.3 at step 34 (images: a.png, b.png)"
    assert str(Diverged(0, math.nan, ("a.png",), False)) == "the loss became NaN or infinite at step 1 (images: a.png)"
    fault = Diverged(4, 0.5, (), updated=False, layers=("a.to_q",))
    assert str(fault) == "the gradient of a.to_q became NaN or infinite at step 5"
    many = Diverged(4, 0.5, (), updated=False, layers=("a", "b", "c"))
    assert str(many) == "the gradient of 3 layers, such as c, became NaN or infinite at step 5"
