"""Output nodes: pictures, LoRA files and loss plots."""

from __future__ import annotations

import json

from torch import Tensor

from lorasmith.core.files import write_atomic
from lorasmith.nodes.saving import checked_prefix, graph_metadata, save_images, save_lora
from lorasmith.nodes.values import LossMap
from lorasmith.report.loss_plot import plot_losses
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import ANY, Input, NodeContext, NodeOutput, Output, node
from lorasmith.workflow.node import Hidden

__all__: list[str] = []

_GRAPH: tuple[Hidden, ...] = ("prompt", "extra_pnginfo")


@node(
    "SaveImage",
    display_name="Save Image",
    category="image",
    inputs=[
        Input("images", "IMAGE"),
        Input(
            "filename_prefix",
            "STRING",
            default="ComfyUI",
            accept=checked_prefix,
            tooltip="May contain folders and %year%, %width%, ...",
        ),
    ],
    outputs=[Output("IMAGE", "images")],
    hidden=_GRAPH,
    output_node=True,
)
def save_image(context: NodeContext, *, images: Tensor, filename_prefix: str) -> NodeOutput:
    """Save pictures in the output folder, with the workflow in their metadata."""
    return NodeOutput((images,), {"images": save_images(context, images, filename_prefix, place="output")})


@node(
    "PreviewImage",
    display_name="Preview Image",
    category="image",
    inputs=[Input("images", "IMAGE")],
    outputs=[Output("IMAGE", "images")],
    hidden=_GRAPH,
    output_node=True,
)
def preview_image(context: NodeContext, *, images: Tensor) -> NodeOutput:
    """Show pictures, which are saved in the temp folder only."""
    return NodeOutput((images,), {"images": save_images(context, images, "ComfyUI_temp", place="temp")})


@node(
    "PreviewAny",
    display_name="Preview as Text",
    category="utilities",
    inputs=[Input("source", ANY)],
    outputs=[Output("STRING")],
    search_aliases=["show output", "inspect", "show text"],
    output_node=True,
)
def preview_any(context: NodeContext, *, source: object) -> NodeOutput:
    """Show a value as text."""
    text = source if isinstance(source, str) else _as_text(source)
    return NodeOutput((text,), {"text": [text]})


@node(
    "SaveLoRA",
    display_name="Save LoRA Weights",
    category="model/merging",
    inputs=[
        Input("lora", "LORA_MODEL"),
        Input(
            "prefix",
            "STRING",
            default="loras/ComfyUI_trained_lora",
            accept=checked_prefix,
            multiline=False,
            tooltip="May have folders.",
        ),
        Input("steps", "INT", optional=True, tooltip="Steps of the LoRA, for its file name."),
    ],
    aliases=["SaveLoRANode"],
    search_aliases=["export lora"],
    hidden=_GRAPH,
    output_node=True,
)
def save_lora_weights(context: NodeContext, *, lora: Lora, prefix: str, steps: int | None = None) -> tuple[()]:
    """Save a LoRA in the output folder, in the layout that most programs read, with its metadata."""
    context.log(f"The LoRA is at {save_lora(context, lora, prefix, steps)}.")
    return ()


@node(
    "LossGraphNode",
    display_name="Plot Loss Graph",
    category="model/training",
    inputs=[
        Input("loss", "LOSS_MAP"),
        Input("filename_prefix", "STRING", default="loss_graph", accept=checked_prefix, multiline=False),
    ],
    search_aliases=["training chart", "plot loss"],
    hidden=_GRAPH,
    output_node=True,
)
def plot_loss_graph(context: NodeContext, *, loss: LossMap, filename_prefix: str) -> NodeOutput:
    """Draw the loss of each step and the smoothed loss; the picture is in the temp folder."""
    files = context.folders.numbered(filename_prefix, place="temp")
    path = files.path(".png")
    write_atomic(path, plot_losses(loss["loss"], metadata=graph_metadata(context)))
    return NodeOutput((), {"images": [files.reference(path)]})


def _as_text(value: object) -> str:
    """A value as JSON, or in Python's words where it has no JSON."""
    if isinstance(value, (bool, int, float)):
        return str(value)
    try:
        return json.dumps(value, indent=4, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)
