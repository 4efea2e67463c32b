"""Contact sheets: pictures in labelled rows and columns; and the previews of a run on disk with their sheets.

Labels are text as pictures, wrapped, in DejaVu Sans, which is part of matplotlib. Previews are PNG files with their
parameters, or WebP files for clips:

    control-1.png, target-1.png    of edit models: what the first prompt edits, and what was trained
    base-1.png                 the model without the LoRA, first prompt
    step-000100-1.png          with the LoRA of step 100
    strength-0.5-1.png         with the finished LoRA at half strength
    steps.png, strengths.png   contact sheets, a column for each prompt

Sheets are made from the files, so that those of a resumed run include earlier pictures. Only comparable pictures are on
a sheet: same prompt, seed, sampling and model. A caller that restarts a run in the same folder must remove the old
files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from lorasmith.core.files import atomic_path, open_regular
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.printable import count_text, printable
from lorasmith.report.pictures import PREVIEW_ENTRY, PREVIEW_TAG, UNREADABLE, PictureOrClip, thinned, write_drawn

_LINE_SPACING = 4


@cache
def load_font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans at `size` pixels, or Pillow's own font where matplotlib, which has it, is not installed."""
    try:
        import matplotlib
    except ImportError:
        default = ImageFont.load_default(size)
        assert isinstance(default, ImageFont.FreeTypeFont)
        return default
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def text_image(text: str, font: ImageFont.FreeTypeFont, width: int, *, colour: str, max_lines: int) -> Image.Image:
    """`text` wrapped to at most `width` pixels, as an RGB picture on white that fits it."""
    lines = wrapped(text, font, width, max_lines=max_lines)
    ascent, descent = font.getmetrics()
    line_height = ascent + descent + _LINE_SPACING
    longest = max((font.getlength(line) for line in lines), default=0)
    picture = Image.new("RGB", (int(longest) + 1, max(1, line_height * len(lines) - _LINE_SPACING)), "white")
    draw = ImageDraw.Draw(picture)
    for index, line in enumerate(lines):
        draw.text(((picture.width - font.getlength(line)) / 2, index * line_height), line, fill=colour, font=font)
    return picture


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, *, max_lines: int) -> list[str]:
    """`text` in lines of at most `width` pixels; long words are broken, and text beyond `max_lines` is elided."""
    lines: list[str] = []
    rest = printable(" ".join(text.split()))
    while rest:
        end = _line_end(rest, font, width)
        line, rest = rest[:end].rstrip(), rest[end:].lstrip()
        if rest and len(lines) == max_lines - 1:
            line, rest = _with_ellipsis(line, font, width), ""
        lines.append(line)
    return lines


def _line_end(text: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """Number of characters in the first line of `text`: up to a blank if possible, at least one."""
    end = min(len(text), width)  # a line has no more characters than pixels
    while end > 1 and font.getlength(text[:end]) > width:
        end -= 1
    if end < len(text) and text[end] != " " and (blank := text.rfind(" ", 0, end)) > 0:
        return blank
    return end


def _with_ellipsis(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1].rstrip()
    return f"{line}…"


_INK, _FAINT, _FRAME = "#1f2933", "#52606d", "#d9dee3"
_GAP, _MARGIN = 8, 24
_ROW_LABEL_WIDTH = 150


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    title: str = "",
    min_cell: int = 128,
    max_cell: int = 512,
) -> Image.Image:
    """One RGB picture with rows of pictures and labels.

    Pictures keep their aspect ratio and are scaled by the same factor: an integer if the largest is small, a reduction
    if it is large, so that the longest edge is between `min_cell` and `max_cell` pixels. Rows may differ in length;
    None is an empty cell. Labels are one for each row or column, or none; long ones are wrapped, then truncated.
    """
    assert len(row_labels) in (0, len(rows))
    assert len(column_labels) in (0, max(len(row) for row in rows))
    table = _scaled(rows, min_cell, max_cell)
    if column_labels:
        width = max(picture.width for row in table for picture in row)
        table.insert(0, [_label(text, width, colour=_FAINT) for text in column_labels])
    if row_labels:
        blank = Image.new("RGB", (1, 1), "white")
        heads = [_label(text, _ROW_LABEL_WIDTH, colour=_INK) for text in row_labels]
        table = [[head, *row] for head, row in zip([blank, *heads][-len(table) :], table, strict=True)]
    sheet = _laid_out(table, header=bool(column_labels))
    if title:
        heading = text_image(title, load_font(22, bold=True), sheet.width, colour=_INK, max_lines=3)
        sheet = _laid_out([[heading], [sheet]], header=True)
    return ImageOps.expand(sheet, _MARGIN, "white")


