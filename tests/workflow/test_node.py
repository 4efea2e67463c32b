from __future__ import annotations

import pytest

from lorasmith.core.errors import GraphError
from lorasmith.core.folders import ASSETS, Folders
from lorasmith.core.registry import Registry
from lorasmith.workflow import Input, Node, NodeContext, node, socket


@pytest.fixture
def registry() -> Registry[Node]:
    return Registry("node", GraphError)


def test_the_function_stays_an_ordinary_one(registry: Registry[Node]) -> None:
    @node("Twice", "Twice", "", registry=registry)
    def twice(
        context: NodeContext, *, value: int = socket("INT"), by: int | None = socket("INT", optional=True)
    ) -> tuple[int | None]:
        return (by,)

    assert registry["Twice"].function is twice
    assert twice(NodeContext(Folders(ASSETS)), value=1) == (None,)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'value'"):
        twice(NodeContext(Folders(ASSETS)))


def test_every_keyword_is_an_input(registry: Registry[Node]) -> None:
    with pytest.raises(TypeError, match="Bad: the keyword step must have a socket as its default"):

        @node("Bad", "Bad", "", registry=registry)
        def bad(context: NodeContext, *, steps: int = socket("INT"), step: int) -> tuple[()]:
            return ()

    assert "Bad" not in registry


def test_a_last_keyword_takes_the_inputs_that_are_not_named(registry: Registry[Node]) -> None:
    inputs = [Input("steps", "INT"), Input("rank", "INT", optional=True)]

    @node("Train", "Train", "", inputs=inputs, registry=registry)
    def train(context: NodeContext, *, model: object = socket("MODEL"), **settings: int) -> tuple[()]:
        return ()

    assert list(registry["Train"].slots) == ["model", "steps", "rank"]
