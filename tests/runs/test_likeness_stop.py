"""A run that ends by the likeness of its previews, with measures that are made up; and one with those of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.encoding import load_dataset
from lorasmith.evaluation import likeness
from lorasmith.evaluation.recognition import Recogniser
from lorasmith.families.model import Model
from lorasmith.formats.metadata import sha256_body
from lorasmith.runs import preview_budget
from lorasmith.runs.library import train
from lorasmith.runs.preview_likeness import PreviewLikeness
from lorasmith.runs.view import RunView
from lorasmith.training.events import Event, LikenessMeasured, Outcome, Warned
from lorasmith.training.results import TrainResult

STORY = {1: (0.5, 0.9), 2: (0.6, 0.8), 3: (0.6, 0.5), 4: (0.58, 0.4), 5: (0.6, 0.3)}
"""Likeness and adherence by step: the second one is the best."""


def coloured(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, 255 - shade, 90))


def by_colour(pictures: Sequence[Image.Image]) -> Tensor:
    """Features of length 1: the mean colour, less the middle one."""
    means = [np.asarray(one.convert("RGB"), np.float32).mean((0, 1)) for one in pictures]
    return F.normalize(torch.from_numpy(np.stack(means)) - 128, dim=1)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, previews_measured: None) -> None:
    """Previews measure as in `STORY`."""

    def measured(self: PreviewLikeness, step: int, *_: object) -> LikenessMeasured:
        alike, follows = STORY.get(step, (0.6, 0.3))
        return LikenessMeasured(step=step, likeness=alike, own=0.7, adherence=follows, score=alike * follows)

    monkeypatch.setattr(PreviewLikeness, "measured", measured)
    monkeypatch.setattr(likeness, "features", by_colour)


def go(tiny: Model, folder: Path, **changed: Any) -> TrainResult:
    data = load_dataset(BUILT_IN_BASE / "input" / "fox", tiny)
    settings: dict[str, Any] = {
        "steps": 8, "rank": 2, "targets": "*.attn2.to_q", "training_dtype": "fp32", "lora_dtype": "fp32", "seed": 3,
        "trigger": "sks fox", "preview_every": 1, "preview_steps": 1, "preview_strengths": "1", "title": "fox",
        "early_stop": "likeness", "validation_share": 0.0, "save_state_every": 1, "learning_rate": 1e-3,
    }  # fmt: skip
    return train(tiny, data, output=folder, **(settings | changed))


@pytest.mark.slow
def test_it_stops_with_the_best_lora_and_resumes_to_the_bit(told: None, tiny: Model, tmp_path: Path) -> None:
    seen: list[Event] = []
    whole = go(tiny, tmp_path / "whole", on_event=seen.append)
    assert (whole.reason, whole.best_step, whole.steps, len(whole.losses)) == (Outcome.STOPPED, 2, 2, 4)
    assert whole.path is not None
    view = RunView.of(seen)
    assert [one.step for one in view.likenesses] == [1, 2, 3, 4]
    assert view.to_json()["likenesses"][1] == {"step": 2, "likeness": 0.6, "own": 0.7, "adherence": 0.8}
    assert "likeness 0.60, prompts followed 0.80" in view.line  # of the LoRA that was kept, which is drawn at last

    # Cancelled after a step whose preview follows its run state.
    for until in (2, 3):
        folder, heard = tmp_path / f"cancelled-{until}", list[Event]()
        part = go(tiny, folder, on_event=heard.append, cancelled=lambda heard=heard, until=until: any(
            isinstance(one, LikenessMeasured) and one.step == until for one in heard
        ))  # fmt: skip
        assert (part.reason, len(part.losses)) == (Outcome.CANCELLED, until)
        rest = go(tiny, folder)
        assert (rest.reason, rest.best_step, rest.losses) == (whole.reason, 2, whole.losses)
        assert rest.path is not None and sha256_body(rest.path) == sha256_body(whole.path)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"previews": ""}, "needs previews, which are turned off"),
        ({"slider_positive": "a red fox", "slider_negative": "a blue fox"}, "which a slider or preference has not"),
        ({"trigger": None}, "needs a prompt to draw, got neither a trigger nor previews"),
    ],
)
def test_what_it_cannot_work_with_is_refused(
    told: None, tiny: Model, tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    with pytest.raises(OptionError, match=reason):
        go(tiny, tmp_path, **changed)


def test_auto_stops_by_likeness_where_its_pictures_fit(
    told: None, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    share = preview_budget._STOP_SHARE
    monkeypatch.setattr(preview_budget, "_STOP_SHARE", 100.0)
    result = go(tiny, tmp_path / "drawn", early_stop="auto", on_event=events.append)
    assert (result.reason, result.best_step, result.steps) == (Outcome.STOPPED, 2, 2)
    said = " ".join(one.message for one in events if isinstance(one, Warned))
    assert "It took 4 of 8 steps, which saves about" in said
    assert [path.name for path in sorted((tmp_path / "drawn").glob("fox-step*"))] == [
        f"fox-step{step:08}.safetensors" for step in (1, 2, 3, 4)
    ]  # kept, for an evaluation
    again = go(tiny, tmp_path / "likeness", early_stop="likeness")
    assert result.path is not None and again.path is not None and sha256_body(result.path) == sha256_body(again.path)
    monkeypatch.setattr(preview_budget, "_STOP_SHARE", share)
    short: list[Event] = []
    go(tiny, tmp_path / "short", early_stop="auto", on_event=short.append, cancelled=lambda: True)
    assert "a quarter of this run" in " ".join(one.message for one in short if isinstance(one, Warned))


def test_without_the_extra_it_is_refused(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeness, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"early_stop likeness needs the package .* pip install"):
        go(tiny, tmp_path)
    assert go(tiny, tmp_path, early_stop="auto").reason is Outcome.FINISHED


def test_measures_are_those_of_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeness, "features", by_colour)
    trained = [coloured(200), coloured(180)]
    watch = PreviewLikeness(trained, Recogniser(), ("on a beach", "at night"))
    base = [coloured(20), coloured(90), coloured(10)]
    images = by_colour(trained)
    own = float(images[0] @ images[1])
    found = watch.measured(7, [coloured(190), *base[1:]], base)
    assert found.step == 7 and found.own == pytest.approx(own)
    assert found.likeness == pytest.approx(float((by_colour([coloured(190)]) @ images.T).mean()))
    assert found.adherence == pytest.approx(1.0)
    assert found.score == pytest.approx(1.0, abs=1e-3)  # it looks like the images and follows the wishes
    same = watch.measured(8, base, base)
    assert (same.score, same.adherence) == (0.0, pytest.approx(1.0))
    away = watch.measured(9, [base[0], base[2], base[1]], base)
    assert away.adherence == pytest.approx(0.0, abs=0.1)


@pytest.mark.slow
def test_a_real_run_is_stopped_before_its_end(previews_measured: None, tiny: Model, tmp_path: Path) -> None:
    data = load_dataset([(path, "sks lion") for path in sorted((BUILT_IN_BASE / "input" / "fox").glob("*.png"))], tiny)
    result = train(
        tiny, data, steps=300, batch_size=4, rank=16, learning_rate=4e-3, seed=1, trigger="sks lion",
        early_stop="likeness", validation_share=0.0, preview_steps=8, preview_every=20, output=tmp_path,
    )  # fmt: skip
    assert result.reason is Outcome.STOPPED
    assert result.best_step is not None and result.best_step == result.steps < len(result.losses) < 300
