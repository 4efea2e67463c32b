from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from lorasmith.formats.metadata import steps_of, tag_frequency, without_private


def test_tags_are_counted() -> None:
    assert list(tag_frequency(["dog,  big dog ", "cat, dog,", ""]).items()) == [("dog", 2), ("big dog", 1), ("cat", 1)]


def test_steps() -> None:
    for metadata, name, steps in [
        ({"lorasmith.steps": "7", "ss_steps": "8"}, "x_9_steps_00001_.safetensors", 7),
        ({"ss_steps": "8"}, "x_9_steps_00001_.safetensors", 8),
        ({"ss_steps": "many"}, "x_9_steps_00001_.safetensors", 9),
        ({}, "x_9_steps_00001__20_steps_00001_.safetensors", 20),
        ({}, "16_steps_00001_.safetensors", 16),
        ({}, "x_steps_1.safetensors", 0),
        ({}, "stepsis.safetensors", 0),
        ({"ss_steps": "9" * 30}, "", 0),
    ]:
        assert steps_of(metadata, name) == steps


@given(st.text(), st.dictionaries(st.sampled_from(["ss_steps", "lorasmith.steps"]), st.text()))
def test_any_name_and_any_metadata_give_a_number(name: str, metadata: dict[str, str]) -> None:
    assert steps_of(metadata, name) >= 0


def test_private_metadata_has_no_path_prompt_caption_or_workflow() -> None:
    metadata = {
        "ss_sd_model_name": "/home/secret/models/dream.safetensors",
        "lorasmith.config": '{"existing_lora": "/home/secret/a.safetensors"}',
        "lorasmith.run": '{"source": "secret"}',
        "lorasmith.steps": "500",
        "prompt": "secret",
        "workflow": "secret",
        "ss_tag_frequency": '{"dataset": {"secret tag": 1}}',
        "ss_seed": "7",
        "ss_network_dim": "16",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.trigger_phrase": "sks dog",
        "modelspec.description": "secret",
        **dict.fromkeys(("ot_config", "ss_datasets", "ss_network_args"), "secret"),
    }
    private = without_private(metadata)
    assert "secret" not in json.dumps(private)
    assert private["ss_sd_model_name"] == "dream.safetensors"
    assert private["modelspec.trigger_phrase"] == "sks dog"
    assert steps_of(private, "") == 500
    assert {"ss_seed", "ss_network_dim", "modelspec.architecture"} <= private.keys()
    assert without_private(private) == private
