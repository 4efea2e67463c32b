"""Training computes the same bits as at the commit that `compare` names; and the comparison sees what differs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.regression.cases import CASES, Outcome
from tests.regression.compare import BASE, compare, difference, has_commit

needs_base = pytest.mark.skipif(
    not has_commit(BASE), reason=f"needs commit {BASE} in the git history: this is a source archive or a shallow clone"
)
QUICK = ("lora",)


@needs_base
def test_quick_cases_compute_the_same_bits() -> None:
    assert compare(QUICK) == dict.fromkeys(QUICK, "")


@needs_base
@pytest.mark.slow
def test_all_cases_compute_the_same_bits() -> None:
    assert compare(tuple(CASES)) == dict.fromkeys(CASES, "")


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (torch.tensor([0.0, 1.5, torch.nan]), ""),
        (torch.tensor([-0.0, 1.5, torch.nan]), "1 of 3 values, largest difference 0"),
        (torch.tensor([0.0, 1.25, 3.0]), "2 of 3 values, largest difference nan"),
        (torch.tensor([0.0, 1.5, torch.nan], dtype=torch.bfloat16), "torch.bfloat16 (3,) now"),
        (torch.tensor([[0.0, 1.5, torch.nan]]), "torch.float32 (1, 3) now"),
    ],
)
def test_tensors_are_compared_by_their_bytes(now: Tensor, words: str) -> None:
    found = difference(Outcome([], {"a": torch.tensor([0.0, 1.5, torch.nan])}), Outcome([], {"a": now}))
    assert words in found
    assert bool(words) == bool(found)


def test_what_differs_is_named() -> None:
    before, nan = Outcome([1.0, 2.0], {"a": torch.ones(())}), float("nan")
    assert difference(before, Outcome([1.0, 2.5], before.tensors)) == "loss 2 of 2 was 2.0, is 2.5"
    assert difference(before, Outcome([1.0], before.tensors)) == "2 losses before, 1 now"
    assert difference(before, Outcome([1.0, 2.0], {"b": torch.ones(())})).startswith("2 tensors are on one side only")
    assert difference(Outcome([nan], {}), Outcome([nan], {})) == ""
