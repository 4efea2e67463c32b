"""The rules of who applies what are what the load matrix measured."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import lora_cases
import pytest

from lorasmith.core.adapter_state import AdapterState
from lorasmith.families.model import Model
from lorasmith.formats.acceptance import PROGRAMS, shortfalls
from lorasmith.formats.lora_file import PORTABLE, layout_for
from lorasmith.training.lora_handle import Lora
from tests.covering import slow_except

RECORD = json.loads((Path(__file__).parents[1] / "golden" / "load_matrix.json").read_text(encoding="utf-8"))
AGREEMENT = 1e-3
ROWS = sorted({(cell["family"], cell["case"]) for cell in RECORD["cells"] if "refused" not in cell})
QUICK = ("sd1", "flux2-klein")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")

    @cache
    def model(family: str) -> Model:
        return lora_cases.base_model(family, folder)[0]

    @cache
    def make(family: str, case: str) -> Lora:
        return lora_cases.example(lora_cases.CASES[case], model(family))

    return make


@pytest.mark.parametrize(("family", "case"), slow_except(ROWS, *(row for row in ROWS if row[0] in QUICK)))
def test_the_rules_say_what_was_measured(lora, family: str, case: str) -> None:
    one = lora(family, case)
    by_layout: dict[str, dict[str, Any]] = {}
    for cell in RECORD["cells"]:
        if (cell["family"], cell["case"]) == (family, case) and "refused" not in cell:
            by_layout.setdefault(cell["layout"], {})[cell["loader"]] = cell
    for layout, cells in by_layout.items():
        kind = layout_for(layout, one.names, one.state)
        found = shortfalls(one.state, kind, one.names, is_portable=layout == PORTABLE)
        measured = {
            program
            for program in PROGRAMS
            if program in cells
            and not (
                cells[program]["applied"] == cells[program]["modules"] > 0
                and (cells[program]["difference"] or 0.0) < AGREEMENT
            )
        }
        assert {short.program for short in found} & cells.keys() == measured, layout
        if "diffusers" in measured and "error" not in cells["diffusers"]:  # it counts modules as we do
            refs = [ref for short in found if short.program == "diffusers" for ref in short.modules]
            assert {f"{ref.component}.{ref.path}" for ref in refs} >= {*cells["diffusers"].get("not_applied", ())}


EVERYONE = {"ours", "diffusers", "ComfyUI", "sd-scripts", "LyCORIS"}
WITHOUT_TRAINERS = {"ours", "diffusers", "ComfyUI"}


def test_portable_loras_are_applied_completely() -> None:
    for family, programs in [
        *((family, EVERYONE) for family in ("sd1", "sdxl", "flux1", "chroma")),
        *((family, EVERYONE - {"sd-scripts"}) for family in ("flux2-klein", "qwen-image")),
        ("hunyuan-video15", EVERYONE - {"sd-scripts", "diffusers"}),
        *(
            (family, WITHOUT_TRAINERS)
            for family in ("z-image", "krea2", "ernie-image", "anima", "sd3", "lumina2", "wan")
        ),
    ]:
        for case in ["lora", "lora-uneven"]:
            cells = [c for c in RECORD["cells"] if (c["family"], c["case"], c["layout"]) == (family, case, PORTABLE)]
            assert {c["loader"] for c in cells} >= programs
            for cell in cells:
                if cell["loader"] in programs:
                    assert cell["applied"] == cell["modules"] > 0, cell
                    assert cell["difference"] < AGREEMENT < cell["effect"], cell


def test_a_file_that_is_refused_for_some_layers_is_not_applied_at_all(lora) -> None:
    one = lora("wan", "lora-all")
    (found,) = shortfalls(one.state, layout_for(PORTABLE, one.names), one.names, is_portable=True)
    assert (found.program, found.is_all) == ("diffusers", True)
    assert found.reason == "it refuses a file with layers that it does not find by such names (patch_embedding)"


def test_a_file_that_is_refused_for_a_missing_layer_is_not_applied_at_all(lora) -> None:
    one = lora("lumina2", "lora-attention")
    (found,) = (
        short
        for short in shortfalls(one.state, layout_for(PORTABLE, one.names), one.names, is_portable=True)
        if short.program == "diffusers"
    )
    assert found.is_all
    assert found.reason.endswith("every linear layer of a block (layers.0.feed_forward.linear_1 is missing)")


@pytest.mark.parametrize(("blocks", "is_read"), [("01", True), ("0", True), ("1", False)])
def test_whole_blocks_are_counted_from_the_first(lora, blocks: str, is_read: bool) -> None:
    one = lora("lumina2", "lora")
    kept = {ref: weights for ref, weights in one.state.adapters.items() if ref.path.split(".")[1] in blocks}
    found = shortfalls(AdapterState(kept, {}), layout_for(PORTABLE, one.names), one.names, is_portable=True)
    assert ("diffusers" not in {short.program for short in found}) == is_read


def test_programs_are_named_once_for_each_reason(lora) -> None:
    one = lora("sd1", "lora-all")
    found = shortfalls(one.state, layout_for("kohya", one.names), one.names)
    assert [short.program for short in found] == ["sd-scripts"]
    assert {ref.path for ref in found[0].modules} == {
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
    }
    assert found[0].sentence.startswith("sd-scripts does not apply 4 modules, such as conv_in, as meant: ")
