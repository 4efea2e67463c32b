"""The table of layers that the defaults leave out, in docs/models.md, is that of the networks."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from original_models import SD1, SD2, save
from torch import nn
from transformer_models import TINY, Case

from lorasmith.families.base import FAMILIES
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from tests.covering import slow_except

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"(?m)^\| (`[^|]+`) \| `([^`|]+)` \| ([^|]+) \| [^|]+ \|$", PAGE.split("\n## Which layers are trained")[1]
)


def row(family: str) -> tuple[str, list[str]]:
    """The default preset, and patterns of what it leaves out."""
    found = [(preset, re.findall("`([^`]+)`", out)) for names, preset, out in ROWS if f"`{family}`" in names]
    assert len(found) == 1, family
    return found[0]


ORIGINAL = {"sd1": SD1, "sd2": SD2}


@pytest.fixture(params=[*ORIGINAL, "sdxl", *slow_except(TINY, "z-image", "krea2")])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    if request.param == "sdxl":
        found: Model = request.getfixturevalue("sdxl")
        return found
    if request.param in ORIGINAL:
        return load_model(save(tmp_path / "tiny.safetensors", ORIGINAL[request.param].tensors()))
    return Case.of(request.param, tmp_path).ours


def test_nothing_of_a_network_is_left_out_unnamed(model: Model) -> None:
    preset, patterns = row(model.family.name)
    assert preset == model.defaults.targets
    rule, module = model.family.presets[preset], model.components.denoiser
    linear = {path: one for path, one in module.named_modules() if isinstance(one, nn.Linear)}
    trained = {path for path, one in linear.items() if rule.matches(path, one)}
    assert trained, preset

    def matching(path: str) -> list[str]:
        return [one for one in patterns if fnmatchcase(path, one)]

    assert [path for path in linear.keys() - trained if not matching(path)] == [], "left out, and not in the table"
    assert [path for path in trained if matching(path)] == [], "in the table, and trained"
    used = {one for path in linear for one in matching(path)}
    assert used == set(patterns), "in the table, and not in the network"


def test_every_family_has_a_row() -> None:
    named = [name for names, _, _ in ROWS for name in re.findall("`([^`]+)`", names)]
    assert sorted(named) == sorted(FAMILIES)
