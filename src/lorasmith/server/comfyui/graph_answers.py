"""Questions about nodes, prompts, and files used by graphs.

A prompt is answered as by a ComfyUI server: an output runs if no node that it depends on has a fault. If at least one
runs, the answer is a success that lists the faults of the others; if none runs, or a node that an output depends on has
an unknown class, the prompt is refused. Pages about nodes in markdown, made from their declarations, are for the
editor's help panel.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorasmith.core.errors import DataError, GraphError, LorasmithError, ModelError
from lorasmith.core.folders import Folders
from lorasmith.core.registry import Registry
from lorasmith.data.image_files import header_size, one_at_a_time, open_original
from lorasmith.formats.container import check_safetensors
from lorasmith.nodes import load_nodes
from lorasmith.server.job_reporter import error_entry
from lorasmith.server.questions import question
from lorasmith.workflow.editor_format import prompt_of_editor
from lorasmith.workflow.editor_graph import EditorGraph, is_editor_format, read_editor_graph
from lorasmith.workflow.graph import Examination, GraphFault, Prompt, class_of, examine, is_remark, node_title
from lorasmith.workflow.node import Node
from lorasmith.workflow.node_reference import badges, input_facts
from lorasmith.workflow.node_reference import object_info as definition
from lorasmith.workflow.sockets import Input

_MOST_PIXELS = 64_000_000  # of a picture that is re-encoded, which takes about 20 bytes of memory per pixel


@question
def object_info(folders: Folders, *, node: str | None = None) -> bytes:
    """JSON text with the definitions of all nodes, or of one, by class; empty for an unknown class."""
    nodes = load_nodes()
    one_or_none = [nodes[node]] if node is not None and node in nodes else []
    ones = [entry for _, entry in nodes.items()] if node is None else one_or_none
    return json.dumps({node or entry.id: definition(entry, folders) for entry in ones}).encode()


@question
def check_prompt(
    folders: Folders, *, prompt: dict[str, Any], targets: list[str] | None = None, workflow: Any = None
) -> PromptAnswer:
    """Check a prompt, as `answer_to`; `workflow` has the classes of its nodes that the editor does not know."""
    return answer_to(_named(prompt, workflow), folders, nodes=load_nodes(), targets=targets)


def _named(prompt: Prompt, workflow: Any) -> Prompt:
    """A prompt whose nodes without a class have that of the workflow, if it has them."""
    with contextlib.suppress(GraphError):
        graph = read_editor_graph(workflow) if is_editor_format(workflow) else EditorGraph({}, {})
        return {
            key: {**member, "class_type": node.type}
            if isinstance(member, dict) and member.get("class_type") is None and (node := graph.inner(key))
            else member
            for key, member in prompt.items()
        }
    return prompt


@question
def prompt_of_workflow(folders: Folders, *, workflow: dict[str, Any]) -> dict[str, Any]:
    """The prompt of a graph in the editor's format. Raises GraphError."""
    return prompt_of_editor(workflow, nodes=load_nodes())


@question
def node_documentation(folders: Folders, *, node: str) -> str | None:
    """The page about a node in markdown; None for an unknown class."""
    nodes = load_nodes()
    return node_page(nodes[node]) if node in nodes else None


@question
def file_metadata(folders: Folders, *, kind: str, name: str) -> dict[str, str] | None:
    """The metadata in the header of a model file of a kind such as `loras`; None if it has none. Raises ModelError."""
    return check_safetensors(folders.find(kind, name), ModelError).metadata or None


@question
def encoded_picture(
    folders: Folders,
    *,
    path: str,
    channel: Literal["rgba", "rgb", "a"] = "rgba",
    format: Literal["png", "webp", "jpeg"] = "png",
    quality: int = 90,
) -> bytes:
    """A picture, or its alpha (`a`) or the colours under it (`rgb`), in a format with a quality from 1 to 100."""
    with _pixels(Path(path)) as image:
        if channel == "a":
            image = _transparency(image)
        elif channel == "rgb" or format == "jpeg":
            image = image.convert("RGB")
        return _encoded(image, format, quality)


@question
def masked_picture(folders: Folders, *, original: str, mask: str) -> bytes:
    """A picture with the alpha of `mask`, which has the same size, as PNG with the picture's metadata."""
    sizes = [header_size(Path(path)) for path in (original, mask)]
    if sizes[0] != sizes[1]:
        drawn, shown = (f"{width}×{height}" for width, height in sizes)
        raise DataError(f"a mask must have the size of its picture, {drawn}, got {shown}; draw it again")
    with _pixels(Path(original)) as image:
        texts = {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}
        image = image.convert("RGBA")
        image.putalpha(open_original(Path(mask))[0].convert("RGBA").getchannel("A"))
        metadata = PngInfo()
        for key, value in texts.items():
            metadata.add_text(key, value)
        result = io.BytesIO()
        image.save(result, "PNG", pnginfo=metadata, compress_level=4)
        return result.getvalue()


