"""The report of a run from its folder: what it finds, whatever the run came to."""

from __future__ import annotations

import json
import re
import shlex
from html import unescape
from pathlib import Path

import pytest

from lorasmith.runs.run_log import read_run
from lorasmith.runs.run_page import report_of, write_report
from lorasmith.training.events import Outcome, RolledBack, RunFinished, StepDone, Warned
from lorasmith.training.storage.run_folder import RunFolder
from tests.training.run_cases import (
    BEGIN,
    HOSTILE,
    PROMPTS,
    log_events,
    picture,
    previewed,
    started,
    steps_done,
    validated,
    whole_run,
    write_run,
)


def report(folder: Path, *events, **settings):
    return report_of(read_run(write_run(folder, events, **settings)))


def page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def finish(step: int, reason: str = Outcome.FINISHED) -> RunFinished:
    return RunFinished(step=step, reason=Outcome(reason), at=BEGIN + 0.8 * step)


def test_a_run_with_all_there_is(tmp_path: Path) -> None:
    folder = whole_run(tmp_path / "run")
    found = report_of(read_run(folder))
    assert (found.status, found.mood, found.verdict) == ("Stopped early", "good", "Best at 200, overfitting since")
    assert found.facts["steps"] == "320 of 400" and found.facts["training time"] == "4 min"
    assert found.facts["best held-out loss, at step 200"] == "0.3543" and found.facts["trained numbers"] == "610,864"
    assert len(found.curves.losses) == 320 and found.curves.faults == [107] and found.curves.rate_varies
    assert [row.step for row in found.validations] == list(range(0, 321, 40))
    assert [kind for kind, _, _ in found.notes] == ["Note", "Out of memory", "Rolled back"]
    assert {image.name: image.standing for image in found.images}["picture-17"] == "never fit"
    assert found.quantiles is not None and len(found.quantiles.bins) == 6
    assert found.before_after is not None and found.progress is not None
    assert [label for label, _ in found.before_after.rows] == ["base model", "LoRA at 0.5", "LoRA at 1"]
    assert [label for label, _ in found.progress.rows] == [
        "base model", "step 100", "step 200", "step 300", "step 320",
    ]  # fmt: skip
    assert found.files["Best on held-out images"].endswith("fox-best.safetensors (1.3 MB)")
    changed = {one.name for one in found.settings if one.value != one.default}
    assert changed == {"steps", "batch_size", "learning_rate", "schedule", "patience"}
    text = page(folder)
    assert len(text) < 500_000 and text.count("data:image/webp") == 4 * (3 + 5)


def test_hostile_captions_stay_text(tmp_path: Path) -> None:
    folder = whole_run(tmp_path / "run")
    text = page(folder)
    assert "<script" not in text and "<b>robot" not in text
    assert "&lt;script&gt;" in text
    use = report_of(read_run(folder)).commands["Draw a picture with it"]
    assert shlex.split(use)[-1] == HOSTILE, "copied into a shell it is one argument, and nothing is run"


@pytest.mark.parametrize(
    ("reason", "status", "mood", "resumable"),
    [
        ("finished", "Finished", "good", False),
        ("stopped", "Stopped early", "good", False),
        ("cancelled", "Stopped", "fair", True),
        ("failed", "Failed", "bad", True),
        (None, "Interrupted", "fair", True),
    ],
)
def test_however_it_ended(tmp_path: Path, reason: str | None, status: str, mood: str, resumable: bool) -> None:
    end = [finish(30, reason)] if reason else []
    found = report(tmp_path, started(60), *steps_done(1, 30, total=60), *end, steps=60)
    assert (found.status, found.mood) == (status, mood)
    assert found.facts["steps"] == "30 of 60"
    assert ("Resume the run" in found.commands) == resumable
    assert ("killed after step 30, or still running" in found.summary) == (reason is None)
    if reason is None:
        with RunFolder(tmp_path).claimed():
            found = report_of(read_run(tmp_path))
            assert (found.status, found.mood) == ("Training", "good") and found.summary.endswith("at step 30")
    assert status in page(tmp_path)


def test_without_validation_it_says_what_it_cannot_know(tmp_path: Path) -> None:
    found = report(tmp_path, started(60), *steps_done(1, 60, total=60), finish(60))
    assert re.fullmatch(
        r"The training loss fell from 0\.\d+ to 0\.\d+ \(means of the first and the last 10 steps\); no images were "
        r"held out, so overfitting cannot be judged\.",
        found.verdict,
    )
    number = found.facts["training loss, mean of the last 10 steps"]
    assert f" to {number} (" in found.verdict
    assert found.validations == [] and "best held-out" not in str(found.facts)


def test_a_run_that_was_stopped_before_its_first_validation_does_not_say_that_nothing_is_held_out(
    tmp_path: Path,
) -> None:
    write_run(tmp_path, [started(60), *steps_done(1, 30, total=60), finish(30, Outcome.CANCELLED)])
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"data": {"held_out": "a.png, b.png"}}))
    verdict = report_of(read_run(tmp_path)).verdict
    assert "too early to judge overfitting" in verdict and "no images were held out" not in verdict


