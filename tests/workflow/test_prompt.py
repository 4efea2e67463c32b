from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import GraphError
from lorasmith.workflow import apply_overrides, parse_prompt

PROMPT = {"3": {"class_type": "Number", "inputs": {"value": 3}}}


def test_a_prompt_is_taken_out_of_its_wrapper() -> None:
    assert parse_prompt(json.dumps(PROMPT)) == PROMPT
    assert parse_prompt(json.dumps({"prompt": PROMPT, "client_id": "x"}).encode()) == PROMPT


def test_a_node_may_be_called_prompt() -> None:
    named = {"prompt": {"class_type": "Number", "inputs": {}}}
    assert parse_prompt(json.dumps(named)) == named


@pytest.mark.parametrize("text", ["", "{", "not json", b"\xff\xfe\x00", "[" * 100_000])
def test_what_is_not_json_is_refused_with_the_remedy(text: str | bytes) -> None:
    with pytest.raises(GraphError, match=r"must be JSON, .* choose Workflow > Export \(API\)"):
        parse_prompt(text)


@pytest.mark.parametrize(("content", "kind"), [([], "a list"), ("x", "text"), (3, "a number"), (None, "or null")])
def test_what_is_not_an_object_is_refused(content: Any, kind: str) -> None:
    with pytest.raises(GraphError, match=f"must hold a JSON object of nodes, got .*{kind}"):
        parse_prompt(json.dumps(content))


def test_the_editors_format_is_refused_with_the_remedy() -> None:
    editor = {"last_node_id": 1, "nodes": [{"id": 1, "type": "KSampler"}], "links": [], "version": 0.4}
    with pytest.raises(GraphError, match=r"editor's format; in ComfyUI choose Workflow > Export \(API\)") as caught:
        parse_prompt(json.dumps(editor))
    assert "\n" not in str(caught.value)


@given(st.text() | st.binary())
def test_any_text_is_a_prompt_or_a_graph_error(text: str | bytes) -> None:
    with contextlib.suppress(GraphError):
        assert isinstance(parse_prompt(text), dict)


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
        ("value=3", "must be <node id>.<input>=<value>, such as 12.steps=200, got 'value=3'"),
        ("1.value", "must be"),
        ("12.value=3", r"no node '12'.*there are node 1 'A Number', node 2 'Add up', node 3 'Text', node 4:1"),
        ("2.ofset=3", r"node 2 'Add up' has no input 'ofset' \(did you mean 'offset'\?\); it has numbers.n0"),
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


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[" * 10_000 + "]" * 10_000, "nested deeper than"),
        (r'{"1": {"class_type": "\ud800"}}', "half of a surrogate pair"),
        ('{"1": {"class_type": "A", "inputs": {"seed": 1' + "0" * 400 + "}}}", "an integer beyond 64 bits"),
    ],
)
def test_json_that_breaks_what_reads_it_is_refused(text: str, rule: str) -> None:
    with pytest.raises(GraphError, match=f"must be JSON, but this one .*{rule}.*; in ComfyUI choose"):
        parse_prompt(text)
