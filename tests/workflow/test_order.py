from __future__ import annotations

import itertools

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.workflow.graph import Cycle, depth_first
from tests.processor_time import processor_time

GRAPHS = st.integers(1, 9).flatmap(
    lambda size: st.lists(
        st.lists(st.integers(0, size - 1), max_size=3, unique=True), min_size=size, max_size=size
    ).map(lambda needs: {str(i): [str(j) for j in members] for i, members in enumerate(needs)})
)


@given(GRAPHS, st.data())
def test_order_and_cycles_agree_with_networkx(needs: dict[str, list[str]], data: st.DataObject) -> None:
    goals = data.draw(st.lists(st.sampled_from(sorted(needs)), min_size=1, unique=True))
    order, cycles = depth_first(goals, needs)
    graph = nx.DiGraph([(key, need) for key, members in needs.items() for need in members])
    graph.add_nodes_from(needs)
    reachable = set(goals).union(*(nx.descendants(graph, goal) for goal in goals))
    assert sorted(order) == sorted(reachable)
    assert bool(cycles) is not nx.is_directed_acyclic_graph(graph.subgraph(reachable))
    for cycle in cycles:
        end = (*cycle.end, cycle.start[0])
        pieces = [cycle.start, end] if cycle.left_out else [(*cycle.start, *end)]
        assert all(graph.has_edge(a, b) for piece in pieces for a, b in itertools.pairwise(piece))
        assert cycle.left_out >= 0 and len({*cycle.start, *cycle.end}) == len(cycle.start) + len(cycle.end)
    if not cycles:
        places = {key: place for place, key in enumerate(order)}
        assert all(places[need] < places[key] for key in order for need in needs[key])


def test_a_chain_deeper_than_python_recurses() -> None:
    needs = {str(i): [str(i + 1)] for i in range(5000)} | {"5000": []}
    order, cycles = depth_first(["0"], needs)
    assert order == tuple(str(i) for i in range(5000, -1, -1))
    assert cycles == ()


def test_thousands_of_nodes_that_lead_back_to_the_first_take_no_time() -> None:
    needs = {str(i): ["0", str(i + 1)] for i in range(20_000)} | {"20000": []}
    with processor_time(at_most_s=2):
        _, cycles = depth_first(["0"], needs)
    assert len(cycles) == 20_000
    assert cycles[0] == Cycle(("0",))
    assert cycles[8] == Cycle(("0", "1", "2", "3"), 1, ("5", "6", "7", "8"))


def test_one_branch_is_finished_before_the_next_begins() -> None:
    needs = {"save": ["train"], "train": ["load"], "load": [], "sample": ["encode", "train"], "encode": ["load"]}
    assert depth_first(["save", "sample"], needs)[0] == ("load", "train", "save", "encode", "sample")
