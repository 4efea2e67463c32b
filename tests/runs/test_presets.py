from __future__ import annotations

import pytest

from lorasmith.core.options import options_of
from lorasmith.data.data_config import DataConfig
from lorasmith.runs.presets import PRESETS, USUAL_IMAGES, Preset, setting_groups
from lorasmith.training.config import TrainConfig

KNOWN = {**options_of(DataConfig), **options_of(TrainConfig)}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
@pytest.mark.parametrize("images", [1, 5, USUAL_IMAGES, 60, 5000])
def test_a_preset_is_settings_that_training_takes(preset: Preset, images: int) -> None:
    config = TrainConfig(**preset.settings_for(images))
    assert preset.least_steps <= config.steps <= preset.most_steps
    assert preset.summary.endswith(".") and len(preset.summary) < 160


def test_presets_train_longer_from_one_to_the_next_and_with_more_images() -> None:
    for images in (3, 20, 200):
        steps = [one.settings_for(images)["steps"] for one in PRESETS.values()]
        assert steps == sorted(set(steps))
    for preset in PRESETS.values():
        by_images = [preset.settings_for(images)["steps"] for images in range(1, 300)]
        assert by_images == sorted(by_images) and by_images[0] < by_images[-1]
    assert PRESETS["balanced"].settings_for() == PRESETS["balanced"].settings_for(USUAL_IMAGES)


def test_every_setting_of_a_page_is_a_declared_one_in_one_group() -> None:
    names = [one.name for group in setting_groups().values() for one in group]
    assert len(names) == len(set(names)) and set(names) < set(KNOWN)
    assert {"track", "existing_state", "bypass_mode"}.isdisjoint(names)
    assert all(setting_groups())  # each has a heading
