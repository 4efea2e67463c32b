"""Output nodes: pictures, folders of them, LoRA files and loss plots, with their workflow in the metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER
from lorasmith.core.files import write_atomic
from lorasmith.core.folders import Folders, number_after
from lorasmith.core.placement import best_device
from lorasmith.core.printable import count_text
from lorasmith.families.base import Family
from lorasmith.families.model import Denoiser, TextEncoder
from lorasmith.formats.names import ModelNames
from lorasmith.nodes.values import LossMap, flat_images, one_for_each, optional_texts, single
from lorasmith.report.loss_plot import plot_losses
from lorasmith.report.pictures import Clip, animation, encoded
from lorasmith.toolbox.extract import PatchedPart, extract_patches, extracted_metadata
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import ANY, NodeContext, NodeOutput, Output, node, socket
from lorasmith.workflow.node import Hidden

_GRAPH: tuple[Hidden, ...] = ("prompt", "extra_pnginfo")


def graph_metadata(context: NodeContext) -> dict[str, str]:
    """The running workflow as the metadata entries that ComfyUI reads: `prompt` and `workflow`."""
    entries = {"prompt": context.prompt, "workflow": context.workflow}
    return {key: json.dumps(graph) for key, graph in entries.items() if graph}


def checked_prefix(prefix: str, folders: Folders) -> str:
    """The prefix of new files, checked before any node runs. Raises OutputError."""
    folders.numbered(prefix)
    return prefix


def save_images(
    context: NodeContext, images: Tensor, prefix: str, *, place: Literal["output", "temp"]
) -> list[dict[str, str]]:
    """Write an IMAGE as PNG files; returns a reference to each for user interfaces. Raises OutputError.

    `prefix` is subfolders and name, with tokens such as %year%.
    """
    entries = PngInfo()
    for key, text in graph_metadata(context).items():
        entries.add_text(key, text)
    height, width = images.shape[1:3]
    files = context.folders.numbered(prefix, place=place, width=width, height=height)
    references = []
    for offset, image in enumerate(images):
        path = files.path(".png", offset)
        write_atomic(path, _png(image, entries))
        references.append(files.reference(path))
    return references


def save_animation(
    context: NodeContext, images: Tensor, prefix: str, *, rate: float, lossless: bool, quality: int, method: int
) -> dict[str, str]:
    """Write an IMAGE as one animated WebP file of `rate` frames per second; otherwise as `save_images`."""
    height, width = images.shape[1:3]
    files = context.folders.numbered(prefix, place="output", width=width, height=height)
    # The workflow is where ComfyUI's editor looks for it in WebP files.
    tags = {"prompt": ExifTags.Base.Model, "workflow": ExifTags.Base.Make}
    entries: dict[int, str | bytes] = {int(tags[key]): f"{key}:{text}" for key, text in graph_metadata(context).items()}
    clip = Clip(tuple(_picture(image) for image in images), rate)
    path = files.path(".webp")
    write_atomic(path, animation(clip, entries, lossless=lossless, quality=quality, method=method))
    return files.reference(path)


def save_image_set(
    context: NodeContext, images: Sequence[Tensor], texts: Sequence[str] | None, prefix: str, *, overwrite: bool
) -> Path:
    """Write images (1, height, width, 3) of any sizes as PNG files, each with a text file of its name if `texts` is
    given.

    Returns the folder. With `overwrite` names are `<prefix>_<index>`, counted from 0, and replace existing files; else
    `<prefix>_<number>_<index>`, with numbers after the highest existing one. Raises OutputError.
    """
    files = context.folders.numbered(prefix)
    number = None if overwrite else number_after(files.folder, rf"{re.escape(files.stem)}_(\d+)[_.].*")
    for index, image in enumerate(images):
        context.raise_if_cancelled()
        middle = "" if number is None else f"_{number + index:05}"
        path = files.folder / f"{files.stem}{middle}_{index:05}.png"
        write_atomic(path, _png(image[0], PngInfo()))
        if texts is not None:
            write_atomic(path.with_suffix(".txt"), texts[index])
        context.progress(index + 1, len(images), text=path.name)
    return files.folder


def save_lora(context: NodeContext, lora: Lora, prefix: str, steps: int | None = None) -> Path:
    """Write a LoRA to the output folder as `<prefix>[_<steps>_steps]_<counter>_.safetensors`.

    The counter follows the highest one under the prefix, whatever the steps in the names, so that nothing is
    overwritten and names sort by age. The workflow is added to its metadata, unless the LoRA was trained with
    `private`. OutputError if it cannot be written; LoraError if the LoRA contains NaN or infinity.
    """
    files = context.folders.numbered(prefix)
    stem = files.stem if steps is None else f"{files.stem}_{steps}_steps"
    number = max(files.counter, number_after(files.folder, rf"{re.escape(files.stem)}_\d+_steps_(\d+)_?\..+"))
    path = files.folder / f"{stem}_{number:05}_.safetensors"
    titles = {"ss_output_name": path.stem, "modelspec.title": files.stem}
    return lora.save(path, metadata=titles if lora.private else titles | graph_metadata(context))


def shown_lora(context: NodeContext, path: Path) -> NodeOutput:
    """No outputs, and a saved LoRA for the node to show."""
    subfolder = path.parent.relative_to(context.folders.output).as_posix()
    reference = {"filename": path.name, "subfolder": "" if subfolder == "." else subfolder, "type": "output"}
    return NodeOutput((), {"loras": [reference]})


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def _png(image: Tensor, entries: PngInfo) -> bytes:
    """An image (height, width, 3) in [0, 1] as a PNG file."""
    return encoded(_picture(image), "PNG", pnginfo=entries, compress_level=4)


def _prefix(default: str, tooltip: str = "", *, multiline: bool | None = False) -> Any:
    return socket("STRING", default=default, accept=checked_prefix, multiline=multiline, tooltip=tooltip)


@node(
    "LoraSave", "Extract and Save Lora", "experimental", search_aliases=["export lora"], hidden=_GRAPH, output_node=True
)
def extract_and_save_lora(
    context: NodeContext,
    *,
    filename_prefix: str = _prefix("loras/ComfyUI_extracted_lora", "May have folders."),
    rank: int = socket("INT", default=8, min=1, max=4096, step=1, tooltip="At most; full differences have none."),
    lora_type: str = socket(
        "COMBO",
        options=("standard", "full_diff"),
        tooltip="A LoRA of the rank, or the whole difference of each weight.",
    ),
    bias_diff: bool = socket("BOOLEAN", default=True, tooltip="Include changes of biases and norms."),
    model_diff: Denoiser | None = socket(
        "MODEL", optional=True, tooltip="A model with LoRAs; what they change is saved."
    ),
    text_encoder_diff: TextEncoder | None = socket("CLIP", optional=True, tooltip="Text encoders with LoRAs."),
) -> NodeOutput:
    """Save what the LoRAs on a model and its text encoders change, as one LoRA in the output folder."""
    if model_diff is None and text_encoder_diff is None:
        context.warn("neither model_diff nor text_encoder_diff is linked, so there is no LoRA to save; link one")
        return NodeOutput(())
    parts = [] if model_diff is None else [PatchedPart(DENOISER, model_diff.module, model_diff.patches)]
    if text_encoder_diff is not None:
        parts += [
            PatchedPart(name, module, [patch for target, patch in text_encoder_diff.patches if target == name])
            for name, module in text_encoder_diff.encoders.modules.items()
        ]
    limit = rank if lora_type == "standard" else None
    names, family, title, predicts = _model(model_diff, text_encoder_diff)
    state = extract_patches(
        parts, names, rank=limit, differences=bias_diff, device=best_device(), progress=context.advance
    )
    count = max(len(part.patches) for part in parts)
    what = count_text(count, "LoRA")
    note = f"extracted from {what} on {title}" + ("" if limit is None else f" at rank {limit}")
    metadata = extracted_metadata(family, predicts, state.adapters.values(), model=title, title="", note=note)
    lora = Lora(state.with_metadata(metadata), names)
    return shown_lora(context, save_lora(context, lora, filename_prefix))


def _model(model: Denoiser | None, clip: TextEncoder | None) -> tuple[ModelNames, Family, str, str]:
    """Names, family, title and parameterization of the model that the LoRA is for."""
    if model is None:
        assert clip is not None
        # Text encoders do not know what the denoiser predicts; only the names of Stable Diffusion 2 depend on it.
        return clip.names, clip.family, clip.title, "epsilon"
    base = model.base
    # The text encoders may be of another file than the model, with other modules.
    names = base.names if clip is None else replace(base.names, text_encoders=clip.names.text_encoders)
    return names, base.family, base.title, model.diffusion.parameterization


@node("SaveImage", "Save Image", "image", outputs=[Output("IMAGE", "images")], hidden=_GRAPH, output_node=True)
def save_image(
    context: NodeContext,
    *,
    images: Tensor = socket("IMAGE"),
    filename_prefix: str = _prefix("ComfyUI", "May contain folders and %year%, %width%, ...", multiline=None),
) -> NodeOutput:
    """Save pictures in the output folder, with the workflow in their metadata."""
    return NodeOutput((images,), {"images": save_images(context, images, filename_prefix, place="output")})


_WEBP_METHODS = {"default": 4, "fastest": 0, "slowest": 6}


@node(
    "SaveAnimatedWEBP",
    "Save Animated WEBP",
    "image",
    outputs=[Output("IMAGE", "images")],
    hidden=_GRAPH,
    output_node=True,
)
def save_animated_webp(
    context: NodeContext,
    *,
    images: Tensor = socket("IMAGE"),
    filename_prefix: str = _prefix("ComfyUI", "May contain folders and %year%, %width%, ..."),
    fps: float = socket("FLOAT", default=6.0, min=0.01, max=1000.0, step=0.01, tooltip="Frames a second."),
    lossless: bool = socket("BOOLEAN", default=True, tooltip="Keep pixels as they are, in larger files."),
    quality: int = socket("INT", default=80, min=0, max=100, tooltip="Of the compression."),
    method: str = socket("COMBO", options=tuple(_WEBP_METHODS), tooltip="Effort of the compression."),
) -> NodeOutput:
    """Save a batch of pictures as one animated WebP file in the output folder, with the workflow in its metadata."""
    saved = save_animation(
        context, images, filename_prefix, rate=fps, lossless=lossless, quality=quality, method=_WEBP_METHODS[method]
    )
    return NodeOutput((images,), {"images": [saved], "animated": [len(images) > 1]})


@node("PreviewImage", "Preview Image", "image", outputs=[Output("IMAGE", "images")], hidden=_GRAPH, output_node=True)
def preview_image(context: NodeContext, *, images: Tensor = socket("IMAGE")) -> NodeOutput:
    """Show pictures, which are saved in the temp folder only."""
    return NodeOutput((images,), {"images": save_images(context, images, "ComfyUI_temp", place="temp")})


@node(
    "PreviewAny",
    "Preview as Text",
    "utilities",
    outputs=["STRING"],
    search_aliases=["show output", "inspect", "show text"],
    output_node=True,
)
def preview_any(context: NodeContext, *, source: object = socket(ANY)) -> NodeOutput:
    """Show a value as text."""
    text = source if isinstance(source, str) else _as_text(source)
    return NodeOutput((text,), {"text": [text]})


_FOLDER_NAME = _prefix("dataset", "In the output folder; may have folders.")
_FILE_PREFIX = _prefix("image", "Of the files' names.")
_MODE = socket(
    "COMBO",
    default="overwrite",
    options=("overwrite", "increment"),
    tooltip="Replace files of earlier runs, or number the new ones after them.",
)


@node(
    "SaveImageDataSetToFolder",
    "Save Image (to Folder) (DEPRECATED)",
    "image",
    search_aliases=["save folder", "save dataset", "export dataset"],
    is_input_list=True,
    output_node=True,
    deprecated=True,
)
def save_image_folder(
    context: NodeContext,
    *,
    images: list[Tensor] = socket("IMAGE"),
    folder_name: list[str] = _FOLDER_NAME,
    filename_prefix: list[str] = _FILE_PREFIX,
    mode: list[str] = _MODE,
) -> tuple[()]:
    """Save images in a folder of the output folder, as PNG."""
    return _save_set(context, images, None, folder_name, filename_prefix, mode)


@node(
    "SaveImageTextDataSetToFolder",
    "Save Image-Text (to Folder)",
    "image",
    search_aliases=["save folder", "save dataset", "export dataset"],
    is_input_list=True,
    output_node=True,
)
def save_image_text_folder(
    context: NodeContext,
    *,
    images: list[Tensor] = socket("IMAGE"),
    texts: Sequence[str] | None = optional_texts("One caption per image, or one for all. Default: no text files."),
    folder_name: list[str] = _FOLDER_NAME,
    filename_prefix: list[str] = _FILE_PREFIX,
    mode: list[str] = _MODE,
) -> tuple[()]:
    """Save images in a folder of the output folder, as PNG, each with its caption in a text file of the same name."""
    return _save_set(context, images, texts or None, folder_name, filename_prefix, mode)


@node(
    "SaveLoRA",
    "Save LoRA Weights",
    "model/merging",
    aliases=["SaveLoRANode"],
    search_aliases=["export lora"],
    hidden=_GRAPH,
    output_node=True,
)
def save_lora_weights(
    context: NodeContext,
    *,
    lora: Lora = socket("LORA_MODEL"),
    prefix: str = _prefix("loras/ComfyUI_trained_lora", "May have folders."),
    steps: int | None = socket("INT", optional=True, tooltip="Steps of the LoRA, for its file name."),
) -> NodeOutput:
    """Save a LoRA in the output folder, in the layout that most programs read, with its metadata."""
    return shown_lora(context, save_lora(context, lora, prefix, steps))


@node(
    "LossGraphNode",
    "Plot Loss Graph",
    "model/training",
    search_aliases=["training chart", "plot loss"],
    hidden=_GRAPH,
    output_node=True,
)
def plot_loss_graph(
    context: NodeContext, *, loss: LossMap = socket("LOSS_MAP"), filename_prefix: str = _prefix("loss_graph")
) -> NodeOutput:
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
