from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lorasmith.core.adapter_state import AdapterState
from lorasmith.families.model import Model
from lorasmith.runs import demo
from lorasmith.runs.demo import before_and_after, demo_spec
from lorasmith.training.events import Outcome
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult


def test_it_trains_on_the_pictures_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = demo_spec(steps=3, seed=2, output=None, device=None).resolved()
    assert len(list(Path(spec.folder).glob("*.png"))) == 16
    assert (spec.name, spec.model, spec.config.steps, spec.config.seed) == ("high-contrast", "lorasmith-tiny", 3, 2)
    assert spec.output == "runs/demo-001"


def test_a_row_for_each_strength_and_progress_over_all(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(denoiser: object, prompts: tuple[str, ...], *, seed: int, progress: object) -> list[Image.Image]:
        assert callable(progress)
        progress(5, 10)
        return [Image.new("RGB", (32, 32))] * len(prompts)

    monkeypatch.setattr(demo, "generate", drawn)
    result = TrainResult(Lora(AdapterState(), tiny.names), [0.5], 1, Outcome.FINISHED, folder=tmp_path)
    seen: list[tuple[int, int]] = []
    sheet = before_and_after(tiny, result, seed=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 30), (15, 30), (25, 30)]
    assert sheet == tmp_path / "before-and-after.png" and sheet.is_file()
