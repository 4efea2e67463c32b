"""Every node declares what ComfyUI's declares: `golden/comfyui_nodes.json` has it as ComfyUI 0.33 answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.folders import Folders
from lorasmith.nodes import load_nodes
from lorasmith.workflow import object_info

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "comfyui_nodes.json").read_text("utf-8"))
# fmt: off
OWN = {
    "TrainLoraNode": [
        "clip", "alpha", "targets", "objective", "timesteps", "max_grad_norm", "zero_init",
        "quantization", "activations", "compile", "schedule", "warmup_steps", "ema_decay", "validation_share",
        "patience", "previews", "preview_every", "private", "training_adapter", "fresh", "exact_dtype", "pairs",
        "pair_focus", "dpo_beta", "training_guidance", "preserve", "preserve_class", "preserve_weight",
        "weight_change", "guidance_loss",
        "guidance_loss_schedule", "tread_rate", "tread_first", "tread_last", "slider_positive", "slider_negative",
        "slider_neutral", "slider_anchors", "slider_guidance", "train_text_encoder", "text_encoder_rate",
        "text_encoder_rank", "text_encoder_steps", "new_word", "new_word_vectors", "new_word_start", "new_word_rate",
        "new_word_steps", "new_word_t5", "new_word_bundle", "tlora", "tlora_min_rank", "tlora_alpha", "loss_weighting",
        "min_snr_gamma", "huber_c", "huber_schedule", "huber_scale", "pyramid_noise", "input_perturbation",
        "post_hoc_ema", "early_stop",
        "trigger", "products", "attention", "cuda_graphs", "autotune",
    ],
}
# fmt: on
OURS = {"LoadImagePairDataSetFromFolder", "MakeTrainingPairs"}
"""Nodes that ComfyUI has nothing of."""

SPELLED = ("default", "min", "max", "step", "multiline", "control_after_generate", "image_upload")
# fmt: off
REQUIRED = (
    "AddTextPrefix", "AddTextSuffix", "AdjustBrightness", "AdjustContrast", "CLIPLoader", "CLIPSetLastLayer",
    "CLIPTextEncode", "CLIPTextEncodeFlux", "CLIPTextEncodeSDXL", "CenterCropImages", "CheckpointLoaderSimple",
    "ConditioningCombine", "ConditioningZeroOut", "CreateList", "DualCLIPLoader", "EmptyLatentImage",
    "EmptySD3LatentImage", "FluxGuidance", "ImageBatch", "ImageDeduplication", "ImageGrid", "ImageScale",
    "ImageScaleBy", "ImageScaleToTotalPixels", "KSampler", "KSamplerAdvanced", "LatentBatch", "LoadImage",
    "LoadImageDataSetFromFolder", "LoadImageMask", "LoadImageTextDataSetFromFolder", "LoadTrainingDataset",
    "LoraLoader", "LoraLoaderBypass", "LoraLoaderBypassModelOnly", "LoraLoaderModelOnly", "LoraModelLoader", "LoraSave",
    "LossGraphNode", "MakeTrainingDataset", "MergeImageLists", "MergeTextLists", "ModelSamplingDiscrete",
    "ModelSamplingFlux", "ModelSamplingSD3", "NormalizeImages", "PreviewImage", "PrimitiveBoolean", "PrimitiveFloat",
    "PrimitiveInt", "PrimitiveString", "PrimitiveStringMultiline", "RandomCropImages", "RebatchLatents",
    "RepeatLatentBatch", "ReplaceText", "ResizeImagesByLongerEdge", "ResizeImagesByShorterEdge", "ResolutionBucket",
    "SaveImage", "SaveImageDataSetToFolder", "SaveImageTextDataSetToFolder", "SaveLoRA", "SaveTrainingDataset",
    "ShuffleDataset", "ShuffleImageTextDataset", "StripWhitespace", "TextToLowercase", "TextToUppercase",
    "TrainLoraNode", "TripleCLIPLoader", "TruncateText", "UNETLoader", "VAEDecode", "VAEEncode", "VAELoader",
)
# fmt: on
"""Every node of ComfyUI's graphs that train LoRAs."""

LISTS = {"MergeTextLists"}
"""Nodes with a list as their output where ComfyUI declares a single text, and then passes a list as one."""


