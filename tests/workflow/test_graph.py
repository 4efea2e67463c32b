from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import GraphError
from lorasmith.workflow import ANY, NodeContext, node, object_info, socket
from lorasmith.workflow.graph import Link, examine, validate
from tests.processor_time import processor_time

ApiNode = Callable[..., dict[str, Any]]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def prompt(api_node: ApiNode) -> dict[str, Any]:
    return {
        "1": api_node("Number", value=3),
        "2": api_node("Sum", "Add up", **{"numbers.n0": ["1", 0], "numbers.n1": 4, "offset": 2, "mode": "negative"}),
        "3": api_node("Show", value=["2", 0]),
    }


def faults(toys: Any, prompt: dict[str, Any]) -> list[str]:
    return [str(fault) for fault in examine(prompt, toys.folders, nodes=toys.nodes).faults]


def test_a_good_prompt_becomes_a_graph(toys: Any, prompt: dict[str, Any]) -> None:
    graph = validate(prompt, toys.folders, nodes=toys.nodes)
    assert list(graph.nodes) == ["1", "2", "3"]
    assert graph.outputs == ("3",)
    assert graph.nodes["2"].title == "Add up"
    assert graph.nodes["1"].title == "A Number"
    assert graph.nodes["2"].inputs == {"numbers.n0": Link("1", 0), "numbers.n1": 4, "offset": 2, "mode": "Negative"}
    assert graph.warnings == ()
    prompt["1"]["inputs"]["value"] = 5.0
    prompt["2"]["inputs"]["offset"] = "8"
    del prompt["2"]["inputs"]["mode"]
    read = validate(prompt, toys.folders, nodes=toys.nodes).nodes
    assert type(read["1"].inputs["value"]) is int
    assert read["2"].inputs == {"numbers.n0": Link("1", 0), "numbers.n1": 4, "offset": 8, "mode": "Plain"}


def test_numeric_ids_aliases_and_wrapped_values(toys: Any, api_node: ApiNode) -> None:
    prompt = {1: api_node("oldnumber", value={"__value__": 4}), 2: api_node("Show", value=[1, 0])}
    graph = validate(prompt, toys.folders, nodes=toys.nodes)
    assert graph.nodes["1"].inputs == {"value": 4}
    assert graph.nodes["1"].node is toys.nodes["Number"]


def test_all_faults_are_found_at_once_and_name_their_node(toys: Any, api_node: ApiNode) -> None:
    prompt = {
        "1": api_node("Number", value=500),
        "2": api_node("Sum", "Add up", **{"numbers.n0": ["1", 3], "offset": "two", "mode": "negativ"}),
        "3": api_node("Shwo", value=["2", 0]),
        "4": api_node("Show", value=["9", 0]),
        "5": api_node("Refuse", value=["6", 0]),
        "6": api_node("Text", text=["2", 0]),
        "7": api_node("Show"),
        "8": api_node("Show", value=["1"]),
        "9b": {"inputs": {}},
        "10": api_node("Show", value=["2", 0]),
        "11": api_node("Show", value=["3", 0]),
        "12": api_node("Show", value=["9b", 0]),
    }
    with pytest.raises(GraphError) as caught:
        validate(prompt, toys.folders, nodes=toys.nodes)
    assert caught.value.findings == (
        "node 1 'A Number': value must be between 0 and 100, got 500",
        "node 2 'Add up': offset must be an integer, got 'two'",
        "node 2 'Add up': mode must be one of Plain, Negative, got 'negativ' (did you mean 'Negative'?)",
        "node 2 'Add up': numbers.n0 is linked to output 3 of node 1 'A Number', which has 1 output, counted from 0; "
        "link another one",
        "node 3 'Shwo': unknown node 'Shwo' (did you mean 'Show'?); replace or remove it",
        "node 4 'Show': value is linked to node '9', which is missing (did you mean '9b'?); link another one",
        "node 5 'Refuse': value must be linked to an output of type INT, "
        "got the STRING output 'STRING' of node 6 'Text'",
        "node 6 'Text': text must be linked to an output of type STRING, got the INT output 'sum' of node 2 'Add up'",
        "node 7 'Show': required input value is missing; add it",
        "node 8 'Show': value must be a value or a link [node id, output number], got ['1']",
        "node 9b: a node must be an object with class_type and inputs; export the workflow again",
    )
    assert str(caught.value).startswith("this workflow cannot run, it has 11 faults\n  - node 1 'A Number'")


