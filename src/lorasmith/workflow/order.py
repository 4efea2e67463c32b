"""Dependency order of nodes, and cycles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_SHOWN = 4


class Cycle(NamedTuple):
    """Nodes of which each needs the next one, and the last the first; the middle of a long cycle is left out."""

    start: tuple[str, ...]  # its first nodes
    left_out: int = 0
    end: tuple[str, ...] = ()  # its last nodes, empty in short cycles


def depth_first(goals: Iterable[str], needs: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], tuple[Cycle, ...]]:
    """Dependencies of `goals`, goals included, once each in order of execution; and cycles. Takes linear time.

    The branch of one goal is completed before the next, in the order of `goals` and `needs`, which has the direct
    dependencies of each node; those without an entry of their own are ignored. Iterative, as workflows may be deeper
    than Python's recursion limit.
    """
    order: dict[str, None] = {}
    cycles: list[Cycle] = []
    for goal in goals:
        stack = [] if goal in order else [(goal, iter(needs[goal]))]
        path = {goal: 0} if stack else {}  # the nodes on the stack, with their places on it
        while stack:
            current, remaining = stack[-1]
            following = next(remaining, None)
            if following is None:
                stack.pop()
                del path[current]
                order[current] = None
            elif following in path:
                first, length = path[following], len(stack) - path[following]
                # Not the whole path: thousands of nodes may each lead back to the same one.
                start = tuple(node for node, _ in stack[first : first + _SHOWN])
                end = tuple(node for node, _ in stack[max(first + _SHOWN, len(stack) - _SHOWN) :])
                cycles.append(Cycle(start, length - len(start) - len(end), end))
            elif following not in order and following in needs:
                path[following] = len(stack)
                stack.append((following, iter(needs[following])))
    return tuple(order), tuple(cycles)
