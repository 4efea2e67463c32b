from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.runs.demo import demo_spec
from lorasmith.runs.plan import plan
from lorasmith.runs.reproduce import plan_again
from lorasmith.runs.run import Host, run
from lorasmith.runs.run_previews import whole_program
from tests.hosts import Audience
from tests.runs.folder_cases import CONFIRMED


def test_it_trains_on_the_pictures_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = demo_spec(steps=3, seed=2, output=None, device=None).resolved()
    assert len(list(Path(spec.folder).glob("*.png"))) == 16
    assert (spec.name, spec.model, spec.config.steps, spec.config.seed) == ("high-contrast", "lorasmith-tiny", 3, 2)
    assert spec.output == "runs/demo-001"
    program = whole_program(spec.config)
    assert (len(program.prompts), program.strengths, [*program.steps]) == (8, (0.5, 1.0), [])


@pytest.mark.slow
def test_a_stopped_demo_has_its_pictures_when_it_is_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    spec = demo_spec(steps=2, seed=1, output=folder, device="cpu")
    small = spec.with_settings(previews="a lion|a robot", preview_steps=1, batch_size=1, rank=1, targets="*.attn2.to_q")
    host = Audience(stop_at=1)
    run(plan(small.resolved(), host), host)
    sheet = folder / "samples" / "strengths.png"
    assert not sheet.exists()
    run(plan_again(folder, Host(), CONFIRMED), Host())
    assert sheet.is_file()
