"""Contact sheets: pictures in labelled rows and columns.

Labels are text as pictures, wrapped, in DejaVu Sans, which is part of matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from lorasmith.core.printable import printable

_LINE_SPACING = 4


@cache
def load_font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans at `size` pixels."""
    import matplotlib

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
