"""Dependency order: what must run before what, and where that is impossible."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

__all__ = ["depth_first"]


def depth_first(
    goals: Collection[str], needs: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """What `goals` need, dependencies first, and the cycles met on the way.

    One goal's branch is finished before the next begins, in the order of `goals` and `needs`. A loop over an explicit
    stack, since workflows may be deeper than Python recurses.

    Args:
        goals: where to begin.
        needs: the direct dependencies of each node; those without an entry of their own are left out.

    Returns:
        Every node that a goal depends on, the goals among them, once each; and each cycle as a path whose last node
        needs the first.
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