def test_an_unknown_node_names_the_one_that_does_the_same(toys: Any, api_node: ApiNode) -> None:
    @node("Shown", "Show It", "toys", search_aliases=["PackShow"], output_node=True, registry=toys.nodes)
    def shown(context: NodeContext) -> None: ...

    with pytest.raises(GraphError) as caught:
        validate({"1": api_node("PackShow")}, toys.folders, nodes=toys.nodes)
    assert caught.value.findings == ("node 1 'PackShow': unknown node 'PackShow'; replace it by Shown (Show It)",)


def test_faults_carry_the_protocols_names(toys: Any, prompt: dict[str, Any]) -> None:
    prompt["1"]["inputs"]["value"] = -1
    prompt["2"]["inputs"].update({"offset": 1001, "mode": "x", "numbers.n1": None})
    found = examine(prompt, toys.folders, nodes=toys.nodes).faults
    assert [(one.node_id, one.kind, one.input_name) for one in found] == [
        ("1", "value_smaller_than_min", "value"),
        ("2", "invalid_input_type", "numbers.n1"),
        ("2", "value_bigger_than_max", "offset"),
        ("2", "value_not_in_list", "mode"),
    ]


def test_a_missing_input_takes_its_default_if_it_has_one(toys: Any, prompt: dict[str, Any]) -> None:
    del prompt["2"]["inputs"]["offset"], prompt["2"]["inputs"]["numbers.n0"]
    assert faults(toys, prompt) == ["node 2 'Add up': required input numbers.n0 is missing; add it"]
    prompt["2"]["inputs"]["numbers.n0"] = ["1", 0]
    graph = validate(prompt, toys.folders, nodes=toys.nodes)
    assert graph.nodes["2"].inputs["offset"] == 0
    assert graph.warnings == ("node 2 'Add up': missing inputs take their defaults: offset=0",)


def test_unknown_inputs_are_warnings(toys: Any, prompt: dict[str, Any]) -> None:
    prompt["2"]["inputs"]["ofset"] = ["99", 0]
    graph = validate(prompt, toys.folders, nodes=toys.nodes)
    assert "ofset" not in graph.nodes["2"].inputs
    assert graph.warnings == (
        "node 2 'Add up': input ofset is ignored, as the node has no such input (did you mean 'offset'?)",
    )


def test_faults_of_nodes_that_no_output_needs_are_warnings(
    toys: Any, prompt: dict[str, Any], api_node: ApiNode
) -> None:
    prompt["4"] = api_node("Number", "Left over", value=-1)
    graph = validate(prompt, toys.folders, nodes=toys.nodes)
    assert "4" not in graph.nodes
    assert graph.warnings == ("node 4 'Left over': value must be between 0 and 100, got -1",)


def test_an_unknown_node_that_no_output_needs_is_a_warning(
    toys: Any, prompt: dict[str, Any], api_node: ApiNode
) -> None:
    prompt["4"] = api_node("SaveNumber", value=["5", 0], pair=[None, 0], text="x")
    prompt["5"] = api_node("Number", value=-1)
    graph = validate(prompt, toys.folders, nodes=toys.nodes)
    assert list(graph.nodes) == ["1", "2", "3"]
    assert graph.warnings == (
        "left out, as their classes are unknown and no output needs them: node 4 'SaveNumber'",
        "node 5 'A Number': value must be between 0 and 100, got -1",
    )
    with pytest.raises(GraphError, match="unknown node 'SaveNumber'"):
        validate(prompt, toys.folders, nodes=toys.nodes, targets=["4"])
    prompt |= {f"a{index}": api_node(f"Other{index}", value=["2", 0]) for index in range(20)}
    warning, _ = validate(prompt, toys.folders, nodes=toys.nodes).warnings
    assert "node 4 'SaveNumber', node a0 'Other0'" in warning and warning.endswith("and 11 more")
    prompt["6"] = api_node("Show", value=["4", 0])
    assert faults(toys, prompt) == [
        "node 4 'SaveNumber': unknown node 'SaveNumber' (did you mean 'Number'?); replace or remove it",
        "node 5 'A Number': value must be between 0 and 100, got -1",
    ], "what an unknown node is linked to counts as needed"


def test_without_a_known_output_an_unknown_node_may_be_one(toys: Any, api_node: ApiNode) -> None:
    prompt = {"1": api_node("Number", value=-1), "2": api_node("SaveNumber", value=["1", 0])}
    assert faults(toys, prompt) == [
        "node 1 'A Number': value must be between 0 and 100, got -1",
        "node 2 'SaveNumber': unknown node 'SaveNumber' (did you mean 'Number'?); replace or remove it",
    ]


