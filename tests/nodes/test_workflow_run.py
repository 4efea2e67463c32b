"""`lorasmith.run_workflow`."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

import lorasmith as ls
from lorasmith.core.errors import CancelledError, GraphError
from lorasmith.core.folders import Folders
from lorasmith.nodes.workflow_run import shown_file
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow.execution_events import Event, ExecutionFinished, NodeProgress

QUICK = {"Train LoRA.steps": 2, "Train LoRA.rank": 2, "Train LoRA.learning_rate": 0.01, "20.targets": "*.attn2.to_q"}


@pytest.mark.slow
def test_an_example_runs_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    events: list[Event] = []
    result = ls.run_workflow("example:folder", changes=QUICK, on_event=events.append)
    assert result.files == (tmp_path / "output" / "loras" / "folder_2_steps_00001_.safetensors",)
    metadata = Lora.load(result.files[0]).state.metadata
    assert json.loads(metadata["prompt"])["20"]["inputs"]["rank"] == 2
    assert json.loads(metadata["workflow"])["nodes"]  # opens in the editor
    lora, losses, steps = result.outputs["20"]
    assert (len(lora), len(losses[0]["loss"]), steps) == (1, 2, (2,))
    assert repr(result) == f"WorkflowResult(outputs of 6 nodes, files: {result.files[0]})"  # not its tensors
    assert isinstance(events[-1], ExecutionFinished)
    assert [one.value for one in events if isinstance(one, NodeProgress) and one.node_id == "20"][-1] == 2
    assert "%|" not in capsys.readouterr().err  # no bars where nobody sees them


def test_notes_are_written_unless_progress_is_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = {
        "1": {"class_type": "PreviewAny", "inputs": {"source": "a"}},
        "2": {"class_type": "SomebodysNode", "inputs": {}},
    }
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(graph))
    for progress in (True, False):
        assert ls.run_workflow(file, base_dir=tmp_path, progress=progress).files == ()
        assert ("left out, as their classes are unknown" in capsys.readouterr().err) is progress


def test_a_run_can_be_stopped_and_wrong_names_are_refused(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(CancelledError):
        ls.run_workflow("example:folder", base_dir=tmp_path, cancel=stop)
    with pytest.raises(GraphError, match=r"did you mean 'folder'"):
        ls.run_workflow("example:foldr")
    with pytest.raises(GraphError, match="no node 'Sampler'"):
        ls.run_workflow("example:folder", changes={"Sampler.steps": 2})


def test_files_among_what_nodes_show(tmp_path: Path) -> None:
    item = {"filename": "a.png", "subfolder": "b", "type": "temp"}
    assert shown_file(item, Folders(tmp_path)) == tmp_path / "temp" / "b" / "a.png"
    assert shown_file("text", Folders(tmp_path)) is None
