"""Tensors of files into adapters: copies, and what is refused."""

from __future__ import annotations

import pytest
import torch

from lorasmith.adapters.adapter import taken
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError


def test_tensors_are_taken_as_copies_in_single_precision() -> None:
    given = {"a": torch.ones(2, 2), "b": torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)}
    found = taken(AdapterWeights("kind", given), ["a"], ("b", "c"))

    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys("ab", torch.float32)
    assert not found["b"].requires_grad
    assert found["a"].data_ptr() != given["a"].data_ptr()


@pytest.mark.parametrize(("names", "has"), [("", "nothing"), ("a", "a"), ("abd", "a, b, d")])
def test_missing_and_foreign_tensors_are_refused(names: str, has: str) -> None:
    with pytest.raises(LoraError) as caught:
        taken(AdapterWeights("kind", dict.fromkeys(names, torch.ones(2, 2))), ["a", "b"], ("c",))

    assert str(caught.value) == (
        f"an adapter of the kind kind needs a, b, and may have c; this one has {has}; get a complete file"
    )


@pytest.mark.parametrize("shape", [(), (3,), (0, 3)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LoraError, match=r"^a of an adapter of the kind kind must be a matrix, got shape "):
        taken(AdapterWeights("kind", {"a": torch.ones(shape)}), ["a"])
