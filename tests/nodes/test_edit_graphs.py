"""Graphs of edit models: reference latents in sampling, in training and in saved data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformer_models import TINY

from lorasmith.core.errors import NodeError
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.sampling.generate import generate
from tests.nodes.graphs import Prompt, api, pictures_in, predicted_with, run, sampled, trained


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folders with a small klein, and pictures before and after an edit."""
    folder = tmp_path_factory.mktemp("comfyui")
    TINY["flux2-klein"].saved(folder)
    pictures_in(folder, before=(48, 32), after=(64, 64))
    return folder


@pytest.fixture(scope="module")
def klein(base: Path) -> Model:
    names = [base / "models" / name for name, _ in TINY["flux2-klein"].files.values()]
    denoiser, vae, encoder = names
    return load_model(denoiser, text_encoders=[encoder], vae=vae)


def loaders() -> Prompt:
    names = [Path(name).name for name, _ in TINY["flux2-klein"].files.values()]
    denoiser, vae, encoder = names
    return {
        "unet": api("UNETLoader", unet_name=denoiser, weight_dtype="default"),
        "clip": api("CLIPLoader", clip_name=encoder, type="flux2"),
        "vae": api("VAELoader", vae_name=vae),
    }


def drawing(**more: Any) -> Prompt:
    return {
        **loaders(),
        "text": api("CLIPTextEncode", clip=["clip", 0], text="a fox"),
        "picture": api("LoadImage", image="before/a.png"),
        "latent": api("VAEEncode", pixels=["picture", 0], vae=["vae", 0]),
        "positive": api("ReferenceLatent", conditioning=["text", 0], latent=["latent", 0]),
        "negative": api("ConditioningZeroOut", conditioning=["positive", 0]),
        **sampled(api("EmptyFlux2LatentImage", width=48, height=32, batch_size=1)),
        **more,
    }


def test_a_sampled_picture_is_that_of_generate(base: Path, klein: Model) -> None:
    (shown,) = run(base, drawing())["decode"][0]
    with Image.open(base / "input" / "before" / "a.png") as control:
        settings: dict[str, Any] = {"steps": 2, "cfg": 1.0, "scheduler": "simple", "seed": 1}
        expected = generate(klein, "a fox", controls=[control.convert("RGB")], **settings)[0]
        without = generate(klein, "a fox", width=48, height=32, **settings)[0]
    ours = (shown * 255).round().numpy().astype(int).reshape(32, 48, 3)
    differing = [np.mean(ours != np.asarray(one, dtype=int)) for one in (expected, without)]
    assert differing[0] < 0.001 and differing[1] > 0.02, differing


