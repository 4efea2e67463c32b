from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from lorasmith.core.errors import GraphError
from lorasmith.workflow import apply_overrides


@pytest.fixture
def prompt(api_node: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return {
        "1": api_node("Number", value=3),
        "2": api_node("Sum", "Add up", **{"numbers.n0": ["1", 0], "offset": 0}),
        "3": api_node("Text", text="old"),
        "4:1": api_node("FromElsewhere", size=1),
    }


@pytest.mark.parametrize(
    ("override", "node_id", "name", "value"),
    [
        ("1.value=200", "1", "value", 200),
        (" 1.value = 2 ", "1", "value", 2),
        ("2.numbers.n0=7", "2", "numbers.n0", 7),
        ('2.numbers.n1=["1", 0]', "2", "numbers.n1", ["1", 0]),
        ("2.mode=negative", "2", "mode", "negative"),
        ("3.text=a = b", "3", "text", "a = b"),
        ("3.text=123", "3", "text", "123"),
        ('3.text="123"', "3", "text", "123"),
        ("3.text=", "3", "text", ""),
        ("1.value=many", "1", "value", "many"),
        ("4:1.size=[1,2]", "4:1", "size", [1, 2]),
        ("Add up.offset=2", "2", "offset", 2),
        ("Add up.numbers.n0=7", "2", "numbers.n0", 7),
        ("Sum.offset=2", "2", "offset", 2),
        ("FromElsewhere.size=2", "4:1", "size", 2),
    ],
)
def test_overrides(toys: Any, prompt: dict[str, Any], override: str, node_id: str, name: str, value: Any) -> None:
    before = json.dumps(prompt)
    changed = apply_overrides(prompt, [override], nodes=toys.nodes)
    assert changed[node_id]["inputs"][name] == value
    assert json.dumps(prompt) == before


def test_later_overrides_win(toys: Any, prompt: dict[str, Any]) -> None:
    changed = apply_overrides(prompt, ["1.value=1", "1.value=2"], nodes=toys.nodes)
    assert changed["1"]["inputs"]["value"] == 2


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("value=3", "must be <node>.<input>=<value>, such as 12.steps=200 or Train LoRA.steps=200, got 'value=3'"),
        ("1.value", "must be"),
        ("12.value=3", r"no node '12'.*there are node 1 'A Number', node 2 'Add up', node 3 'Text', node 4:1"),
        ("2.ofset=3", r"node 2 'Add up' has no input 'ofset' \(did you mean 'offset'\?\); it has numbers.n0"),
        ("Text.txt=3", r"node 3 'Text' has no input 'txt' \(did you mean 'text'\?\)"),
        ("Txt.text=3", r"no node 'Txt' \(did you mean 'Text'\?\)"),
        (".value=3", "no node"),
        ("4:1.length=3", "node 4:1 'FromElsewhere' has no input 'length'; it has size"),
    ],
)
def test_refused_overrides(toys: Any, prompt: dict[str, Any], override: str, sentence: str) -> None:
    with pytest.raises(GraphError, match=sentence):
        apply_overrides(prompt, [override], nodes=toys.nodes)


@pytest.mark.parametrize("inputs", [None, [], "offset", 3])
def test_an_override_of_a_damaged_node_is_refused(toys: Any, inputs: object) -> None:
    with pytest.raises(GraphError, match="node 1 'A Number' must have an object of inputs"):
        apply_overrides({"1": {"class_type": "Number", "inputs": inputs}}, ["1.value=3"], nodes=toys.nodes)


def test_a_title_of_several_nodes_says_which_ids_there_are(
    toys: Any, prompt: dict[str, Any], api_node: Callable[..., dict[str, Any]]
) -> None:
    prompt["7"] = api_node("Number", "Add up", value=1)
    with pytest.raises(GraphError, match="2 nodes are called 'Add up'; use an id: 2, 7"):
        apply_overrides(prompt, ["Add up.offset=3"], nodes=toys.nodes)
    prompt["7"]["_meta"]["title"] = "size 1.5"
    assert apply_overrides(prompt, ["size 1.5.value=3"], nodes=toys.nodes)["7"]["inputs"]["value"] == 3
    with pytest.raises(GraphError, match="2 nodes are called 'Number'; use an id: 1, 7"):
        apply_overrides(prompt, ["Number.value=3"], nodes=toys.nodes)
