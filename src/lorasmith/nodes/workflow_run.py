"""Workflows from files (JSON, pictures and LoRAs with a workflow in their metadata, examples), and their execution."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lorasmith.core.arguments import typed_arguments
from lorasmith.core.errors import GraphError
from lorasmith.core.extras import TINY
from lorasmith.core.files import read_regular
from lorasmith.core.folders import Folders
from lorasmith.core.printable import printable
from lorasmith.core.registry import Registry
from lorasmith.formats.container import check_safetensors
from lorasmith.nodes.all_nodes import load_nodes
from lorasmith.nodes.example_workflows import EXAMPLE_PREFIX, example_named
from lorasmith.runs.progress_bars import counted, note
from lorasmith.workflow.editor_format import Workflow, carried_workflow, parse_workflow
from lorasmith.workflow.execution_events import Event, NodeMessage, NodeProgress, NodeStarted
from lorasmith.workflow.executor import Executor
from lorasmith.workflow.graph import Graph, apply_overrides, validate
from lorasmith.workflow.node import NODES, Node


def read_workflow(path: str | os.PathLike[str], *, nodes: Registry[Node] = NODES) -> Workflow:
    """The workflow in a JSON file (either format), a PNG, a LoRA, or `example:<name>`. Raises GraphError."""
    name = os.fspath(path)
    if name.startswith(EXAMPLE_PREFIX):
        # In the editor's format, so that files which the graph saves can be opened there.
        path = example_named(name.removeprefix(EXAMPLE_PREFIX)).editor_path
    path = Path(path)
    try:
        if path.suffix.lower() == ".safetensors":
            return _carried(check_safetensors(path, GraphError).metadata, path, nodes)
        content = read_regular(path)
    except OSError as error:
        raise GraphError(f"{path} cannot be read ({error.strerror}); give {_KINDS}") from error
    if content.startswith(_PNG):
        return _carried(_png_entries(content, path), path, nodes)
    return parse_workflow(content, nodes=nodes)


def _carried(entries: Mapping[str, str], path: Path, nodes: Registry[Node]) -> Workflow:
    workflow = carried_workflow(entries, nodes=nodes)
    if workflow is None:
        raise GraphError(f"{path.name} carries no workflow, only files that a graph saved do; give {_KINDS}")
    return workflow


def _png_entries(content: bytes, path: Path) -> dict[str, str]:
    """Text chunks of a PNG, without decoding its pixels."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            return {str(key): str(text) for key, text in picture.info.items() if isinstance(text, str)}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise GraphError(f"{path.name} is not a PNG that can be read; save the picture again") from error


_PNG = b"\x89PNG\r\n\x1a\n"
_KINDS = "a workflow (.json), a PNG or LoRA that a graph saved, or example:NAME"


@dataclass(frozen=True)
class CheckedWorkflow:
    """A graph that can run, and the editor's JSON of it, if its file has that."""

    graph: Graph
    editor: Mapping[str, Any] | None


@dataclass(frozen=True)
class WorkflowResult:
    """The results of a workflow.

    Attributes:
        files: the files that its nodes saved, in order.
        outputs: by node id, a tuple of items for each output of the node.
    """

    files: tuple[Path, ...]
    outputs: Mapping[str, tuple[tuple[Any, ...], ...]]

    def __repr__(self) -> str:
        # Outputs are models and tensors, whose repr fills pages.
        files = ", ".join(printable(str(file), limit=160) for file in self.files) or "none"
        return f"WorkflowResult(outputs of {len(self.outputs)} nodes, files: {files})"


