"""The picture of a LoRA where model browsers look for it: in its header, and beside the file.

NAME.safetensors     `modelspec.thumbnail`, a small JPEG as a data URL (ModelSpec)
NAME.png             the picture, as A1111, Forge and ComfyUI's browsers look for it
NAME.preview.png     the same by its older name
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from lorasmith.core.files import atomic_path
from lorasmith.formats.container import read_safetensors, write_safetensors

THUMBNAIL = "modelspec.thumbnail"
_EDGE, _QUALITY = 256, 85


def give_picture(lora: Path, picture: Path, *, private: bool) -> None:
    """Write the picture of a LoRA into its header and beside it. Tensors and their hashes stay the same.

    Of a clip's WebP file, the first frame is used. A `private` LoRA gets no picture in its header, and the files beside
    it no prompt.
    """
    with Image.open(picture) as opened:
        opened.load()
        pixels = opened.convert("RGB")
    content = _png(pixels) if private or picture.suffix != ".png" else picture.read_bytes()
    for suffix in (".png", ".preview.png"):
        with atomic_path(lora.with_suffix(suffix)) as temporary:
            temporary.write_bytes(content)
    if private:
        return
    tensors, metadata = read_safetensors(lora)
    # Copies, as the tensors are mapped from the file that is replaced.
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    del tensors
    write_safetensors(lora, copies, {**metadata, THUMBNAIL: _data_url(pixels)})


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def _data_url(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((_EDGE, _EDGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="jpeg", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
