"""Graphs of edit models whose text encoder sees pictures: ComfyUI's nodes in sampling and in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformer_models import TINY

from lorasmith.core.errors import NodeError
from lorasmith.families.model import Model
from lorasmith.families.parts.language_models import sight_of
from lorasmith.nodes import picture_prompts
from tests.covering import slow_except
from tests.nodes.graphs import Prompt, api, pictures_in, run, sampled

PICTURES = {"before/a.png": (64, 64), "style/a.png": (128, 32)}
MULTIPLE = {"qwen-image": 28, "krea2": 32}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference latents of 64×64 px, and what Qwen-Image 2.1 sees of 128×128 px, instead of a megapixel."""
    monkeypatch.setattr(picture_prompts, "_REFERENCES", replace(picture_prompts._REFERENCES, most_pixels=64**2))
    own = type(TINY["qwen-image-2.1"].family)
    (form,) = own.controls
    assert form.sight is not None
    monkeypatch.setattr(own, "controls", (replace(form, sight=replace(form.sight, pixels=128**2)),))


@pytest.fixture(scope="module", params=slow_except(MULTIPLE, "qwen-image"))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folders with a small model, and pictures before and after an edit."""
    folder = tmp_path_factory.mktemp("comfyui")
    files = TINY[family].saved(folder)
    if family == "qwen-image":
        files["transformer"].rename(files["transformer"].with_name("qwen_image_edit_2511_bf16.safetensors"))
    pictures_in(folder, before=(64, 64), after=(64, 64), style=(128, 32))
    return folder


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return TINY[family].loaded(TINY[family].saved(tmp_path_factory.mktemp("model")))


def loaders(base: Path) -> Prompt:
    def only(kind: str) -> str:
        (file,) = (base / "models" / kind).iterdir()
        return file.name

    clip_type = "krea2" if "krea2" in only("diffusion_models") else "qwen_image"
    return {
        "unet": api("UNETLoader", unet_name=only("diffusion_models"), weight_dtype="default"),
        "clip": api("CLIPLoader", clip_name=only("text_encoders"), type=clip_type),
        "vae": api("VAELoader", vae_name=only("vae")),
        "one": api("LoadImage", image="before/a.png"),
        "two": api("LoadImage", image="style/a.png"),
    }


def drawing(base: Path, method: str) -> Prompt:
    return {
        **loaders(base),
        "text": api(
            "TextEncodeQwenImageEditPlus",
            clip=["clip", 0],
            prompt="make it blue",
            vae=["vae", 0],
            image1=["one", 0],
            image3=["two", 0],
        ),
        "positive": api(
            "FluxKontextMultiReferenceLatentMethod", conditioning=["text", 0], reference_latents_method=method
        ),
        "negative": api("ConditioningZeroOut", conditioning=["positive", 0]),
        **sampled(api("EmptySD3LatentImage", width=64, height=64, batch_size=1), steps=1),
    }


def pixels(base: Path, file: str, size: tuple[int, int]) -> Tensor:
    """In [−1, 1], scaled as the node scales."""
    with Image.open(base / "input" / file) as picture:
        found = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    return torch.nn.functional.interpolate(found, size[::-1], mode="area") * 2 - 1


def test_prompts_have_the_pictures_and_conditionings_their_latents(base: Path, family: str, model: Model) -> None:
    graph = drawing(base, "index_timestep_zero")
    found = run(base, graph)["text"][0][0][0]
    sight = sight_of(pixels=384**2, multiple=MULTIPLE[family])
    shown = [pixels(base, file, sight.size(*size)) for file, size in PICTURES.items()]
    chat = sight.prompt("make it blue", (1, 3))
    assert "Picture 3: " in chat, "numbered as the inputs are"
    expected = model.text_encoder.encode(chat, shown)
    torch.testing.assert_close(found.tensors["context"], expected.tensors["context"], rtol=1e-4, atol=1e-4)
    assert found.text == "make it blue"
    latents = [model.autoencoder.encode(pixels(base, file, size)) for file, size in PICTURES.items()]
    assert [tuple(one.shape) for one in found.controls] == [(1, 16, 1, 8, 8), (1, 16, 1, 4, 16)]
    for control, own in zip(found.controls, latents, strict=True):
        torch.testing.assert_close(control, own, rtol=1e-4, atol=1e-4)


def test_the_method_of_2511_is_that_of_the_node_or_the_name(base: Path, family: str) -> None:
    drawn = {}
    for method in ("index_timestep_zero", "index", "none"):
        graph = drawing(base, "index" if method == "none" else method)
        if method == "none":
            graph["sampler"]["inputs"] |= {"positive": ["text", 0], "negative": ["text", 0]}
        drawn[method] = run(base, graph)["decode"][0][0]
    assert torch.equal(drawn["none"], drawn["index_timestep_zero"])
    assert not torch.equal(drawn["none"], drawn["index"])
    with pytest.raises(NodeError, match=r"must be index or index_timestep_zero for .*, got offset; choose one"):
        run(base, drawing(base, "offset"))


def test_without_pictures_plus_keeps_its_prompt_and_the_first_node_has_that_of_text_alone(
    base: Path, model: Model
) -> None:
    graph = {
        **loaders(base),
        "plus": api("TextEncodeQwenImageEditPlus", clip=["clip", 0], prompt="a fox"),
        "first": api("TextEncodeQwenImageEdit", clip=["clip", 0], prompt="a fox"),
        "text": api("CLIPTextEncode", clip=["clip", 0], text="a fox"),
    }
    graph |= {f"show {name}": api("PreviewAny", source=[name, 0]) for name in ("plus", "first", "text")}
    found = run(base, graph)
    plus, first, text = (found[name][0][0][0].tensors["context"] for name in ("plus", "first", "text"))
    assert torch.equal(first, text) and plus.shape == text.shape and not torch.equal(plus, text)


def test_the_node_of_august_2025_shows_one_picture_without_a_number(base: Path, family: str) -> None:
    graph = {
        **loaders(base),
        "text": api("TextEncodeQwenImageEdit", clip=["clip", 0], prompt="a fox", image=["one", 0]),
        "show": api("PreviewAny", source=["text", 0]),
    }
    found = run(base, graph)["text"][0][0][0]
    sight = sight_of(pixels=1024**2, multiple=MULTIPLE[family], is_numbered=False)
    tokens = sight.tokens(64, 64)
    assert found.tensors["context"].shape[1] == tokens + 2 + 2 + 5 and not found.controls


@pytest.mark.parametrize(
    "node, image", [("TextEncodeQwenImageEdit", "image"), ("TextEncodeQwenImageEditPlus", "image1")]
)
def test_a_prompt_of_a_family_of_its_own_has_the_picture_where_its_denoiser_looks(
    node: str, image: str, tmp_path: Path
) -> None:
    tiny = TINY["qwen-image-2.1"]
    model = tiny.loaded(tiny.saved(tmp_path))
    pictures_in(tmp_path, before=(64, 64), style=(128, 32))
    text = api(node, clip=["clip", 0], prompt="a fox", vae=["vae", 0], **{image: ["one", 0]})
    graph = {**loaders(tmp_path), "text": text, "show": api("PreviewAny", source=["text", 0])}
    found = run(tmp_path, graph)["text"][0][0][0]
    sight = model.family.controls[0].sight
    assert sight is not None
    seen = pixels(tmp_path, "before/a.png", sight.size(64, 64))
    expected = model.text_encoder.encode("a fox", [seen], sight=sight).tensors["context"]
    torch.testing.assert_close(found.tensors["context"], expected, rtol=1e-4, atol=1e-4)
    assert [tuple(one.shape) for one in found.controls] == [(1, 64, 4, 4)]


def test_a_text_encoder_that_sees_nothing_is_refused(base: Path) -> None:
    graph = drawing(base, "index")
    graph["clip"] = api("CheckpointLoaderSimple", ckpt_name="lorasmith-tiny.safetensors")
    graph["text"]["inputs"]["clip"] = ["clip", 1]
    with pytest.raises(NodeError, match=r"for models whose text encoder sees pictures, but lorasmith-tiny encodes for"):
        run(base, graph)
