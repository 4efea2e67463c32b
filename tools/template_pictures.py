"""Draw the pictures of the editor's templates: what the example workflows make, on small cards.

    python -m tools.template_pictures FOLDER

The examples whose cards show their results are run in FOLDER, a base folder for each, unless their pictures are there;
that takes minutes. The other cards show the pictures that are trained on. Written
are `templates/<name>-1.webp` of `lorasmith-editor`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.nodes.example_workflows import Example, examples
from lorasmith.nodes.workflow_run import run_workflow
from lorasmith.server.comfyui.editor_files import PICTURES, picture_of

EDGE, BAND = 320, 34
INK, PAPER, BAND_COLOUR = "white", "#f4f1ec", "#1f2a37"


def card(tiles: Sequence[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """A square card of pictures in rows; a caption is written below each that has one."""
    rows = -(-len(tiles) // columns)
    result = Image.new("RGB", (EDGE, EDGE), PAPER)
    width, height = EDGE // columns, EDGE // rows
    for number, (caption, picture) in enumerate(tiles):
        band = BAND if caption else 0
        left, top = number % columns * width, number // columns * height
        result.paste(_fitted(picture, (width, height - band)), (left, top))
        if caption:
            _label(result, (left, top + height - band, left + width, top + height), caption, 17)
    return result


def named_card(name: str, pictures: Sequence[Image.Image]) -> Image.Image:
    """Six pictures in two rows, with a name below."""
    result = Image.new("RGB", (EDGE, EDGE), PAPER)
    edge = EDGE // 3
    top = (EDGE - 2 * edge - 60) // 2
    for number, picture in enumerate(pictures[:6]):
        result.paste(_fitted(picture, (edge, edge)), (number % 3 * edge, top + number // 3 * edge))
    _label(result, (0, EDGE - 76, EDGE, EDGE), name, 30)
    return result


def mosaic(pictures: Sequence[Image.Image]) -> Image.Image:
    """Six pictures, the first of twice the size of the others."""
    result = Image.new("RGB", (EDGE, EDGE), PAPER)
    edge = EDGE // 3
    small = ((2, 0), (2, 1), (0, 2), (1, 2), (2, 2))
    for picture, (column, row), size in zip(pictures, ((0, 0), *small), (2, *[1] * 5), strict=True):
        result.paste(_fitted(picture, (size * edge, size * edge)), (column * edge, row * edge))
    return result


def _whole(picture: Image.Image) -> Image.Image:
    """A picture as wide as a card, on white."""
    result = Image.new("RGB", (EDGE, EDGE), "white")
    scaled = picture.convert("RGB").resize(
        (EDGE, round(EDGE * picture.height / picture.width)), Image.Resampling.LANCZOS
    )
    result.paste(scaled, (0, (EDGE - scaled.height) // 2))
    return result


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in the middle of a tile that it fills, without being stretched."""
    picture = picture.convert("RGB")
    scale = max(size[0] / picture.width, size[1] / picture.height)
    scaled = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    left, top = (scaled.width - size[0]) // 2, (scaled.height - size[1]) // 2
    return scaled.crop((left, top, left + size[0], top + size[1]))


def _label(picture: Image.Image, box: tuple[int, int, int, int], text: str, points: int) -> None:
    from matplotlib.font_manager import findfont

    draw = ImageDraw.Draw(picture)
    draw.rectangle(box, fill=BAND_COLOUR)
    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    draw.text(middle, text, fill=INK, font=ImageFont.truetype(findfont("DejaVu Sans"), points), anchor="mm")


def _drawn(one: Example, folder: Path) -> Image.Image:
    """The card of a template."""
    foxes = [Image.open(path) for path in sorted((BUILT_IN_BASE / "input" / "fox").glob("*.png"))]
    if one.needs or one.name == "single_subject":
        return named_card(one.card, foxes)
    if one.name == "folder":
        return mosaic(foxes)
    base = folder / one.name
    if not (base / "output").exists():
        run_workflow(f"example:{one.name}", base_dir=base, progress=False)

    def made(pattern: str) -> list[Image.Image]:
        return [Image.open(path) for place in ("output", "temp") for path in sorted((base / place).glob(pattern))]

    match one.name:
        case "style":
            rows = [made(f"high_contrast_{kind}*") for kind in ("base", "half", "full")]
            return card([("", picture) for row in rows for picture in row[:3]], 3)
        case "strengths":
            labels = ("0", "0.5", "1", "1.5")
            return card([(f"strength {label}", one) for label, one in zip(labels, made("strengths*"), strict=True)], 2)
        case "preserve" | "text_encoder":
            drawn = [one for kind in ("base", "strength-1") for one in made(f"runs/*/samples/{kind}-[12].png")]
            labels = [f"{text}, {when}" for when in ("before", "after") for text in ("fox", "lion")[: len(drawn) // 2]]
            return card([*zip(labels, drawn, strict=True)], 2)
        case "continue":
            return _whole(made("continued_loss*")[0])
        case other:
            raise ValueError(f"the template {other} needs a picture")


def main(folder: Path) -> None:
    """Draw every card."""
    PICTURES.mkdir(exist_ok=True)
    for one in examples():
        picture = picture_of(one.name)
        _drawn(one, folder).save(picture, quality=72, method=6)
        print(picture, picture.stat().st_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
