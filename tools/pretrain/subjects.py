"""The drawings of `benchmarks/quality`: each held-out subject in each set that draws it, side by side."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lorasmith.evaluation.judge import EDGE
from lorasmith.evaluation.wishes import STYLES
from tools.pretrain.data import HELD_OUT_SUBJECTS, OTHER_SETS

SETS = (*STYLES, *OTHER_SETS)


def render_subjects(node_modules: Path, output: Path) -> None:
    """Draw a strip of (EDGE, EDGE) pixels a set into `output/SUBJECT.png`, in the order of SETS, on nothing."""
    from tools.pretrain.icons import IconSets  # needs the SVG renderer, which nothing else here does

    sets = IconSets(node_modules)
    output.mkdir(parents=True, exist_ok=True)
    for subject in HELD_OUT_SUBJECTS:
        strip = Image.new("RGBA", (EDGE * len(SETS), EDGE))
        for place, icon_set in enumerate(SETS):
            strip.paste(sets.render(icon_set, subject, EDGE - 2), (EDGE * place + 1, 1))
        strip.save(output / f"{subject}.png", optimize=True)
