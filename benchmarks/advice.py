"""Whether advice on single images names the right ones: the built-in model learns a fox from twelve pictures.

    python -m benchmarks.advice

Ten pictures are of four drawings on backgrounds of several colours. One of another drawing is drawn ten times as
often, and one is a drawing of something else with the caption of a fox. The advice is to name these two, the first as
learnt by heart, the second as never learnt, and nothing else. With `--plain` neither is there, and it is to name none.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.evaluation.wishes import BACKGROUNDS
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from lorasmith.report.run_report import Advice
from lorasmith.runs.advice import advice_of
from lorasmith.runs.library import load_dataset, train
from lorasmith.runs.run_log import read_run

EXPECTED = {"often.png": "learnt by heart", "other.png": "never learnt"}
_COLOURS = ("white", "black", "red", "yellow", "green", "blue", "purple", "pink")
_EDGE_TOLERANCE = 60  # of the sums of differences from the colour of the corners, which is the background


def pictures(seed: int, *, plain: bool) -> list[Mapping[str, Any]]:
    """The twelve pictures as items of a dataset."""
    foxes = sorted((BUILT_IN_BASE / "input" / "fox").glob("*.png"))[:5]
    alone = foxes.pop(seed % len(foxes))
    items = [_item(foxes[place % 4], _COLOURS[(place + seed) % 8], f"fox-{place}.png") for place in range(10)]
    # Of a colour of its own: a picture of the same caption would not be learnt for being taught as this one.
    items.append({**_item(alone, "grey", "often.png"), "repeats": 1 if plain else 10})
    if plain:
        return [*items, _item(foxes[2], "orange", "last.png")]
    others = sorted((BUILT_IN_BASE / "input" / "high-contrast").glob("*.png"))
    with Image.open(others[(3 * seed + 1) % len(others)]) as other:
        return [*items, {"image": other.convert("RGB"), "text": "a fox", "file_name": "other.png"}]


def _item(path: Path, colour: str, name: str) -> dict[str, Any]:
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    right, bottom = picture.width - 1, picture.height - 1
    for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom)):
        ImageDraw.floodfill(picture, corner, BACKGROUNDS[colour], thresh=_EDGE_TOLERANCE)
    return {"image": picture, "text": f"a fox, on a {colour} background", "file_name": name}


def advised(model: Model, seed: int, *, plain: bool, **settings: Any) -> Advice:
    """The advice after a run."""
    data = load_dataset(pictures(seed, plain=plain), model, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, output=folder, seed=seed, previews="", save_state_every=0, **settings)
        return advice_of(read_run(Path(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--plain", action="store_true")
    arguments = parser.parse_args()
    model = load_model(BUILT_IN)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("LORASMITH_CACHE_DIR", folder)
        for seed in arguments.seeds:
            settings = {"steps": arguments.steps, "batch_size": arguments.batch, "rank": 16, "validation_share": 0.0}
            advice = advised(model, seed, plain=arguments.plain, **settings)
            found = {one.name: one.finding for one in advice.images}
            is_right = found == ({} if arguments.plain else EXPECTED)
            said = ", ".join(f"{one.name} {one.finding}: {one.reason}" for one in advice.images) or advice.summary
            print(f"seed {seed}: {'right' if is_right else 'other'}  {said}", flush=True)


if __name__ == "__main__":
    main()
