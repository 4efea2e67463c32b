"""A recipe in a run: its record holds what came out, from which the run is repeated without the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.data_config import ImageSource
from lorasmith.families.locating import BUILT_IN
from lorasmith.runs.plan import plan
from lorasmith.runs.presets import Rule
from lorasmith.runs.recorded_run import read_run_file
from lorasmith.runs.run import Host, run
from lorasmith.runs.spec import RunSpec


def test_the_record_of_a_run_holds_what_its_recipe_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = (
        Rule(settings={"timesteps": "shifted", "timestep_shift": 3.0}, model=BUILT_IN, images="few"),
        Rule(settings={"flip": True}, kind="subject"),  # of the data
    )
    monkeypatch.setattr("lorasmith.runs.presets.RECIPE", rules)
    spec = RunSpec(
        sources=(ImageSource(str(BUILT_IN_BASE / "input" / "fox")),),
        model=BUILT_IN,
        output=str(tmp_path / "run"),
        preset="quick",
        settings={"trigger": "sks dog", "steps": 1, "rank": 2, "previews": ""},
    )
    planned = plan(spec, Host())
    assert "Recipe quick for a subject" in planned.job.notes[0]
    run(planned, Host())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["source"]["preset"], record["source"]["kind"], record["source"]["flip"]) == (
        "quick",
        "subject",
        True,
    )
    assert (record["asked"]["timestep_shift"], record["asked"]["rank"]) == (3.0, 2)
    monkeypatch.setattr("lorasmith.runs.presets.RECIPE", (Rule(settings={"min_snr_gamma": 4.0}),))  # a later version's
    again = plan(replace(read_run_file(tmp_path / "run" / "run.json"), output=str(tmp_path / "again")), Host())
    assert again.job.requested == planned.job.requested and again.spec.data == planned.spec.data
    assert "--preset none" in " ".join(again.spec.command())
