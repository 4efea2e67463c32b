"""The example workflows run as they are, with fewer steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorasmith.core.folders import ASSETS, Folders
from lorasmith.families.model import Model
from lorasmith.nodes import load_nodes
from lorasmith.training.lora import Lora
from lorasmith.workflow import Executor, apply_overrides, parse_prompt, validate

EXAMPLE = Path(__file__).parents[2] / "examples" / "single_subject_lora.json"


@pytest.fixture
def prompt() -> dict[str, Any]:
    load_nodes()
    return parse_prompt(EXAMPLE.read_text("utf-8"))


def test_the_example_is_the_guides(prompt: dict[str, Any], tmp_path: Path) -> None:
    graph = validate(prompt, Folders(tmp_path))
    assert graph.warnings == ()
    train = prompt["60"]["inputs"]
    assert (train["steps"], train["rank"], train["learning_rate"]) == (200, 16, 1e-4)
    texts = [(ASSETS / "input" / "fox" / f"fox_{n}.txt").read_text("utf-8").strip() for n in range(1, 7)]
    assert [prompt[str(key)]["inputs"]["text"] for key in range(40, 46)] == texts


def test_the_example_trains_saves_plots_and_samples(prompt: dict[str, Any], tmp_path: Path, tiny: Model) -> None:
    folders = Folders(tmp_path)
    fewer = ["60.steps=3", "72.batch_size=1", "80.steps=2", "90.steps=2"]
    prompt = apply_overrides(prompt, fewer)
    # Three steps at the example's rate are too few to be seen in 8 bits.
    prompt = apply_overrides(prompt, ["60.learning_rate=0.01"])
    Executor(folders).run(validate(prompt, folders))
    saved = folders.find("loras", "fox_3_steps_00001_.safetensors")
    lora = Lora.load(saved, tiny)
    assert lora.state.unknown == {}
    assert json.loads(lora.state.metadata["prompt"])["60"]["inputs"]["steps"] == 3
    assert (tmp_path / "temp" / "fox_loss_00001_.png").is_file()
    before, after = (
        np.array(Image.open(tmp_path / "output" / f"fox_{when}_00001_.png")) for when in ("before", "after")
    )
    assert before.shape == after.shape == (64, 64, 3)
    assert not np.array_equal(before, after)


def test_the_editors_version_is_the_same_graph(prompt: dict[str, Any]) -> None:
    editor = json.loads(EXAMPLE.with_suffix(".ui.json").read_text("utf-8"))
    sources = {link: [str(source), slot] for link, source, slot, *_ in editor["links"]}
    rebuilt = {}
    for member in editor["nodes"]:
        inputs: dict[str, Any] = {one["name"]: sources[one["link"]] for one in member["inputs"]}
        widgets = iter(member["widgets_values"])
        for name, slot in load_nodes()[member["type"]].slots.items():
            if not slot.scalar_types or name not in prompt[str(member["id"])]["inputs"]:
                continue
            value = next(widgets)
            inputs.setdefault(name, value)
            # Editors put a widget of their own after seeds and uploads.
            if name == "seed" or slot.extras.get("image_upload"):
                next(widgets)
        assert list(widgets) == []
        rebuilt[str(member["id"])] = {
            "class_type": member["type"],
            "inputs": inputs,
            "_meta": {"title": member["title"]},
        }
    assert rebuilt == prompt
