from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.formats.metadata import TrainingFacts, build_metadata, steps_of, tag_frequency, without_private

FACTS = TrainingFacts(
    kohya_version="sd_v1",
    modelspec_architecture="stable-diffusion-v1",
    modelspec_implementation="diffusers",
    resolution=(512, 768),
    rank=16,
    alpha=16.0,
    steps=500,
    base_model="dreamlike.safetensors",
    prediction_type="epsilon",
    learning_rate=1e-4,
    batch_size=2,
    accumulation=3,
    training_dtype="fp32",
    tags={"dog": 3, "grass": 1},
    dataset="10_dog",
    started=0.0,
    finished=86400.0,
    title="dog",
    trigger="sks dog",
    seed=7,
    workflow={"nodes": [1]},
)


def test_entries_that_other_programs_read() -> None:
    metadata = build_metadata(FACTS)
    assert list(metadata) == sorted(metadata)
    assert all(isinstance(value, str) for value in metadata.values())
    expected = {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "16",
        "ss_network_alpha": "16.0",
        "ss_network_args": "{}",
        "ss_steps": "500",
        "ss_total_batch_size": "6",
        "ss_resolution": "(512, 768)",
        "ss_learning_rate": "0.0001",
        "ss_mixed_precision": "no",
        "ss_seed": "7",
        "ss_tag_frequency": '{"10_dog": {"dog": 3, "grass": 1}}',
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "dog",
        "modelspec.resolution": "512x768",
        "modelspec.date": "1970-01-02T00:00:00",
        "modelspec.trigger_phrase": "sks dog",
        "modelspec.prediction_type": "epsilon",
        "modelspec.tags": "dog, grass",
        "lorasmith.steps": "500",
        "workflow": '{"nodes": [1]}',
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert "prompt" not in metadata
    assert "ss_epoch" not in metadata


def test_other_algorithms_name_lycoris() -> None:
    metadata = build_metadata(dataclasses.replace(FACTS, algorithm="loha", kohya_version="sd_v2_v"))
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"]) == {"algo": "loha"}
    assert metadata["ss_v2"] == "True"


def test_tags_are_counted() -> None:
    assert list(tag_frequency(["dog,  big dog ", "cat, dog,", ""]).items()) == [("dog", 2), ("big dog", 1), ("cat", 1)]


@pytest.mark.parametrize(
    ("metadata", "name", "steps"),
    [
        ({"lorasmith.steps": "7", "ss_steps": "8"}, "x_9_steps_00001_.safetensors", 7),
        ({"ss_steps": "8"}, "x_9_steps_00001_.safetensors", 8),
        ({"ss_steps": "many"}, "x_9_steps_00001_.safetensors", 9),
        ({}, "x_9_steps_00001__20_steps_00001_.safetensors", 20),
        ({}, "16_steps_00001_.safetensors", 16),
        ({}, "x_steps_1.safetensors", 0),
        ({}, "stepsis.safetensors", 0),
        ({"ss_steps": "9" * 30}, "", 0),
    ],
)
def test_steps(metadata: dict[str, str], name: str, steps: int) -> None:
    assert steps_of(metadata, name) == steps


@given(st.text(), st.dictionaries(st.sampled_from(["ss_steps", "lorasmith.steps"]), st.text()))
def test_any_name_and_any_metadata_give_a_number(name: str, metadata: dict[str, str]) -> None:
    assert steps_of(metadata, name) >= 0


@given(st.integers(0, 10**6))
def test_own_metadata_and_own_names_give_the_steps(steps: int) -> None:
    assert steps_of(build_metadata(dataclasses.replace(FACTS, steps=steps)), "x") == steps
    assert steps_of({}, f"loras/ComfyUI_trained_lora_{steps}_steps_00003_.safetensors") == steps


def test_what_a_run_knows_of_sd_scripts_entries_is_there() -> None:
    facts = dataclasses.replace(
        FACTS,
        num_images=3,
        buckets={(512, 768): 3, (512, 512): 4},
        max_grad_norm=1.0,
        loss="l2",
        lr_scheduler="constant",
        gradient_checkpointing=False,
    )
    metadata = build_metadata(facts)
    assert metadata["ss_num_batches_per_epoch"] == "2"  # seven samples in batches of six
    assert json.loads(metadata["ss_bucket_info"])["buckets"] == {
        "0": {"resolution": [512, 512], "count": 4},
        "1": {"resolution": [512, 768], "count": 3},
    }
    assert json.loads(metadata["ss_dataset_dirs"]) == {"10_dog": {"n_repeats": 1, "img_count": 3}}
    expected = {
        "ss_enable_bucket": "True",
        "ss_lr_scheduler": "constant",
        "ss_lr_warmup_steps": "0",
        "ss_max_grad_norm": "1.0",
        "ss_loss_type": "l2",
        "ss_gradient_checkpointing": "False",
    }
    assert {key: metadata[key] for key in expected} == expected


def test_variants_are_told_as_lycoris_calls_them() -> None:
    metadata = build_metadata(dataclasses.replace(FACTS, network_args={"dora_wd": True}))
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"]) == {"algo": "lora", "dora_wd": True}


def test_private_metadata_has_no_path_prompt_caption_or_workflow() -> None:
    facts = dataclasses.replace(
        FACTS,
        base_model="/home/secret/models/dream.safetensors",
        config={"existing_lora": "/home/secret/a.safetensors"},
        prompt={"1": "secret"},
        num_images=1,
        tags={"secret tag": 1},
        description="secret",
    )
    metadata = build_metadata(facts) | {"ot_config": "secret", "ss_datasets": "secret", "ss_network_args": "secret"}
    private = without_private(metadata)
    assert "secret" not in json.dumps(private)
    assert private["ss_sd_model_name"] == "dream.safetensors"
    assert private["modelspec.trigger_phrase"] == "sks dog"
    assert steps_of(private, "") == 500
    assert {"ss_seed", "ss_network_dim", "modelspec.architecture"} <= private.keys()
    assert without_private(private) == private
