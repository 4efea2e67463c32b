"""The example workflows are listed, and run as they are, with fewer steps."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorasmith.core.errors import GraphError
from lorasmith.core.folders import ASSETS, BUILT_IN_BASE, Folders
from lorasmith.families.model import Model
from lorasmith.nodes import load_nodes
from lorasmith.nodes.example_workflows import example_named, examples
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import Executor, apply_overrides, parse_prompt, validate

EXAMPLES = ASSETS / "examples"
SUBJECT, STYLE = EXAMPLES / "single_subject.json", EXAMPLES / "style.json"

ALL = sorted(path for path in EXAMPLES.glob("*.json") if not path.name.endswith(".ui.json"))


def test_every_file_is_listed_with_what_it_needs() -> None:
    listed = examples()
    assert sorted(one.path for one in listed) == ALL
    assert sorted(path for one in listed for path in (one.path, one.editor_path)) == sorted(EXAMPLES.iterdir())
    assert len({one.title for one in listed}) == len(listed)
    needs = {one.name: one.needs for one in listed}
    assert (
        [name for name, files in needs.items() if not files]
        == list(needs)[:7]
        == ["single_subject", "style", "folder", "continue", "strengths", "preserve", "text_encoder"]
    )
    assert needs["flux1"] == ("flux1-dev.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors", "ae.safetensors")


def test_an_unknown_example_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        GraphError, match=r"no example 'stile' \(did you mean 'style'\?\).*single_subject, style, .*wan"
    ):
        example_named("stile")


def prompt_in(example: Path) -> dict[str, Any]:
    load_nodes()
    return parse_prompt(example.read_text("utf-8"))


@pytest.fixture
def prompt() -> dict[str, Any]:
    return prompt_in(SUBJECT)


def test_the_example_is_the_guides(prompt: dict[str, Any], tmp_path: Path) -> None:
    graph = validate(prompt, Folders(tmp_path))
    assert graph.warnings == ()
    train = prompt["60"]["inputs"]
    assert (train["steps"], train["rank"], train["learning_rate"]) == (200, 16, 1e-4)
    texts = [(BUILT_IN_BASE / "input" / "fox" / f"fox_{n}.txt").read_text("utf-8").strip() for n in range(1, 7)]
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


def test_an_example_with_a_clip_trains(tmp_path: Path, tiny: Model) -> None:
    fewer = ["20.steps=2", "20.rank=2", "20.targets=*.attn2.to_q", "20.learning_rate=0.01", "20.previews="]
    folders = Folders(tmp_path)
    graph = validate(apply_overrides(prompt_in(EXAMPLES / "text_encoder.json"), fewer), folders)
    assert graph.warnings == ()
    Executor(folders).run(graph)
    (saved,) = (tmp_path / "output" / "loras").glob("*.safetensors")
    assert {ref.component for ref in Lora.load(saved, tiny).state.adapters} == {"denoiser", "text_encoder"}


@pytest.mark.parametrize("example", ALL, ids=lambda path: path.stem)
def test_the_editors_version_is_the_same_graph(example: Path) -> None:
    prompt = prompt_in(example)
    editor = json.loads(example.with_suffix(".ui.json").read_text("utf-8"))
    sources = {link: [str(source), slot] for link, source, slot, *_ in editor["links"]}
    rebuilt = {}
    for member in editor["nodes"]:
        inputs: dict[str, Any] = {one["name"]: sources[one["link"]] for one in member["inputs"]}
        widgets = iter(member["widgets_values"])
        for name, slot in load_nodes()[member["type"]].slots.items():
            has_widget = slot.scalar_types and not slot.force_input
            if not has_widget or (value := next(widgets, None)) is None:
                continue
            if name in prompt[str(member["id"])]["inputs"]:
                inputs.setdefault(name, value)
            else:
                assert value == slot.default
            # Editors put a widget of their own after seeds and uploads.
            if slot.extras.get("control_after_generate") or name == "seed" or slot.extras.get("image_upload"):
                next(widgets)
        assert list(widgets) == []
        rebuilt[str(member["id"])] = {
            "class_type": member["type"],
            "inputs": inputs,
            "_meta": {"title": member["title"]},
        }
    assert rebuilt == prompt


@pytest.mark.parametrize("example", ALL, ids=lambda path: path.stem)
def test_no_two_nodes_of_the_editors_version_overlap(example: Path) -> None:
    title_bar = 30
    boxes = {}
    for member in json.loads(example.with_suffix(".ui.json").read_text("utf-8"))["nodes"]:
        (x, y), (width, height) = member["pos"], member["size"]
        boxes[member["title"]] = (x, y - title_bar, x + width, y + height)
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], f"{one} overlaps {other}"
