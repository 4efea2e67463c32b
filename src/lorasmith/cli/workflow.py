"""`lorasmith run` and `nodes`: a ComfyUI workflow, without ComfyUI, and the nodes that workflows can use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import TextColumn
from rich.text import Text

from lorasmith.cli.console import (
    console,
    echo,
    heading,
    print_note,
    print_result,
    progress_bar,
    progress_lines,
    result_shown,
    stoppable,
)
from lorasmith.cli.flags import BaseDir, ExtraModelPaths, FollowLinks, folders_of
from lorasmith.cli.together import check_alone

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from lorasmith.core.folders import Folders
    from lorasmith.workflow.execution_events import Event, UiOutput
    from lorasmith.workflow.node import Node


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("run")(run)
    app.command("nodes")(nodes)


def run(
    workflow: Annotated[
        Path,
        typer.Argument(
            help="Workflow that ComfyUI saved or exported, a PNG or LoRA that carries one, or example:NAME; "
            "'example:' alone lists the examples."
        ),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NODE.INPUT=VALUE",
            help="Change an input, such as 12.steps=200 or 'Train LoRA.steps=200'. Repeatable.",
        ),
    ] = None,
    follow_links: FollowLinks = False,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
) -> None:
    """Run a ComfyUI workflow.

    Both formats are read, the one that the editor saves and that of Export (API). The whole workflow is checked before
    any node runs. Results are written to output/ in the base folder.
    """
    check_alone("run")
    from lorasmith.nodes.example_workflows import EXAMPLE_PREFIX, examples
    from lorasmith.nodes.workflow_run import checked_workflow
    from lorasmith.workflow.executor import Executor

    if str(workflow) == EXAMPLE_PREFIX:
        print_result(lambda: {"examples": examples()}, _print_examples)
        return
    folders = folders_of(base_dir, extra_model_paths, follow_links=follow_links)
    checked = checked_workflow(workflow, folders, set_ or [])
    for warning in checked.graph.warnings:
        print_note(warning)
    with stoppable() as stop, _Narrator(folders) as narrator:
        Executor(folders, on_event=narrator).run(checked.graph, workflow=checked.editor, cancel=stop)
    print_result(lambda: {"outputs": narrator.outputs, "notes": [*checked.graph.warnings, *narrator.notes]})


def _print_examples() -> None:
    from lorasmith.nodes.example_workflows import EXAMPLE_PREFIX, examples

    for example in examples():
        needs = f"; needs {', '.join(example.needs)}" if example.needs else ""
        echo(f"{EXAMPLE_PREFIX + example.name:<24}{example.title}{needs}")


class _Narrator:
    """Prints an executor's events."""

    def __init__(self, folders: Folders) -> None:
        self.outputs: dict[str, list[str]] = {}
        self.notes: list[str] = []
        self._folders = folders
        self._title = ""
        self._lines = progress_lines()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> _Narrator:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_bar()
        self._lines.close()

    def __call__(self, event: Event) -> None:
        from lorasmith.workflow import execution_events as events

        match event:
            case events.NodeStarted(node_id, title):
                self._title = title
                console.print(Text.assemble((f"{node_id:>4}", "dim"), f"  {title}"), soft_wrap=True)
                self._lines.begin(f"      {title}")
            case events.NodeProgress(_, value, maximum, text):
                self._advance(value, maximum, text)
            case events.NodeMessage(_, level, text):
                if level == "warning":
                    self.notes.append(text)
                    print_note(text, indent=6)
                else:
                    echo(f"      {text}")
            case events.NodeFinished(node_id, ui):
                self._end_bar()
                self._show(node_id, ui)
            case events.ExecutionFailed() | events.ExecutionCancelled():
                self._end_bar()

    def _advance(self, value: int, maximum: int, text: str) -> None:
        if self._bar is None:
            self._bar = progress_bar(TextColumn("     "), TextColumn("{task.fields[text]}", style="dim", markup=False))
            self._bar.start()
            self._task = self._bar.add_task("", total=maximum, text="")
        assert self._task is not None
        self._bar.update(self._task, completed=value, total=maximum, text=text)
        count = f"{value:,} of {maximum:,}"
        line = f"      {self._title}: {text if count in text else ', '.join(filter(None, (count, text)))}"
        self._lines.report(line, 0.0 if text else value / max(1, maximum))

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._lines.end()

    def _show(self, node_id: str, ui: UiOutput) -> None:
        texts = [text for items in ui.values() for item in items if (text := self._text(item)) is not None]
        if texts:
            self.outputs[node_id] = texts
        with result_shown():
            for text in texts:
                echo(f"      {text}")

    def _text(self, item: object) -> str | None:
        """A file that a node wrote, or a text; None for what is for other user interfaces."""
        from lorasmith.nodes.workflow_run import shown_file

        if (file := shown_file(item, self._folders)) is not None:
            return str(file)
        return item if isinstance(item, str) else None


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
    from lorasmith.workflow.node_reference import find_node, nodes_by_category, object_info

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
                echo(f"  {_title(node)}: {', '.join(slot.name for slot in node.inputs) or 'no inputs'}")
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
        members = [slot for slot in node.inputs if slot.optional is optional]
        if members:
            heading(title)
        for member in members:
            echo(f"  {member.name}: {', '.join(input_facts(member, _choices(member, folders)))}")
            if member.tooltip:
                echo(f"    {member.tooltip}")
    if node.outputs:
        heading("Outputs")
    for number, output in enumerate(node.outputs):
        kind = f" ({output.type})" if output.label != output.type else ""
        echo(f"  {number}: {output.label}{kind}{', a list' if output.is_list else ''}")
        if output.tooltip:
            echo(f"    {output.tooltip}")


def _choices(slot: Any, folders: Folders) -> list[str]:
    """The choices; of long lists (of files) only the first ones."""
    choices = slot.choices(folders)
    more = [f"{len(choices) - _MOST:,} more"] if len(choices) > _MOST else []
    return [*choices[:_MOST], *more]


_MOST = 60
