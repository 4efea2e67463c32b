"""Folders of images: names, captions, pictures, and what is no file."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image

from lorasmith.core.folders import Folders
from lorasmith.data.folder import scan_folder
from lorasmith.data.image_files import open_image
from lorasmith.families.parts.prompt_weights import parse_weights
from lorasmith.sampling.previews import parse_prompts
from tests.fuzz.engine import Door, command, printed
from tests.fuzz.mutators import damaged_bytes, nasty_text

__all__ = ["doors"]

_SUFFIXES = (".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff", ".txt", ".caption", ".PNG", "", ".safetensors")


def doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """A folder with odd names, scanned and listed; its captions as prompts."""
    images = folder / "images"
    images.mkdir()
    (images / "0.png").write_bytes(_picture("PNG"))
    caption = nasty_text(rng) * rng.choice((1, 1, 20))
    (images / "0.txt").write_bytes(rng.choice((caption.encode("utf-8", "replace"), rng.randbytes(20))))
    for _ in range(rng.choice((1, 1, 2, 5))):
        _put(rng, images)
    found: list[Door] = [("scan", lambda: _scanned(images, nasty_text(rng)[:100]))]
    match rng.randrange(6):
        case 0:
            found.append(("list", lambda: printed(*Folders(folder).files("loras"))))
        case 1 if rng.random() < 0.2:
            found.append(("models command", lambda: command("models", "--base-dir", folder)))
        case _:
            found.append(("prompt", lambda: str(parse_weights(caption))[:0] + " ".join(parse_prompts(caption))[:0]))
    return found


def _scanned(images: Path, trigger: str) -> str:
    scan = scan_folder(images, trigger=trigger)
    for one in scan.images:
        with open_image(one.path) as picture:
            picture.load()
    return printed(*scan.notes, *(f"{path.name}: {reason}" for path, reason in scan.skipped))


def _put(rng: random.Random, images: Path) -> None:
    """One more entry; none if there is one of that name, which may be a link, or the system refuses the name."""
    name = rng.choice((
        lambda: nasty_text(rng)[: rng.choice((20, 254, 300))],
        lambda: f"{rng.choice((1, 10, 10**12, 10**200, -1))}_{nasty_text(rng)[:20]}"[:250],
        lambda: os.fsdecode(rng.randbytes(6)),
        lambda: f"{rng.randrange(9)}",
    ))().replace("/", "_").replace("\x00", "")  # fmt: skip
    path = images / f"{name}{rng.choice(_SUFFIXES)}"
    with suppress(OSError, UnicodeEncodeError, ValueError):
        if os.path.lexists(path):
            return
        match rng.randrange(8):
            case 0:
                path.mkdir()
                (path / "1.png").write_bytes(_picture("PNG"))
            case 1:
                os.mkfifo(path)
            case 2:
                path.symlink_to(rng.choice(("/proc/version", "/dev/zero", images, "gone")))
            case 3:
                path.write_bytes(rng.randbytes(rng.choice((0, 1, 100))))
            case _:
                data = _picture(rng.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")))
                path.write_bytes(damaged_bytes(rng, data) if rng.random() < 0.7 else data)


@cache
def _picture(form: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((24, 20)).convert("RGB").save(file, form)
    return file.getvalue()
