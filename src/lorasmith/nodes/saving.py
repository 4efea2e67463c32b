"""Saving of numbered files with their workflow in the metadata."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lorasmith.core.files import write_atomic
from lorasmith.core.folders import Folders, NumberedFiles
from lorasmith.report.pictures import Clip, animation
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import NodeContext, NodeOutput


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
    clip = Clip(tuple(_picture(one) for one in images), rate)
    path = files.path(".webp")
    write_atomic(path, animation(clip, entries, lossless=lossless, quality=quality, method=method))
    return files.reference(path)


def save_image_set(
    context: NodeContext,
    images: Sequence[Tensor],
    texts: Sequence[str] | None,
    prefix: str,
    *,
    overwrite: bool,
) -> Path:
    """Write images (1, height, width, 3) of any sizes as PNG files, each with a text file of its name if `texts` is
    given.

    Returns the folder. With `overwrite` names are `<prefix>_<index>`, counted from 0, and replace existing files; else
    `<prefix>_<number>_<index>`, with numbers after the highest existing one. Raises OutputError.
    """
    files = context.folders.numbered(prefix)
    number = None if overwrite else _after(files, rf"{re.escape(files.stem)}_(\d+)[_.].*")
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
    path = files.folder / f"{stem}_{_free_counter(files):05}_.safetensors"
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
    picture = _picture(image)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=entries, compress_level=4)
    return buffer.getvalue()


def _free_counter(files: NumberedFiles) -> int:
    """First free counter, whatever the steps in the names."""
    return max(files.counter, _after(files, rf"{re.escape(files.stem)}_\d+_steps_(\d+)_?\..+"))


def _after(files: NumberedFiles, pattern: str) -> int:
    """The number after the highest one that the pattern finds in the names of a folder, which need not exist."""
    taken = re.compile(pattern, re.IGNORECASE)
    names = [entry.name for entry in files.folder.iterdir()] if files.folder.is_dir() else []
    return 1 + max((int(match[1]) for name in names if (match := taken.fullmatch(name))), default=0)
