"""Folders of images: names, captions, pictures, and what is not a file."""

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
from lorasmith.data.captions import CaptionRules
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import scan_folder
from lorasmith.data.image_files import open_image
from lorasmith.families.parts.encoders import parse_weights
from lorasmith.sampling.previews import parse_prompts
from tests.fuzz.engine import Door, FaultError, command, printed
from tests.fuzz.mutators import damaged_bytes, damaged_json, json_bytes, nasty_text

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
    if rng.random() < 0.5:
        _put_metadata(rng, images)
    config = _config(rng)
    found: list[Door] = [("scan", lambda: _scanned(images, config))]
    match rng.randrange(6):
        case 0:
            found.append(("list", lambda: printed(*Folders(folder).files("loras"))))
        case 1 if rng.random() < 0.2:
            found.append(("models command", lambda: command("models", "--base-dir", folder)))
        case _:
            found.append(("prompt", lambda: str(parse_weights(caption))[:0] + " ".join(parse_prompts(caption))[:0]))
    return found


def _config(rng: random.Random) -> DataConfig:
    """Settings of which each is drawn."""
    return DataConfig(
        trigger=nasty_text(rng)[:100],
        captions=rng.choice(("files", "files", "files", "filename", "folder")),
        prefix=rng.choice(("", nasty_text(rng)[:50])),
        recursive=rng.random() < 0.5,
        wildcards=rng.random() < 0.5,
        caption_lines=rng.random() < 0.5,
        shuffle_tags=rng.random() < 0.5,
        keep_tags=rng.randrange(3),
        tag_dropout=rng.choice((0.0, 0.5, 1.0)),
        masks=rng.choice(("none", "files")),
    )


def _scanned(images: Path, config: DataConfig) -> str:
    scan = scan_folder(images, config)
    rules = CaptionRules.of(config)
    for one in scan.images:
        with open_image(one.path) as picture:
            picture.load()
        possible = rules.possible(one.captions, 100)
        for draw in range(3):
            if possible is not None and rules.drawn(one.captions, 0, draw) not in possible:
                raise FaultError("drew a text that is not possible")
    return printed(*scan.notes, *(f"{path.name}: {reason}" for path, reason in scan.skipped))


def _put_metadata(rng: random.Random, images: Path) -> None:
    """A metadata file, damaged or of odd names and captions, unless the name is taken."""
    name = rng.choice(("metadata.json", "meta_x.json", "metadata.jsonl", "metadata.csv", "metadata.parquet"))
    names = [rng.choice(("0.png", "0", "1_x/1.png", "../0.png", nasty_text(rng))) for _ in range(rng.choice((1, 3)))]
    texts = [rng.choice((nasty_text(rng), [nasty_text(rng), "{a|b}, c"], None, 3, {"a": 1})) for _ in names]
    if name.endswith(".json"):
        content = json_bytes(
            damaged_json(rng, {one: {"caption": text} for one, text in zip(names, texts, strict=True)})
        )
    elif name.endswith(".jsonl"):
        entries = [{"file_name": one, "text": text} for one, text in zip(names, texts, strict=True)]
        content = b"\n".join(json_bytes(damaged_json(rng, entry) if rng.random() < 0.5 else entry) for entry in entries)
    elif name.endswith(".csv"):
        rows = "".join(f'"{one}","{text}"\n' for one, text in zip(names, texts, strict=True))
        content = f"file_name,text\n{rows}".encode("utf-8", "replace")
    else:
        content = b"PAR1" + rng.randbytes(100) + b"PAR1"
    with suppress(FileExistsError), (images / name).open("xb") as file:
        file.write(damaged_bytes(rng, content) if rng.random() < 0.3 else content)


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