@contextlib.contextmanager
def _pixels(path: Path) -> Iterator[Image.Image]:
    """The picture of a file with its alpha; only one large picture is open at a time. Raises DataError."""
    size = header_size(path)
    if math.prod(size) > _MOST_PIXELS:
        most = f"{_MOST_PIXELS // 1_000_000} million pixels"
        raise DataError(f"a picture that is converted must have at most {most}, got {size[0]}×{size[1]}; scale it down")
    with one_at_a_time(size):
        yield open_original(path)[0]


def _transparency(image: Image.Image) -> Image.Image:
    alpha = image.getchannel("A") if "A" in image.getbands() else Image.new("L", image.size, 255)
    shown = Image.new("RGBA", image.size)
    shown.putalpha(alpha)
    return shown


def _encoded(image: Image.Image, format: str, quality: int) -> bytes:
    if image.mode not in ("RGB", "RGBA", "L"):
        image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    result = io.BytesIO()
    options = {} if format == "png" else {"quality": min(100, max(1, quality))}
    image.save(result, format, **options)
    return result.getvalue()


@dataclass(frozen=True)
class PromptAnswer:
    """The result of checking a prompt; errors are in the protocol's form."""

    outputs: tuple[str, ...]  # ids of the output nodes that run; empty if the prompt is refused
    error: dict[str, Any] | None = None  # why the prompt is refused; None if it runs
    node_errors: dict[str, Any] = field(default_factory=dict)  # by node id
    warnings: tuple[str, ...] = ()  # sentences about what is ignored


def answer_to(
    prompt: Prompt, folders: Folders, *, nodes: Registry[Node], targets: Collection[str] | None = None
) -> PromptAnswer:
    """Check a prompt. `targets` are the ids of the output nodes to run, None for all."""
    try:
        examination = examine(prompt, folders, nodes=nodes, targets=targets)
    except LorasmithError as error:
        return PromptAnswer((), error_entry("invalid_prompt", str(error)))
    faults, graph = examination.faults, examination.graph
    left_out = _left_out(prompt, faults, nodes)
    if not faults:
        return PromptAnswer(graph.outputs, None, left_out, graph.warnings)
    users = _users(prompt)
    faulty = dict.fromkeys(fault.node_id for fault in faults if fault.node_id is not None)
    errors = {key: _node_entry(key, faults, prompt, users, examination, folders, nodes) for key in [*faulty][:_LISTED]}
    spoiled = _reached(faulty, users)
    good = tuple(key for key in graph.outputs if key not in spoiled)
    refusal = _refusal(faults, good, prompt, nodes)
    if refusal is not None:
        return PromptAnswer((), refusal, left_out | errors, graph.warnings)
    return PromptAnswer(good, None, left_out | errors, graph.warnings)


def _refusal(
    faults: Sequence[GraphFault], good: Sequence[str], prompt: Prompt, nodes: Registry[Node]
) -> dict[str, Any] | None:
    """Why no output runs; None if some do."""
    unknown = next((fault for fault in faults if fault.kind == "missing_node_type"), None)
    if unknown is not None and unknown.node_id is not None:
        member = prompt.get(unknown.node_id)
        names = {"node_id": unknown.node_id, "class_type": _class_name(member), "node_title": node_title(member, nodes)}
        return error_entry("missing_node_type", str(unknown), f"Node ID '#{unknown.node_id}'", **names)
    if good:
        return None
    whole = next((fault for fault in faults if fault.node_id is None), None)
    if whole is not None:
        return error_entry(whole.kind, str(whole))
    sentences = [str(fault) for fault in faults[:_LISTED]]
    return error_entry("prompt_outputs_failed_validation", "no output of this workflow can run", "\n".join(sentences))


def _left_out(prompt: Prompt, faults: Sequence[GraphFault], nodes: Registry[Node]) -> dict[str, Any]:
    """Errors of nodes of unknown classes on which no known output depends; they may be outputs, and do not run."""
    needed = {fault.node_id for fault in faults}
    found = {}
    for key, member in prompt.items():
        if key in needed or is_remark(str(key), member) or class_of(member, nodes) is not None:
            continue
        name = _class_name(member)
        error = error_entry("missing_node_type", _TITLES["missing_node_type"], f"{name!r} is left out")
        found[str(key)] = {"errors": [error], "dependent_outputs": [], "class_type": name or ""}
        if len(found) == _LISTED:
            break
    return found


def _node_entry(
    key: str,
    faults: Sequence[GraphFault],
    prompt: Prompt,
    users: Mapping[str, Sequence[str]],
    examination: Examination,
    folders: Folders,
    nodes: Registry[Node],
) -> dict[str, Any]:
    member = prompt.get(key)
    spoiled = _reached([key], users)
    own = [fault for fault in faults if fault.node_id == key][:_LISTED]
    return {
        "errors": [_input_error(fault, member, folders, nodes) for fault in own],
        "dependent_outputs": [output for output in examination.graph.outputs if output in spoiled],
        "class_type": _class_name(member) or "",
    }


