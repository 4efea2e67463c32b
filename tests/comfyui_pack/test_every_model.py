"""The table of ComfyUI's models in docs/comfyui-pack.md is that of the record, and the record says what was found."""

from __future__ import annotations

import json
from typing import Any

import pytest

every_model: Any = pytest.importorskip("every_model", reason="the pack is not part of a source distribution")
MODELS: dict[str, dict[str, Any]] = json.loads(every_model.RECORD.read_text(encoding="utf-8"))["models"]


def test_the_page_has_the_recorded_table() -> None:
    record = json.loads(every_model.RECORD.read_text(encoding="utf-8"))
    page = every_model.PAGE.read_text(encoding="utf-8")
    assert page == every_model.page(record), "run comfyui-lorasmith/proof/prove.py CHECKOUT --models"
    assert all(f"\n| `{title}` | " in page for title in MODELS)


def test_at_least_thirty_models_are_proven_and_none_fails() -> None:
    assert sum(map(every_model.is_proven, MODELS.values())) >= 30
    for title, row in MODELS.items():
        assert not every_model.failed(row), (title, row)
        assert {"gradient", "built-in fails", "sentence"} & row.keys(), title
        assert "sentence" in row or row["resumed"], title


def test_a_row_beyond_a_limit_is_not_called_proven() -> None:
    row = next(row for row in MODELS.values() if every_model.is_proven(row))
    for changed in ({"gradient": 1e-3}, {"left out": 1}, {"same bits": False}, {"resumed": False}):
        assert not every_model.is_proven({**row, **changed})
        assert "proven" not in every_model.page({"models": {"Odd": {**row, **changed}}}).partition("`Odd`")[2][:40]
