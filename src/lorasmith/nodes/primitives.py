"""Nodes for plain values and lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorasmith.workflow import MATCH, Grow, Input, NodeContext, Output, node

_CATEGORY = "utilities/primitive"
_LIMIT = 2**63 - 1


@node(
    "PrimitiveInt",
    display_name="Int",
    category=_CATEGORY,
    inputs=[Input("value", "INT", min=-_LIMIT, max=_LIMIT, extras={"control_after_generate": "fixed"})],
    outputs=[Output("INT")],
)
def primitive_int(context: NodeContext, *, value: int) -> tuple[int]:
    """A whole number."""
    return (value,)


@node(
    "PrimitiveFloat",
    display_name="Float",
    category=_CATEGORY,
    inputs=[Input("value", "FLOAT", min=-_LIMIT, max=_LIMIT, step=0.1)],
    outputs=[Output("FLOAT")],
)
def primitive_float(context: NodeContext, *, value: float) -> tuple[float]:
    """A number."""
    return (value,)


@node(
    "PrimitiveString",
    display_name="Text",
    category=_CATEGORY,
    inputs=[Input("value", "STRING", multiline=False)],
    outputs=[Output("STRING")],
)
def primitive_string(context: NodeContext, *, value: str) -> tuple[str]:
    """Text on one line."""
    return (value,)


@node(
    "PrimitiveStringMultiline",
    display_name="Text (Multiline)",
    category=_CATEGORY,
    inputs=[Input("value", "STRING", multiline=True)],
    outputs=[Output("STRING")],
)
def primitive_string_multiline(context: NodeContext, *, value: str) -> tuple[str]:
    """Text on several lines."""
    return (value,)


@node(
    "PrimitiveBoolean",
    display_name="Boolean",
    category=_CATEGORY,
    inputs=[Input("value", "BOOLEAN")],
    outputs=[Output("BOOLEAN")],
)
def primitive_boolean(context: NodeContext, *, value: bool) -> tuple[bool]:
    """True or false."""
    return (value,)


@node(
    "CreateList",
    display_name="Create List",
    category="utilities",
    inputs=[Input("inputs", MATCH, grow=Grow("input", min=1, max=10))],
    outputs=[Output(MATCH, "list", is_list=True)],
    is_input_list=True,
)
def create_list(context: NodeContext, *, inputs: Mapping[str, list[Any]]) -> tuple[list[Any]]:
    """Join values of one type, or lists of them, into a list whose items are processed one by one."""
    return ([item for items in inputs.values() for item in items],)