@pytest.fixture(params=sorted(GOLDEN))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return object_info(load_nodes()[request.param], Folders(tmp_path)), GOLDEN[request.param]


def test_all_nodes_are_there_and_each_is_compared() -> None:
    assert len(REQUIRED) == 76
    assert set(REQUIRED) <= set(load_nodes())
    assert set(load_nodes()) == set(GOLDEN) | OURS
    assert load_nodes()["SaveLoRANode"] is load_nodes()["SaveLoRA"]


def test_what_editors_show_of_a_node_is_as_in_comfyui(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    ours, theirs = pair
    assert ours["display_name"] == (theirs["display_name"] or ours["name"])  # editors show the id for none
    assert ours["category"] == theirs["category"]
    assert ours["is_input_list"] == theirs["is_input_list"]
    assert ours["output_node"] == theirs["output_node"]
    assert ours["description"]
    assert ours.get("deprecated", False) == theirs.get("deprecated", ours.get("deprecated", False))


def test_outputs_are_comfyuis(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    ours, theirs = pair
    types = [{"the element type": "COMFY_MATCHTYPE_V3"}.get(one["type"], one["type"]) for one in theirs["outputs"]]
    assert ours["output"] == types
    assert ours["output_name"] == [one["name"] for one in theirs["outputs"]]
    assert ours["output_is_list"] == [one["is_list"] or ours["name"] in LISTS for one in theirs["outputs"]]


def test_inputs_are_comfyuis_and_our_own_come_after(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    ours, theirs = pair
    for group in ("required", "optional"):
        expected = [name for name, one in theirs["inputs"].items() if one["kind"] == group]
        own = OWN.get(ours["name"], []) if group == "optional" else []
        assert list(ours["input"].get(group, {})) == expected + own


def test_each_input_has_comfyuis_type_range_default_and_choices(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    ours, theirs = pair
    declared = {**ours["input"]["required"], **ours["input"].get("optional", {})}
    for name, expected in theirs["inputs"].items():
        kind, options = declared[name]
        if expected["type"] == "AUTOGROW":
            template = options["template"]
            assert kind == "COMFY_AUTOGROW_V3"
            assert [template[key] for key in ("prefix", "min", "max")] == [
                expected[key] for key in ("prefix", "min", "max")
            ]
            continue
        assert kind == expected["type"]
        if kind == "COMFY_AUTOGROW_V3":
            template, known = options["template"], expected["definition"]["template"]
            assert [template[key] for key in ("names", "min")] == [known[key] for key in ("names", "min")]
            assert template["input"]["required"]["value"][0] == known["input"]["required"]["value"][0]
            continue
        assert {key: options[key] for key in SPELLED if key in options} == {
            key: expected[key] for key in SPELLED if key in expected
        }, name
        assert options.get("forceInput", False) == expected.get("forceInput", False)
        if expected.get("options", "files") != "files":
            # Algorithms, optimizers and losses of our own come after ComfyUI's.
            known = len(expected["options"]) if name in ("algorithm", "optimizer", "loss_function") else None
            assert options["options"][:known] == expected["options"]
        # The kinds of numbers tell widgets apart: 1 is an INT, 1.0 a FLOAT.
        assert type(options.get("default")) is type(expected.get("default"))


def test_file_lists_come_from_the_folders(tmp_path: Path) -> None:
    (tmp_path / "output" / "loras").mkdir(parents=True)
    (tmp_path / "output" / "loras" / "mine.safetensors").touch()
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "cat.png").touch()
    folders = Folders(tmp_path)

    def choices(node: str, name: str) -> list[str]:
        found: list[str] = object_info(load_nodes()[node], folders)["input"]["required"][name][1]["options"]
        return found

    assert choices("TrainLoraNode", "existing_lora") == ["mine.safetensors", "[None]"]
    assert choices("LoraLoader", "lora_name") == ["mine.safetensors"]
    assert choices("LoadImage", "image")[:2] == ["cat.png", "fox/fox_1.png"]
    assert "lorasmith-tiny.safetensors" in choices("CheckpointLoaderSimple", "ckpt_name")
    assert "fox" in choices("LoadImageDataSetFromFolder", "folder")
