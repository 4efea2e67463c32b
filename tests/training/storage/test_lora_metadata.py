"""What a LoRA says of its run, as other programs look for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.formats.metadata import autov1, sha256_file, steps_of
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.results import BaseHashes, training_metadata
from lorasmith.training.storage.records import RunRecord, SampleRecord


def picture(name: str, caption: str, width: int, height: int) -> Sample:
    return Sample(torch.zeros(4, height // 4, width // 4), Conditioning({}, text=caption), name)


DATA = EncodedDataset(
    (
        *[picture(f"{index}.png", "dog, grass" if index == 0 else "dog", 64, 96) for index in range(3)],
        *[picture(f"{index}.png", "", 64, 64) for index in range(3, 7)],
    )
)


def metadata(tiny: Model, *, steps: int = 500, data: EncodedDataset = DATA, **settings: Any) -> dict[str, str]:
    given = {"batch_size": 2, "grad_accumulation_steps": 3, "learning_rate": 1e-4, "seed": 7, "training_dtype": "fp32"}
    config = TrainConfig(**(given | {"targets": "attention"} | settings))
    job = plan_job(tiny.denoiser, config, torch.device("cpu"))
    record = RunRecord(source={"command": "train"}, samples=(SampleRecord(name="not repeated"),))
    about: dict[str, Any] = {"title": "dog", "trigger": "sks dog", "started": 0.0, "hashes": BaseHashes(None)}
    return training_metadata(job, data, steps=steps, record=record, **about)


def test_entries_that_other_programs_read(tiny: Model) -> None:
    found = metadata(tiny)
    assert list(found) == sorted(found)
    assert all(isinstance(value, str) for value in found.values())
    expected = {
        "ss_base_model_version": "sd_v1_v",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "16",
        "ss_network_alpha": "16.0",
        "ss_network_args": "{}",
        "ss_sd_model_name": tiny.title,
        "ss_steps": "500",
        "ss_epoch": "429",
        "ss_total_batch_size": "6",
        "ss_num_batches_per_epoch": "2",  # seven samples in batches of six
        "ss_num_train_images": "7",
        "ss_resolution": "(64, 96)",
        "ss_learning_rate": "0.0001",
        "ss_mixed_precision": "no",
        "ss_seed": "7",
        "ss_tag_frequency": '{"dataset": {"dog": 3, "grass": 1}}',
        "ss_enable_bucket": "True",
        "ss_lr_scheduler": "constant",
        "ss_lr_warmup_steps": "0",
        "ss_max_grad_norm": "1.0",
        "ss_loss_type": "l2",
        "ss_gradient_checkpointing": "False",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "dog",
        "modelspec.resolution": "64x96",
        "modelspec.trigger_phrase": "sks dog",
        "modelspec.prediction_type": "v",
        "modelspec.tags": "dog, grass",
        "lorasmith.steps": "500",
        "lorasmith.algorithm": "lora",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert json.loads(found["ss_bucket_info"])["buckets"] == {
        "0": {"resolution": [64, 64], "count": 4},
        "1": {"resolution": [64, 96], "count": 3},
    }
    assert json.loads(found["ss_dataset_dirs"]) == {"dataset": {"n_repeats": 1, "img_count": 7}}
    assert json.loads(found["lorasmith.run"]) == {"source": {"command": "train"}}
    assert json.loads(found["lorasmith.config"])["batch_size"] == 2


def test_pictures_of_the_class_are_regularisation_images(tiny: Model) -> None:
    of_class = replace(picture("class.png", "a lion", 64, 64), is_class=True)
    found = metadata(tiny, data=EncodedDataset((*DATA.samples, of_class)))
    assert (found["ss_num_train_images"], found["ss_num_reg_images"]) == ("7", "1")
    assert "lion" not in found["ss_tag_frequency"]


def test_other_algorithms_and_variants_name_lycoris(tiny: Model) -> None:
    found = metadata(tiny, algorithm="LoHa", schedule="cosine", warmup_steps=20, steps=17)
    assert (found["ss_lr_warmup_steps"], steps_of(found, "x")) == ("20", 17)
    assert found["ss_network_module"] == "lycoris.kohya"
    assert json.loads(found["ss_network_args"]) == {"algo": "loha"}
    found = metadata(tiny, dora="output", rslora=True)
    assert json.loads(found["ss_network_args"]) == {
        "algo": "lora",
        "dora_wd": True,
        "wd_on_output": True,
        "rs_lora": True,
    }


def test_private_metadata_has_no_caption_and_no_settings(tiny: Model) -> None:
    private = metadata(tiny, private=True)
    assert not {"ss_tag_frequency", "lorasmith.config", "lorasmith.run", "modelspec.tags"} & private.keys()
    assert private["modelspec.trigger_phrase"] == "sks dog"
    assert {"ss_seed", "ss_network_dim", "modelspec.architecture"} <= private.keys()


def test_the_base_models_hashes_are_known_after_a_while_and_those_of_other_models_are_empty(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")

    def hashes_of(path: Path | None) -> tuple[str, str]:
        with BaseHashes(path) as hashes:
            hashes.wait(lambda: False)
        return hashes.sha256, hashes.autov1

    assert hashes_of(file) == (sha256_file(file), autov1(file))
    assert {hashes_of(one) for one in (None, tmp_path, tmp_path / "missing")} == {("", "")}
