from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorasmith.core.errors import GraphError
from lorasmith.core.folders import Folders
from lorasmith.formats.container import write_safetensors
from lorasmith.nodes import load_nodes
from lorasmith.nodes.example_workflows import example_named
from lorasmith.nodes.outputs import save_images
from lorasmith.nodes.workflow_run import read_workflow
from lorasmith.workflow import NodeContext

PROMPT = {"1": {"class_type": "PrimitiveString", "inputs": {"value": "a"}}}
EDITOR = {"nodes": [{"id": 1, "type": "PrimitiveString", "widgets_values": ["a"]}], "links": [], "version": 0.4}


@pytest.fixture(autouse=True)
def nodes() -> None:
    load_nodes()


@pytest.mark.parametrize("content", [PROMPT, EDITOR, {"prompt": PROMPT}])
def test_json_of_either_format(tmp_path: Path, content: object) -> None:
    (tmp_path / "graph.json").write_text(json.dumps(content))
    assert read_workflow(tmp_path / "graph.json").prompt == PROMPT


def test_an_example_in_both_formats() -> None:
    example = example_named("style")
    read = read_workflow("example:style")
    assert read.prompt == json.loads(example.path.read_text("utf-8"))
    assert read.editor == json.loads(example.editor_path.read_text("utf-8"))
    assert read_workflow(Path("example:style")) == read
    with pytest.raises(GraphError, match="no example 'nothing'"):
        read_workflow("example:nothing")


def test_a_picture_that_a_graph_saved(tmp_path: Path) -> None:
    context = NodeContext(Folders(tmp_path), prompt=PROMPT, workflow=EDITOR)
    save_images(context, torch.zeros(1, 8, 8, 3), "fox", place="output")
    assert read_workflow(tmp_path / "output" / "fox_00001_.png") == (PROMPT, EDITOR)


def test_a_picture_of_the_editors_graph_alone_whatever_its_name(tmp_path: Path) -> None:
    entries = PngInfo()
    entries.add_itxt("workflow", json.dumps(EDITOR), zip=True)
    Image.new("L", (4, 4)).save(tmp_path / "picture", "PNG", pnginfo=entries)
    assert read_workflow(tmp_path / "picture") == (PROMPT, EDITOR)


def test_a_lora_that_a_graph_saved(tmp_path: Path) -> None:
    entries = {"prompt": json.dumps(PROMPT), "workflow": json.dumps(EDITOR), "ss_steps": "3"}
    write_safetensors(tmp_path / "lora.safetensors", {"a": torch.zeros(1)}, entries)
    assert read_workflow(tmp_path / "lora.safetensors") == (PROMPT, EDITOR)


def test_files_without_a_workflow_are_refused(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "plain.png")
    write_safetensors(tmp_path / "plain.safetensors", {"a": torch.zeros(1)}, {"ss_steps": "3"})
    for name in ("plain.png", "plain.safetensors"):
        with pytest.raises(GraphError, match=f"{name} carries no workflow, only files that a graph saved do"):
            read_workflow(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:20])
    with pytest.raises(GraphError, match=r"cut\.png is not a PNG that can be read"):
        read_workflow(tmp_path / "cut.png")
    with pytest.raises(GraphError, match="cannot be read"):
        read_workflow(tmp_path / "none.json")
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    with pytest.raises(GraphError):
        read_workflow(tmp_path / "bad.safetensors")
