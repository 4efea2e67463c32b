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
LISTS = {"MergeTextLists"}
"""Nodes with a list as their output where ComfyUI declares a single text, and then passes a list as one."""


def test_all_nodes_are_there_and_each_is_compared() -> None:
    assert set(load_nodes()) == set(GOLDEN) | OURS
    assert load_nodes()["SaveLoRANode"] is load_nodes()["SaveLoRA"]


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_a_node_is_declared_as_in_comfyui(name: str, tmp_path: Path) -> None:
    ours, theirs = object_info(load_nodes()[name], Folders(tmp_path)), GOLDEN[name]
    assert ours["display_name"] == (theirs["display_name"] or name)  # editors show the id for none
    assert {key: ours[key] for key in ("category", "is_input_list", "output_node")} == {
        key: theirs[key] for key in ("category", "is_input_list", "output_node")
    }
    assert ours["description"]
    assert ours.get("deprecated", False) == theirs.get("deprecated", ours.get("deprecated", False))
    types = [{"the element type": "COMFY_MATCHTYPE_V3"}.get(one["type"], one["type"]) for one in theirs["outputs"]]
    assert ours["output"] == types
    assert ours["output_name"] == [one["name"] for one in theirs["outputs"]]
    assert ours["output_is_list"] == [one["is_list"] or name in LISTS for one in theirs["outputs"]]
    for group in ("required", "optional"):
        expected = [key for key, one in theirs["inputs"].items() if one["kind"] == group]
        own = OWN.get(name, []) if group == "optional" else []
        assert list(ours["input"].get(group, {})) == expected + own
    compare_inputs(ours, theirs)


def compare_inputs(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Each input has ComfyUI's type, range, default and choices."""
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
