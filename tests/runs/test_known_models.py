from __future__ import annotations

import re
from pathlib import Path

from lorasmith.runs.model_list import known_models

_ROWS = {
    "Stable Diffusion 1.x, 2.x": ("sd1", "sd2"),
    "Stable Diffusion XL": ("sdxl",),
    "Stable Diffusion 3.5": ("sd3",),
    "Flux.1": ("flux1",),
    "Chroma": ("chroma",),
    "Flux.2 dev, klein": ("flux2", "flux2-klein"),
    "Z-Image": ("z-image",),
    "Lumina 2": ("lumina2",),
    "Qwen-Image, 2512, Edit": ("qwen-image",),
    "Qwen-Image 2.1": ("qwen-image-2.1",),
    "Ideogram 4": ("ideogram4",),
    "Krea 2": ("krea2",),
    "ERNIE-Image": ("ernie-image",),
    "Anima": ("anima",),
    "Wan 2.1, 2.2 A14B; 2.2 5B": ("wan", "wan22-5b"),
    "Wan 2.1, 2.2 A14B, image to video": ("wan-i2v",),
    "HunyuanVideo 1.5": ("hunyuan-video15",),
}
"""Families by their row in docs/models.md."""

_TARGETS = {
    "attention+ff": r"attention and (feed-forward|MLPs?)",
    "transformer": r"transformer blocks|whole blocks",
    "all-linear": r"all linear layers",
}
_TIMES = {"uniform": "uniform times", "logit_normal": "logit-normal times", "shifted": "times, with a shift"}


def test_the_page_of_models_has_the_defaults_of_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    table = page.partition("## Recommended settings")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|", table, flags=re.MULTILINE))
    defaults = {one.name: one.defaults for one in known_models()}
    assert sorted(name for names in _ROWS.values() for name in names) == sorted(defaults)
    missing = []
    for row, names in _ROWS.items():
        for one in (defaults[name] for name in names):
            rate = f"{one.learning_rate:.0e}".replace("e-0", "e-")
            facts = [rf"\b{one.resolution} px", rf"rate {rate}\b", rf"guidance {one.guidance:g}(?![.\d])"]
            facts += [_TARGETS[one.targets], _TIMES[one.timestep_distribution]]
            facts += [rf"\b{one.frames} frames", rf"\b{one.frame_rate:g}( a second|\b)"] if one.frames > 1 else []
            missing += [f"{row}: {fact}" for fact in facts if not re.search(fact, rows[row])]
    assert missing == []