def _scaled(rows: Sequence[Sequence[Image.Image | None]], min_cell: int, max_cell: int) -> list[list[Image.Image]]:
    """Framed RGB copies, scaled so that the longest edge of all is within the bounds."""
    longest = max(edge for row in rows for picture in row if picture is not None for edge in picture.size)
    factor = max(1, math.ceil(min_cell / longest)) if longest <= max_cell else max_cell / longest

    def framed(picture: Image.Image | None) -> Image.Image:
        if picture is None:
            return Image.new("RGB", (1, 1), "white")
        width, height = (max(1, round(edge * factor)) for edge in picture.size)
        kind = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
        return ImageOps.expand(picture.convert("RGB").resize((width, height), kind), 1, _FRAME)

    return [[framed(picture) for picture in row] for row in rows]


def _label(text: str, width: int, *, colour: str) -> Image.Image:
    return text_image(text, load_font(14), width, colour=colour, max_lines=5)


def _laid_out(table: Sequence[Sequence[Image.Image]], *, header: bool) -> Image.Image:
    """The cells of a table on white, centred in their rows and columns; those of a header row at the bottom."""
    num_columns = max(len(row) for row in table)
    widths = [max(row[column].width for row in table if column < len(row)) for column in range(num_columns)]
    heights = [max((cell.height for cell in row), default=0) for row in table]
    gaps = _GAP * (num_columns - 1), _GAP * (len(table) - 1)
    sheet = Image.new("RGB", (sum(widths) + gaps[0], sum(heights) + gaps[1]), "white")
    y = 0
    for index, row in enumerate(table):
        x = 0
        for cell, width in zip(row, widths, strict=False):
            spare = heights[index] - cell.height
            sheet.paste(cell, (x + (width - cell.width) // 2, y + (spare if header and index == 0 else spare // 2)))
            x += width + _GAP
        y += heights[index] + _GAP
    return sheet


_MOST_ROWS = 24
_LARGEST_SHEET = 4096  # pixels in either direction, labels aside
_CELLS = 64, 384


def pair_stems(folder: Path) -> list[str]:
    """Stems of the files with controls, masks, and of what is trained, in a folder of previews."""
    names = (
        re.fullmatch(r"(control(?:-\d+)?|mask|target)-\d+\.(?:png|webp)", file.name) for file in folder.glob("*-*.*")
    )
    stems = {name[1] for name in names if name}
    return sorted(stems, key=lambda stem: (stem == "target", stem == "mask", len(stem), stem))


class PreviewFolder:
    """Writes pictures and contact sheets; the folder is created with the first picture.

    `prompts` has one per picture of a row. `sampling` are parameters of all pictures for their metadata: JSON values by
    A1111's names (`Steps`, `Seed`, `Model`, ...).
    """

    def __init__(self, folder: Path, prompts: Sequence[str], *, title: str, sampling: Mapping[str, Any]) -> None:
        self.folder = folder
        self.prompts = tuple(prompts)
        self._title = title
        self._sampling = dict(sampling)

    def write_pair(self, stem: str, pictures: Sequence[PictureOrClip]) -> tuple[Path, ...]:
        """Write a control or mask of each prompt, or what is trained, by a stem of `pair_stems`."""
        return self._write(stem, pictures, {})

    def write_base(self, pictures: Sequence[PictureOrClip]) -> tuple[Path, ...]:
        """Write the pictures without the LoRA, one per prompt. Raises OutputError, like all methods that write."""
        return self._write("base", pictures, {"Strength": 0.0})

    def write_step(self, pictures: Sequence[PictureOrClip], step: int, lora: str) -> tuple[Path, ...]:
        """Write the pictures with the LoRA of a step; `lora` is its file name."""
        return self._write(f"step-{step:06}", pictures, {"LoRA": lora, "Step": step, "Strength": 1.0})

    def has_step(self, step: int) -> bool:
        """Whether all pictures of a step are there."""
        return any(self.folder.glob(f"step-{step:06}-{len(self.prompts)}.*"))

    def write_strength(
        self, pictures: Sequence[PictureOrClip], strength: float, step: int, lora: str, *, final: bool = True
    ) -> tuple[Path, ...]:
        """Write the pictures at a strength; those of a step on the way are in no sheet."""
        stem = f"strength-{strength:g}" if final else f"step-{step:06}-at-{strength:g}"
        return self._write(stem, pictures, {"LoRA": lora, "Step": step, "Strength": strength})

    def write_steps_sheet(self) -> Path:
        """Write `steps.png`: rows for the base and the steps, thinned if there are many."""
        names = (re.fullmatch(r"step-(\d+)-\d+\.(?:png|webp)", file.name) for file in self.folder.iterdir())
        steps = thinned(sorted({int(name[1]) for name in names if name}), _MOST_ROWS)
        rows = self._pairs() | {"base": "base"} | {f"step-{step:06}": f"step {step}" for step in steps}
        return self._write_sheet("steps.png", rows, f"{self._title}, step by step")

    def write_strengths_sheet(self, strengths: Sequence[float], step: int) -> Path:
        """Write `strengths.png`: rows for the base and the finished LoRA at each strength, in ascending order."""
        stems = {strength: f"strength-{strength:g}" for strength in strengths} | {0.0: "base"}
        labels = {
            stem: "base" if strength == 0 else f"strength {strength:g}" for strength, stem in sorted(stems.items())
        }
        rows = self._pairs() | labels
        return self._write_sheet("strengths.png", rows, f"{self._title} after {count_text(step, 'step')}")

    def _pairs(self) -> dict[str, str]:
        return {stem: stem.replace("-", " ") for stem in pair_stems(self.folder)}

    def _write(self, stem: str, pictures: Sequence[PictureOrClip], made_with: Mapping[str, Any]) -> tuple[Path, ...]:
        paths = []
        for number, (picture, prompt) in enumerate(zip(pictures, self.prompts, strict=True), start=1):
            facts = {**self._sampling, **made_with}
            parameters = f"{prompt}\n" + ", ".join(f"{name}: {fact}" for name, fact in facts.items())
            entry = json.dumps({"Prompt": prompt, **facts})
            paths.append(write_drawn(picture, self.folder / f"{stem}-{number}", parameters, entry))
        return tuple(paths)

    def _write_sheet(self, name: str, rows: Mapping[str, str], title: str) -> Path:
        """Write a contact sheet of `rows`, labels by the stem of their files; rows without pictures are skipped."""
        smallest, largest = _CELLS
        cell = max(smallest, min(largest, _LARGEST_SHEET // max(len(rows), len(self.prompts))))
        rows_of = {label: self._row(stem, cell) for stem, label in rows.items()}
        shown = {label: row for label, row in rows_of.items() if any(row)}
        sheet = contact_sheet(
            list(shown.values()), list(shown), self.prompts, title=title, min_cell=min(128, cell), max_cell=cell
        )
        path = self.folder / name
        with atomic_path(path) as temporary:
            sheet.save(temporary, format="png")
        return path

    def _row(self, stem: str, size: int) -> list[Image.Image | None]:
        """The pictures of a row, at most `size` pixels long; None for missing or incomparable ones."""
        row = []
        for number, prompt in enumerate(self.prompts, start=1):
            path = self.folder / f"{stem}-{number}.png"
            path = path if path.exists() else path.with_suffix(".webp")
            row.append(_opened(path, {"Prompt": prompt, **self._sampling}, size))
        return row


def _opened(path: Path, expected: Mapping[str, Any], size: int) -> Image.Image | None:
    """A small copy of a picture or of a clip's first frame; None if missing, unreadable or of other parameters."""
    try:
        with open_regular(path) as file, Image.open(file) as picture:
            entry = picture.getexif()[PREVIEW_TAG] if picture.format == "WEBP" else picture.info[PREVIEW_ENTRY]
            facts = dict(parse_foreign_json(entry))
            if any(facts.get(name) != value for name, value in expected.items()):
                return None
            picture.thumbnail((size, size), Image.Resampling.LANCZOS)
            return picture.copy()
    except (KeyError, TypeError, *UNREADABLE):  # other programs may have changed the file, or its text may be gone
        return None
