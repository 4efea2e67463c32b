"""Grids of pictures of a run: one prompt with the LoRAs of several steps, at several strengths, from the same noise.

    gallery/grid-0a1b2c3d.json       a `Grid`
    gallery/grid-0a1b2c3d-00.webp    its pictures

A grid is of one prompt, and replaces an earlier one of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from lorasmith.core.files import ensure_folder, read_regular, write_atomic
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.typed_json import typed
from lorasmith.evaluation.evaluation_record import Grid, GridCell
from lorasmith.families.model import Model
from lorasmith.report.pictures import KEPT_EDGE, webp
from lorasmith.runs.run_page import is_own
from lorasmith.sampling.generate import Sampling, generate_clips
from lorasmith.training.lora_handle import Lora

GALLERY = "gallery"  # folder in that of a run

MOST_STEPS = 4  # columns
_MOST_GRIDS = 200


def read_grids(folder: Path) -> tuple[Grid, ...]:
    """The grids in the folder of a run, in the order of their prompts; damaged ones, and links, are left out."""
    found = []
    for path in sorted((folder / GALLERY).glob("grid-*.json"))[:_MOST_GRIDS]:
        if not is_own(path, folder):
            continue
        try:
            grid = typed(parse_foreign_json(read_regular(path)), Grid)
        except (OSError, ValueError):
            continue
        if all(is_own(folder / file, folder) for file in (grid.base, *(cell.file for cell in grid.cells))):
            found.append(grid)
    return tuple(sorted(found, key=lambda grid: grid.prompt))


def draw_grid(
    model: Model,
    run: Path,
    loras: Sequence[tuple[int, Path]],
    strengths: Sequence[float],
    *,
    wish: str,
    prompt: str,
    sampling: Sampling,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> Grid:
    """Draw a prompt without a LoRA, and with each of them, by step, at each strength, into the folder of a run.

    `progress` receives (sampling steps done, total). Raises as `generate_clips`, after which an earlier grid stays.
    """
    total, done = sampling.steps * (1 + len(loras) * len(strengths)), 0

    def drawn(lora: Lora | None, strength: float) -> Image.Image:
        nonlocal done
        before = done
        applied = None if lora is None else lora.applied(model.denoiser, model.text_encoder, strength=strength)
        (clip,) = generate_clips(
            model.denoiser if applied is None else applied.denoiser,
            prompt,
            sampling,
            text_encoder=model.text_encoder if applied is None else applied.encoder,
            progress=lambda steps, _: progress(before + steps, total),
            cancelled=cancelled,
        )
        done += sampling.steps
        return clip.frames[0]

    pictures, cells = [drawn(None, 0.0)], list[tuple[int, float]]()
    for step, path in loras:
        lora = Lora.load(path, model)
        for strength in strengths:
            pictures.append(drawn(lora, strength))
            cells.append((step, strength))
    stem = f"grid-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    folder = ensure_folder(run / GALLERY)
    files = [f"{GALLERY}/{stem}-{number:02}.webp" for number in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        write_atomic(run / file, webp(picture, KEPT_EDGE))
    grid = Grid(
        wish=wish,
        prompt=prompt,
        seed=sampling.seed,
        base=files[0],
        cells=tuple(
            GridCell(step=step, strength=strength, file=file)
            for (step, strength), file in zip(cells, files[1:], strict=True)
        ),
    )
    write_atomic(folder / f"{stem}.json", json.dumps(asdict(grid), ensure_ascii=False, indent=1) + "\n")
    return grid
