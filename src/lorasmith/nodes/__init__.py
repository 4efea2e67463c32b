"""ComfyUI's nodes for LoRA training and what a graph needs around them: thin, the work is done by the library."""

from lorasmith.nodes.all_nodes import load_nodes

__all__ = ["load_nodes"]
