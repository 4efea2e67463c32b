"""Records as they are written and read, and what no record may hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorasmith.core.errors import OptionError
from lorasmith.training.storage.records import ModelRecord, RunRecord, SampleRecord, check_title, parsed_record

RECORD = RunRecord(
    title="dog",
    source={"command": "train", "folder": "/photos"},
    model=ModelRecord(name="m", path=None, family="sd1", files={"vae": "/m"}),
    config={"steps": 5, "alpha": None},
    asked={"steps": 5},
    samples=(SampleRecord(name="0.png", caption="ein Höhlenbär", latents=(4, 8, 8)),),
    fingerprint={"config": {"seed": 3}, "base": {"denoiser": "d"}, "noising": ["v", "s"]},
    environment={"threads": 2, "versions": {"torch": "2"}},
)


def test_a_record_is_read_as_it_was_written_by_this_version_or_another() -> None:
    assert parsed_record(RECORD.to_text()) == RECORD
    entry = parsed_record(RECORD.to_entry())
    assert (entry.source, entry.asked, entry.fingerprint) == (RECORD.source, RECORD.asked, RECORD.fingerprint)
    assert entry.samples == () and "title" not in json.loads(RECORD.to_entry())
    assert RECORD.all_environments == (RECORD.environment,)
    assert parsed_record('{"environments": [{"threads": 2}, {"threads": 4}]}').all_environments == (
        {"threads": 2},
        {"threads": 4},
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 2}, "version must be between 1 and 1, got 2; if a later Lorasmith wrote it, update"),
        ({"version": 0}, "version must be between 1 and 1, got 0"),
        ({"version": "1"}, "version must be an integer"),
        ({"title": "../cat"}, "name must be a file name without folders"),
        ({"title": "a\0b"}, "name must have at most [0-9]+ bytes and no control characters"),
        ({"steps_before": -1}, "steps_before must be between 0 and"),
        ({"steps_before": 2**62}, "steps_before must be between 0 and"),
        ({"samples": [{"latents": [4, "8"]}]}, r"samples\[0\].latents\[1\] must be an integer"),
        ({"fingerprint": {"config": ["seed"]}}, "fingerprint.config must be an object"),
        ({"fingerprint": None}, "fingerprint must be an object, got None"),
        ({"asked": {"steps": {}}}, "asked.steps must be"),
        ({"environments": [3]}, r"environments\[0\] must be an object"),
        ({"model": []}, "model must be an object"),
    ],
)
def test_what_no_record_holds_is_refused_with_its_place(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parsed_record(json.dumps({**json.loads(RECORD.to_text()), **changes}))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"steps_before": NaN}', b"\xff", '{"a": 1, "a": 2}'])
def test_what_is_no_record_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parsed_record(text)


@pytest.mark.parametrize("name", ["a/b", "a\\b", "..", " ", "", "a\tb", "\udcff"])
def test_a_name_is_that_of_a_file(name: str) -> None:
    with pytest.raises(OptionError, match="name must"):
        check_title(name)
    check_title("Hörnchen 12:30 (2).v1")
