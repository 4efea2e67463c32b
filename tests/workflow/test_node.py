from __future__ import annotations

from typing import Any

import pytest

from lorasmith.core.errors import GraphError
from lorasmith.core.registry import Registry
from lorasmith.workflow import Input, Node, NodeContext, node


@pytest.fixture
def registry() -> Registry[Node]:
    return Registry("node", GraphError)


def test_the_docstring_describes_and_aliases_resolve(toys: Any) -> None:
    assert toys.nodes["OldNumber"] is toys.nodes["Number"]
    assert toys.nodes["Number"].description == "Give a number."


def test_the_function_stays_an_ordinary_one(registry: Registry[Node]) -> None:
    @node("Twice", display_name="Twice", category="", inputs=[Input("value", "INT")], registry=registry)
    def twice(context: NodeContext, *, value: int) -> tuple[()]:
        return ()

    assert registry["Twice"].function is twice


def test_keywords_must_be_the_inputs(registry: Registry[Node]) -> None:
    declare = node("Bad", display_name="Bad", category="", inputs=[Input("steps", "INT")], registry=registry)
    with pytest.raises(TypeError, match=r"Bad: .* got \['step'\] for \['steps'\]"):

        @declare
        def bad(context: NodeContext, *, step: int) -> tuple[()]:
            return ()

    assert "Bad" not in registry


def test_optional_inputs_need_a_default_somewhere(registry: Registry[Node]) -> None:
    inputs = [Input("mask", "MASK", optional=True)]
    with pytest.raises(TypeError, match="optional input mask has no default"):

        @node("Bad", display_name="Bad", category="", inputs=inputs, registry=registry)
        def bad(context: NodeContext, *, mask: Any) -> tuple[()]:
            return ()


def test_slots_are_the_keys_of_workflow_files(toys: Any) -> None:
    assert list(toys.nodes["Sum"].slots) == ["numbers.n0", "numbers.n1", "numbers.n2", "numbers.n3", "offset", "mode"]


def test_a_last_keyword_takes_the_inputs_that_are_not_named(registry: Registry[Node]) -> None:
    inputs = [Input("model", "MODEL"), Input("steps", "INT"), Input("rank", "INT", optional=True)]

    @node("Train", display_name="Train", category="", inputs=inputs, registry=registry)
    def train(context: NodeContext, *, model: object, **settings: int) -> tuple[()]:
        return ()

    assert list(registry["Train"].slots) == ["model", "steps", "rank"]
    with pytest.raises(TypeError, match=r"got \['base'\] for \['model', 'steps', 'rank'\]"):

        @node("Bad", display_name="Bad", category="", inputs=inputs, registry=registry)
        def bad(context: NodeContext, *, base: object, **settings: int) -> tuple[()]:
            return ()