def checked_workflow(workflow: str | os.PathLike[str], folders: Folders, changes: Sequence[str]) -> CheckedWorkflow:
    """The workflow in a file or `example:<name>`, with `changes` as for `apply_overrides`, checked as a whole.

    GraphError if the file has no workflow, or one that cannot run.
    """
    nodes = load_nodes()
    read = read_workflow(workflow, nodes=nodes)
    prompt = apply_overrides(read.prompt, changes, nodes=nodes)
    try:
        graph = validate(prompt, folders, nodes=nodes)
    except GraphError as error:
        if TINY.trouble and os.fspath(workflow).startswith(EXAMPLE_PREFIX):
            trouble = f"examples use the built-in model or its pictures, but {TINY.trouble}"
            raise GraphError(trouble, error.findings) from error
        raise
    return CheckedWorkflow(graph, read.editor)


@typed_arguments
def run_workflow(
    workflow: str | os.PathLike[str],
    *,
    changes: Mapping[str, Any] | None = None,
    base_dir: str | os.PathLike[str] | None = None,
    extra_model_paths: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
    progress: bool = True,
    on_event: Callable[[Event], object] | None = None,
    cancel: threading.Event | None = None,
) -> WorkflowResult:
    """Run a ComfyUI workflow.

    Args:
        workflow: JSON as ComfyUI's editor saves or exports it, a PNG or LoRA that contains one, or `example:<name>`.
        changes: values of inputs by `<node>.<input>`, such as `{"Train LoRA.steps": 200}`; the node is an id, or a
            title or class that one node alone has.
        base_dir: base folder of ComfyUI's layout; the current folder if None. Results are written to its `output`.
        extra_model_paths: an `extra_model_paths.yaml`; the base folder's, if it has one, if None.
        follow_links: whether inputs are read where links lead out of the base folder.
        progress: whether to show bars and notes.
        on_event: called with each event of the execution (`lorasmith.workflow.execution_events`).
        cancel: set it from another thread to stop; Train LoRA then returns the LoRA of the steps taken.

    Returns:
        The saved files, and the outputs of the nodes.

    Raises:
        GraphError: the example does not exist, or the file has no workflow or one that cannot run.
        NodeError: a node failed; the sentence names it.
        CancelledError: `cancel` was set.
        OptionError: `extra_model_paths` is missing or malformed.
    """
    base = Path.cwd() if base_dir is None else Path(base_dir)
    extra = None if extra_model_paths is None else Path(extra_model_paths)
    folders = Folders.load(base, extra_model_paths=extra, follow_links=follow_links)
    texts = [
        f"{place}={value if isinstance(value, str) else json.dumps(value)}" for place, value in (changes or {}).items()
    ]
    checked = checked_workflow(workflow, folders, texts)
    for warning in checked.graph.warnings if progress else ():
        note(warning)
    with _events_shown(progress) as show:

        def report(event: Event) -> None:
            show(event)
            if on_event is not None:
                on_event(event)

        results = Executor(folders, on_event=report).run(checked.graph, workflow=checked.editor, cancel=cancel)
    shown = [item for result in results.values() for items in result.ui.values() for item in items]
    files = [file for item in shown if (file := shown_file(item, folders)) is not None]
    return WorkflowResult(tuple(files), {key: result.outputs for key, result in results.items()})


def shown_file(item: Any, folders: Folders) -> Path | None:
    """The file that an item of a node's output for user interfaces refers to, if any."""
    if not (isinstance(item, dict) and "filename" in item):
        return None
    return Path(folders.place(item["type"]), item["subfolder"], item["filename"])


@contextlib.contextmanager
def _events_shown(progress: bool) -> Iterator[Callable[[Event], None]]:
    """Context with an event handler that shows warnings, and a bar for each node that counts its steps."""
    title, bar = "", None
    with contextlib.ExitStack() as bars:

        def show(event: Event) -> None:
            nonlocal title, bar
            match event:
                case NodeStarted():
                    bars.close()
                    title, bar = event.title, None
                case NodeProgress():
                    bar = bar or bars.enter_context(counted(title, progress))
                    if bar is not None:
                        bar(event.value, event.maximum)
                case NodeMessage(level="warning") if progress:
                    note(event.text)

        yield show
