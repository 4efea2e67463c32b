"""Conversion of the editor's format: as the editor itself does it, bounded, and the inverse of what we write."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.core.errors import GraphError
from lorasmith.core.folders import ASSETS
from lorasmith.nodes import load_nodes
from lorasmith.workflow.editor_format import prompt_of_editor
from tests.processor_time import processor_time
from tests.workflow.editor_cases import CASES, TEXT, graph, instance, joined, made, shown, subgraph
from tools.example_graphs import as_editor

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "editor_prompts.json").read_text("utf-8"))["prompts"]
EXAMPLES = sorted((ASSETS / "examples").glob("*.ui.json"))


def converted(content: Any) -> dict[str, Any]:
    return prompt_of_editor(content, nodes=load_nodes())


def with_defaults(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with the titles and values that the editor adds and ours leaves to the checks."""
    nodes, found = load_nodes(), {}
    for key, member in prompt.items():
        node = nodes[member["class_type"]]
        missing = {name: one.default for name, one in node.slots.items() if one.default is not None}
        title = member.get("_meta", {}).get("title") or node.display_name
        found[key] = {**member, "inputs": missing | member["inputs"], "_meta": {"title": title}}
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_prompt_is_the_one_that_the_editor_makes(name: str) -> None:
    ours, editors = with_defaults(converted(CASES[name])), RECORDED[name]
    for key, member in editors.items():
        member["_meta"] = {"title": member["_meta"]["title"]}
        # The editor's title of a class is its translation of the display name.
        if not any(str(one["id"]) == key and one.get("title") for one in CASES[name]["nodes"]):
            ours[key]["_meta"] = member["_meta"]
        # It has defaults of its own for texts and choices that are declared without one.
        for missing in set(member["inputs"]) - set(ours[key]["inputs"]):
            assert member["inputs"][missing] == ""
            del member["inputs"][missing]
        declared = load_nodes()[member["class_type"]].slots
        for added in set(ours[key]["inputs"]) - set(member["inputs"]):
            assert declared[added].optional
            del ours[key]["inputs"][added]
    assert ours == editors


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_examples_are_the_same_in_both_formats(file: Path) -> None:
    prompt = json.loads(file.with_suffix("").with_suffix(".json").read_text("utf-8"))
    assert with_defaults(converted(json.loads(file.read_text("utf-8")))) == with_defaults(prompt)


def test_values_by_name() -> None:
    file = graph(
        [made(1, "StringConcatenate", {"string_b": "b", "string_a": "a"}), shown(2, 1)], CASES["plain"]["links"]
    )
    assert converted(file)["1"]["inputs"] == {"string_a": "a", "string_b": "b"}


def test_ids_of_any_kind_and_links_to_nowhere() -> None:
    first, second = joined(1, string_a=7, string_b=8), shown(2, 1)
    first["id"], second["id"] = "a:1", 2.0
    links = [[1, "a:1", "0", 2.0, 0, TEXT], [7, 55, 0, "a:1", 0, TEXT], None, [3], [8, None, 0, 1, 0], {"id": {}}]
    prompt = converted(graph([first, second], links))  # type: ignore[arg-type]
    assert prompt["2"]["inputs"] == {"source": ["a:1", 0]}
    assert prompt["a:1"]["inputs"] == {"string_a": "a", "string_b": "b", "delimiter": "-"}


def test_a_list_is_wrapped_as_a_value() -> None:
    prompt = converted(graph([joined(1, ["x", 0]), shown(2, 1)], [[1, 1, 0, 2, 0, TEXT]]))  # type: ignore[arg-type]
    assert prompt["1"]["inputs"]["string_a"] == {"__value__": ["x", 0]}


def test_definitions_may_stand_inside_definitions() -> None:
    flat = CASES["nested, the outer instance's value"]
    inner, outer = flat["definitions"]["subgraphs"]
    nested = {**flat, "definitions": {"subgraphs": [{**outer, "definitions": {"subgraphs": [inner]}}]}}
    assert converted(nested) == converted(flat)


def test_a_subgraph_that_passes_its_input_on() -> None:
    through = subgraph(1, [], [[1, -10, 0, -20, 0, TEXT]], ["text"])
    nodes = [joined(1), instance(9, 1, text=1), shown(2, 2)]
    prompt = converted(graph(nodes, [[1, 1, 0, 9, 0, TEXT], [2, 9, 0, 2, 0, TEXT]], subgraphs=[through]))
    assert prompt["2"]["inputs"] == {"source": ["1", 0]}


