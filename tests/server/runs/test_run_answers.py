from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.typed_json import typed
from lorasmith.formats.metadata import sha256_file
from lorasmith.runs.run_log import read_run
from lorasmith.runs.run_page import report_of
from lorasmith.runs.spec import RunSpec
from lorasmith.server.datasets.dataset_folders import UnknownFileError
from lorasmith.server.questions import answer
from lorasmith.server.runs import run_answers as questions
from lorasmith.server.runs import run_list_answers, run_result_answers
from lorasmith.training.events import RunFinished, encoded
from lorasmith.training.storage.run_folder import RunFolder

RUN = "runs/dog-001"


def changed_record(base: Path, **changes: Any) -> None:
    path = base / RUN / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_end(base: Path) -> None:
    path = base / RUN / "events.jsonl"
    path.write_text("\n".join(line for line in path.read_text().split("\n") if '"RunFinished"' not in line))


def test_a_run_in_the_list_has_the_numbers_of_its_report(installation: Folders, base: Path) -> None:
    (row,) = run_list_answers.runs(installation).runs
    report = report_of(read_run(base / RUN))
    assert (row.id, row.name, row.state, row.step, row.steps, row.job) == (RUN, "dog", "finished", 4, 4, None)
    assert row.family == "sd1" and row.started and row.seconds > 0
    assert f"{row.loss:.3g}" in f"{report.facts[row.loss_label]}" or row.loss is not None
    assert row.loss_label in report.facts and row.held_out is not None
    assert (base / RUN / str(row.cover)).is_file()


STATES: dict[str, tuple[Callable[[Path], object], str]] = {
    "killed": (without_end, "interrupted"),
    "cancelled": (
        lambda base: (without_end(base), _append(base, RunFinished(step=4, reason="cancelled"))),  # type: ignore[arg-type]
        "cancelled",
    ),
}


def _append(base: Path, event: RunFinished) -> None:
    with (base / RUN / "events.jsonl").open("a") as log:
        log.write("\n" + encoded(event) + "\n")


@pytest.mark.parametrize("case", STATES)
def test_the_state_of_a_run(installation: Folders, base: Path, case: str) -> None:
    change, state = STATES[case]
    change(base)
    assert run_list_answers.runs(installation).runs[0].state == state


def test_a_run_in_another_process_or_job_is_running(installation: Folders, base: Path) -> None:
    without_end(base)
    with RunFolder(base / RUN).claimed():
        assert run_list_answers.runs(installation).runs[0].state == "running"
    (row,) = run_list_answers.runs(installation, jobs={RUN: "a job"}).runs
    assert (row.state, row.job) == ("running", "a job")


def test_runs_of_graphs_are_listed_and_damaged_ones_named(installation: Folders, base: Path) -> None:
    (base / "output" / "runs").mkdir(parents=True)
    (base / "runs" / "dog-001").rename(base / "output" / "runs" / "lora_00001")
    (base / "runs" / "bad").mkdir()
    (base / "runs" / "bad" / "run.json").write_text("{")
    (base / "runs" / "no run").mkdir()
    found = run_list_answers.runs(installation)
    assert [row.id for row in found.runs] == ["output/runs/lora_00001"]
    assert [one.file for one in found.damaged] == ["runs/bad"]


def test_the_runs_of_two_experts_are_listed_one_by_one(installation: Folders, base: Path) -> None:
    (base / "runs" / "wave-001").mkdir()
    (base / "runs" / "dog-001").rename(base / "runs" / "wave-001" / "low_noise")
    (row,) = run_list_answers.runs(installation).runs
    assert (row.id, row.name) == ("runs/wave-001/low_noise", "dog")
    found = questions.run(installation, row.id)
    assert found.folder == str(base / "runs" / "wave-001" / "low_noise") and found.lora is not None
    assert Path(questions.run_file(installation, row.id, "dog.safetensors")).is_file()
    for other in (
        "runs/wave-001",
        "runs/wave-001/high_noise",
        "runs/wave-001/samples",
        "runs/../low_noise",
        "low_noise",
    ):
        with pytest.raises(UnknownFileError):
            questions.run(installation, other)


def test_a_run_says_what_its_report_says(installation: Folders, base: Path) -> None:
    found = questions.run(installation, RUN)
    report = report_of(read_run(base / RUN))
    assert (found.verdict, found.facts, found.commands) == (report.verdict, report.facts, report.commands)
    assert found.command.startswith("lorasmith train ") and found.trigger == "sks dog"
    assert [step for step, _ in found.losses] == [1, 2, 3, 4] == [step for step, _ in found.smooth]
    assert found.smooth[-1][1] == pytest.approx(found.loss)
    assert [one.step for one in found.validations] == [2, 4]
    assert sum(one.best for one in found.validations) == 1
    assert found.best_step == next(one.step for one in found.validations if one.best)
    assert {one.file: one.use for one in found.images}.keys() == {f"{number}.png" for number in range(4)}
    assert [one.use for one in found.images].count("held out") == 2
    assert all((base / RUN / str(one.thumbnail)).is_file() for one in found.images)
    assert {one.standing for one in found.images} == {""}  # too few steps to say anything
    assert {(one.step, one.strength) for one in found.previews} >= {(4, 1.0)}
    assert all((base / RUN / one.file).is_file() and one.prompt == "a dog" for one in found.previews)
    assert found.lora and found.lora.file == "dog.safetensors" and found.lora.installed is None
    assert {one.step for one in found.saves} >= {2, 4}
    assert found.changed["rank"] == 2 and found.changed["resolution"] == 32 and "seed" not in found.changed
    assert {one.name for one in found.settings} >= {"rank", "learning_rate", "trigger"}
    assert found.is_trainable_on and found.dataset == "dog"
    assert "run.json" in found.files and ".lock" not in found.files
    json.dumps(answer("run", {"id": RUN}, installation), allow_nan=False)


