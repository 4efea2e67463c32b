"""Texts of data sets are ComfyUI's, and bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dataset_cases import TEXT_CASES
from safetensors import safe_open

from lorasmith.core.errors import OptionError

GOLDEN = Path(__file__).parents[1] / "golden" / "comfyui_dataset_nodes.safetensors"


@pytest.mark.parametrize("case", range(len(TEXT_CASES)), ids=lambda case: f"{case}-{TEXT_CASES[case][0]}")
def test_texts_are_comfyuis(bench: Any, case: int) -> None:
    node, inputs = TEXT_CASES[case]
    with safe_open(GOLDEN, "pt") as file:
        assert bench.one(node, **inputs) == json.loads(file.metadata()["texts"])[case]


def test_each_text_of_a_list_is_changed(bench: Any) -> None:
    assert bench.call("AddTextPrefix", lists={"texts": ["a", "b"]}, prefix="sks ").outputs == (("sks a", "sks b"),)
    assert bench.call("MergeTextLists", lists={"texts": ["a", "b"]}).outputs == (("a", "b"),)


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("AddTextPrefix", {"texts": "a" * 600_000, "prefix": "b" * 600_000}),
        ("AddTextSuffix", {"texts": "a" * 600_000, "suffix": "b" * 600_000}),
        ("ReplaceText", {"texts": "a" * 2000, "find": "a", "replace": "b" * 2000}),
        ("ReplaceText", {"texts": "a" * 2000, "find": "", "replace": "b" * 2000}),
    ],
)
def test_no_text_grows_without_bound(bench: Any, node: str, inputs: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=r"a text must have at most 1,000,000 characters"):
        bench.call(node, **inputs)
