from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import CancelledError, DataError, NodeError
from lorasmith.core.folders import Folders
from lorasmith.workflow import Executor, NodeContext, node, socket, validate
from lorasmith.workflow.execution_events import (
    Event,
    ExecutionCancelled,
    ExecutionFailed,
    ExecutionFinished,
    ExecutionStarted,
    NodeCached,
    NodeFinished,
    NodeMessage,
    NodeProgress,
    NodeStarted,
)
from lorasmith.workflow.graph import Graph, GraphNode

ApiNode = Callable[..., dict[str, Any]]


class Runner:
    """One executor with all it says and all that ran since the last look."""

    def __init__(self, toys: Any) -> None:
        self.toys = toys
        self.events: list[Event] = []
        self.executor = Executor(toys.folders, on_event=self.events.append)

    def run(self, prompt: dict[str, Any], **options: Any) -> Any:
        self.events.clear()
        self.toys.ran.clear()
        graph = validate(prompt, self.toys.folders, nodes=self.toys.nodes)
        return self.executor.run(graph, **options)

    def kinds(self) -> list[type[Event]]:
        return [type(event) for event in self.events]


@pytest.fixture
def runner(toys: Any) -> Runner:
    return Runner(toys)


@pytest.fixture
def prompt(api_node: ApiNode) -> dict[str, Any]:
    return {
        "9": api_node("Show", value=["2", 0]),
        "1": api_node("Number", value=3),
        "2": api_node("Sum", **{"numbers.n0": ["1", 0], "numbers.n1": ["1", 0], "offset": 1}),
    }


@st.composite
def random_prompts(draw: st.DrawFn) -> dict[str, Any]:
    """Sums of earlier sums, each with an offset of its own so that no two are equal, some of them shown."""
    size = draw(st.integers(1, 10))
    prompt = {}
    for index in range(size):
        needs = draw(st.lists(st.integers(0, index - 1), max_size=3, unique=True)) if index else []
        links = {f"numbers.n{place}": [f"n{need}", 0] for place, need in enumerate(needs)} or {"numbers.n0": 0}
        prompt[f"n{index}"] = {"class_type": "Sum", "inputs": {**links, "offset": index}}
    for goal in draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4, unique=True)):
        prompt[f"show{goal}"] = {"class_type": "Show", "inputs": {"value": [f"n{goal}", 0]}}
    return {key: prompt[key] for key in draw(st.permutations(sorted(prompt)))}


def dependencies(prompt: dict[str, Any]) -> nx.DiGraph:
    links = [
        (value[0], key)
        for key, member in prompt.items()
        for value in member["inputs"].values()
        if isinstance(value, list)
    ]
    graph = nx.DiGraph(links)
    graph.add_nodes_from(prompt)
    return graph


def values(prompt: dict[str, Any]) -> dict[str, int]:
    """What each sum of a random prompt comes to, worked out apart from the executor."""
    results: dict[str, int] = {}
    for key in nx.topological_sort(dependencies(prompt)):
        if not key.startswith("show"):
            inputs = dict(prompt[key]["inputs"])
            offset = inputs.pop("offset")
            results[key] = offset + sum(results[v[0]] if isinstance(v, list) else v for v in inputs.values())
    return results


@given(prompt=random_prompts())
def test_every_needed_node_runs_once_after_what_it_needs(toys: Any, prompt: dict[str, Any]) -> None:
    runner = Runner(toys)
    results = runner.run(prompt)
    graph = dependencies(prompt)
    goals = [key for key in prompt if key.startswith("show")]
    needed = set(goals).union(*(nx.ancestors(graph, goal) for goal in goals))
    assert sorted(toys.ran) == sorted(needed)
    places = {key: place for place, key in enumerate(toys.ran)}
    assert all(places[a] < places[b] for a, b in graph.edges if b in needed)
    expected = values(prompt)
    assert {key: result.outputs[0][0] for key, result in results.items() if key in expected} == {
        key: expected[key] for key in needed if key in expected
    }


@given(prompt=random_prompts(), data=st.data())
def test_a_changed_input_runs_its_descendants_again_and_nothing_else(
    toys: Any, prompt: dict[str, Any], data: st.DataObject
) -> None:
    runner = Runner(toys)
    first = runner.run(prompt)
    assert runner.run(prompt) == first
    assert toys.ran == []
    changed = data.draw(st.sampled_from(sorted(key for key in first if not key.startswith("show"))))
    prompt[changed]["inputs"]["offset"] += 500
    second = runner.run(prompt)
    assert set(toys.ran) == ({changed} | nx.descendants(dependencies(prompt), changed)) & set(first)
    expected = values(prompt)
    assert all(second[key].outputs[0][0] == expected[key] for key in second if key in expected)


