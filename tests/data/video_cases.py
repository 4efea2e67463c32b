"""Small videos, where PyAV is installed, and animations."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
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


GREY = 60  # of 255, a second
_DEFAULT_DURATION = b"\x23\xe3\x83\x84"  # Matroska's element of the frame rate, with the length of its four bytes


def timed_movie(path: Path, times: Sequence[float], *, rate: int | None = None) -> Path:
    """A video whose frames have these time stamps, in seconds, and `GREY` each second; skips the test without PyAV.

    `rate` is what the file states: PyAV's default if left out, nothing for 0 (Matroska only).
    """
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(_CODECS.get(path.suffix, "mpeg4"), rate=rate or None)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 10**7
        base = Fraction(1, 2400)
        stream.codec_context.time_base = stream.time_base = base
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), round(GREY * time), np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if rate == 0:
        content = path.read_bytes()
        assert content.count(_DEFAULT_DURATION) == 1
        place = content.index(_DEFAULT_DURATION)
        path.write_bytes(content[:place] + b"\xec\x86" + bytes(6) + content[place + 8 :])  # an element without meaning
    return path


def animation(
    path: Path, frames: int, milliseconds: int | list[int] = 100, size: tuple[int, int] = (32, 16), step: int = 20
) -> Path:
    """An animation of grey frames, each `step` brighter."""
    pictures = [Image.new("RGB", size, (step * number,) * 3) for number in range(frames)]
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, **options)
    return path
