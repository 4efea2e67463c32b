"""Text as pictures: wrapped labels in DejaVu Sans, which is part of matplotlib."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

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
