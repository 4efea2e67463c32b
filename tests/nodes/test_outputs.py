from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lorasmith.core.errors import DataError, LoraError, OutputError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.training.lora_handle import Lora

Make = Callable[..., Any]


@pytest.fixture
def lora(bench: Any, tiny: Model, latents: Make, captions: list[Conditioning]) -> Lora:
    trained: Lora = bench.one(
        "TrainLoraNode", model=tiny.denoiser, latents=latents(), positive=captions[:1], steps=1, targets="*.attn2.to_q"
    )
    return trained


def test_pictures_are_numbered_and_carry_their_workflow(bench: Any, pictures: Make) -> None:
    image = pictures(2)
    first = bench.call("SaveImage", images=image, filename_prefix="sub/%width%x%height%")
    second = bench.call("SaveImage", images=image, filename_prefix="sub/%width%x%height%")
    assert [one["filename"] for one in (*first.ui["images"], *second.ui["images"])] == [
        f"64x64_0000{n}_.png" for n in (1, 2, 3, 4)
    ]
    assert first.ui["images"][0] | {"filename": ""} == {"filename": "", "subfolder": "sub", "type": "output"}
    assert first.outputs[0][0] is image
    with Image.open(bench.folders.base / "output" / "sub" / "64x64_00002_.png") as saved:
        assert json.loads(saved.text["prompt"]) == bench.context.prompt
        assert json.loads(saved.text["workflow"]) == bench.context.workflow
        assert np.array_equal(np.array(saved), (image[1] * 255).round().numpy())


def test_values_out_of_range_are_clipped(bench: Any) -> None:
    bench.call("SaveImage", images=torch.tensor([-1.0, 0.5, 2.0]).expand(1, 2, 2, 3), filename_prefix="a")
    with Image.open(bench.folders.base / "output" / "a_00001_.png") as saved:
        assert saved.getpixel((0, 0)) == (0, 128, 255)


def test_previews_go_to_the_temp_folder(bench: Any, pictures: Make) -> None:
    (shown,) = bench.call("PreviewImage", images=pictures()).ui["images"]
    assert shown["type"] == "temp"
    assert (bench.folders.base / "temp" / shown["filename"]).is_file()


@pytest.mark.parametrize("losses", [[0.5], [0.5, 0.5, 0.5], [0.5, math.nan, 0.25, math.nan]])
@pytest.mark.usefixtures("figures_drawn")
def test_a_loss_plot_takes_what_training_gives(bench: Any, losses: list[float]) -> None:
    (shown,) = bench.call("LossGraphNode", loss={"loss": losses}, filename_prefix="fox").ui["images"]
    assert shown == {"filename": "fox_00001_.png", "subfolder": "", "type": "temp"}
    with Image.open(bench.folders.base / "temp" / "fox_00001_.png") as saved:
        assert saved.width > 600
        assert json.loads(saved.text["prompt"]) == bench.context.prompt
        assert json.loads(saved.text["workflow"]) == bench.context.workflow


def test_a_lora_is_named_by_steps_and_a_counter_that_is_never_used_twice(bench: Any, lora: Lora) -> None:
    for steps in (20, 10, None, 10):
        bench.call("SaveLoRA", lora=lora, prefix="loras/a", **({} if steps is None else {"steps": steps}))
    bench.call("SaveLoRA", lora=lora, prefix="loras/a_10_steps")
    assert sorted(path.name for path in (bench.folders.base / "output" / "loras").iterdir()) == [
        "a_00003_.safetensors",
        "a_10_steps_00002_.safetensors",
        "a_10_steps_00004_.safetensors",
        "a_10_steps_00005_.safetensors",
        "a_20_steps_00001_.safetensors",
    ]
    assert "a_20_steps_00001_.safetensors" in bench.folders.files("loras")


