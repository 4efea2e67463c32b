"""`lorasmith nodes`: the nodes that workflows can use."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import echo, heading, print_result
from lorasmith.cli.flags import BaseDir, ExtraModelPaths, folders_of

if TYPE_CHECKING:
    from lorasmith.core.folders import Folders
    from lorasmith.workflow.node import Node


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("nodes")(nodes)


def nodes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NODE]", help="A node, by its class or its title: show it in detail.")
    ] = None,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
) -> None:
    """List the nodes that workflows can use, by category, or show one with its inputs and outputs.

    With --json, the definitions are those of a ComfyUI server's /object_info.
    """
    from lorasmith.nodes import load_nodes
    from lorasmith.workflow.node_reference import find_node, nodes_by_category
    from lorasmith.workflow.object_info import object_info

    known = load_nodes()
    chosen = [node for _, node in known.items()] if name is None else [find_node(name, known)]
    folders = folders_of(base_dir, extra_model_paths)

    def show() -> None:
        if name is not None:
            _print_node(chosen[0], folders)
            return
        for category, members in nodes_by_category(known):
            heading(category)
            for node in members:
                echo(f"  {_title(node)}: {', '.join(one.name for one in node.inputs) or 'no inputs'}")
        echo()
        echo("Workflows of these nodes to begin with: lorasmith run example:")

    print_result(lambda: {node.id: object_info(node, folders) for node in chosen}, show)


def _title(node: Node) -> str:
    return node.id if node.id == node.display_name else f"{node.id} ({node.display_name})"


def _print_node(node: Node, folders: Folders) -> None:
    from lorasmith.workflow.node_reference import badges, input_facts

    heading(_title(node), f" in {node.category}{''.join(f', {badge}' for badge in badges(node))}")
    echo(f"  {node.description}")
    if node.aliases:
        echo(f"  Older names: {', '.join(node.aliases)}")
    for title, optional in (("Inputs", False), ("Optional inputs", True)):
        members = [one for one in node.inputs if one.optional is optional]
        if members:
            heading(title)
        for one in members:
            echo(f"  {one.name}: {', '.join(input_facts(one, _choices(one, folders)))}")
            if one.tooltip:
                echo(f"    {one.tooltip}")
    if node.outputs:
        heading("Outputs")
    for number, output in enumerate(node.outputs):
        kind = f" ({output.type})" if output.label != output.type else ""
        echo(f"  {number}: {output.label}{kind}{', a list' if output.is_list else ''}")
        if output.tooltip:
            echo(f"    {output.tooltip}")


def _choices(one: Any, folders: Folders) -> list[str]:
    """The choices; of long lists (of files) only the first ones."""
    choices = one.choices(folders)
    more = [f"{len(choices) - _MOST:,} more"] if len(choices) > _MOST else []
    return [*itertools.islice(choices, _MOST), *more]


_MOST = 60
