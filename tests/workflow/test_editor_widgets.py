from __future__ import annotations

from typing import Any

import pytest

from lorasmith.nodes import load_nodes
from lorasmith.workflow import NodeContext, node, socket
from lorasmith.workflow.editor_graph import EditorNode, is_control, named_values, names_in, without_missing_controls

SAMPLER = ["seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"]


def test_names_follow_the_declaration_with_a_place_after_seeds() -> None:
    names = names_in(load_nodes())
    assert names("KSampler", [5, "randomize", 20, 8, "euler", "normal", 1]) == SAMPLER
    assert names("PrimitiveInt", [5, "fixed"]) == ["value", None]
    assert names("ksampler", []) == SAMPLER
    assert names("Unheard", []) is None


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ([5, "randomize", 20, 8], 20),
        ([5, "increment-wrap", 20, 8], 20),
        ([5, True, 20, 8], 20),
        ([5, None, 20, 8], 20),
        ([5, 20, 8, "euler"], 20),
        ([5], ...),
        ([], ...),
    ],
)
def test_a_file_may_lack_the_editors_own_widget(values: list[Any], steps: object) -> None:
    found = named_values(EditorNode("1", "KSampler", values=values), names_in(load_nodes()))
    assert found is not None
    assert found.get("steps", ...) == steps


def test_older_files_keep_values_of_inputs_that_are_sockets_only(toys: Any) -> None:
    @node("Forced", "Forced", "toys", registry=toys.nodes)
    def forced(
        context: NodeContext,
        *,
        a: int = socket("INT"),
        b: str = socket("STRING", force_input=True),
        later: int = socket("INT", optional=True, default=1),
        c: int = socket("INT"),
    ) -> tuple[()]:
        """Take inputs."""
        return ()

    names = names_in(toys.nodes)
    assert names("Forced", [1, 2, 3]) == ["a", "c", "later"]
    assert names("Forced", [1, "b", 2, 3]) == ["a", None, "c", "later"]


def test_controls() -> None:
    assert all(map(is_control, ["fixed", "randomize", True, None]))
    assert not any(map(is_control, ["euler", 3, 1.5, [], {}]))
    assert without_missing_controls(["a", None, "b", None], [1, 2, "fixed"]) == ["a", "b", None]
