"""Events as JSON that a browser reads."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lorasmith.core.folders import ASSETS
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import scan_folder
from lorasmith.runs.run_plan import ImageEncoded, ImagesFound, ModelLoading
from lorasmith.server.job_reporter import PROGRESS, event_json, finite
from lorasmith.training.events import KINDS, Outcome, RunFinished, StepDone


def test_training_events_are_as_in_the_log_but_for_numbers_that_json_lacks() -> None:
    found = event_json(StepDone(at=1.0, step=3, loss=math.nan, grad_norm=math.inf, draws=((0, 0.5, -math.inf),)))
    assert found["event"] == "StepDone" and found["loss"] is None and found["grad_norm"] is None
    assert found["draws"] == [[0, 0.5, None]] and found["step"] == 3 and found["at"] == 1.0
    assert event_json(RunFinished(step=3, reason=Outcome.FAILED))["reason"] == "failed"
    assert finite({"a": [1, "x", None, (math.nan,)]}) == {"a": [1, "x", None, [None]]}


def test_events_of_preparation_are_summaries() -> None:
    scan = scan_folder(ASSETS / "input" / "fox", DataConfig())
    found = event_json(ImagesFound(folder=Path("fox"), scan=scan, trigger=""))
    assert (found["images"], found["folder"], found["skipped_count"]) == (6, "fox", 0)
    assert "6 of 6 images" in found["captions"]
    assert len(json.dumps(found)) < 2000
    assert event_json(ModelLoading(model="m"))["model"] == "m"
    done = event_json(ImageEncoded(done=1, total=2, cached=1))
    assert (done["event"], done["done"], done["total"], done["cached"]) == ("ImageEncoded", 1, 2, 1)


def test_progress_are_events_of_these_names() -> None:
    assert {"StepDone", "Drawing", "CaptionEncoded"} == PROGRESS & KINDS.keys()
    assert {"ImageEncoded", "ClassImageDrawn", "EncodersHashed"} == PROGRESS - KINDS.keys()