def test_events_of_a_run_and_of_its_repetition(runner: Runner, prompt: dict[str, Any]) -> None:
    runner.run(prompt)
    assert runner.events == [
        ExecutionStarted(("1", "2", "9"), ()),
        NodeStarted("1", "A Number"),
        NodeFinished("1", {}),
        NodeStarted("2", "Sum"),
        NodeFinished("2", {}),
        NodeStarted("9", "Show"),
        NodeFinished("9", {"text": ["7"]}),
        ExecutionFinished(),
    ]
    runner.run(prompt)
    assert runner.events == [
        ExecutionStarted(("1", "2", "9"), ("1", "2", "9")),
        NodeCached("1", {}),
        NodeCached("2", {}),
        NodeCached("9", {"text": ["7"]}),
        ExecutionFinished(),
    ]


def test_spelling_titles_and_ids_do_not_matter_to_the_cache(runner: Runner, prompt: dict[str, Any]) -> None:
    runner.run(prompt)
    renamed = {f"x{key}": {**member, "_meta": {"title": "New"}} for key, member in prompt.items()}
    for member in renamed.values():
        for name, value in member["inputs"].items():
            if isinstance(value, list):
                member["inputs"][name] = [f"x{value[0]}", 0]
    renamed["x2"]["inputs"].update(mode="PLAIN", offset=1.0)
    renamed["x1"]["class_type"] = "OldNumber"
    runner.run(renamed)
    assert runner.toys.ran == []


def test_equal_nodes_share_their_outputs(runner: Runner, prompt: dict[str, Any], api_node: ApiNode) -> None:
    prompt["1b"] = api_node("Number", value=3)
    prompt["2"]["inputs"]["numbers.n1"] = ["1b", 0]
    results = runner.run(prompt)
    assert runner.toys.ran == ["1", "2", "9"]
    assert results["1b"] is results["1"]


def test_nodes_that_write_their_id_are_not_shared(runner: Runner, prompt: dict[str, Any], api_node: ApiNode) -> None:
    @node("OwnId", "Own Id", "", outputs=["STRING"], hidden=["unique_id"], registry=runner.toys.nodes)
    def own_id(context: NodeContext) -> tuple[str]:
        return (context.node_id,)

    prompt = {"a": api_node("OwnId"), "b": api_node("OwnId")}
    prompt |= {f"show {key}": api_node("Show", value=[key, 0]) for key in prompt}
    results = runner.run(prompt)
    assert [results[key].outputs for key in "ab"] == [(("a",),), (("b",),)]


def test_only_the_last_runs_outputs_are_kept(runner: Runner, prompt: dict[str, Any]) -> None:
    runner.run(prompt)
    prompt["1"]["inputs"]["value"] = 4
    runner.run(prompt)
    prompt["1"]["inputs"]["value"] = 3
    runner.run(prompt)
    assert runner.toys.ran == ["1", "2", "9"]


def test_a_changed_file_is_read_again(runner: Runner, api_node: ApiNode) -> None:
    folder = runner.toys.folders.base / "input"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    prompt = {"1": api_node("ReadFile", file="a.txt"), "2": api_node("Show", value=["1", 0])}
    assert runner.run(prompt)["2"].ui == {"text": ["one"]}
    runner.run(prompt)
    assert runner.toys.ran == []
    (folder / "a.txt").write_text("two")
    os.utime(folder / "a.txt", ns=(1, 1))
    assert runner.run(prompt)["2"].ui == {"text": ["two"]}


def test_a_result_of_a_linked_file_name_is_never_cached(runner: Runner, api_node: ApiNode) -> None:
    toys = runner.toys

    @node("ReadNamed", "", "", outputs=["STRING"], registry=toys.nodes)
    def read_named(context: NodeContext, *, file: str = socket("STRING", file=Folders.find_input)) -> tuple[str]:
        toys.ran.append(context.node_id)
        return (file,)

    prompt = {
        "1": api_node("Text", text="a.txt"),
        "2": api_node("ReadNamed", file=["1", 0]),
        "3": api_node("Show", value=["2", 0]),
    }
    runner.run(prompt)
    runner.run(prompt)
    assert toys.ran == ["2", "3"]