def test_a_circle_of_reroutes_leads_nowhere() -> None:
    nodes = [made(1, "Reroute", **{"": 2}), made(2, "Reroute", **{"": 1}), joined(3, string_a=3)]
    prompt = converted(graph(nodes, [[1, 1, 0, 2, 0, "*"], [2, 2, 0, 1, 0, "*"], [3, 2, 0, 3, 0, "*"]]))
    assert prompt["3"]["inputs"]["string_a"] == "a"


def test_a_muted_instance_in_a_subgraph_does_not_run() -> None:
    inner = CASES["a subgraph with a link"]["definitions"]["subgraphs"]
    outer = subgraph(2, [instance(41, 1, mode=2, first=None), joined(42)], [[1, 42, 0, -20, 0, TEXT]], [])
    prompt = converted(graph([instance(9, 2), shown(2, 1)], [[1, 9, 0, 2, 0, TEXT]], subgraphs=[*inner, outer]))
    assert list(prompt) == ["9:42", "2"]


def test_values_of_unknown_nodes_are_named_by_their_inputs_where_these_are_as_many() -> None:
    node = made(1, "Unheard", ["x", 5, "fixed"], string_a=None, seed=None)
    assert converted(graph([node], []))["1"]["inputs"] == {"string_a": "x", "seed": 5}
    assert converted(graph([made(1, "Unheard", ["x", 5, 6], string_a=None)], []))["1"]["inputs"] == {}
    named = {**made(1, "Unheard", ["x"]), "widgets_values_named": {"text": "x"}}
    assert converted(graph([named], []))["1"]["inputs"] == {"text": "x"}


def nest(count: int, within: int = 1) -> dict[str, Any]:
    """A file with `count` subgraphs, each with `within` instances of the next one."""
    definitions = [
        subgraph(number, [instance(40 + place, number + 1) for place in range(within)], [], [])
        for number in range(count)
    ]
    definitions.append(subgraph(count, [joined(1)], [], []))
    return graph([instance(9, 0)], [], subgraphs=definitions)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        (
            graph([instance(9, 1)], [], subgraphs=[subgraph(1, [instance(2, 1)], [], [])]),
            "must not contain itself, but 'Subgraph 1' does",
        ),
        (nest(60), "at most 50 deep in one another, got 61"),
        (nest(3000), "at most 50 deep in one another"),
        (nest(20, within=2), "at most 50,000 nodes"),
        (nest(6, within=10), "at most 50,000 nodes"),
        (graph([{"id": 1}], []), r"a node of a workflow must be an object with an id and a type, got \{'id': 1\}"),
        (graph([3], []), "a node of a workflow must be an object"),
        (graph([{"id": True, "type": "Note"}], []), "a node of a workflow must be an object"),
        (graph([joined(1), joined(1)], []), "ids of nodes must be unique, but two nodes have the id 1"),
        (
            graph([instance(9, 1), {**joined(1), "id": "9:1"}], [], subgraphs=[subgraph(1, [joined(1)], [], [])]),
            "ids of nodes must be unique, but two nodes are '9:1'",
        ),
        (graph([], [], subgraphs=[{"nodes": []}]), "a subgraph of a workflow must have an id, got None"),
        (graph([], [], subgraphs=["x"]), "a subgraph of a workflow must be an object, got 'x'"),
    ],
    ids=range(12),
)
def test_what_is_refused(file: Any, sentence: str) -> None:
    with processor_time(at_most_s=3), pytest.raises(GraphError, match=sentence) as caught:
        converted(file)
    assert len(str(caught.value)) < 400


def test_a_subgraph_in_itself_is_named() -> None:
    two = [subgraph(1, [instance(2, 2)], [], []), subgraph(2, [instance(2, 1)], [], [])]
    with pytest.raises(GraphError, match=r"a subgraph must not contain itself, but 'Subgraph [12]' does"):
        converted(graph([instance(9, 1)], [], subgraphs=two))
    assert converted(graph([joined(1)], [], subgraphs=two)) != {}, "which nothing uses"


def test_text_is_not_multiplied_without_bound() -> None:
    large = subgraph(1, [joined(1, "x" * 2**20)], [], [])
    with pytest.raises(GraphError, match="nodes and 268,435,456 characters"):
        converted(graph([instance(key, 1) for key in range(2, 300)], [], subgraphs=[large]))


def test_long_ways_of_links_are_followed_once() -> None:
    count = 5000
    nodes = [made(key, "Reroute", **{"": key - 1}) for key in range(1, count)]
    links: list[list[Any]] = [[key, key, 0, key + 1, 0, "*"] for key in range(count)]
    readers = [joined(count + key, string_a=count + key) for key in range(1000)]
    links += [[one["id"], count - 1, 0, one["id"], 0, "*"] for one in readers]
    with processor_time(at_most_s=3):
        prompt = converted(graph([joined(0), *nodes, *readers], links))
    assert prompt[str(count + 7)]["inputs"]["string_a"] == ["0", 0]


