from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lorasmith.core.typed_json import typed
from lorasmith.runs.sweep_file import Sweep
from lorasmith.runs.sweep_results import SweepEntry, SweepRecord, result_of, sweep_record, write_results
from lorasmith.runs.sweep_run import failures_in
from lorasmith.training.events import Outcome
from lorasmith.training.storage.run_folder import RunFolder
from tests.runs.sweep_cases import ended_with, left_by, names_of, sweep_of
from tests.tools.test_schemas import committed, faults


def recorded(sweep: Sweep, output: Path) -> SweepRecord:
    return sweep_record(sweep.file.name, [found(sweep, name, output) for name in sweep.runs])


def found(sweep: Sweep, name: str, output: Path) -> SweepEntry:
    return result_of(sweep, name, output, failures_in(output).get(name))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return sweep_of(tmp_path)


def test_complete_runs_are_ranked_by_their_lowest_held_out_loss(sweep: Sweep, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for name, losses in zip(sweep.runs, ([0.9, 0.8], [0.9, 0.5, 0.7], [0.6], [0.95, math.nan]), strict=True):
        left_by(sweep, name, output, losses)
    record = recorded(sweep, output)
    assert record.comparable
    assert [(one.number, one.place, one.loss, one.best_step) for one in record.runs] == [
        (2, 1, 0.5, 2), (3, 2, 0.6, 1), (1, 3, 0.8, 2), (4, 4, 0.95, 1),
    ]  # fmt: skip
    best = record.runs[0]
    assert (best.change, best.steps, best.seconds, best.lora) == (-0.5, 3, 29.0, "rank-2_rate-3e-4/cat.safetensors")
    (output / best.name / "cat-best.safetensors").touch()
    assert recorded(sweep, output).runs[0].lora == "rank-2_rate-3e-4/cat-best.safetensors"


def test_runs_judged_by_other_images_are_ranked_by_the_change(sweep: Sweep, tmp_path: Path) -> None:
    output = tmp_path / "out"
    left_by(sweep, names_of(sweep)[0], output, [0.5], base_loss=0.6)
    left_by(sweep, names_of(sweep)[1], output, [0.7], base_loss=1.4, held_out="1" * 32)
    record = recorded(sweep, output)
    assert not record.comparable
    assert [one.number for one in record.runs[:2]] == [2, 1]
    assert "the runs were judged by different held-out images" in write_results(record, output).read_text("utf-8")


def test_what_is_not_complete_is_apart_with_its_state(sweep: Sweep, tmp_path: Path) -> None:
    output = tmp_path / "out"
    failed, stopped, killed, waiting = sweep.runs
    left_by(sweep, failed, output, [0.1], outcome=Outcome.FAILED)
    ended_with(failed, output, "the disk is full; free some space")
    left_by(sweep, stopped, output, [0.1, 0.2], outcome=Outcome.CANCELLED)
    left_by(sweep, killed, output, [0.1], outcome=None)
    record = recorded(sweep, output)
    assert [(one.state, one.steps, one.place) for one in record.runs] == [
        ("failed", 1, None), ("stopped", 2, None), ("stopped", 1, None), ("waiting", 0, None),
    ]  # fmt: skip
    assert record.runs[0].error == "the disk is full; free some space"
    page = write_results(record, output).read_text("utf-8")
    assert "No run is complete yet." in page and "the disk is full; free some space" in page
    assert waiting in page


def test_a_run_that_was_interrupted_at_once_is_stopped_and_one_that_fell_alone_has_failed(
    sweep: Sweep, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for run in names_of(sweep)[:2]:
        left_by(sweep, run, output, [0.1], outcome=Outcome.FAILED)
    ended_with(names_of(sweep)[0], output, "")
    stopped, failed = (found(sweep, run, output) for run in names_of(sweep)[:2])
    assert (stopped.state, stopped.error) == ("stopped", "")
    assert failed.state == "failed" and failed.error.startswith("the run failed; logs/")


def test_a_run_that_another_process_trains_is_running(sweep: Sweep, tmp_path: Path) -> None:
    folder = left_by(sweep, names_of(sweep)[0], tmp_path / "out", [0.1], outcome=None)
    with RunFolder(folder).claimed():
        assert found(sweep, names_of(sweep)[0], tmp_path / "out").state == "running"
    assert found(sweep, names_of(sweep)[0], tmp_path / "out").state == "stopped"


def test_a_failure_before_the_run_began_is_kept_and_a_later_success_counts(sweep: Sweep, tmp_path: Path) -> None:
    run = names_of(sweep)[0]
    ended_with(run, tmp_path / "out", "no usable image")
    assert (entry := found(sweep, run, tmp_path / "out")).state == "failed" and entry.error == "no usable image"
    left_by(sweep, run, tmp_path / "out", [0.5])
    assert found(sweep, run, tmp_path / "out").state == "complete"


@pytest.mark.parametrize("text", ["{", "", '{"error": 3}'])
def test_damaged_files_are_no_results(sweep: Sweep, tmp_path: Path, text: str) -> None:
    run, output = names_of(sweep)[0], tmp_path / "out"
    ended_with(run, output, "")
    (output / "logs" / f"{run}.json").write_text(text)
    assert found(sweep, run, output).state == "waiting"
    left_by(sweep, run, output, [0.5])
    (output / run / "run.json").write_text("{")
    assert (entry := found(sweep, run, output)).state == "failed" and "cannot be read" in entry.error


def test_a_complete_run_of_other_settings_is_not_this_one(sweep: Sweep, tmp_path: Path) -> None:
    output = tmp_path / "out"
    left_by(sweep, names_of(sweep)[0], output, [0.5], noise_offset=0.1)
    left_by(sweep, names_of(sweep)[1], output, [0.5], keep_states=5, existing_state="/elsewhere/state")
    assert [found(sweep, run, output).state for run in names_of(sweep)[:2]] == ["waiting", "complete"]
    (tmp_path / "moved").mkdir()
    moved = sweep_of(tmp_path / "moved")
    assert found(moved, names_of(moved)[1], output).state == "complete", "of the same photos, elsewhere"
    others = sweep_of(tmp_path, "learning_rate = [1e-4, 3e-4]\nrank = [2, 4]\n")
    assert found(others, names_of(sweep)[1], output).state == "complete"


def test_what_the_recipe_of_a_preset_chose_makes_no_other_run(sweep: Sweep, tmp_path: Path) -> None:
    planned = replace(sweep, runs={name: replace(spec, preset="balanced") for name, spec in sweep.runs.items()})
    first, second = names_of(planned)[:2]
    left_by(planned, first, tmp_path / "out", [0.5], train_text_encoder=True, schedule="linear")
    left_by(planned, second, tmp_path / "out", [0.5], train_text_encoder=True, noise_offset=0.1)
    assert [found(planned, run, tmp_path / "out").state for run in (first, second)] == ["complete", "waiting"]


def test_what_is_written_is_what_the_schema_says_and_is_read_again(sweep: Sweep, tmp_path: Path) -> None:
    output = tmp_path / "out"
    left_by(sweep, names_of(sweep)[0], output, [0.5, 0.4])
    ended_with(names_of(sweep)[1], output, "failed")
    record = recorded(sweep, output)
    write_results(record, output)
    written = json.loads((output / "sweep.json").read_text("utf-8"))
    assert typed(written, SweepRecord) == record
    assert list(faults(written, committed("sweep.schema.json"))) == []
    assert committed("sweep.schema.json")["$defs"]["SweepRecord"]["properties"].keys() == written.keys()


def test_pictures_of_equal_prompts_are_side_by_side_and_others_apart(sweep: Sweep, tmp_path: Path) -> None:
    output, names = tmp_path / "out", [Path("a.png"), Path("b.png")]
    for run, shown in zip(names_of(sweep)[:3], (names, names, names[:1]), strict=True):
        folder = left_by(sweep, run, output, [0.5], previews=shown)
        for path in shown:
            Image.new("RGB", (8, 8)).save(folder / "samples" / path)
    alike = write_results(
        recorded(Sweep(**{**vars(sweep), "runs": dict([*sweep.runs.items()][:2])}), output), output
    ).read_text("utf-8")
    assert "Pictures of the base model and of each run, by prompt" in alike
    assert alike.count("<img") == 6, "two prompts: the base model and two runs"
    different = write_results(recorded(sweep, output), output).read_text("utf-8")
    assert "of each run, by prompt" not in different
    assert different.count("<img") == 4 + 4 + 2
