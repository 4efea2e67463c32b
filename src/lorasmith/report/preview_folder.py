"""Previews of a run on disk: PNG files with their parameters, WebP files for clips, and contact sheets of them.

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
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from lorasmith.core.files import atomic_path, open_regular, write_atomic
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.printable import count_text
from lorasmith.report.contact_sheet import contact_sheet
from lorasmith.report.pictures import UNREADABLE, Clip, PictureOrClip, animation, parameters_entry, thinned

_ENTRY = "lorasmith.preview"  # not `prompt`, which ComfyUI reads as a graph
_TAG = int(ExifTags.Base.ImageDescription)  # the same in the EXIF data of clips
_MOST_ROWS = 24
_LARGEST_SHEET = 4096  # pixels in either direction, labels aside
_CELLS = 64, 384


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

    def write_base(self, pictures: Sequence[PictureOrClip]) -> tuple[Path, ...]:
        """Write the pictures without the LoRA, one per prompt. Raises OutputError, like all methods that write."""
        return self._write("base", pictures, {"Strength": 0.0})

    def write_step(self, pictures: Sequence[PictureOrClip], step: int, lora: str) -> tuple[Path, ...]:
        """Write the pictures with the LoRA of a step; `lora` is its file name."""
        return self._write(f"step-{step:06}", pictures, {"LoRA": lora, "Step": step, "Strength": 1.0})

    def write_strength(
        self, pictures: Sequence[PictureOrClip], strength: float, step: int, lora: str
    ) -> tuple[Path, ...]:
        return self._write(f"strength-{strength:g}", pictures, {"LoRA": lora, "Step": step, "Strength": strength})

    def write_steps_sheet(self) -> Path:
        """Write `steps.png`: rows for the base and the steps, thinned if there are many."""
        names = (re.fullmatch(r"step-(\d+)-\d+\.(?:png|webp)", file.name) for file in self.folder.iterdir())
        steps = thinned(sorted({int(name[1]) for name in names if name}), _MOST_ROWS)
        rows = {"base": "base"} | {f"step-{step:06}": f"step {step}" for step in steps}
        return self._write_sheet("steps.png", rows, f"{self._title}, step by step")

    def write_strengths_sheet(self, strengths: Sequence[float], step: int) -> Path:
        """Write `strengths.png`: rows for the base and the finished LoRA at each strength."""
        rows = {"base": "base"} | {f"strength-{strength:g}": f"strength {strength:g}" for strength in strengths}
        return self._write_sheet("strengths.png", rows, f"{self._title} after {count_text(step, 'step')}")

    def _write(self, stem: str, pictures: Sequence[PictureOrClip], made_with: Mapping[str, Any]) -> tuple[Path, ...]:
        paths = []
        for number, (picture, prompt) in enumerate(zip(pictures, self.prompts, strict=True), start=1):
            facts = {**self._sampling, **made_with}
            parameters = f"{prompt}\n" + ", ".join(f"{name}: {fact}" for name, fact in facts.items())
            entry = json.dumps({"Prompt": prompt, **facts})
            if isinstance(picture, Clip):
                path = self.folder / f"{stem}-{number}.webp"
                write_atomic(path, animation(picture, dict([parameters_entry(parameters), (_TAG, entry)])))
                paths.append(path)
                continue
            info = PngInfo()
            info.add_itxt("parameters", parameters)
            info.add_itxt(_ENTRY, entry)
            path = self.folder / f"{stem}-{number}.png"
            with atomic_path(path) as temporary:
                picture.save(temporary, format="png", pnginfo=info)
            paths.append(path)
        return tuple(paths)

    def _write_sheet(self, name: str, rows: Mapping[str, str], title: str) -> Path:
        """Write a contact sheet of `rows`, labels by the stem of their files; rows without pictures are skipped."""
        smallest, largest = _CELLS
        cell = max(smallest, min(largest, _LARGEST_SHEET // max(len(rows), len(self.prompts))))
        found = {label: self._row(stem, cell) for stem, label in rows.items()}
        shown = {label: row for label, row in found.items() if any(row)}
        sheet = contact_sheet(
            list(shown.values()), list(shown), self.prompts, title=title, min_cell=min(128, cell), max_cell=cell
        )
        path = self.folder / name
        with atomic_path(path) as temporary:
            sheet.save(temporary, format="png")
        return path

    def _row(self, stem: str, size: int) -> list[Image.Image | None]:
        """The pictures of a row, at most `size` pixels long; None for missing or incomparable ones."""
        found = []
        for number, prompt in enumerate(self.prompts, start=1):
            path = self.folder / f"{stem}-{number}.png"
            path = path if path.exists() else path.with_suffix(".webp")
            found.append(_opened(path, {"Prompt": prompt, **self._sampling}, size))
        return found


def _opened(path: Path, expected: Mapping[str, Any], size: int) -> Image.Image | None:
    """A small copy of a picture or of a clip's first frame; None if missing, unreadable or of other parameters."""
    try:
        with open_regular(path) as file, Image.open(file) as picture:
            entry = picture.getexif()[_TAG] if picture.format == "WEBP" else picture.info[_ENTRY]
            facts = dict(parse_foreign_json(entry))
            if any(facts.get(name) != value for name, value in expected.items()):
                return None
            picture.thumbnail((size, size), Image.Resampling.LANCZOS)
            return picture.copy()
    except (KeyError, TypeError, *UNREADABLE):  # other programs may have changed the file, or its text may be gone
        return None
