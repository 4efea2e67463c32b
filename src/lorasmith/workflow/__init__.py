"""Node graphs: declaration, parsing, validation, execution. Independent of training."""

from lorasmith.workflow.context import NodeContext
from lorasmith.workflow.executor import Executor
from lorasmith.workflow.graph import Graph, examine, validate
from lorasmith.workflow.mapping import NodeResult
from lorasmith.workflow.node import NODES, Node, NodeOutput, node
from lorasmith.workflow.object_info import object_info
from lorasmith.workflow.prompt import apply_overrides
from lorasmith.workflow.sockets import ANY, MATCH, Grow, Input, Output
from lorasmith.workflow.workflow_text import Workflow, carried_workflow, parse_prompt, parse_workflow

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
    "validate",
]
