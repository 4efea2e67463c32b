"""Questions about nodes, prompts, and files used by graphs."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from lorasmith.core.errors import DataError, ModelError
from lorasmith.core.folders import Folders
from lorasmith.core.registry import Registry
from lorasmith.server.comfyui.node_pages import node_page
from lorasmith.server.comfyui.prompt_answers import answer_to
from lorasmith.server.questions.question_registry import question
from lorasmith.workflow.editor_format import prompt_of_editor
from lorasmith.workflow.node import Node
from lorasmith.workflow.object_info import object_info as definition

_MOST_PIXELS = 64_000_000  # of a picture that is re-encoded, which takes about 20 bytes of memory per pixel


@question
def object_info(folders: Folders, *, node: str | None = None) -> bytes:
    """JSON text with the definitions of all nodes, or of one, by class; empty for an unknown class."""
    known = _nodes()
    one_or_none = [known[node]] if node is not None and node in known else []
    found = [one for _, one in known.items()] if node is None else one_or_none
    return json.dumps({node or one.id: definition(one, folders) for one in found}).encode()


@question
def check_prompt(folders: Folders, *, prompt: dict[str, Any], targets: list[str] | None = None) -> dict[str, Any]:
    """Check a prompt: `{outputs, error, node_errors, warnings}`, as `PromptAnswer`. `targets` as in `answer_to`."""
    answer = answer_to(prompt, folders, nodes=_nodes(), targets=targets)
    return {
        "outputs": list(answer.outputs),
        "error": answer.error,
        "node_errors": answer.node_errors,
        "warnings": list(answer.warnings),
    }


@question
def prompt_of_workflow(folders: Folders, *, workflow: dict[str, Any]) -> dict[str, Any]:
    """The prompt of a graph in the editor's format. Raises GraphError."""
    return prompt_of_editor(workflow, nodes=_nodes())


@question
def node_documentation(folders: Folders, *, node: str) -> str | None:
    """The page about a node in markdown; None for an unknown class."""
    known = _nodes()
    return node_page(known[node]) if node in known else None


@question
def file_metadata(folders: Folders, *, kind: str, name: str) -> dict[str, str] | None:
    """The metadata in the header of a model file of a kind such as `loras`; None if it has none. Raises ModelError."""
    from lorasmith.formats.container import check_safetensors

    return check_safetensors(folders.find(kind, name), ModelError).metadata or None


@question
def encoded_picture(
    folders: Folders,
    *,
    path: str,
    channel: Literal["rgba", "rgb", "a"] = "rgba",
    format: Literal["png", "webp", "jpeg"] = "png",
    quality: int = 90,
) -> bytes:
    """A picture, or its alpha (`a`) or the colours under it (`rgb`), in a format with a quality from 1 to 100."""
    with _pixels(Path(path)) as image:
        if channel == "a":
            image = _transparency(image)
        elif channel == "rgb" or format == "jpeg":
            image = image.convert("RGB")
        return _encoded(image, format, quality)


@question
def masked_picture(folders: Folders, *, original: str, mask: str) -> bytes:
    """A picture with the alpha of `mask`, which has the same size, as PNG with the picture's metadata."""
    from PIL.PngImagePlugin import PngInfo

    from lorasmith.data.image_files import header_size, open_original

    sizes = [header_size(Path(path)) for path in (original, mask)]
    if sizes[0] != sizes[1]:
        drawn, shown = (f"{width}×{height}" for width, height in sizes)
        raise DataError(f"a mask must have the size of its picture, {drawn}, got {shown}; draw it again")
    with _pixels(Path(original)) as image:
        texts = {key: value for key, value in image.info.items() if isinstance(value, str)}
        image = image.convert("RGBA")
        image.putalpha(open_original(Path(mask))[0].convert("RGBA").getchannel("A"))
        metadata = PngInfo()
        for key, value in texts.items():
            metadata.add_text(key, value)
        result = io.BytesIO()
        image.save(result, "PNG", pnginfo=metadata, compress_level=4)
        return result.getvalue()


@contextlib.contextmanager
def _pixels(path: Path) -> Iterator[Any]:
    """The picture of a file with its alpha; only one large picture is open at a time. Raises DataError."""
    from lorasmith.data.image_files import header_size, one_at_a_time, open_original

    size = header_size(path)
    if math.prod(size) > _MOST_PIXELS:
        most = f"{_MOST_PIXELS // 1_000_000} million pixels"
        raise DataError(f"a picture that is converted must have at most {most}, got {size[0]}×{size[1]}; scale it down")
    with one_at_a_time(size):
        yield open_original(path)[0]


def _transparency(image: Any) -> Any:
    from PIL import Image

    alpha = image.getchannel("A") if "A" in image.getbands() else Image.new("L", image.size, 255)
    shown = Image.new("RGBA", image.size)
    shown.putalpha(alpha)
    return shown


def _encoded(image: Any, format: str, quality: int) -> bytes:
    if image.mode not in ("RGB", "RGBA", "L"):
        image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    result = io.BytesIO()
    options = {} if format == "png" else {"quality": min(100, max(1, quality))}
    image.save(result, format, **options)
    return result.getvalue()


def _nodes() -> Registry[Node]:
    from lorasmith.nodes import load_nodes

    return load_nodes()