def test_lists_flow_item_by_item_until_somebody_gathers_them(runner: Runner, api_node: ApiNode) -> None:
    prompt = {
        "1": api_node("Range", count=3),
        "2": api_node("Sum", **{"numbers.n0": ["1", 0], "numbers.n1": ["1", 1], "offset": 10}),
        "3": api_node("Gather", items=["2", 0]),
        "4": api_node("Show", value=["3", 0]),
        "5": api_node("MakeList", **{"inputs.input0": ["2", 0], "inputs.input1": ["1", 0]}),
        "6": api_node("Show", value=["5", 0]),
    }
    results = runner.run(prompt)
    assert runner.toys.ran.count("2") == 3
    assert results["4"].ui == {"text": ["([13, 14, 15], None)"]}
    assert results["6"].ui == {"text": ["13", "14", "15", "0", "1", "2"]}


def test_linked_values_are_held_to_the_declared_range(runner: Runner, api_node: ApiNode) -> None:
    prompt = {
        "1": api_node("Number", value=50),
        "2": api_node("Range", "Count up", count=["1", 0]),
        "3": api_node("Show", value=["2", 1]),
    }
    with pytest.raises(NodeError, match="node 2 'Count up': count must be between 0 and 10, got 50"):
        runner.run(prompt)


def test_a_refusal_names_the_node_and_keeps_what_was_done(
    runner: Runner, prompt: dict[str, Any], api_node: ApiNode
) -> None:
    prompt["10"] = api_node("Refuse", "The Choosy", value=["2", 0])
    with pytest.raises(NodeError) as caught:
        runner.run(prompt)
    assert str(caught.value) == "node 10 'The Choosy': the value must be liked, got 7; choose another"
    assert isinstance(caught.value.__cause__, DataError)
    assert runner.events[-1] == ExecutionFailed("10", "The Choosy", caught.value)
    del prompt["10"]
    runner.run(prompt)
    assert runner.toys.ran == []


def test_a_check_of_a_node_comes_before_all_work_and_only_where_the_node_will_run(
    runner: Runner, prompt: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.run(prompt)
    checked: list[str] = []

    def refuse(graph: Graph, member: GraphNode, folders: Folders) -> None:
        checked.append(member.id)
        raise DataError("these cannot work together")

    monkeypatch.setitem(vars(runner.toys.nodes["Sum"]), "check", refuse)
    runner.run(prompt)
    assert checked == []
    prompt["2"]["inputs"]["offset"] = 2
    prompt["1"]["inputs"]["value"] = 4
    with pytest.raises(NodeError, match=r"^node 2 'Sum': these cannot work together$"):
        runner.run(prompt)
    assert (checked, runner.toys.ran, runner.kinds()) == (["2"], [], [ExecutionStarted, ExecutionFailed])


def test_a_bug_keeps_its_type_and_says_where(runner: Runner, api_node: ApiNode) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        runner.run({"1": api_node("Refuse", value=1, bug=True)})
    assert caught.value.__notes__ == ["while running node 1 'Refuse' (Refuse)"]
    assert runner.events[-1] == ExecutionFailed("1", "Refuse", caught.value)


def test_cancelled_before_the_first_node(runner: Runner, prompt: dict[str, Any]) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError, match="node 1 'A Number': the run was cancelled"):
        runner.run(prompt, cancel=cancel)
    assert runner.toys.ran == []
    assert runner.events[-1] == ExecutionCancelled("1")


def test_cancelled_inside_a_node_stops_before_the_next(
    runner: Runner, prompt: dict[str, Any], api_node: ApiNode
) -> None:
    prompt["5"] = api_node("Slow", value=["2", 0], stop=True)
    prompt["9"]["inputs"]["value"] = ["5", 0]
    with pytest.raises(CancelledError, match="node 9"):
        runner.run(prompt)
    assert runner.toys.ran == ["1", "2", "5"]
    assert NodeProgress("5", 1, 2, "half") in runner.events
    assert NodeMessage("5", "warning", "slow") in runner.events
    assert runner.kinds()[-2:] == [NodeFinished, ExecutionCancelled]
    # What a node returned after it was told to stop may be half of its work, so it runs again; the rest is reused.
    with pytest.raises(CancelledError):
        runner.run(prompt)
    assert runner.toys.ran == ["5"]


def test_nodes_see_the_workflow_they_run_in(runner: Runner, api_node: ApiNode) -> None:
    seen: list[NodeContext] = []

    @node("Look", "Look", "", output_node=True, registry=runner.toys.nodes)
    def look(context: NodeContext) -> tuple[()]:
        seen.append(context)
        return ()

    prompt = {"7": api_node("Look")}
    runner.run(prompt, workflow={"nodes": []})
    assert (seen[0].node_id, seen[0].prompt, seen[0].workflow) == ("7", prompt, {"nodes": []})
    assert seen[0].folders is runner.toys.folders
    assert not seen[0].cancelled()