def test_the_unconditional_side_keeps_them_through_zero_out(
    base: Path, klein: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = predicted_with(monkeypatch)
    graph = drawing()
    graph["sampler"]["inputs"] |= {"cfg": 2.0, "steps": 1}
    graph["positive"]["inputs"]["conditioning"] = ["first", 0]
    graph["first"] = api("ReferenceLatent", conditioning=["text", 0], latent=["latent", 0])
    run(base, graph)
    assert [tuple(one.shape) for one in seen[0].controls] == [(2, 128, 2, 3)] * 2
    pixels = torch.from_numpy(np.array(Image.open(base / "input" / "before" / "a.png"))).permute(2, 0, 1)[None]
    expected = klein.components.latent.to_model(klein.autoencoder.encode(pixels.float() / 127.5 - 1))
    for control in seen[0].controls:
        torch.testing.assert_close(control, expected.expand(2, -1, -1, -1), rtol=1e-4, atol=1e-4)


def test_a_node_without_a_latent_changes_nothing_and_the_method_is_a_setting(base: Path) -> None:
    graph = drawing(
        none=api("ReferenceLatent", conditioning=["text", 0]),
        index=api(
            "FluxKontextMultiReferenceLatentMethod", conditioning=["positive", 0], reference_latents_method="index"
        ),
        offset=api(
            "FluxKontextMultiReferenceLatentMethod", conditioning=["index", 0], reference_latents_method="offset"
        ),
        scaled=api("FluxKontextImageScale", image=["picture", 0]),
    )
    for extra in ("none", "offset", "scaled"):
        graph[f"show {extra}"] = api("PreviewAny", source=[extra, 0])
    found = run(base, graph)
    assert not found["none"][0][0][0].controls
    markers = [name for name in found["offset"][0][0][0].tensors if name.startswith("controls_")]
    assert markers == ["controls_by_offset"]
    assert found["scaled"][0][0].shape == (1, 832, 1248, 3)
    graph["offset"]["inputs"]["reference_latents_method"] = "uxo/uno"
    graph["sampler"]["inputs"]["positive"] = ["offset", 0]
    beyond = run(base, graph)["decode"][0][0]
    assert not torch.equal(beyond, found["decode"][0][0])
    graph["offset"]["inputs"]["reference_latents_method"] = "index_timestep_zero"
    with pytest.raises(NodeError, match=r"must be offset or index or uxo/uno for .*, got index_timestep_zero; choose"):
        run(base, graph)


def training(*, by: str) -> Prompt:
    """Pairs by the order of their names: as trainers' users draw it in ComfyUI, or by our own nodes."""
    pairs = {
        "references": {
            "after": api("LoadImageTextDataSetFromFolder", folder="after"),
            "before": api("LoadImageDataSetFromFolder", folder="before"),
            "data": api(
                "MakeTrainingDataset", images=["after", 0], vae=["vae", 0], clip=["clip", 0], texts=["after", 1]
            ),
            "latents": api("VAEEncode", pixels=["before", 0], vae=["vae", 0]),
            "pairs": api("ReferenceLatent", conditioning=["data", 1], latent=["latents", 0]),
        },
        "pairs": {
            "after": api("LoadImagePairDataSetFromFolder", folder="after", control_folder="before"),
            "data": api(
                "MakeTrainingPairs",
                images=["after", 0],
                controls=["after", 1],
                vae=["vae", 0],
                clip=["clip", 0],
                texts=["after", 2],
            ),
            "pairs": api("CreateList", **{"inputs.input0": ["data", 1]}),
        },
    }[by]
    return {
        **loaders(),
        **pairs,
        "train": trained(["data", 0], ["pairs", 0], batch_size=2),
        "save": api("SaveLoRA", lora=["train", 0], prefix="loras/edit", steps=["train", 2]),
        "keep": api(
            "SaveTrainingDataset", latents=["data", 0], conditioning=["pairs", 0], folder_name=by, shard_size=1000
        ),
    }


def test_a_training_graph_trains_on_its_pairs(base: Path, klein: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = predicted_with(monkeypatch)
    found = run(base, training(by="references"))
    assert len(found["train"][1][0]["loss"]) == 2
    assert [one[0].text for one in found["pairs"][0]] == ["make it a", "make it b"]
    batches = [one for one in seen if one.controls]
    assert batches and all(tuple(one.controls[0].shape) == (2, 128, 2, 3) for one in batches)
    pixels = torch.from_numpy(np.array(Image.open(base / "input" / "before" / "a.png"))).permute(2, 0, 1)[None]
    expected = klein.components.latent.to_model(klein.autoencoder.encode(pixels.float() / 127.5 - 1))
    errors = [(control - expected).abs().max().item() for control in batches[-1].controls[0].split(1)]
    assert min(errors) < 1e-3 < max(errors), "one of the two pictures"
    loaded = {"load": api("LoadTrainingDataset", folder_name="references"), **loaders()}
    loaded["show"] = api("PreviewAny", source=["load", 1])
    kept = run(base, loaded)["load"][1]
    assert [tuple(one[0].controls[0].shape) for one in kept] == [(1, 128, 2, 3)] * 2


def test_several_controls_of_an_image_are_in_the_order_of_their_inputs(base: Path) -> None:
    graph = loaders() | {
        "after": api("LoadImageDataSetFromFolder", folder="after"),
        "before": api("LoadImageDataSetFromFolder", folder="before"),
        "one": api("LoadImage", image="after/b.png"),
        "data": api(
            "MakeTrainingPairs",
            images=["after", 0],
            controls=["before", 0],
            controls_3=["one", 0],
            vae=["vae", 0],
            clip=["clip", 0],
        ),
        "show": api("PreviewAny", source=["data", 1]),
    }
    latents, conditionings = run(base, graph)["data"]
    sizes = [[tuple(control.shape[-2:]) for control in one.controls] for (one,) in conditionings]
    assert sizes == [[(2, 3), (4, 4)]] * 2, "one for all"
    assert all(torch.equal(one.controls[1], latents[1]["samples"]) for (one,) in conditionings)
    graph["before"] = api("LoadImage", image="before/a.png")
    graph["twice"] = api("ImageBatch", image1=["before", 0], image2=["before", 0])
    graph["thrice"] = api("ImageBatch", image1=["twice", 0], image2=["before", 0])
    graph["data"]["inputs"]["controls"] = ["thrice", 0]
    with pytest.raises(NodeError, match=r"controls must have one picture per image or one for all, got 3 for 2 images"):
        run(base, graph)


def test_folders_that_are_no_pairs_are_refused(base: Path) -> None:
    graph = {
        "load": api("LoadImagePairDataSetFromFolder", folder="after", control_folder="few"),
        "show": api("PreviewImage", images=["load", 0]),
    }
    few = base / "input" / "few"
    few.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(few / "a.png")
    with pytest.raises(NodeError, match=r"each image needs a control, but there is none for b\.png"):
        run(base, graph)
    for name in ("a_1.png", "b.png", "b_1.png"):
        Image.new("RGB", (64, 64)).save(few / name)
    with pytest.raises(NodeError, match=r"must have one for each image here, got 2 for a\.png"):
        run(base, graph)


def test_a_model_without_controls_refuses_them(base: Path) -> None:
    graph = drawing()
    graph |= {"unet": api("CheckpointLoaderSimple", ckpt_name="lorasmith-tiny.safetensors")}
    for name, kind in (("clip", 1), ("vae", 2)):
        for one in graph.values():
            one["inputs"] = {
                key: ["unet", kind] if value == [name, 0] else value for key, value in one["inputs"].items()
            }
    with pytest.raises(NodeError, match=r"lorasmith-tiny .* takes no controls, got 1; leave them out"):
        run(base, graph)
