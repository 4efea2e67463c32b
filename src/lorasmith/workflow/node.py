"""Node declaration: a typed function with its description for editors and workflow files, and the context of its calls.

    @node("ImageScale", "Upscale Image", "image/upscaling", outputs=["IMAGE"])
    def image_scale(
        context: NodeContext,
        *,
        image: Tensor = socket("IMAGE"),
        width: int = socket("INT", default=512, min=0, max=16384),
    ) -> tuple[Tensor]:
        \"\"\"Scale pictures to a size.\"\"\"

The function is not wrapped. Its keywords are the inputs, the first paragraph of its docstring is the description; it
returns a tuple with one value per output, or a `NodeOutput` with output for user interfaces.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

from lorasmith.core.errors import CancelledError, GraphError
from lorasmith.core.folders import Folders
from lorasmith.core.registry import Registry, instance_of
from lorasmith.workflow.execution_events import Event, NodeMessage, NodeProgress, NodeReport, UiOutput
from lorasmith.workflow.sockets import Input, Output

Hidden: TypeAlias = Literal["prompt", "extra_pnginfo", "unique_id"]


@dataclass(frozen=True)
class NodeOutput:
    """The return value of a node with output for user interfaces.

    Attributes:
        values: one value per output.
        ui: output for user interfaces by kind, each a list.
    """

    values: tuple[Any, ...] = ()
    ui: UiOutput = field(default_factory=dict)


NodeFunction: TypeAlias = Callable[..., "tuple[Any, ...] | NodeOutput"]
F = TypeVar("F", bound=NodeFunction)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A declared node.

    Attributes:
        id: class name in workflow files; `aliases` are older names.
        display_name, category, description, search_aliases: for editors.
        inputs, outputs: in the editors' order.
        hidden: parts of the workflow that the node writes into its results. With `unique_id` a result also depends on
            the node's id, so that two equal nodes are both run.
        is_input_list: whether the function is called once with lists of all inputs, instead of once per item.
        output_node: whether the node is an output; others run only if an output needs them.
        check: function that raises a LorasmithError if the sources of the inputs cannot work together. Called with the
            graph, the node in it and the folders, before any node runs.
        deprecated, experimental: badges.
        function: called with a NodeContext and the inputs as keywords.
    """

    id: str
    display_name: str
    category: str
    function: NodeFunction
    inputs: tuple[Input, ...] = ()
    outputs: tuple[Output, ...] = ()
    aliases: tuple[str, ...] = ()
    description: str = ""
    search_aliases: tuple[str, ...] = ()
    hidden: tuple[Hidden, ...] = ()
    is_input_list: bool = False
    output_node: bool = False
    check: Callable[[Any, Any, Folders], object] | None = None
    deprecated: bool = False
    experimental: bool = False

    @cached_property
    def slots(self) -> Mapping[str, Input]:
        """All inputs that a workflow file can have, by key, with repeating inputs expanded."""
        return {slot.name: slot for declared in self.inputs for slot in declared.expanded()}


NODES: Registry[Node] = Registry("node", GraphError, group="nodes", checked=instance_of(Node, "id"))


def node(
    id: str,
    display_name: str,
    category: str,
    *,
    inputs: Sequence[Input] = (),
    outputs: Sequence[Output | str] = (),
    aliases: Sequence[str] = (),
    search_aliases: Sequence[str] = (),
    hidden: Sequence[Hidden] = (),
    is_input_list: bool = False,
    output_node: bool = False,
    check: Callable[[Any, Any, Folders], object] | None = None,
    deprecated: bool = False,
    experimental: bool = False,
    registry: Registry[Node] = NODES,
) -> Callable[[F], F]:
    """Decorator that declares and registers a node.

    Args:
        id, display_name, category, aliases, search_aliases, hidden, is_input_list, output_node, check, deprecated,
            experimental: as the attributes of `Node`.
        inputs: those after the function's keywords, which its final `**keyword` receives.
        outputs: each an `Output`, or its type.
        registry: where it is registered.

    Raises:
        TypeError: a keyword of the function has no `socket` as its default.
    """

    def declare(function: F) -> F:
        declared = Node(
            id=id,
            display_name=display_name,
            category=category,
            function=function,
            inputs=(*_keyword_inputs(id, function), *inputs),
            outputs=tuple(Output(output) if isinstance(output, str) else output for output in outputs),
            aliases=tuple(aliases),
            description=" ".join((inspect.getdoc(function) or "").split("\n\n")[0].split()),
            search_aliases=tuple(search_aliases),
            hidden=tuple(hidden),
            is_input_list=is_input_list,
            output_node=output_node,
            check=check,
            deprecated=deprecated,
            experimental=experimental,
        )
        registry.register(id, *aliases, module=function.__module__)(declared)
        return function

    return declare


def _keyword_inputs(id: str, function: Any) -> tuple[Input, ...]:
    """The inputs that a function's keywords have as their defaults, in place of which it then has their values."""
    _, *keywords = inspect.signature(function).parameters.values()
    inputs = []
    for keyword in keywords:
        if isinstance(keyword.default, Input):
            inputs.append(replace(keyword.default, name=keyword.name))
        elif keyword.kind is not keyword.VAR_KEYWORD:
            raise TypeError(f"{id}: the keyword {keyword.name} must have a socket as its default")
    function.__kwdefaults__ = {slot.name: slot.default for slot in inputs if slot.optional}
    return tuple(inputs)


def ignore(event: Event) -> None:
    """An event callback that does nothing."""


@dataclass(frozen=True)
class NodeContext:
    """The context of one node in one run; `NodeContext(folders)` is enough to call a node function directly.

    Attributes:
        folders: of models, inputs and outputs.
        node_id: id of the node in the prompt.
        prompt: the whole API-format workflow, for the metadata of saved files.
        workflow: the editor's JSON of the same graph, if the client sent it.
        cancel: set to stop the run.
        report: receives the node's events.
    """

    folders: Folders
    node_id: str = ""
    prompt: Mapping[str, Any] = field(default_factory=dict)
    workflow: Mapping[str, Any] | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    report: Callable[[Event], None] = ignore

    def cancelled(self) -> bool:
        """Whether the run was cancelled. Long nodes check it once per step, save their result and raise."""
        return self.cancel.is_set()

    def raise_if_cancelled(self) -> None:
        if self.cancelled():
            raise CancelledError("the run was cancelled")

    def progress(self, value: int, maximum: int, *, text: str = "", preview: bytes | None = None) -> None:
        """Report that `value` of `maximum` steps are done; see `NodeProgress`."""
        self.report(NodeProgress(self.node_id, value, maximum, text, preview))

    def advance(self, value: int, maximum: int, text: str = "") -> None:
        """Report progress, as a callback of what can be stopped: raises CancelledError if the run was cancelled."""
        self.raise_if_cancelled()
        self.progress(value, maximum, text=text)

    def publish(self, kind: str, data: Mapping[str, Any]) -> None:
        """Report JSON values for programs; see `NodeReport`."""
        self.report(NodeReport(self.node_id, kind, data))

    def log(self, text: str) -> None:
        """Report information in one line."""
        self.report(NodeMessage(self.node_id, "info", text))

    def warn(self, text: str) -> None:
        """Report a warning in one line."""
        self.report(NodeMessage(self.node_id, "warning", text))
