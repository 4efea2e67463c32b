"""Dependency order of nodes, and cycles."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

__all__ = ["depth_first"]


def depth_first(
    goals: Collection[str], needs: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Dependencies of `goals` in order of execution, and cycles.

    The branch of one goal is completed before the next, in the order of `goals` and `needs`. Implemented with an
    explicit stack, as workflows may be deeper than Python's recursion limit.

    Args:
        goals: nodes to start from.
        needs: direct dependencies of each node; those without an entry of their own are ignored.

    Returns:
        Every node that a goal depends on, goals included, once each; and each cycle as a path whose last node needs the
        first.
    """
    order: dict[str, None] = {}
    cycles = []
    for goal in goals:
        path: dict[str, None] = {}
        stack = [] if goal in order else [(goal, iter(needs[goal]))]
        path.update({goal: None} if stack else {})
        while stack:
            current, remaining = stack[-1]
            following = next(remaining, None)
            if following is None:
                stack.pop()
                del path[current]
                order[current] = None
            elif following in path:
                members = list(path)
                cycles.append(tuple(members[members.index(following) :]))
            elif following not in order and following in needs:
                path[following] = None
                stack.append((following, iter(needs[following])))
    return tuple(order), tuple(cycles)
