"""Whole graphs on a tiny Flux.1 in files of its own: sampling and training as templates and trainers' graphs do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flux_files import save_flux_files

from lorasmith.core.errors import NodeError
from lorasmith.core.folders import Folders
from lorasmith.nodes import load_nodes
from lorasmith.workflow import validate
from lorasmith.workflow.execution_events import Event, NodeMessage
from tests.nodes.graphs import Prompt, api, run, sampled, trained


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comfyui")
    save_flux_files(folder)
    return folder


def loaders(weight_dtype: str = "default") -> Prompt:
    return {
        "unet": api("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype=weight_dtype),
        "clip": api(
            "DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp16.safetensors", type="flux"
        ),
        "vae": api("VAELoader", vae_name="ae.safetensors"),
    }


def sampling(model: str = "unet") -> Prompt:
    return {
        "text": api("CLIPTextEncode", clip=["clip", 0], text="a fox"),
        "positive": api("FluxGuidance", conditioning=["text", 0], guidance=3.5),
        "negative": api("ConditioningZeroOut", conditioning=["text", 0]),
        **sampled(api("EmptySD3LatentImage", width=64, height=32, batch_size=1), model=model, scheduler="beta"),
    }


def training(model: str = "unet", **changes: Any) -> Prompt:
    habits = {
        "quantized_backward": "None",
        "algorithm": "lora",
        "gradient_checkpointing": True,
        "checkpoint_depth": 2,
        "bypass_mode": True,
    }
    return {
        "note": api("Note", text="made by hand"),
        "_doc": {"about": "a graph of a guide"},
        "image1": api("LoadImage", image="fox/fox_1.png"),
        "image2": api("LoadImage", image="fox/fox_2.png"),
        "image3": api("LoadImage", image="fox/fox_3.png"),
        "batch1": api("ImageBatch", image1=["image1", 0], image2=["image2", 0]),
        "batch2": api("ImageBatch", image1=["batch1", 0], image2=["image3", 0]),
        "small": api("ImageScale", image=["batch2", 0], upscale_method="area", width=32, height=32, crop="center"),
        "data": api(
            "MakeTrainingDataset", images=["small", 0], vae=["vae", 0], clip=["clip", 0], texts="a fox,\nby a lake"
        ),
        "train": trained(["data", 0], ["data", 1], model=model, **(habits | changes)),
        "save": api("SaveLoRA", lora=["train", 0], prefix="loras/fox", steps=2, _note="the steps of the run"),
        "trained": api("LoraModelLoader", model=[model, 0], lora=["train", 0], strength_model=1.0, bypass=False),
    }


def test_parts_are_sampled_together(base: Path) -> None:
    outputs = run(base, {**loaders(), **sampling()})
    assert outputs["sampler"][0][0]["samples"].shape == (1, 16, 4, 8)
    assert outputs["decode"][0][0].shape == (1, 32, 64, 3)


@pytest.mark.parametrize("lacking", ["quantized_backward", "checkpoint_depth", "offloading", "bucket_mode"])
def test_graphs_of_older_versions_lack_some_inputs(base: Path, lacking: str) -> None:
    prompt = {**loaders(), **training()}
    del prompt["train"]["inputs"][lacking]
    load_nodes()
    graph = validate(prompt, Folders(base))
    assert graph.warnings == ()
    assert graph.nodes["train"].inputs["quantized_backward"] is False


@pytest.mark.slow
def test_a_range_of_sampling_is_ignored_by_training_with_a_word(base: Path) -> None:
    events: list[Event] = []
    prompt = {**loaders(), **training()}
    prompt["late"] = api("ConditioningSetTimestepRange", conditioning=["data", 1], start=0.5, end=1.0)
    prompt["train"]["inputs"] |= {"positive": ["late", 0], "steps": 1}
    run(base, prompt, events)
    warnings = [event.text for event in events if isinstance(event, NodeMessage) and event.level == "warning"]
    assert any(one.startswith("3 of 3 captions are for a part of sampling") for one in warnings)


def test_an_encoder_of_another_family_is_refused_before_the_work(base: Path) -> None:
    """In sampling; `test_part_files` has training."""
    prompt = {**loaders(), **sampling()}
    prompt["clip"] = api("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion")
    sentence = (
        r"the context of a conditioning for flux1-dev \(Flux\.1\) must have width 32, got 64; "
        r"encode prompts with its own text encoders \(clip_l and t5xxl, loaded with type flux\)"
    )
    with pytest.raises(NodeError, match=sentence):
        run(base, prompt)