@pytest.mark.parametrize(
    "id",
    ["", "runs", "runs/", "runs/..", "../runs/dog-001", "runs/../runs/dog-001", "runs/.x", "input/dog", "runs/gone"],
)
def test_what_is_no_run_is_unknown(installation: Folders, id: str) -> None:
    for ask in (questions.run, questions.run_page, run_result_answers.run_graph, run_result_answers.install_run):
        with pytest.raises(UnknownFileError, match="there is no run"):
            ask(installation, id)


@pytest.mark.parametrize(
    "path", ["", ".", "..", "../dog-001/run.json", "/etc/passwd", "a\\b", ".lock", "samples", "c:x"]
)
def test_what_is_no_file_of_a_run_is_unknown(installation: Folders, path: str) -> None:
    with pytest.raises(UnknownFileError, match="there is no file"):
        questions.run_file(installation, RUN, path)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_out_of_a_run_are_not_followed(installation: Folders, base: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    (base / RUN / "link.png").symlink_to(tmp_path / "secret.png")
    (base / RUN / "samples" / "inner").symlink_to(tmp_path)
    assert questions.run_file(installation, RUN, "run.json") == str((base / RUN / "run.json").resolve())
    for path in ("link.png", "samples/inner/secret.png"):
        with pytest.raises(UnknownFileError):
            questions.run_file(installation, RUN, path)
        assert path not in questions.run(installation, RUN).files
    (base / "runs" / "elsewhere").symlink_to(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert [row.id for row in run_list_answers.runs(installation).runs] == [RUN]


def test_the_page_is_made_from_the_records(installation: Folders, base: Path) -> None:
    (base / RUN / "report.html").write_text("<script>alert(1)</script>")
    page = questions.run_page(installation, RUN).decode()
    assert "alert(1)" not in page and "<title>" in page


def test_a_lora_is_copied_once_and_replaces_nothing(
    installation: Folders, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loras = base / "models" / "loras"
    loras.mkdir(parents=True)
    (loras / "Dog.safetensors").write_bytes(b"mine")  # which is dog.safetensors where case is ignored
    assert run_result_answers.install_run(installation, RUN).installed == "dog-2.safetensors"
    assert (loras / "Dog.safetensors").read_bytes() == b"mine"
    assert sha256_file(loras / "dog-2.safetensors") == sha256_file(base / RUN / "dog.safetensors")
    again = run_result_answers.install_run(installation, RUN)
    assert (again.installed, again.was_there) == ("dog-2.safetensors", True)
    lora = questions.run(installation, RUN).lora
    assert lora is not None and lora.installed == "dog-2.safetensors"
    assert run_result_answers.install_run(installation, RUN, step=2, name="../early").installed == "__early.safetensors"

    real = run_result_answers._copy
    monkeypatch.setattr(run_result_answers, "_copy", lambda *paths: (time.sleep(0.2), real(*paths)))
    with ThreadPoolExecutor() as threads:  # as the assistant answers
        both = threads.map(lambda step: run_result_answers.install_run(installation, RUN, step=step, name="x"), (2, 4))
    assert {one.installed for one in both} == {"x.safetensors", "x-2.safetensors"}
    with pytest.raises(OptionError, match="has LoRAs of the steps 2, 4, got 3"):
        run_result_answers.install_run(installation, RUN, step=3)


def test_links_that_a_record_follows_are_followed_if_the_server_does(installation: Folders, base: Path) -> None:
    record = base / RUN / "run.json"
    content = json.loads(record.read_text())
    content["source"]["follow_links"] = True
    record.write_text(json.dumps(content))
    for following in (False, True):
        found = answer("train_on_request", {"id": RUN, "steps": 9}, replace(installation, follow_links=following))
        assert found["settings"].get("follow_links", False) is following


def test_training_on_is_a_request_from_the_last_state(installation: Folders, base: Path) -> None:
    given = typed(answer("train_on_request", {"id": RUN, "steps": 9}, installation), RunSpec)
    assert given.model == "lorasmith-tiny" and given.settings["steps"] == 9 and given.settings["rank"] == 2
    assert given.data.trigger == "sks dog" and Path(given.folder) == base / "input" / "dog"
    assert Path(str(given.config.existing_state)) == base / RUN / "states" / "step-000004.safetensors"


NOT_ON: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "fewer steps": (lambda base: None, 4, "steps must be more than the 4"),
    "no steps": (lambda base: None, 0, "steps must be between"),
    "incomplete": (without_end, 9, "is not complete"),
    "graph": (lambda base: changed_record(base, source={"command": "run"}), 9, "was not trained on a folder"),
    "elsewhere": (
        lambda base: changed_record(
            base, source={"command": "train", "model": "/elsewhere/m.safetensors", "name": "dog", "folder": "/etc"}
        ),
        9,
        "may name files in the current folder alone",
    ),
    "code": (lambda base: changed_record(base, asked={"optimizer": "os.system"}), 9, "importing it would run code"),
}


@pytest.mark.parametrize("case", NOT_ON)
def test_what_cannot_be_trained_on_is_refused(installation: Folders, base: Path, case: str) -> None:
    change, steps, match = NOT_ON[case]
    change(base)
    with pytest.raises(LorasmithError, match=match):
        run_result_answers.train_on_request(installation, RUN, steps=steps)
