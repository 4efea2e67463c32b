"""Pages about nodes in markdown, made from their declarations, for the editor's help panel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lorasmith.workflow.node import Node
from lorasmith.workflow.node_reference import badges, input_facts
from lorasmith.workflow.sockets import Input


def node_page(node: Node) -> str:
    """The page about a node."""
    return "\n".join(_lines(node)) + "\n"


def _lines(node: Node) -> Iterator[str]:
    yield f"# {node.display_name}"
    yield ""
    if node.description:
        yield from (node.description, "")
    if said := badges(node):
        yield from (f"*{', '.join(said).capitalize()} node.*", "")
    required = [one for one in node.inputs if not one.optional]
    for title, inputs in (("Inputs", required), ("Optional inputs", [one for one in node.inputs if one.optional])):
        if inputs:
            yield from (f"## {title}", "")
            yield from _table(("Name", "Type", "Meaning"), (_input_row(one) for one in inputs))
            yield ""
    if node.outputs:
        yield from ("## Outputs", "")
        rows = ((one.label, f"list of {one.type}" if one.is_list else one.type, one.tooltip) for one in node.outputs)
        yield from _table(("Name", "Type", "Meaning"), rows)
        yield ""
    if node.aliases:
        yield f"Older names: {', '.join(f'`{name}`' for name in node.aliases)}"


def _input_row(one: Input) -> tuple[str, str, str]:
    fixed = () if callable(one.options) else tuple(one.options)
    return f"`{one.name}`", ", ".join(input_facts(one, fixed)), one.tooltip


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield _row(head)
    yield _row(("---",) * len(head))
    yield from map(_row, rows)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"
