"""The page in other languages: every table has what the modules say, and the main views have no English sentence."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest

import lorasmith
from lorasmith.evaluation import evaluation_record
from lorasmith.evaluation.evaluation_record import Verdict
from lorasmith.families.base import FAMILIES
from lorasmith.runs.captioner_shelf import CAPTIONER_RELEASES
from lorasmith.runs.evaluate import plain_sentence
from lorasmith.runs.presets import PRESETS, setting_groups
from lorasmith.runs.run_plan import ClassImageDrawn, ImageEncoded, ImagesFound, ModelLoading, RunPlanned
from lorasmith.runs.view import _preparation
from lorasmith.server.api_routes import setting_answer
from lorasmith.server.runs.run_answers import _plain_end
from lorasmith.training.events import CaptionEncoded, Outcome

PAGES = Path(lorasmith.__file__).parent / "server" / "pages"
MODULES = sorted(path for path in PAGES.rglob("*.mjs") if "vendor" not in path.parts)
TABLES = sorted(PAGES.glob("lang/*.json"))
EXTRACTOR = Path(__file__).parents[3] / "tools" / "pages" / "texts.mjs"

NEEDS_NODE = pytest.mark.skipif(shutil.which("node") is None, reason="there is no node to read the modules with")

KEPT = {"LoRA file", "Enter"}
"""What is the same in each language: a key, and a name of the server that a module compares."""

Table = dict[str, str | dict[str, str]]


@functools.cache
def texts() -> dict[str, str]:
    """The keys of all texts of the page, each with a place where it stands."""
    command = ["node", str(EXTRACTOR), *map(str, MODULES)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    places = declared()
    for path, of_module in found.items():
        for key, line in of_module["keys"]:
            places.setdefault(key, f"{Path(path).relative_to(PAGES)}:{line}")
        bare = [text for text, _ in of_module["bare"] if text not in KEPT]
        assert bare == [], (
            f"{path} has texts that are not translated: put t before them, or name their property in READ"
        )
    return places


def declared() -> dict[str, str]:
    """The texts of the server that the page translates: those that are declared, each with what it is of."""
    found = {}
    for title, options in setting_groups().items():
        found[title] = "a heading of settings"
        for one in map(setting_answer, options):
            found |= {one.label: f"the setting {one.name}", one.help: f"the setting {one.name}"}
    for preset in PRESETS.values():
        found |= {preset.title: f"the preset {preset.name}", preset.summary: f"the preset {preset.name}"}
    releases = [one for _, family in FAMILIES.items() for one in family.releases]
    return found | {one.about: f"the model {one.name}" for one in [*releases, *CAPTIONER_RELEASES.values()]}


def table(path: Path) -> Table:
    """A table; a key that is there twice is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = {key for key, _ in pairs if [one for one, _ in pairs].count(key) > 1}
        assert not twice, f"{path.name} has twice: {twice}"
        return dict(pairs)

    found: Table = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    return found


def wrong(found: Table, places: dict[str, str]) -> list[str]:
    """What a table lacks, has too much, or has with other holes than the English text."""
    said = [f"missing, of {place}: {key}" for key, place in places.items() if key not in found]
    said += [f"stale: {key}" for key in found if key not in places and not key.startswith("~")]
    for key, entry in found.items():
        for form in [entry] if isinstance(entry, str) else entry.values():
            if sorted(re.findall(r"\{\w+\}", form)) != sorted(re.findall(r"\{\w+\}", key)):
                said.append(f"other holes: {key}: {form}")
            if not form.strip() or re.search(r'[<>"]', form):
                said.append(f"not a text: {key}: {form}")
    return said


@NEEDS_NODE
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_has_every_text_of_the_page_and_no_other(path: Path) -> None:
    found = table(path)
    said = wrong(found, texts())
    assert not said, "\n".join([path.name, *said])
    assert list(found) == sorted(found), "the keys of a table are sorted"


