"""Small videos, where PyAV is installed, and animations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

_CODECS = {".flv": "flv", ".webm": "libvpx"}


def movie(path: Path, frames: int, width: int = 32, height: int = 16) -> Path:
    """A video of grey frames, 25 brighter each, 10 a second; skips the test without PyAV."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(_CODECS.get(path.suffix, "mpeg4"), rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            grey = np.full((height, width, 3), min(255, number * 25), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


def animation(path: Path, frames: int, milliseconds: int = 100, size: tuple[int, int] = (32, 16)) -> Path:
    """An animation of grey frames, 20 brighter each."""
    pictures = [Image.new("RGB", size, (20 * number,) * 3) for number in range(frames)]
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, **options)
    return path
