"""ComfyUI's nodes for LoRA training and the nodes that such graphs need: thin wrappers of the library."""

from lorasmith.nodes.all_nodes import load_nodes

__all__ = ["load_nodes"]
