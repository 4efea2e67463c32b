"""`lorasmith data check` as people run it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lorasmith.cli.console import print_findings
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.findings import Finding
from tests.cli.conftest import Ran
from tests.data.test_preflight import add, photo

FOX = BUILT_IN_BASE / "input" / "fox"


def test_good_pictures(lorasmith: Callable[..., Ran]) -> None:
    ran = lorasmith("data", "check", FOX, "--model", "lorasmith-tiny")
    assert ran.code == 0 and ran.err == ""
    assert "Nothing to look at: the images are fit for training." in ran.out and "Look at" not in ran.out
    assert "6 images in" in ran.out and "Model     lorasmith-tiny" in ran.out
    assert "6 samples (6 images)" in ran.out


def test_findings_page_and_mended_folder(lorasmith: Callable[..., Ran], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    add(folder / "1.png", photo(1), "a dog")
    add(folder / "2.png", photo(1, (200, 200)), "a dog again")
    add(folder / "3.tga", photo(3), "a cat")
    ran = lorasmith("data", "check", "photos", "--report", "page.html", "--fix", "fixed", "--batch-size", 2)
    assert ran.code == 1
    assert "Look at: 1 file or folder cannot be used: 3.tga (is a TGA file" in ran.out
    assert "Look at: 1 image nearly equals another: 2.png (like 1.png); keep one of each" in ran.out
    assert "assumed; --model or --resolution decides" in ran.out and "with batch 2" in ran.out
    assert "2 pictures with 2 captions written to fixed" in ran.out
    assert "1 set apart: duplicates/2.png" in ran.out and "1 converted: 3.png" in ran.out
    assert "CHANGES.txt in it says what was done to each file" in ran.out
    assert "<!doctype html>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert lorasmith("data", "check", "fixed").code == 0
    again = lorasmith("data", "check", "photos", "--fix", "fixed")
    assert again.code == 1 and "must be a new or empty folder" in again.err


def test_json_is_all_that_is_printed(lorasmith: Callable[..., Ran], tmp_path: Path) -> None:
    add(tmp_path / "photos" / "1.png", Image.new("RGB", (64, 64)), "a\x1b[2Jdog")
    ran = lorasmith("data", "check", "photos", "--json", "--fix", "fixed", "--report", "page.html")
    values = json.loads(ran.out)
    assert ran.code == 1 and values["findings"][0]["kind"] == "empty pictures"
    assert values["images"][0]["caption"] == "a\x1b[2Jdog"
    assert (tmp_path / "fixed" / "1.png").is_file() and (tmp_path / "page.html").is_file()
    assert (
        values["mended"]["files"][0] | {"name": "1.png", "target": "1.png", "changes": []}
        == values["mended"]["files"][0]
    )


def test_settings_of_the_data_are_heeded(lorasmith: Callable[..., Ran]) -> None:
    ran = lorasmith("data", "check", FOX, "--resolution", 512, "--trigger", "sks", "--json")
    values = json.loads(ran.out)
    assert values["resolutions"] == [512] and [one["kind"] for one in values["findings"]] == ["tiny pictures"]
    assert values["images"][0]["caption"].startswith("sks, ")
    assert lorasmith("data", "check", FOX, "--resolution", 512, "--no-upscale").code == 0
    steps = json.loads(lorasmith("data", "check", FOX, "--bucket-step", 128, "--validation-share", 0.5, "--json").out)
    assert steps["multiple"] == 128 and len(steps["held_out"]) == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none"], "does not exist"),
        ([FOX, "--model", "none.safetensors"], "none.safetensors"),
        ([FOX, "--resolution", "5000"], "resolution must be between 1 and 4096"),
        ([FOX, "--fix", FOX / "fixed"], "must be outside of the original"),
        ([FOX, "--fix-only", "copies"], "--fix-only chooses what --fix mends, but no --fix is given"),
        ([FOX, "--fix", "new", "--fix-only", "x"], "--fix-only must be one of sizes, rotation, formats, copies"),
    ],
)
def test_errors_are_sentences(lorasmith: Callable[..., Ran], arguments: list[object], sentence: str) -> None:
    ran = lorasmith("data", "check", *arguments)
    assert ran.code == 1 and sentence in ran.err and "Traceback" not in ran.err


def test_only_the_first_findings_are_printed_where_a_run_starts(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("copies", f"problem {index}", "a.png", "remove it") for index in range(5)]
    print_findings(findings, most=3)
    assert capsys.readouterr().out.splitlines() == [
        "Look at: problem 0: a.png; remove it.",
        "Look at: problem 1: a.png; remove it.",
        "Look at: 3 more; lorasmith data check lists them.",
    ]
    print_findings(findings[:3], most=3)
    assert capsys.readouterr().out.count("remove it") == 3
