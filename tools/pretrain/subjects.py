"""The subjects of `benchmarks/quality`, and their drawings: each subject in each set that draws it, side by side.

Recipes and methods are chosen on the development subjects. The test subjects are for a final run alone; no training
on them was looked at when they were chosen.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lorasmith.evaluation.judge import EDGE
from lorasmith.evaluation.wishes import STYLES
from tools.pretrain.data import FXEMOJI, HELD_OUT_SUBJECTS, OTHER_SETS, slug

SETS = (*STYLES, *OTHER_SETS, FXEMOJI)
DEVELOPMENT = (*HELD_OUT_SUBJECTS, "hibiscus")
TEST = (
    "wolf", "tiger face", "koala", "cow face", "mouse face", "rooster", "spouting whale", "honeybee", "spider",
    "palm tree", "rose", "grapes", "pear", "ear of corn", "hot pepper", "french fries", "cookie", "trophy", "tractor",
    "helicopter", "locomotive", "castle", "baseball", "dress", "jack-o-lantern", "ring", "candle", "bomb",
)  # fmt: skip


def render_subjects(node_modules: Path, output: Path) -> None:
    """Draw a strip of (EDGE, EDGE) pixels a set into `output/SUBJECT.webp`, in the order of SETS, on nothing.

    A place stays empty if the set does not draw the subject.
    """
    from tools.pretrain.icons import IconSets  # needs the SVG renderer, which nothing else here does

    sets = IconSets(node_modules)
    output.mkdir(parents=True, exist_ok=True)
    for subject in (*DEVELOPMENT, *TEST):
        name = slug(subject)
        strip = Image.new("RGBA", (EDGE * len(SETS), EDGE))
        for place, icon_set in enumerate(SETS):
            if sets.has(icon_set, name):
                strip.paste(sets.render(icon_set, name, EDGE - 2), (EDGE * place + 1, 1))
        strip.save(output / f"{name}.webp", lossless=True, method=6)
