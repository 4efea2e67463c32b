"""Output nodes: pictures, folders of them, LoRA files and loss plots."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor

from lorasmith.core.files import write_atomic
from lorasmith.nodes.saving import (
    checked_prefix,
    graph_metadata,
    save_animation,
    save_image_set,
    save_images,
    save_lora,
    shown_lora,
)
from lorasmith.nodes.values import LossMap, flat_images, one_for_each, single
from lorasmith.report.loss_plot import plot_losses
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import ANY, Input, NodeContext, NodeOutput, Output, node
from lorasmith.workflow.node import Hidden

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


_METHODS = {"default": 4, "fastest": 0, "slowest": 6}


@node(
    "SaveAnimatedWEBP",
    display_name="Save Animated WEBP",
    category="image",
    inputs=[
        Input("images", "IMAGE"),
        Input(
            "filename_prefix",
            "STRING",
            default="ComfyUI",
            accept=checked_prefix,
            multiline=False,
            tooltip="May contain folders and %year%, %width%, ...",
        ),
        Input("fps", "FLOAT", default=6.0, min=0.01, max=1000.0, step=0.01, tooltip="Frames a second."),
        Input("lossless", "BOOLEAN", default=True, tooltip="Keep pixels as they are, in larger files."),
        Input("quality", "INT", default=80, min=0, max=100, tooltip="Of the compression."),
        Input("method", "COMBO", options=tuple(_METHODS), tooltip="Effort of the compression."),
    ],
    outputs=[Output("IMAGE", "images")],
    hidden=_GRAPH,
    output_node=True,
)
def save_animated_webp(
    context: NodeContext,
    *,
    images: Tensor,
    filename_prefix: str,
    fps: float,
    lossless: bool,
    quality: int,
    method: str,
) -> NodeOutput:
    """Save a batch of pictures as one animated WebP file in the output folder, with the workflow in its metadata."""
    saved = save_animation(
        context, images, filename_prefix, rate=fps, lossless=lossless, quality=quality, method=_METHODS[method]
    )
    return NodeOutput((images,), {"images": [saved], "animated": [len(images) > 1]})


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


def _image_set_inputs() -> list[Input]:
    return [
        Input(
            "folder_name",
            "STRING",
            default="dataset",
            accept=checked_prefix,
            multiline=False,
            tooltip="In the output folder; may have folders.",
        ),
        Input(
            "filename_prefix",
            "STRING",
            default="image",
            accept=checked_prefix,
            multiline=False,
            tooltip="Of the files' names.",
        ),
        Input(
            "mode",
            "COMBO",
            default="overwrite",
            options=("overwrite", "increment"),
            tooltip="Replace files of earlier runs, or number the new ones after them.",
        ),
    ]


@node(
    "SaveImageDataSetToFolder",
    display_name="Save Image (to Folder) (DEPRECATED)",
    category="image",
    inputs=[Input("images", "IMAGE"), *_image_set_inputs()],
    search_aliases=["save folder", "save dataset", "export dataset"],
    is_input_list=True,
    output_node=True,
    deprecated=True,
)
def save_image_folder(
    context: NodeContext, *, images: list[Tensor], folder_name: list[str], filename_prefix: list[str], mode: list[str]
) -> tuple[()]:
    """Save images in a folder of the output folder, as PNG."""
    return _save_set(context, images, None, folder_name, filename_prefix, mode)


@node(
    "SaveImageTextDataSetToFolder",
    display_name="Save Image-Text (to Folder)",
    category="image",
    inputs=[
        Input("images", "IMAGE"),
        Input(
            "texts",
            "STRING",
            optional=True,
            force_input=True,
            multiline=False,
            tooltip="One caption per image, or one for all. Default: no text files.",
        ),
        *_image_set_inputs(),
    ],
    search_aliases=["save folder", "save dataset", "export dataset"],
    is_input_list=True,
    output_node=True,
)
def save_image_text_folder(
    context: NodeContext,
    *,
    images: list[Tensor],
    texts: Sequence[str] = (),
    folder_name: list[str],
    filename_prefix: list[str],
    mode: list[str],
) -> tuple[()]:
    """Save images in a folder of the output folder, as PNG, each with its caption in a text file of the same name."""
    return _save_set(context, images, texts or None, folder_name, filename_prefix, mode)


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
def save_lora_weights(context: NodeContext, *, lora: Lora, prefix: str, steps: int | None = None) -> NodeOutput:
    """Save a LoRA in the output folder, in the layout that most programs read, with its metadata."""
    return shown_lora(context, save_lora(context, lora, prefix, steps))


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


def _save_set(
    context: NodeContext,
    images: list[Tensor],
    texts: Sequence[str] | None,
    folder_name: list[str],
    filename_prefix: list[str],
    mode: list[str],
) -> tuple[()]:
    pictures = flat_images(images)
    captions = None if texts is None else one_for_each(texts, len(pictures), name="texts", of="caption")
    prefix = f"{single(context, 'folder_name', folder_name)}/{single(context, 'filename_prefix', filename_prefix)}"
    overwrite = single(context, "mode", mode) == "overwrite"
    folder = save_image_set(context, pictures, captions, prefix, overwrite=overwrite)
    context.log(f"{len(pictures)} images are in {folder}.")
    return ()


def _as_text(value: object) -> str:
    """A value as JSON, or as Python prints it where JSON lacks it."""
    if isinstance(value, (bool, int, float)):
        return str(value)
    try:
        return json.dumps(value, indent=4, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)