def test_notes_and_remarks_are_passed_over(toys: Any, prompt: dict[str, Any], api_node: ApiNode) -> None:
    prompt["_doc"] = "adds two numbers"
    prompt["_note"] = {"by": "somebody"}
    prompt["20"] = api_node("Note", text="look here")
    prompt["21"] = api_node("MarkdownNote")
    prompt["2"]["_doc"] = "the sum"
    prompt["2"]["inputs"]["_note"] = "in the input as well"
    graph = validate(prompt, toys.folders, nodes=toys.nodes)
    assert list(graph.nodes) == ["1", "2", "3"]
    assert graph.warnings == ()
    assert graph.prompt is prompt


def test_an_input_that_older_workflows_lack_gets_its_default(toys: Any, api_node: ApiNode) -> None:
    @node("Later", "Later", "toys", output_node=True, registry=toys.nodes)
    def later(context: NodeContext, *, new: bool = socket("BOOLEAN", default=True, may_lack=True)) -> tuple[()]:
        """Take an input."""
        return ()

    def read(**inputs: Any) -> Any:
        graph = validate({"1": api_node("Later", **inputs)}, toys.folders, nodes=toys.nodes)
        return graph.nodes["1"].inputs["new"]

    assert read() is True
    assert [read(new=text) for text in ("None", "false", "True")] == [False, False, True]
    assert "new" in object_info(toys.nodes["Later"], toys.folders)["input"]["required"]
    with pytest.raises(GraphError, match="new must be a true or false value, got 'perhaps'"):
        read(new="perhaps")


def test_a_graph_needs_an_output_node(toys: Any, api_node: ApiNode) -> None:
    assert faults(toys, {"1": api_node("Number", value=-1)}) == [
        "a workflow needs an output node (Show, Refuse), got none; add one",
        "node 1 'A Number': value must be between 0 and 100, got -1",
    ]
    assert faults(toys, {}) == ["a workflow needs an output node (Show, Refuse), got none; add one"]


@pytest.mark.parametrize("extra", ["text", 3, None, [], {}, {"ds": {"scale": 1}}])
def test_what_is_no_node_is_passed_over(toys: Any, prompt: dict[str, Any], extra: object) -> None:
    graph = validate({**prompt, "extra": extra, "version": 0.4}, toys.folders, nodes=toys.nodes)
    assert graph.warnings == ()
    assert list(graph.nodes) == ["1", "2", "3"]


@pytest.mark.parametrize("value", [[1, 2, 3], {"__value__": [1, 2, 3]}, [], ["a", "b"], [["1", 0]]])
def test_a_list_that_is_no_link_is_a_value(toys: Any, value: Any) -> None:
    @node("Anything", "Anything", "toys", output_node=True, registry=toys.nodes)
    def anything(context: NodeContext, *, value: Any = socket(ANY)) -> tuple[()]:
        """Take anything."""
        return ()

    graph = validate({"1": {"class_type": "Anything", "inputs": {"value": value}}}, toys.folders, nodes=toys.nodes)
    assert graph.nodes["1"].inputs == {"value": value["__value__"] if isinstance(value, dict) else value}


def test_targets_choose_among_output_nodes(toys: Any, prompt: dict[str, Any], api_node: ApiNode) -> None:
    prompt["4"] = api_node("Show", value=7.5)
    assert list(validate(prompt, toys.folders, nodes=toys.nodes, targets=["3"]).nodes) == ["1", "2", "3"]
    with pytest.raises(GraphError, match=r"7\.5"):
        validate(prompt, toys.folders, nodes=toys.nodes)


def test_a_cycle_is_named_node_by_node(toys: Any, prompt: dict[str, Any], api_node: ApiNode) -> None:
    prompt["2"]["inputs"]["numbers.n1"] = ["4", 0]
    prompt["4"] = api_node("Sum", **{"numbers.n0": ["2", 0], "offset": 0})
    assert faults(toys, prompt) == [
        "node 2 'Add up': a node must not depend on its own output, but these do: "
        "node 2 'Add up' → node 4 'Sum' → node 2 'Add up'; remove one of the links"
    ]
    prompt["2"]["inputs"]["numbers.n1"] = ["2", 0]
    assert "node 2 'Add up' → node 2 'Add up'" in faults(toys, prompt)[0]


@pytest.mark.parametrize("output", [-1, 1, 10**20])
def test_a_link_to_an_output_that_a_node_lacks(toys: Any, prompt: dict[str, Any], output: int) -> None:
    prompt["3"]["inputs"]["value"] = ["2", output]
    (fault,) = faults(toys, prompt)

    assert f"value is linked to output {output} of node 2 'Add up', which has 1 output" in fault


def test_titles_and_ids_are_printable(toys: Any, prompt: dict[str, Any]) -> None:
    prompt["3\x1b[2J"] = prompt.pop("3") | {"_meta": {"title": "\x1b]0;a\x07" + "x" * 10**6}}
    graph = validate(prompt, toys.folders, nodes=toys.nodes)
    title = graph.nodes["3\x1b[2J"].title

    assert title.startswith(r"\u001b]0;a\u0007xxx")
    assert len(title) == 80
    assert "\x1b" not in graph.nodes["3\x1b[2J"].label


