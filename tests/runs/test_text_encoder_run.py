"""A run on a folder that trains the text encoders or a new word: its record, its files and its previews."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from lorasmith.formats.container import read_safetensors
from lorasmith.runs.plan import plan
from lorasmith.runs.run import run
from lorasmith.training.events import Previewed
from tests.hosts import Audience
from tests.runs.folder_cases import asked, placed

QUICK: dict[str, Any] = {
    "steps": 2,
    "learning_rate": 1e-7,  # of the denoiser, which changes nothing
    "previews": "a cat",
    "preview_every": 1,
    "preview_steps": 2,
    "preview_strengths": "0.5,1",
}


def drawn(images: Path, folder: Path, **settings: Any) -> list[int]:
    """How far the previews of the LoRA are from that of the base model, in order, of 255."""
    audience = Audience()
    run(plan(placed(asked(images, **QUICK, **settings), folder), audience), audience)
    base, *others = (event.paths[0] for event in audience.events if isinstance(event, Previewed))
    distances = []
    for path in others:
        with Image.open(base) as one, Image.open(path) as other:
            bands: Any = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getextrema()
        distances.append(max(high for _, high in bands))
    return distances


def test_previews_are_drawn_with_the_new_word(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "word"
    first, last, half = drawn(images, folder, trigger="cat", targets="none", new_word="cat", new_word_rate=0.05)
    assert min(first, last) > 2 and first != last == half, "a word has no strength"
    assert json.loads((folder / "run.json").read_text())["config"]["new_word_rate"] == 0.05
    bundle, _ = read_safetensors(folder / "cat.safetensors")
    beside, _ = read_safetensors(folder / "cat_emb.safetensors")
    assert bundle["bundle_emb.cat.clip_l"].equal(beside["clip_l"])
