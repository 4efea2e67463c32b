"""What a measurement is about."""

from __future__ import annotations

import pytest

from lorasmith.runs.queue import measurement_subject
from lorasmith.training.config import TrainConfig

SETTINGS = {"rank": 8, "resolution": 512}


@pytest.mark.parametrize(
    "same", [{"steps": 7}, {"seed": 1}, {"batch_size": TrainConfig().batch_size}, {"trigger": "x"}]
)
def test_settings_without_effect_on_a_step_are_left_out(same: dict[str, object]) -> None:
    assert measurement_subject("m", SETTINGS | same, "cuda:1") == measurement_subject("m", SETTINGS, "cuda:0")


@pytest.mark.parametrize("other", [{"rank": 4}, {"resolution": 1024}, {"quantization": "int8"}, {"optimizer": "SGD"}])
def test_the_others_are_part_of_it(other: dict[str, object]) -> None:
    assert measurement_subject("m", SETTINGS | other, "cuda") != measurement_subject("m", SETTINGS, "cuda")


def test_model_and_device_are_part_of_it() -> None:
    subjects = {measurement_subject(model, {}, device) for model in ("a", "b") for device in ("cpu", "cuda")}
    assert len(subjects) == 4
