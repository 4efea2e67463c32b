"""Write the list of nodes in `docs/comfyui.md`.

    python -m tools.node_list

A test compares it with the nodes.
"""

from __future__ import annotations

from pathlib import Path

from lorasmith.nodes import load_nodes
from lorasmith.workflow.node_reference import nodes_by_category

PAGE = Path(__file__).parents[1] / "docs" / "comfyui.md"
START, END = "<!-- nodes: written by tools/node_list.py -->\n", "<!-- end of nodes -->\n"


def written() -> str:
    """The page with the current list."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    rows = [
        f"| {category} | {', '.join(_named(node.id, node.display_name) for node in members)} |\n"
        for category, members in nodes_by_category(load_nodes())
    ]
    return "".join([before, START, "\n| category | nodes |\n|---|---|\n", *rows, "\n", END, after])


def _named(id: str, title: str) -> str:
    return f"`{id}`" if title == id else f"`{id}` ({title})"


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
