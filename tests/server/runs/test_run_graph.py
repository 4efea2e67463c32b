from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lorasmith.core.errors import LorasmithError
from lorasmith.core.folders import Folders
from lorasmith.nodes import load_nodes
from lorasmith.server.runs.run_result_answers import run_graph
from lorasmith.workflow.graph import validate
from tests.server.runs.test_run_answers import RUN, changed_record


def test_a_run_on_a_folder_is_a_graph_that_can_run(installation: Folders, base: Path) -> None:
    found = run_graph(installation, RUN)
    graph = found["prompt"]
    load_nodes()
    validate(graph, installation)
    train = next(one["inputs"] for one in graph.values() if one["class_type"] == "TrainLoraNode")
    record = json.loads((base / RUN / "run.json").read_text())["config"]
    for name in ("steps", "rank", "learning_rate", "alpha", "targets", "schedule", "zero_init", "seed"):
        assert train[name] == record[name], name
    assert train["existing_lora"] == "[None]" and train["previews"] == "a dog"
    kinds = {one["class_type"]: one["inputs"] for one in graph.values()}
    assert kinds["CheckpointLoaderSimple"]["ckpt_name"] == "lorasmith-tiny.safetensors"
    assert kinds["LoadImageTextDataSetFromFolder"]["folder"] == "dog"
    assert kinds["AddTextPrefix"]["prefix"] == "sks dog, "
    assert all(note.endswith(".") for note in found["notes"])


def test_a_run_of_a_graph_is_that_graph(installation: Folders, base: Path) -> None:
    changed_record(base, source={"command": "run", "prompt": {"1": {"class_type": "X", "inputs": {}}}})
    assert run_graph(installation, RUN) == {"prompt": {"1": {"class_type": "X", "inputs": {}}}, "notes": []}


def test_what_nodes_do_not_find_is_refused(installation: Folders, base: Path, tmp_path: Path) -> None:
    moved = tmp_path / "photos"
    shutil.copytree(base / "input" / "dog", moved)
    source = json.loads((base / RUN / "run.json").read_text())["source"]
    for change, match in (
        ({"folder": str(moved)}, "finds images in the input folder alone"),
        ({"model": str(tmp_path / "m.safetensors")}, "finds models in the model folders alone"),
        ({"vae": str(tmp_path / "v.safetensors")}, "in models/vae alone"),
        ({"command": "script"}, "only runs on folders and of graphs"),
    ):
        changed_record(base, source={**source, **change})
        with pytest.raises(LorasmithError, match=match):
            run_graph(installation, RUN)


def test_a_run_on_pairs_is_a_graph_of_pairs(installation: Folders, base: Path) -> None:
    record = json.loads((base / RUN / "run.json").read_text())
    images = [{"name": "1.png", "controls": 1}, {"name": "2.png"}]
    shutil.copytree(base / "input" / "dog", base / "input" / "dog" / "control")
    shutil.copytree(base / "input" / "dog" / "control", base / "input" / "before")
    for control, folder in (([], "dog/control"), ([str(base / "input" / "before")], "before")):
        source = {**record["source"], **({"control": control} if control else {})}
        changed_record(base, source=source, data={**record["data"], "images": images})
        graph = run_graph(installation, RUN)["prompt"]
        load_nodes()
        validate(graph, installation)
        kinds = {one["class_type"]: one["inputs"] for one in graph.values()}
        assert kinds["LoadImagePairDataSetFromFolder"] == {"folder": "dog", "control_folder": folder}
        scaled, pairs = graph[kinds["MakeTrainingPairs"]["controls"][0]], kinds["AddTextPrefix"]["texts"]
        assert scaled["inputs"]["image"] == ["10", 1] and pairs == ["10", 2]
    changed_record(base, data={**record["data"], "images": [{"name": "1.png", "controls": 2}]})
    with pytest.raises(LorasmithError, match="has one control for each image, got 2; use its command"):
        run_graph(installation, RUN)
