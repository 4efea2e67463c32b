"""`lorasmith nodes`, and the list of nodes in docs/comfyui.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.folders import Folders
from lorasmith.nodes import load_nodes
from lorasmith.workflow.node_reference import object_info
from tools.node_list import PAGE, written

Command = Callable[..., Any]


def test_nodes_are_listed_by_category(lorasmith: Command) -> None:
    ran = lorasmith("nodes")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines.index("model/training") < next(
        n for n, line in enumerate(lines) if "TrainLoraNode (Train LoRA): " in line
    )
    assert lines[-1].endswith("lorasmith run example:")
    assert sum(line.startswith("  ") for line in lines) == sum(not node.deprecated for _, node in load_nodes().items())


def test_a_node_is_shown_in_detail(lorasmith: Command) -> None:
    ran = lorasmith("nodes", "train lora")
    assert "TrainLoraNode (Train LoRA)" in ran.out
    assert "  steps: INT, default 16, from 1 to 100000\n    Number of optimizer updates." in ran.out
    assert "  0: lora (LORA_MODEL)" in ran.out


@pytest.mark.parametrize("name", [None, "KSampler"])
def test_json_is_that_of_a_server(lorasmith: Command, tmp_path: Path, name: str | None) -> None:
    ran = lorasmith("nodes", *([] if name is None else [name]), "--json", "--base-dir", str(tmp_path))
    known = load_nodes()
    chosen = [node for _, node in known.items() if name in (None, node.id)]
    assert json.loads(ran.out) == json.loads(
        json.dumps({one.id: object_info(one, Folders(tmp_path)) for one in chosen})
    )


def test_an_unknown_node_is_refused(lorasmith: Command) -> None:
    ran = lorasmith("nodes", "KSamper")
    assert ran.code == 1
    assert "unknown node 'KSamper' (did you mean 'KSampler'?)" in ran.err


def test_the_list_in_the_docs_is_the_current_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == written(), "run python -m tools.node_list"
