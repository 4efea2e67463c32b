"""Pictures whose captions and masks have faults, checked and written again."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from lorasmith.data.captions import MAX_CAPTION
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import FolderScan, scan_folder
from lorasmith.data.mended_folder import write_mended
from lorasmith.data.preflight import preflight
from tests.fuzz.engine import Door, FaultError, printed
from tests.fuzz.mutators import damaged_bytes, nasty_text

_CONFIG = DataConfig(masks="files", captions="files", resolution=32)
_SHAPES = ((24, 20), (24, 20), (20, 24), (1, 1), (24, 21), (48, 40), (2000, 1))


def doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """A folder of pictures with captions and masks, some of them at fault; it is checked, and a mended copy read."""
    images = folder / "images"
    images.mkdir()
    for number in range(rng.choice((1, 2, 4))):
        picture = Image.frombytes("RGB", (24, 20), rng.randbytes(24 * 20 * 3)).convert(
            rng.choice(("RGB", "RGB", "L", "RGBA", "P"))
        )
        _save(picture, images / f"{number}{rng.choice(('.png', '.png', '.webp'))}")
        if rng.random() < 0.8:
            (images / f"{number}{rng.choice(('.txt', '.txt', '.caption'))}").write_bytes(_caption(rng))
        if rng.random() < 0.8:
            _mask(rng, images / f"{number}.mask.png")
    return [("mend", lambda: _mended(images, folder / "mended"))]


def _mended(images: Path, target: Path) -> str:
    before = scan_folder(images, _CONFIG)
    said = _said(before)
    if before.images:
        check = preflight(before, _CONFIG, folder=images, resolution=32, multiple=8)
        write_mended(check, _CONFIG, target)
        after = scan_folder(target, _CONFIG)
        refused = {path.stem for path, reason in before.skipped if reason.kind in ("caption", "mask", "size")}
        if back := refused & {image.path.stem for image in after.images}:
            raise FaultError("a picture that was refused is trained on once mended", min(back))
        if lost := refused - {path.stem for path in (target / "unused").glob("*")}:
            raise FaultError("a picture that was refused is not kept in unused", min(lost))
        if after.skipped:
            raise FaultError("a mended folder has files that cannot be used", after.skipped[0])
        said += _said(after)
    return said


def _said(scan: FolderScan) -> str:
    return printed(*scan.notes, *(f"{path.name}: {reason}" for path, reason in scan.skipped))


def _caption(rng: random.Random) -> bytes:
    text = nasty_text(rng)[:5000].encode("utf-8", "surrogatepass")
    makers: list[Callable[[], bytes]] = [
        lambda: b"a fox",
        lambda: text,
        lambda: b"\xef\xbb\xbf" + text,
        lambda: "a fox é".encode(rng.choice(("latin-1", "utf-16", "utf-16-le", "utf-32", "cp037"))),
        lambda: b"a" * rng.choice((MAX_CAPTION, MAX_CAPTION + 1, 4 * MAX_CAPTION + 1)),
        lambda: b"\x00" * rng.choice((1, 1000)),
        lambda: rng.randbytes(rng.choice((1, 30, 3000))),
        lambda: b" \n\r\x0b\x0c\x85" * rng.choice((1, 1000)),
    ]
    return rng.choice(makers)()


def _mask(rng: random.Random, path: Path) -> None:
    mask = Image.new(rng.choice(("L", "L", "1", "RGB", "RGBA", "I;16", "LA")), rng.choice(_SHAPES))
    if rng.random() < 0.5:
        mask.paste(rng.choice(((255,), (1,))) * len(mask.getbands()) if len(mask.getbands()) > 1 else 255, (0, 0, 9, 9))
    _save(mask, path)
    if rng.random() < 0.3:
        path.write_bytes(damaged_bytes(rng, path.read_bytes()))


def _save(picture: Image.Image, path: Path) -> None:
    file = io.BytesIO()
    picture.save(
        file, "PNG" if path.suffix == ".png" else "WEBP", **({"lossless": True} if path.suffix == ".webp" else {})
    )
    path.write_bytes(file.getvalue())