def test_a_saved_lora_tells_its_making(bench: Any, lora: Lora, tiny: Model) -> None:
    bench.call("SaveLoRA", lora=lora, steps=1)
    path = bench.folders.base / "output" / "loras" / "ComfyUI_trained_lora_1_steps_00001_.safetensors"
    with safe_open(path, "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
    assert json.loads(metadata["prompt"]) == bench.context.prompt
    assert json.loads(metadata["workflow"]) == bench.context.workflow
    assert metadata["ss_output_name"] == path.stem
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert {"ss_steps", "ss_network_dim", "sshs_model_hash", "lorasmith.config"} <= set(metadata)
    assert all(key.startswith("lora_unet_") for key in keys)
    assert Lora.load(path, tiny).state.adapters.keys() == lora.state.adapters.keys()


def test_a_lora_that_is_not_finite_is_not_written(bench: Any, lora: Lora) -> None:
    weights = next(iter(lora.state.adapters.values()))
    weights.tensors["up"].fill_(math.nan)
    with pytest.raises(LoraError, match="NaN"):
        bench.call("SaveLoRA", lora=lora, prefix="loras/a")
    assert not list((bench.folders.base / "output").rglob("a_*"))


def test_a_file_in_the_place_of_the_output_folder_is_named(bench: Any, pictures: Make, tmp_path: Path) -> None:
    (tmp_path / "output").write_text("in the way")
    with pytest.raises(OutputError, match="output"):
        bench.call("SaveImage", images=pictures(), filename_prefix="a")


def test_a_private_lora_keeps_the_workflow_to_itself(
    bench: Any, tiny: Model, latents: Make, captions: list[Conditioning]
) -> None:
    settings = {"steps": 1, "targets": "*.attn2.to_q", "training_dtype": "fp32", "private": True}
    trained = bench.one("TrainLoraNode", model=tiny.denoiser, latents=latents(), positive=captions[:1], **settings)
    bench.call("SaveLoRA", lora=trained, prefix="loras/mine")
    with safe_open(bench.folders.base / "output" / "loras" / "mine_00001_.safetensors", "pt") as file:
        metadata = file.metadata()
    assert not {"prompt", "workflow", "ss_tag_frequency", "lorasmith.config"} & metadata.keys()
    assert "a fox" not in str(metadata)
    assert metadata["ss_steps"] == "1"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", "a\nb"),
        (5, "5"),
        (True, "True"),
        (None, "null"),
        ({"ü": [1]}, '{\n    "ü": [\n        1\n    ]\n}'),
        (torch.tensor([1.0]), "tensor([1.])"),
    ],
)
def test_values_are_shown_as_text(bench: Any, value: object, text: str) -> None:
    result = bench.call("PreviewAny", source=value)
    assert result.ui == {"text": [text]}
    assert result.outputs == ((text,),)


def folder_names(bench: Any) -> list[str]:
    return sorted(path.name for path in (bench.folders.output / "my" / "set").iterdir())


@pytest.mark.parametrize("node", ["SaveImageDataSetToFolder", "SaveImageTextDataSetToFolder"])
def test_image_sets_are_overwritten_or_numbered(bench: Any, pictures: Make, node: str) -> None:
    lists = {"images": [pictures(1), pictures(2, 32, 48, seed=1)]}
    for _ in range(2):
        bench.call(node, lists=lists, folder_name="my/set")
    assert folder_names(bench) == ["image_00000.png", "image_00001.png", "image_00002.png"]
    bench.call(node, lists=lists, folder_name="my/set", mode="increment")
    assert folder_names(bench)[3:] == ["image_00003_00000.png", "image_00004_00001.png", "image_00005_00002.png"]
    bench.call(node, lists=lists, folder_name="my/set", mode="increment")
    assert folder_names(bench)[6:] == ["image_00006_00000.png", "image_00007_00001.png", "image_00008_00002.png"]


def test_a_saved_set_is_loaded_again_bit_for_bit(bench: Any, tmp_path: Path) -> None:
    images = [(torch.rand(1, 20 + n, 30, 3) * 255).round() / 255 for n in range(3)]
    texts = ["a fox", "a cat, é", ""]
    bench.call("SaveImageTextDataSetToFolder", lists={"images": images, "texts": texts}, folder_name="set")
    (bench.folders.output / "set").rename(tmp_path / "set")
    (tmp_path / "input").mkdir()
    (tmp_path / "set").rename(tmp_path / "input" / "set")
    loaded, captions = bench.call("LoadImageTextDataSetFromFolder", folder="set").outputs
    assert list(captions) == texts
    assert all(
        torch.equal((one * 255).round(), (other * 255).round()) for one, other in zip(loaded, images, strict=True)
    )


def test_texts_of_another_number_are_refused(bench: Any, pictures: Make) -> None:
    with pytest.raises(DataError, match="one caption per image or one for all, got 2 for 3 images"):
        bench.call("SaveImageTextDataSetToFolder", images=pictures(3), lists={"texts": ["a", "b"]})
    assert not bench.folders.output.exists()


@pytest.mark.parametrize("names", [{"folder_name": "../x"}, {"filename_prefix": "../../x"}, {"folder_name": "/tmp"}])
def test_image_sets_stay_in_the_output_folder(bench: Any, pictures: Make, names: dict[str, str]) -> None:
    with pytest.raises(OutputError, match="must stay inside its folder"):
        bench.call("SaveImageDataSetToFolder", images=pictures(), **names)
