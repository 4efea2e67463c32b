from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lorasmith.core.options import options_of
from lorasmith.data.data_config import DataConfig
from lorasmith.families.locating import BUILT_IN
from lorasmith.runs.presets import (
    PRESETS,
    RECIPE,
    USUAL_IMAGES,
    Kind,
    Preset,
    Rule,
    guessed_kind,
    recipe_settings,
    setting_groups,
    with_recipe,
)
from lorasmith.runs.spec import KIND, RunSpec
from lorasmith.training.config import TrainConfig

KNOWN = {**options_of(DataConfig), **options_of(TrainConfig)}


MODELS = ("", BUILT_IN, *sorted({one.model for one in RECIPE if one.model} - {BUILT_IN}))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KIND.choices)
@pytest.mark.parametrize("images", [1, 5, USUAL_IMAGES, 60, 5000])
@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_a_recipe_is_settings_that_training_takes(preset: Preset, images: int, kind: Kind, model: str) -> None:
    given = recipe_settings(preset, images=images, kind=kind, model=model)
    spec = RunSpec(settings=given)
    assert preset.least_seen <= spec.config.steps * spec.config.samples_per_step <= preset.most_seen
    assert spec.data and not [*spec.config.idle_settings()]
    assert preset.summary.endswith(".") and len(preset.summary) < 160


def test_presets_train_longer_from_one_to_the_next_and_with_more_images() -> None:
    for images in (3, 20, 200):
        seen = [one.seen(images) for one in PRESETS.values()]
        assert seen == sorted(set(seen))
    for preset in PRESETS.values():
        by_images = [preset.seen(images) for images in range(1, 300)]
        assert by_images == sorted(by_images) and by_images[0] < by_images[-1]
    balanced = PRESETS["balanced"]
    assert recipe_settings(balanced) == recipe_settings(balanced, images=USUAL_IMAGES)


def test_what_somebody_gives_wins_over_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = (
        Rule(settings={"timesteps": "shifted", "timestep_shift": 3.0}),
        Rule(settings={"optimizer": "prodigy", "learning_rate": 1.0}, images="one"),
        Rule(settings={"flip": True}, kind="style"),
        Rule(settings={"ema_decay": 0.9}, model="sdxl"),
        Rule(settings={"dropout": 0.1}, preset="quick"),
    )
    monkeypatch.setattr("lorasmith.runs.presets.RECIPE", rules)
    spec = RunSpec(preset="balanced", settings={"rank": 4, "timestep_shift": 2.0})
    found, chosen = with_recipe(spec, ["sks dog", "sks dog asleep"], model="sd1")
    assert found.settings == {
        "rank": 4, "timestep_shift": 2.0, "timesteps": "shifted", "steps": 400, "save_every": 80
    }  # fmt: skip
    assert chosen is not None and set(chosen.settings) == {"timesteps", "steps", "save_every"}
    assert found.kind == "subject" and "timesteps shifted" in chosen.sentence
    # A rule whose first setting is another one is left out whole.
    found, _ = with_recipe(RunSpec(preset="quick", settings={"timesteps": "uniform"}), ["a"], model="sdxl")
    assert {"timestep_shift", "kind"}.isdisjoint(found.settings) and found.settings["timesteps"] == "uniform"
    assert (found.settings["learning_rate"], found.settings["ema_decay"], found.settings["dropout"]) == (1.0, 0.9, 0.1)
    found, chosen = with_recipe(RunSpec(preset="balanced", kind="style"), [""] * 20, model="sd1")
    assert found.data.flip and chosen is not None and not chosen.because
    # Written out, the recipe's own settings are a run without a recipe.
    assert with_recipe(replace(found, preset="none"), [""], model="sdxl") == (replace(found, preset="none"), None)


@pytest.mark.parametrize(
    ("settings", "rank"),
    [({"existing_lora": "a.safetensors"}, None), ({"pairs": "slider"}, 32), ({"new_word": "<a>"}, 32)],
)
def test_a_run_that_teaches_something_else_has_its_preset_alone(settings: dict[str, Any], rank: int | None) -> None:
    found, chosen = with_recipe(RunSpec(preset="thorough", settings=settings), ["a"] * 4, model=BUILT_IN)
    assert chosen is not None and chosen.kind is None and chosen.sentence.startswith("Preset thorough from 4 pictures")
    assert found.settings.get("rank") == rank and found.settings["steps"] == 800
    assert not found.settings.keys() - {"steps", "save_every", "rank", "patience", *settings}
    spec = RunSpec(preset="thorough", settings={"existing_state": "a.safetensors"})
    assert with_recipe(spec, ["a"] * 4, model=BUILT_IN) == (spec, None)


def test_steps_follow_the_batch() -> None:
    plain, large = (recipe_settings(PRESETS["quick"], given=given) for given in ({}, {"batch_size": 4}))
    assert plain["steps"] == 4 * large["steps"] == 300
    assert "save_every" not in recipe_settings(PRESETS["quick"], given={"steps": 10})


@pytest.mark.parametrize(
    ("captions", "trigger", "kind", "because"),
    [
        (["sks dog on a beach", "sks dog in snow"], "sks dog", "subject", "sks dog"),
        (["a lion, line art style", "a bus, line art style"], "", "style", "differ and say art"),
        (["a lion", "a bus", "a red house", "a tree"], "", "style", "different things"),
        (["a woman on a beach", "woman in red", "a woman", "she smiles"], "", "subject", "woman"),
        (["", "", "", "", ""], "", "subject", "nothing says"),
        (["", ""], "ink style", "style", "style"),
        (["sks dog", "sks dog, a painting", "sks dog asleep"], "sks dog", "subject", "sks dog"),
        (["a drawing of sks"] * 4, "sks", "subject", "sks"),
        (["sks cat in a line drawing", "a drawing of sks cat asleep"], "sks cat", "subject", "sks cat"),
        (["a lion, line art style", "a bus, line art style"], "sks", "style", "differ and say art"),
    ],
)
def test_captions_say_what_they_teach(captions: list[str], trigger: str, kind: Kind, because: str) -> None:
    found, why = guessed_kind(captions, trigger)
    assert found == kind and because in why


def test_every_setting_of_a_page_is_a_declared_one_in_one_group() -> None:
    names = [one.name for group in setting_groups().values() for one in group]
    assert len(names) == len(set(names)) and set(names) < set(KNOWN)
    assert {"track", "existing_state", "bypass_mode"}.isdisjoint(names)
    assert all(setting_groups())  # each has a heading
