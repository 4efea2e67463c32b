from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.runs.demo import demo_spec
from lorasmith.runs.preview_budget import whole_program


def test_it_trains_on_the_pictures_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = demo_spec(steps=3, seed=2, output=None, device=None).resolved()
    assert len(list(Path(spec.folder).glob("*.png"))) == 16
    assert (spec.name, spec.model, spec.config.steps, spec.config.seed) == ("high-contrast", "lorasmith-tiny", 3, 2)
    assert spec.output == "runs/demo-001"
    program = whole_program(spec.config)
    assert (len(program.prompts), program.strengths, [*program.steps]) == (8, (0.5, 1.0), [])