def test_work_is_bounded() -> None:
    wide = made(1, "Wide", mode=4)
    wide["inputs"] = [{"name": f"i{key}", "type": "A", "link": None} for key in range(2000)]
    wide["outputs"] = [{"name": "o", "type": "B", "links": []} for _ in range(2000)]
    reader = made(2, "Reader")
    reader["inputs"] = [{"name": f"i{key}", "type": "C", "link": key} for key in range(2000)]
    links: list[list[Any]] = [[key, 1, key, 2, key, "C"] for key in range(2000)]
    with processor_time(at_most_s=5), pytest.raises(GraphError, match="two million nodes at most"):
        converted(graph([wide, reader], links))


scalars = st.none() | st.booleans() | st.integers(-2, 4) | st.sampled_from(["", "a", "-10", "Reroute", "1"])
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
sockets = st.fixed_dictionaries(
    {"name": st.sampled_from(["string_a", "string_b", "source", ""]), "type": scalars, "link": scalars | anything},
    optional={"widget": st.fixed_dictionaries({"name": scalars}) | anything},
)
members = st.fixed_dictionaries(
    {
        "id": st.integers(0, 4) | st.sampled_from(["a", "1"]),
        "type": st.sampled_from(
            ["StringConcatenate", "PreviewAny", "Reroute", "PrimitiveNode", "Note", "Unheard", "0", "1"]
        ),
    },
    optional={
        "mode": st.sampled_from([0, 2, 4, 3, None, "4"]),
        "inputs": st.lists(sockets, max_size=3) | anything,
        "outputs": st.lists(st.fixed_dictionaries({"type": scalars}), max_size=2) | anything,
        "widgets_values": anything | st.dictionaries(st.sampled_from(["string_a", "x"]), scalars, max_size=2),
        "properties": st.fixed_dictionaries({"proxyWidgets": st.lists(st.lists(scalars, max_size=4), max_size=3)})
        | anything,
        "title": scalars,
    },
)
ends = st.integers(0, 4) | st.sampled_from([-10, -20, "a", None])
links_of = st.lists(
    st.tuples(st.integers(0, 4), ends, st.integers(-1, 2), ends, st.integers(-1, 2)).map(list), max_size=6
)
graphs = st.fixed_dictionaries(
    {"nodes": st.lists(members, max_size=5, unique_by=lambda one: str(one["id"])), "links": links_of}
)
boundaries = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from(["string_a", "x", ""]), "linkIds": st.lists(scalars, max_size=2)}),
    max_size=2,
)
definitions = st.lists(st.tuples(graphs, boundaries, boundaries), max_size=2).map(
    lambda found: [
        {**inner, "id": str(key), "inputs": inputs, "outputs": outputs}
        for key, (inner, inputs, outputs) in enumerate(found)
    ]
)


@settings(max_examples=60)
@given(graphs, definitions)
def test_any_graph_is_a_prompt_or_refused(file: dict[str, Any], inner: list[Any]) -> None:
    with contextlib.suppress(GraphError):
        prompt = converted({**file, "definitions": {"subgraphs": inner}})
        assert json.loads(json.dumps(prompt)) == prompt
        for member in prompt.values():
            for value in member["inputs"].values():
                if isinstance(value, list):
                    assert value[0] in prompt, "links lead to nodes that run"


@st.composite
def prompts(draw: st.DrawFn) -> dict[str, Any]:
    """A prompt of text nodes, with links to earlier nodes."""
    prompt: dict[str, Any] = {}
    for number in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["PrimitiveString", "StringConcatenate", "StringReplace", "PrimitiveInt"]))
        inputs: dict[str, Any] = {}
        for name, slot in load_nodes()[kind].slots.items():
            texts = [key for key, one in prompt.items() if one["class_type"] != "PrimitiveInt"]
            if kind != "PrimitiveInt" and texts and draw(st.booleans()):
                inputs[name] = [draw(st.sampled_from(texts)), 0]
            else:
                inputs[name] = draw(st.text(max_size=5) if slot.type == "STRING" else st.integers(0, 9))
        prompt[str(number)] = {"class_type": kind, "inputs": inputs, "_meta": {"title": f"Node {number}"}}
    return prompt


@settings(max_examples=50)
@given(prompts())
def test_what_is_written_as_the_editor_does_is_read_back(prompt: dict[str, Any]) -> None:
    assert converted(json.loads(json.dumps(as_editor(prompt)))) == prompt
