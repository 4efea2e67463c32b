"""A small registry of nodes about numbers, whose graphs are easy to compute by hand, and a record of what ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.errors import DataError, GraphError
from lorasmith.core.folders import Folders
from lorasmith.core.registry import Registry
from lorasmith.workflow import ANY, MATCH, Grow, Node, NodeContext, NodeOutput, Output, node, socket


@dataclass
class Toys:
    """Nodes, folders, and the ids of the nodes whose functions were called, in order."""

    nodes: Registry[Node]
    folders: Folders
    ran: list[str] = field(default_factory=list)


@pytest.fixture
def toys(tmp_path: Path) -> Toys:
    made = Toys(Registry("node", GraphError), Folders(tmp_path))
    _declare_sources(made)
    _declare_lists(made)
    _declare_goals(made)
    return made


def api_node(class_type: str, title: str | None = None, **inputs: Any) -> dict[str, Any]:
    member: dict[str, Any] = {"class_type": class_type, "inputs": inputs}
    return member if title is None else {**member, "_meta": {"title": title}}


@pytest.fixture(name="api_node")
def api_node_fixture() -> Any:
    return api_node


def _declare_sources(toys: Toys) -> None:
    @node("Number", "A Number", "toys", outputs=["INT"], aliases=["OldNumber"], registry=toys.nodes)
    def number(context: NodeContext, *, value: int = socket("INT", default=1, min=0, max=100)) -> tuple[int]:
        """Give a number.

        This paragraph is for readers of the code.
        """
        toys.ran.append(context.node_id)
        return (value,)

    @node("Sum", "Sum", "toys", outputs=[Output("INT", "sum")], registry=toys.nodes)
    def total(
        context: NodeContext,
        *,
        numbers: Mapping[str, int] = socket("INT", grow=Grow("n", min=1, max=4)),
        offset: int = socket("INT", default=0, min=-10, max=1000),
        mode: str = socket("COMBO", options=("Plain", "Negative"), default="Plain", optional=True),
    ) -> tuple[int]:
        toys.ran.append(context.node_id)
        return ((sum(numbers.values()) + offset) * (-1 if mode == "Negative" else 1),)

    @node("Text", "Text", "toys", outputs=["STRING"], registry=toys.nodes)
    def text(context: NodeContext, *, text: str = socket("STRING", multiline=True)) -> tuple[str]:
        toys.ran.append(context.node_id)
        return (text,)

    @node("ReadFile", "Read File", "toys", outputs=["STRING"], registry=toys.nodes)
    def read_file(
        context: NodeContext,
        *,
        file: str = socket(
            "COMBO",
            options=lambda folders: folders.input_files([".txt"]),
            accept=lambda name, folders: str(folders.find_input(name)) and name,
            file=Folders.find_input,
        ),
    ) -> tuple[str]:
        toys.ran.append(context.node_id)
        return (context.folders.find_input(file).read_text(),)


def _declare_lists(toys: Toys) -> None:
    @node("Range", "Range", "toys", outputs=[Output("INT", is_list=True), Output("INT", "count")], registry=toys.nodes)
    def counted(context: NodeContext, *, count: int = socket("INT", default=3, min=0, max=10)) -> tuple[list[int], int]:
        toys.ran.append(context.node_id)
        return list(range(count)), count

    @node("Gather", "Gather", "toys", outputs=["LIST"], is_input_list=True, registry=toys.nodes)
    def gather(
        context: NodeContext,
        *,
        items: list[Any] = socket(ANY),
        note: list[str] | None = socket("STRING", optional=True),
    ) -> tuple[Any]:
        toys.ran.append(context.node_id)
        return ((items, note),)

    @node(
        "MakeList",
        "Make List",
        "toys",
        outputs=[Output(MATCH, "list", is_list=True)],
        is_input_list=True,
        registry=toys.nodes,
    )
    def make_list(
        context: NodeContext, *, inputs: Mapping[str, list[Any]] = socket(MATCH, grow=Grow("input"))
    ) -> tuple[list[Any]]:
        toys.ran.append(context.node_id)
        return ([item for items in inputs.values() for item in items],)


def _declare_goals(toys: Toys) -> None:
    @node("Show", "Show", "toys", output_node=True, registry=toys.nodes)
    def show(context: NodeContext, *, value: Any = socket("INT,STRING,LIST")) -> NodeOutput:
        """Show a value."""
        toys.ran.append(context.node_id)
        return NodeOutput(ui={"text": [str(value)]})

    @node("Refuse", "Refuse", "toys", output_node=True, registry=toys.nodes)
    def refuse(
        context: NodeContext, *, value: int = socket("INT"), bug: bool = socket("BOOLEAN", default=False, optional=True)
    ) -> tuple[()]:
        toys.ran.append(context.node_id)
        if bug:
            raise ZeroDivisionError("a bug")
        raise DataError(f"the value must be liked, got {value}; choose another")

    @node("Slow", "Slow", "toys", outputs=["INT"], registry=toys.nodes)
    def slow(
        context: NodeContext, *, value: int = socket("INT"), stop: bool = socket("BOOLEAN", default=True)
    ) -> tuple[int]:
        toys.ran.append(context.node_id)
        context.progress(1, 2, text="half")
        context.warn("slow")
        if stop:
            context.cancel.set()
        return (value,)