def test_images_are_said_to_have_captions_only_where_they_have(tmp_path: Path) -> None:
    write_run(tmp_path, [started(9)])
    record = json.loads((tmp_path / "run.json").read_text())
    sample = record["samples"][0]
    record["samples"] = [{**sample, "name": name} for name in ("a", "a", "b")]
    record["data"] = {"captions_used": "the trigger 'sks' for 2 of 2 images"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    found = report_of(read_run(tmp_path))
    assert (found.data["Training images"], found.facts["training images"]) == ("2 (3 samples in an epoch)", "2")
    assert found.data["Captions used"] == "the trigger 'sks' for 2 of 2 images"


def test_a_run_of_one_step(tmp_path: Path) -> None:
    found = report(tmp_path, started(1), *steps_done(1, 1, total=1), finish(1))
    assert found.verdict.startswith("Too few steps to see a trend")
    assert page(tmp_path).count("<svg") == 2, "the loss at two widths, and no curve of noise levels"


def test_a_run_that_never_began(tmp_path: Path) -> None:
    found = report(tmp_path)
    assert found.verdict == "No step was completed." and found.facts["steps"] == "0 of 500"
    assert found.files["LoRA"] == "none was saved"
    assert "<svg" not in page(tmp_path)
    (tmp_path / "events.jsonl").unlink()
    assert "No step was completed" in page(tmp_path)


def test_a_first_step_that_was_rolled_back(tmp_path: Path) -> None:
    fault = RolledBack(step=1, to_step=0, images=(), rate_factor=0.5, message="It was NaN.", at=BEGIN)
    found = report(tmp_path, started(9), StepDone(step=1, loss=float("nan"), grad_norm=0, at=BEGIN), fault)
    assert found.curves.losses == [] and "No step was completed" in page(tmp_path)


def test_a_run_that_was_resumed(tmp_path: Path) -> None:
    note = Warned(message="Rank 8 is more than one layer can hold.", at=BEGIN)
    first = [started(40), note, *steps_done(1, 20, total=40), validated(20, total=40, best_step=20)]
    second = [started(40, at=BEGIN + 9000), note, *steps_done(16, 40, total=40), validated(20, total=40, best_step=20)]
    found = report(tmp_path, *first, *second, finish(40))
    assert len(found.curves.losses) == 40 and len(found.validations) == 1 and len(found.notes) == 1
    assert "started 2 times" in found.summary


def test_an_existing_lora_counts(tmp_path: Path) -> None:
    write_run(tmp_path, [started(1)])
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"steps_before": 120}))
    assert report_of(read_run(tmp_path)).facts["steps before, of the LoRA continued"] == "120"


def test_what_the_run_was_asked_and_made_with(tmp_path: Path) -> None:
    write_run(tmp_path, [])
    record = json.loads((tmp_path / "run.json").read_text())
    record |= {
        "data": {
            "folder": "/photos/my fox",
            "trigger": "sks fox",
            "resolution": 512,
            "held_out": ["a", "b"],
            "note": None,
        },
        "environment": {"platform": "Linux", "packages": {"torch": "2.9.0"}, "threads": 2},
        "source": {"command": "train", "folder": "/photos/my fox", "model": "m", "name": "fox", "trigger": "sks fox"},
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "fox.safetensors").write_bytes(b"\0" * 2000)
    found = report_of(read_run(tmp_path))
    assert (
        found.commands["Repeat the run"]
        == "lorasmith train '/photos/my fox' --model m --name fox --preset none --trigger 'sks fox'"
    )
    assert found.commands["Draw a picture with it"].endswith("--prompt 'sks fox'")
    assert found.data["Held out"] == "a, b" and found.data["Latents"] == "16×16 × 1" and "Note" not in found.data
    assert found.environment["packages torch"] == "2.9.0" and found.environment["base model name"] == "lorasmith-tiny"