def _input_error(fault: GraphFault, member: Any, folders: Folders, nodes: Registry[Node]) -> dict[str, Any]:
    message = _TITLES.get(fault.kind, "The node cannot run")
    if fault.input_name is None:
        return error_entry(fault.kind, message, fault.sentence)
    extra: dict[str, Any] = {"input_name": fault.input_name}
    node = class_of(member, nodes)
    if node is not None:
        extra["input_config"] = _input_config(node, fault.input_name, folders)
    inputs = member.get("inputs", {}) if isinstance(member, dict) else {}
    if fault.input_name in inputs:
        extra["received_value"] = _bounded(inputs[fault.input_name])
        if fault.kind == "return_type_mismatch":
            extra["linked_node"] = inputs[fault.input_name]
    return error_entry(fault.kind, message, f"{fault.input_name}: {fault.sentence}", **extra)


def _input_config(node: Node, name: str, folders: Folders) -> list[Any] | None:
    """The declaration of an input as in `/object_info`; None for one with a long list of choices."""
    groups = definition(node, folders)["input"]
    config = groups["required"].get(name) or groups.get("optional", {}).get(name)
    if config is None or len(config[1].get("options", ())) > _MOST_CHOICES:
        return None
    return list(config)


def _bounded(value: Any) -> Any:
    """A value for a response: long texts and large structures are shortened."""
    if isinstance(value, (int, float)) or value is None:
        return value
    text = value if isinstance(value, str) else repr(value)[: _LONGEST + 1]
    return value if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _users(prompt: Prompt) -> dict[str, list[str]]:
    """By node, the nodes that it is linked to."""
    users: dict[str, list[str]] = {}
    for key, member in prompt.items():
        for source in _sources(member):
            users.setdefault(source, []).append(str(key))
    return users


def _sources(member: Any) -> Iterator[str]:
    inputs = member.get("inputs") if isinstance(member, dict) else None
    for value in inputs.values() if isinstance(inputs, dict) else ():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int)):
            yield str(value[0])


def _reached(start: Collection[str], users: Mapping[str, Sequence[str]]) -> set[str]:
    """`start` and every node that depends on it."""
    reached, waiting = set(start), deque(start)
    while waiting:
        for user in users.get(waiting.popleft(), ()):
            if user not in reached:
                reached.add(user)
                waiting.append(user)
    return reached


def _class_name(member: Any) -> str | None:
    name = member.get("class_type") if isinstance(member, dict) else None
    return name if isinstance(name, str) else None


_LISTED, _MOST_CHOICES, _LONGEST = 50, 20, 1000
_TITLES = {
    "bad_linked_input": "The link of an input is broken",
    "dependency_cycle": "The node depends on its own output",
    "invalid_input_type": "The value of an input has the wrong type",
    "missing_node_type": "The class of the node is unknown",
    "required_input_missing": "A required input is missing",
    "return_type_mismatch": "The type of a linked output does not fit",
    "value_bigger_than_max": "A value is above its maximum",
    "value_not_in_list": "A value is not in the list",
    "value_smaller_than_min": "A value is below its minimum",
}


def node_page(node: Node) -> str:
    """The page about a node."""
    return "\n".join(_lines(node)) + "\n"


def _lines(node: Node) -> Iterator[str]:
    yield f"# {node.display_name}"
    yield ""
    if node.description:
        yield from (node.description, "")
    if marks := badges(node):
        yield from (f"*{', '.join(marks).capitalize()} node.*", "")
    required = [slot for slot in node.inputs if not slot.optional]
    for title, inputs in (("Inputs", required), ("Optional inputs", [slot for slot in node.inputs if slot.optional])):
        if inputs:
            yield from (f"## {title}", "")
            yield from _table(("Name", "Type", "Meaning"), (_input_row(slot) for slot in inputs))
            yield ""
    if node.outputs:
        yield from ("## Outputs", "")
        rows = (
            (output.label, f"list of {output.type}" if output.is_list else output.type, output.tooltip)
            for output in node.outputs
        )
        yield from _table(("Name", "Type", "Meaning"), rows)
        yield ""
    if node.aliases:
        yield f"Older names: {', '.join(f'`{name}`' for name in node.aliases)}"


def _input_row(slot: Input) -> tuple[str, str, str]:
    fixed = () if callable(slot.options) else tuple(slot.options)
    return f"`{slot.name}`", ", ".join(input_facts(slot, fixed)), slot.tooltip


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield _row(head)
    yield _row(("---",) * len(head))
    yield from map(_row, rows)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"
