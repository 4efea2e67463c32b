"""Node graphs: declaration, parsing, validation, execution. Independent of training."""

from lorasmith.workflow.editor_format import Workflow, carried_workflow, parse_prompt, parse_workflow
from lorasmith.workflow.executor import Executor, NodeResult
from lorasmith.workflow.graph import Graph, apply_overrides, examine, validate
from lorasmith.workflow.node import NODES, Node, NodeContext, NodeOutput, node
from lorasmith.workflow.node_reference import object_info
from lorasmith.workflow.sockets import ANY, MATCH, Grow, Input, Output, socket

__all__ = [
    "ANY",
    "MATCH",
    "NODES",
    "Executor",
    "Graph",
    "Grow",
    "Input",
    "Node",
    "NodeContext",
    "NodeOutput",
    "NodeResult",
    "Output",
    "Workflow",
    "apply_overrides",
    "carried_workflow",
    "examine",
    "node",
    "object_info",
    "parse_prompt",
    "parse_workflow",
    "socket",
    "validate",
]