def test_the_page_has_no_place_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home" / "ann lee"
    monkeypatch.setattr(Path, "home", lambda: home)
    folder = home / "ComfyUI" / "runs" / "fox-001"
    folder.mkdir(parents=True)
    write_run(folder, [])
    record = json.loads((folder / "run.json").read_text())
    model = "/mnt/big disk/models/checkpoints/mine.safetensors"
    record |= {
        "data": {"folder": f"{home}/photos/fox", "note": "see https://example.org/a/b and 3/4"},
        "model": {**record["model"], "name": "mine", "path": model},
        "source": {"command": "train", "folder": f"{home}/ComfyUI/input/fox", "model": model, "name": "fox"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "fox.safetensors").write_bytes(b"\0" * 2000)
    text = page(folder)
    assert "ann lee" not in text and "big disk" not in text and "/mnt" not in text and str(tmp_path) not in text
    assert (
        "lorasmith train &#x27;input/fox&#x27; --model &#x27;mine.safetensors&#x27;" in text
        and "runs/fox-001/fox.safetensors" in text
        and "photos/fox" in text
    )
    assert "https://example.org/a/b and 3/4" in text


def test_a_record_of_another_version(tmp_path: Path) -> None:
    write_run(tmp_path, [started(9), *steps_done(1, 9, total=9)])
    (tmp_path / "run.json").write_text(json.dumps({"mood": "good"}))
    assert "Interrupted" in page(tmp_path)


def test_the_end_that_is_not_logged_yet_is_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, [started(9), *steps_done(1, 9, total=9)])
    assert "Finished" in write_report(tmp_path, finish(9)).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ({"command": "train", "argv": ["rm", "-rf", "~"]}, {}),
        ({"command": "train", "folder": "/f", "model": "m", "name": "fox"}, {"optimizer": "antigravity.X"}),
    ],
)
def test_no_command_of_a_stranger_is_offered_for_copying(tmp_path: Path, source: dict, asked: dict) -> None:
    write_run(tmp_path, [started(9)])
    record = json.loads((tmp_path / "run.json").read_text()) | {"source": source, "asked": asked}
    (tmp_path / "run.json").write_text(json.dumps(record | {"command": ["rm", "-rf", "~"]}))
    assert "Repeat the run" not in report_of(read_run(tmp_path)).commands
    assert "rm -rf" not in page(tmp_path)


def test_draws_of_images_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    odd = StepDone(step=1, loss=0.3, grad_norm=0.1, draws=((0, 0.5, 0.3), (7, 0.5, 0.3), (0, 1.5, 0.3)), at=BEGIN)
    assert [image.draws for image in report(tmp_path, started(1), odd).images] == [1]
    assert report(tmp_path, started(1), StepDone(step=1, loss=0.3, grad_norm=0.1, at=BEGIN)).images == []


def test_lines_that_were_left_out_are_said(tmp_path: Path) -> None:
    write_run(tmp_path, [started(9), *steps_done(1, 9, total=9)])
    with (tmp_path / "events.jsonl").open("a") as log:
        log.write('{"event": "StepD\n')
    assert "1 line of events.jsonl could not be read and is left out" in unescape(page(tmp_path))


def test_pictures_are_found_where_the_folder_is_now(tmp_path: Path) -> None:
    folder = tmp_path / "then"
    write_run(folder, [started(9), previewed(folder, 0, 0.0), previewed(folder, 9, 1.0)])
    moved = folder.rename(tmp_path / "now")
    assert page(moved).count("data:image") == 2 * len(PROMPTS)


def test_nothing_outside_the_folder_is_shown(tmp_path: Path) -> None:
    secret = picture(tmp_path / "secret.png", "secret", (200, 0, 0))
    run = tmp_path / "run"
    shown = previewed(run, 9, 1.0, ["a"])
    log = [started(9), type(shown)(step=9, prompts=("a",), paths=(str(secret),), strength=1.0, at=BEGIN)]
    write_run(run, log)
    assert "data:image" not in page(run)
    log_events(run, [started(9), shown])
    assert page(run).count("data:image") == 1
    Path(shown.paths[0]).unlink()
    Path(shown.paths[0]).symlink_to(secret)
    (run / "samples" / "strengths.png").symlink_to(secret)
    assert "data:image" not in page(run)


@pytest.mark.slow
def test_contact_sheets_stand_in_for_single_pictures(tmp_path: Path) -> None:
    write_run(tmp_path, [started(9)])
    assert "Before and after" not in page(tmp_path)
    picture(tmp_path / "samples" / "strengths.png", "sheet", (0, 90, 200), 800)
    picture(tmp_path / "samples" / "steps.png", "sheet", (0, 90, 200), 3000)
    text = page(tmp_path)
    assert "Before and after" in text and "Previews during training" in text and 'width="1600"' in text


@pytest.mark.slow
def test_many_previews_are_thinned(tmp_path: Path) -> None:
    prompts = [f"prompt {index}" for index in range(15)]
    shown = [previewed(tmp_path, step, 1.0, prompts) for step in range(0, 300, 10)]
    found = report(tmp_path, started(300), *shown)
    assert found.progress is not None and len(found.progress.columns) == 12
    labels = [label for label, _ in found.progress.rows]
    assert len(labels) == 10 and labels[0] == "step 0" and labels[-1] == "step 290"


def test_previews_of_unequal_length(tmp_path: Path) -> None:
    found = report(tmp_path, started(9), previewed(tmp_path, 0, 0.0), previewed(tmp_path, 9, 1.0, PROMPTS[:2]))
    assert found.before_after is not None
    assert [len(paths) for _, paths in found.before_after.rows] == [4, 4]
    assert page(tmp_path).count("no picture") == 2
