"""Runs on pairs of pictures that are opposites: doors, records, resuming, reproducing, and the strip of a slider."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorasmith.core.errors import OptionError
from lorasmith.data.data_config import ImageSource
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.runs.plan import plan
from lorasmith.runs.preview_budget import whole_program
from lorasmith.runs.recorded_run import Typed, read_run_file
from lorasmith.runs.run import run
from lorasmith.runs.run_page import previews_of
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.sweep_file import read_sweep
from lorasmith.runs.view import RunView
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Previewed
from tests.hosts import Audience


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of 64×64 and their opposites."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for place in ("high", "low"):
        (folder / place).mkdir()
        for name in "abc":
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / place / f"{name}.png")
    return folder


def asked(folder: Path, **settings: Any) -> RunSpec:
    quick = {"rank": 2, "targets": "*.attn2.to_q", "steps": 3, "previews": "", "resolution": 64, "trigger": "a lion"}
    return RunSpec(
        sources=(ImageSource(str(folder / "high")),),
        model=BUILT_IN,
        name="cat",
        settings={**quick, "control": (str(folder / "low"),), "pairs": "slider", **settings},
    )


def test_pairs_choose_opposites_at_every_door(pairs: Path, tiny: Model) -> None:
    spec = asked(pairs).resolved()
    assert spec.data.controls == "opposite"
    command = spec.command()
    assert command[command.index("--pairs") + 1] == "slider" and command[command.index("--controls") + 1] == "opposite"
    assert RunSpec.from_record(spec.to_record(), {"pairs": "slider"}).resolved().data == spec.data
    file = pairs / "run.toml"
    file.write_text(f'model = "{BUILT_IN}"\nsources = "high"\ncontrol = "low"\npairs = "dpo"\n')
    assert read_run_file(file, Typed(spec=RunSpec())).resolved().data.controls == "opposite"
    head = f'model = "{BUILT_IN}"\nsources = "high"\ncontrol = "low"\n'
    (pairs / "sweep.toml").write_text(f'{head}[grid]\npairs = ["slider", "dpo"]\n')
    found = read_sweep(pairs / "sweep.toml").runs.values()
    assert [(one.config.pairs, one.data.controls) for one in found] == [("slider", "opposite"), ("dpo", "opposite")]
    inside = pairs / "inside"
    (inside / "control").mkdir(parents=True)
    for name in "abc":
        (inside / f"{name}.png").write_bytes((pairs / "high" / f"{name}.png").read_bytes())
        (inside / "control" / f"{name}.png").write_bytes((pairs / "low" / f"{name}.png").read_bytes())
    assert train(tiny, inside, pairs="dpo", steps=1, rank=2, targets="*.attn2.to_q", progress=False).losses


@pytest.mark.parametrize("settings", [{"controls": "none", "control": ()}, {"pairs": "none", "controls": "opposite"}])
def test_pairs_and_opposites_are_chosen_together(pairs: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"pairs and controls opposite belong together, got pairs \w+ and controls"):
        asked(pairs, **settings).resolved()


def test_a_slider_is_drawn_as_a_strip(pairs: Path, tmp_path: Path) -> None:
    audience = Audience()
    drawn = {"previews": "a lion", "preview_every": 1, "preview_steps": 1, "steps": 2}
    result = run(plan(replace(asked(pairs, **drawn), output=str(tmp_path / "run")), audience), audience)
    assert result.folder is not None
    events = [one for one in audience.events if isinstance(one, Previewed)]
    assert [(one.step, one.strength) for one in events] == [
        (0, 0.0), (1, 1.0), (1, -2.0), (1, -1.0), (1, 2.0), (2, 1.0), (2, -2.0), (2, -1.0), (2, 2.0),
    ]  # fmt: skip
    names = {one.name for one in (result.folder / "samples").iterdir()}
    assert {"step-000001-at--2-1.png", "strength--2-1.png", "strengths.png"} <= names
    assert len({path for one in events for path in one.paths}) == len(events)
    table, over_time = previews_of(result.folder, RunView.of(events))
    assert table is not None and over_time is not None
    labels = ["LoRA at -2", "LoRA at -1", "base model", "LoRA at 1", "LoRA at 2"]
    assert [label for label, _ in table.rows] == labels
    assert [label for label, _ in over_time.rows] == ["base model", "step 1", "step 2"]
    assert over_time.about == "Pictures by step and prompt, with the LoRA at 1"
    assert whole_program(TrainConfig()).is_strip is False


@pytest.mark.parametrize("name", ["slider", "slider_pairs"])
def test_the_examples_are_sliders(name: str) -> None:
    file = Path(__file__).parents[2] / "examples" / f"{name}.toml"
    spec = read_run_file(file, Typed(spec=RunSpec())).resolved()
    assert spec.config.consequences().is_slider and spec.config.rank == 8
    assert spec.data.controls == ("opposite" if name == "slider_pairs" else "required")
