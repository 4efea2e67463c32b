"""Saving of numbered files with their workflow in the metadata."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lorasmith.core.files import write_atomic
from lorasmith.core.folders import Folders, NumberedFiles
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import NodeContext

__all__ = ["checked_prefix", "graph_metadata", "save_images", "save_lora"]


def graph_metadata(context: NodeContext) -> dict[str, str]:
    """The running workflow as the metadata entries that ComfyUI reads: `prompt` and `workflow`."""
    entries = {"prompt": context.prompt, "workflow": context.workflow}
    return {key: json.dumps(graph) for key, graph in entries.items() if graph}


def checked_prefix(prefix: str, folders: Folders) -> str:
    """The prefix of new files, which is checked before any node runs. Raises OutputError, as `Folders.numbered`."""
    folders.numbered(prefix)
    return prefix


def save_images(
    context: NodeContext, images: Tensor, prefix: str, *, place: Literal["output", "temp"]
) -> list[dict[str, str]]:
    """Write an IMAGE as PNG files.

    Args:
        context: of the saving node.
        images: (batch, height, width, 3) in [0, 1].
        prefix: subfolders and name, with tokens such as %year%.
        place: folder to write to.

    Returns:
        A reference to each file for user interfaces.

    Raises:
        OutputError: a file cannot be written.
    """
    entries = PngInfo()
    for key, text in graph_metadata(context).items():
        entries.add_text(key, text)
    height, width = images.shape[1:3]
    files = context.folders.numbered(prefix, place=place, width=width, height=height)
    references = []
    for offset, image in enumerate(images):
        picture = Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", pnginfo=entries, compress_level=4)
        path = files.path(".png", offset)
        write_atomic(path, buffer.getvalue())
        references.append(files.reference(path))
    return references


def save_lora(context: NodeContext, lora: Lora, prefix: str, steps: int | None = None) -> Path:
    """Write a LoRA to the output folder as `<prefix>[_<steps>_steps]_<counter>_.safetensors`.

    The counter follows the highest one under the prefix, whatever the steps in the names, so that nothing is
    overwritten and names sort by age. The workflow is added to its metadata, unless the LoRA was trained with
    `private`.

    Args:
        context: of the saving node.
        lora: the LoRA.
        prefix: subfolders and name, with tokens such as %year%.
        steps: for the name; None to omit them.

    Raises:
        OutputError: the file cannot be written.
        LoraError: the LoRA contains NaN or infinity.
    """
    files = context.folders.numbered(prefix)
    stem = files.stem if steps is None else f"{files.stem}_{steps}_steps"
    path = files.folder / f"{stem}_{_free_counter(files):05}_.safetensors"
    titles = {"ss_output_name": path.stem, "modelspec.title": files.stem}
    return lora.save(path, metadata=titles if lora.private else titles | graph_metadata(context))


def _free_counter(files: NumberedFiles) -> int:
    """First free counter, whatever the steps in the names."""
    taken = re.compile(rf"{re.escape(files.stem)}_\d+_steps_(\d+)_?\..+", re.IGNORECASE)
    names = [entry.name for entry in files.folder.iterdir()] if files.folder.is_dir() else []
    return max([files.counter, *(int(match[1]) + 1 for name in names if (match := taken.fullmatch(name)))])
