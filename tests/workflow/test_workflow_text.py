from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import GraphError
from lorasmith.workflow import carried_workflow, parse_prompt, parse_workflow

PROMPT = {"3": {"class_type": "Number", "inputs": {"value": 3}}}
EDITOR = {"nodes": [{"id": 3, "type": "Number", "widgets_values": [3]}], "links": [], "version": 0.4}


def test_a_prompt_is_taken_out_of_its_wrapper() -> None:
    assert parse_prompt(json.dumps(PROMPT)) == PROMPT
    assert parse_prompt(json.dumps({"prompt": PROMPT, "client_id": "x"}).encode()) == PROMPT


def test_a_node_may_be_called_prompt() -> None:
    named = {"prompt": {"class_type": "Number", "inputs": {}}}
    assert parse_prompt(json.dumps(named)) == named


@pytest.mark.parametrize("text", ["", "{", "not json", b"\xff\xfe\x00", "[" * 100_000])
def test_what_is_not_json_is_refused_with_the_remedy(text: str | bytes) -> None:
    with pytest.raises(GraphError, match=r"must be JSON, .* choose Workflow > Save"):
        parse_prompt(text)


@pytest.mark.parametrize(("content", "kind"), [([], "a list"), ("x", "text"), (3, "a number"), (None, "or null")])
def test_what_is_not_an_object_is_refused(content: Any, kind: str) -> None:
    with pytest.raises(GraphError, match=f"must hold a JSON object of nodes, got .*{kind}"):
        parse_prompt(json.dumps(content))


@given(st.text() | st.binary())
def test_any_text_is_a_prompt_or_a_graph_error(text: str | bytes) -> None:
    with contextlib.suppress(GraphError):
        assert isinstance(parse_prompt(text), dict)


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


def test_both_formats_are_read_and_the_editors_is_kept(toys: Any) -> None:
    assert parse_workflow(json.dumps(PROMPT), nodes=toys.nodes) == (PROMPT, None)
    assert parse_workflow(b"\xef\xbb\xbf" + json.dumps(EDITOR).encode(), nodes=toys.nodes) == (PROMPT, EDITOR)


def test_metadata_carry_a_workflow_under_two_names(toys: Any) -> None:
    prompt, editor = json.dumps(PROMPT), json.dumps(EDITOR)
    assert carried_workflow({"prompt": prompt, "workflow": editor, "else": "x"}, nodes=toys.nodes) == (PROMPT, EDITOR)
    assert carried_workflow({"workflow": editor}, nodes=toys.nodes) == (PROMPT, EDITOR)
    assert carried_workflow({"prompt": prompt, "workflow": "{"}, nodes=toys.nodes) == (PROMPT, None)
    assert carried_workflow({"prompt": prompt, "workflow": "[]"}, nodes=toys.nodes) == (PROMPT, None)
    assert carried_workflow({"else": prompt}, nodes=toys.nodes) is None
    with pytest.raises(GraphError, match="must be JSON"):
        carried_workflow({"prompt": "a fox"}, nodes=toys.nodes)
