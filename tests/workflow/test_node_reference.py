from __future__ import annotations

from typing import Any

import pytest

from lorasmith.core.errors import GraphError
from lorasmith.workflow import Grow, Input, NodeContext, node
from lorasmith.workflow.node_reference import badges, find_node, input_facts, nodes_by_category


def test_nodes_are_found_by_class_older_name_and_title(toys: Any) -> None:
    for name in ("Number", "number", "OldNumber", " A Number ", "a number"):
        assert find_node(name, toys.nodes).id == "Number"
    with pytest.raises(
        GraphError, match=r"unknown node 'A Numbr' \(did you mean 'A Number'\?\); `lorasmith nodes` lists"
    ):
        find_node("A Numbr", toys.nodes)

    @node("Second", display_name="A Number", category="toys", deprecated=True, output_node=True, registry=toys.nodes)
    def second(context: NodeContext) -> tuple[()]:
        """Do nothing."""
        return ()

    with pytest.raises(GraphError, match="2 nodes are called 'A Number'; give a class: Number, Second"):
        find_node("A Number", toys.nodes)
    assert badges(toys.nodes["Second"]) == ["output", "deprecated"]
    listed = [one.id for _, members in nodes_by_category(toys.nodes) for one in members]
    assert "Number" in listed
    assert "Second" not in listed
    assert listed == sorted(listed, key=str.casefold)


@pytest.mark.parametrize(
    ("declared", "facts"),
    [
        (Input("rank", "INT", default=8, min=1, max=128), ["INT", "default 8", "from 1 to 128"]),
        (Input("rate", "FLOAT", min=0.5, max=1e-7), ["FLOAT", "from 0.5 to 1e-07"]),
        (Input("seed", "INT", max=2**64 - 1), ["INT", "to 18446744073709551615"]),
        (Input("value", "*"), ["any type"]),
        (Input("mode", "COMBO", default="a"), ["choice", "default 'a'", "one of a, b"]),
        (Input("numbers", "INT", grow=Grow("n", min=1, max=4)), ["INT", "repeated 1 to 4 times"]),
    ],
)
def test_facts_of_inputs(declared: Input, facts: list[str]) -> None:
    assert input_facts(declared, ["a", "b"] if declared.type == "COMBO" else []) == facts
