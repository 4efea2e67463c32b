"""`lorasmith evaluate` on a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran


@pytest.mark.slow
def test_a_run_is_evaluated(
    lorasmith: Callable[..., Ran], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASMITH_CACHE_DIR", str(tmp_path / "cache"))
    trained = lorasmith(
        "train", photos, "--model", "lorasmith-tiny", "--trigger", "sks dog", "--steps", 2, "--save-every", 1,
        "--no-previews", "--output", "run",
    )  # fmt: skip
    assert trained.code == 0
    ran = lorasmith("evaluate", "run", "--model", "lorasmith-tiny", "--steps", 1, "--json")
    found = json.loads(ran.out)
    assert ran.code == 0 and found["folder"] == str(Path("run", "evaluation"))
    assert found["prompts"][5] == "sks dog, noto style", "wishes that the built-in model knows"
    assert found["training"]["count"] > 0, "the pictures are those of the run"
    assert [one["step"] for one in found["loras"]] == [1, 2]
    page = Path("run/evaluation/evaluation.html").read_text()
    assert found["sentence"] in page
    shown = lorasmith("report", "run")
    report = Path("run/report.html").read_text()
    assert shown.code == 0 and found["sentence"] in report and 'href="evaluation/evaluation.html"' in report
    assert lorasmith("evaluate", "run", "--model", "lorasmith-tiny", "--steps", 1).out.count(found["sentence"]) == 1