def unknown(index: int) -> dict[str, Any]:
    return {"class_type": f"Shew{index}", "inputs": {}}


def leading_back(index: int) -> dict[str, Any]:
    return {
        "class_type": "Sum",
        "inputs": {"numbers.n0": ["0", 0], "numbers.n1": [str((index + 1) % 3000), 0], "offset": "x"},
    }


def dangling(index: int) -> dict[str, Any]:
    return {"class_type": "Show", "inputs": {"value": [f"a{index}", 0], "x": 1, "y": 1}}


@pytest.mark.parametrize(("member", "count"), [(unknown, 10_000), (leading_back, 3000), (dangling, 10_000)])
def test_large_workflows_are_checked_in_linear_time_with_few_findings(
    toys: Any, member: Callable[[int], dict[str, Any]], count: int
) -> None:
    prompt = {str(index): member(index) for index in range(count)}
    with processor_time(at_most_s=2), pytest.raises(GraphError) as error:
        validate(prompt, toys.folders, nodes=toys.nodes)
    assert len(error.value.findings) >= count
    *_, last = lines = str(error.value).split("\n")
    assert re.fullmatch(r"  and [0-9,]+ more", last)
    assert len(lines) == 52
    assert max(map(len, lines)) <= 310


def test_warnings_are_few_too(toys: Any, prompt: dict[str, Any]) -> None:
    prompt["1"]["inputs"] |= {f"x{index}": 1 for index in range(10_000)}
    assert len(validate(prompt, toys.folders, nodes=toys.nodes).warnings) <= 51


def test_a_fault_is_found_however_many_others_are_ignored(toys: Any, prompt: dict[str, Any]) -> None:
    ignored = {f"a{index}": {"class_type": "Number", "inputs": {"value": -1}} for index in range(1000)}
    prompt["2"]["inputs"]["offset"] = "none"
    examination = examine(ignored | prompt, toys.folders, nodes=toys.nodes)

    assert [fault.node_id for fault in examination.faults] == ["2"]
    assert examination.graph.warnings[-1] == "950 more faults are not listed"


def test_a_workflow_of_more_nodes_than_any_is_refused(toys: Any) -> None:
    with pytest.raises(GraphError, match="at most 50,000 nodes, got 50,001"):
        validate({str(index): {"inputs": {}} for index in range(50_001)}, toys.folders, nodes=toys.nodes)


def test_match_sockets_carry_one_type_through(toys: Any, api_node: ApiNode) -> None:
    prompt = {
        "1": api_node("Number", value=1),
        "2": api_node("Text", text="x"),
        "3": api_node("MakeList", **{"inputs.input0": ["1", 0], "inputs.input1": ["1", 0]}),
        "4": api_node("MakeList", **{"inputs.input0": ["3", 0]}),
        "5": api_node("Text", text=["4", 0]),
        "6": api_node("Show", value=["5", 0]),
    }
    assert faults(toys, prompt) == [
        "node 5 'Text': text must be linked to an output of type STRING, "
        "got the INT output 'list' of node 4 'Make List'"
    ]
    prompt["3"]["inputs"]["inputs.input1"] = ["2", 0]
    prompt["5"]["inputs"]["text"] = "plain"
    prompt["6"]["inputs"]["value"] = ["4", 0]
    assert faults(toys, prompt) == [
        "node 3 'Make List': inputs.input1 must have the type of inputs.input0, which is INT, "
        "got the STRING output 'STRING' of node 2 'Text'"
    ]


def test_files_that_are_not_there_are_found_before_anything_runs(toys: Any, api_node: ApiNode) -> None:
    prompt = {"1": api_node("ReadFile", file="a.txt"), "2": api_node("Show", value=["1", 0])}
    assert faults(toys, prompt)[0].startswith("node 1 'Read File': no file 'a.txt' in the input folder; put it into ")


@given(st.data())
def test_a_prompt_with_anything_in_it_is_examined_without_a_crash(
    toys: Any, prompt: dict[str, Any], data: st.DataObject
) -> None:
    broken = copy.deepcopy(prompt)
    member = broken[data.draw(st.sampled_from(["1", "2", "3"]))]
    place = data.draw(st.sampled_from(["class_type", "inputs", "_meta", "value", "numbers.n0", "mode"]))
    anything = data.draw(JSON)
    (member if place in ("class_type", "inputs", "_meta") else member["inputs"])[place] = anything
    for fault in examine(broken, toys.folders, nodes=toys.nodes).faults:
        assert str(fault).startswith(("node ", "a workflow needs"))