def sentences() -> set[str]:
    """What the server says of the end of a run, and before its first step: one sentence of each kind."""
    likeness = SimpleNamespace(likeness=0.5, own=0.6), SimpleNamespace(likeness=0.5, own=None), None
    ends = {
        _plain_end(cast("Any", SimpleNamespace(outcome=outcome, step=step, likeness=like)))
        for outcome in (None, *Outcome)
        for step in (1, 2000)
        for like in likeness
    }
    lora = SimpleNamespace(label="step 40", measures=SimpleNamespace(adherence=0.9))
    plain = SimpleNamespace(label="step 40", measures=SimpleNamespace(adherence=None))
    ends |= {
        plain_sentence(cast("Any", SimpleNamespace(trigger=trigger, loras=loras, verdict=verdict)))
        for trigger in ("foxy", "sks dog")
        for loras in ([lora], [plain], [lora, lora], [plain, plain])
        for verdict in (
            *(Verdict(outcome="use", best=0, copied=copied) for copied in (True, False)),
            *(Verdict(outcome=outcome) for outcome in get_args(evaluation_record.Outcome)),
        )
    }
    images = [
        SimpleNamespace(caption_source=source, caption="fox")
        for source in ("trigger", "folder", "class", "none", "text")
    ]
    before = (
        *(
            ImagesFound(folder=Path(), scan=cast("Any", SimpleNamespace(images=some)), trigger="sks dog")
            for some in (images, images[::-1], images[:1], [])
        ),
        ModelLoading(model="lorasmith-tiny"),
        *(RunPlanned(plan=cast("Any", SimpleNamespace(config=SimpleNamespace(steps=steps)))) for steps in (1, 150)),
        *(ImageEncoded(done=1, total=4, cached=cached) for cached in (0, 2)),
        CaptionEncoded(done=1, total=4),
        ClassImageDrawn(done=1, total=4),
    )
    said = {one for end in ends for one in re.split(r"(?<=[.!?]) (?=[A-Z])", end)}
    return said | {text for event in before if (text := _preparation(event)) is not None}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_has_the_sentences_of_the_server_about_a_run(path: Path) -> None:
    likes = {
        key: "(.+)".join(map(re.escape, re.split(r"\{\d\}", key[1:]))) for key in table(path) if key.startswith("~")
    }
    said = sentences()
    assert [one for one in said if not any(re.fullmatch(like, one) for like in likes.values())] == []
    parts = " ".join(said)
    assert [key for key, like in likes.items() if not re.search(like, parts)] == []


@NEEDS_NODE
def test_what_is_wrong_in_a_table_is_named() -> None:
    places = {"{0} of {1}": "a.mjs:1", "Stop": "a.mjs:2", "{0} photos": "a.mjs:3"}
    good: Table = {"{0} of {1}": "{1}, {0}", "Stop": "Halt", "{0} photos": {"one": "{0} Foto", "other": "{0} Fotos"}}
    assert wrong(good, places) == []
    assert wrong({**good, "Stop": " ", "Gone": "Fort"}, places) == ["stale: Gone", "not a text: Stop:  "]
    assert wrong({**good, "{0} of {1}": "{0}"}, places) == ["other holes: {0} of {1}: {0}"]
    assert wrong({"Stop": "Halt", "{0} photos": "{0}"}, places) == ["missing, of a.mjs:1: {0} of {1}"]


@NEEDS_NODE
def test_texts_are_found_in_templates_attributes_and_code(tmp_path: Path) -> None:
    module = tmp_path / "module.mjs"
    module.write_text(
        r"""
        import { html } from "./html.mjs"; // html`<p>Not this</p>`
        const rule = /`[/]"/.test(text) ? 1 / 2 : t`Either ${t`or`}`;
        const view = ({ one }) => html`<p title="A title" class="not-one">
          Step ${one} of <b>${rule}</b>
          ${one > 1 && html`<${Button} busyText="Busy…" onClick=${() => say(t`It’s \u201c${one}\u201d.`)}>Go on<//>`}
        </p> ${count(one.length, "photo")} ${count(sum(few(one)), "file fits", "files fit")}`;
        const lost = [html`<${Fact} name="A title" value="rank" />`, "Not translated", "Enter", "not a text"];
        """
    )
    output = subprocess.run(["node", str(EXTRACTOR), str(module)], check=True, capture_output=True, text=True).stdout
    (found,) = json.loads(output).values()
    assert found["bare"] == [["A title", 8], ["Not translated", 8]]
    assert sorted(key for key, _ in found["keys"]) == sorted(
        ["Either {0}", "or", "A title", "Step {0} of", "Busy…", "It’s “{0}”.", "Go on", "{0} photos", "{0} files fit"]
    )
