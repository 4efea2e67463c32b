"""Graphs from a folder of images to a LoRA: with buckets, and with a data set that is saved and loaded between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorasmith.core.folders import Folders
from lorasmith.nodes import load_nodes
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import Executor, validate

SIZES = {"one": [(64, 64)] * 3, "mixed": [(64, 64), (96, 64), (64, 96), (96, 64)]}


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    for name, sizes in SIZES.items():
        folder = tmp_path / "input" / name
        folder.mkdir(parents=True)
        for number, size in enumerate(sizes):
            picture = Image.linear_gradient("L").resize(size).convert("RGB")
            Image.eval(picture, lambda value, number=number: (value + 40 * number) % 256).save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"picture {number}")
    return Folders(tmp_path)


def member(name: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": name, "inputs": inputs}


def graph(folder: str, source: str, **settings: Any) -> dict[str, Any]:
    """From a folder to a saved LoRA; training takes the outputs of node `source`."""
    train = {key: one.default for key, one in load_nodes()["TrainLoraNode"].slots.items() if one.default is not None}
    train |= {"steps": 2, "targets": "*.attn2.to_q", "training_dtype": "fp32", "learning_rate": 0.01, **settings}
    return {
        "1": member("CheckpointLoaderSimple", ckpt_name="lorasmith-tiny.safetensors"),
        "2": member("LoadImageTextDataSetFromFolder", folder=folder),
        "3": member("MakeTrainingDataset", images=["2", 0], texts=["2", 1], vae=["1", 2], clip=["1", 1]),
        "4": member("ResolutionBucket", latents=["3", 0], conditioning=["3", 1]),
        "5": member("SaveTrainingDataset", latents=["3", 0], conditioning=["3", 1], folder_name="set", shard_size=2),
        "6": member("LoadTrainingDataset", folder_name="set"),
        "7": member("TrainLoraNode", model=["1", 0], latents=[source, 0], positive=[source, 1], **train),
        "8": member("SaveLoRA", lora=["7", 0], prefix="loras/x"),
    }


def trained(folders: Folders, nodes: dict[str, Any], wanted: str) -> tuple[list[float], Lora]:
    kept = {key: one for key, one in nodes.items() if key in wanted}
    result = Executor(folders).run(validate(kept, folders))["7"].outputs
    return result[1][0]["loss"], result[0][0]


def test_one_bucket_trains_as_without_buckets_bit_for_bit(folders: Folders) -> None:
    plain, lora = trained(folders, graph("one", "3"), "12378")
    bucketed, same = trained(folders, graph("one", "4", bucket_mode=True), "123478")
    assert plain == bucketed
    for ref, weights in lora.state.adapters.items():
        for name, tensor in weights.tensors.items():
            assert torch.equal(tensor, same.state.adapters[ref].tensors[name])


@pytest.mark.slow
def test_a_data_set_that_comfyui_saved_trains_as_ours(folders: Folders) -> None:
    """ComfyUI's conditionings have a pooled vector for every model; Stable Diffusion 1 has no use for it."""
    plain, _ = trained(folders, graph("mixed", "3"), "12378")
    kept = {key: one for key, one in graph("mixed", "3").items() if key in "1235"}
    result = Executor(folders).run(validate(kept, folders))["3"].outputs
    theirs = {
        "latents": list(result[0]),
        "conditioning": [
            [[one.tensors["context"], {"pooled_output": torch.ones(1, 768)}] for one in combined]
            for combined in result[1]
        ],
    }
    (folders.base / "datasets" / "theirs").mkdir()
    torch.save(theirs, folders.base / "datasets" / "theirs" / "shard_0000.pkl")
    nodes = graph("mixed", "6")
    nodes["6"]["inputs"]["folder_name"] = "theirs"
    loaded, _ = trained(folders, nodes, "1678")
    assert loaded == plain
