"""Runs that are stopped, killed, continued and repeated, as people do it from the command line."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.cli import run_output
from lorasmith.cli.main import main
from lorasmith.cli.run_output import training_progress
from lorasmith.runs.run_plan import ImageEncoded, ModelLoading
from lorasmith.training import results
from lorasmith.training.events import Event, EventHandler, StepDone
from lorasmith.training.storage.run_folder import RunFolder
from tests.runs.folder_cases import pictures, tensors_of, with_metadata, with_record

Command = Callable[..., Any]
Interrupt = Callable[..., contextlib.AbstractContextManager[None]]

QUICK = ("--model", "lorasmith-tiny", "--rank", 2, "--targets", "attention", "--resolution", 32, "--name", "cat",
         "--no-previews")  # fmt: skip
RUN = (*QUICK, "--steps", 5, "--schedule", "cosine")
JUDGED = (*QUICK, "--steps", 4, "--learning-rate", 0.3, "--validate-every", 1, "--validation-draws", 2)


@contextlib.contextmanager
def interrupted(*numbers: signal.Signals, at: int = 2) -> Iterator[None]:
    """Signals arrive when the loss of a step is told."""

    @contextlib.contextmanager
    def progress() -> Iterator[EventHandler]:
        with training_progress() as show:

            def hear(event: Event) -> None:
                show(event)
                if isinstance(event, StepDone) and event.step == at:
                    for number in numbers:
                        signal.raise_signal(number)

            yield hear

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_output, "training_progress", progress)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "photos", 4)


def made(images: Path, folder: Path, outcome: str) -> Path:
    """The folder of a run, which comes to an outcome; not to be changed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(sys, "argv", ["lorasmith", *map(str, ("train", images, *RUN, "--output", folder))])
        main()
    assert RunFolder(folder).outcome() == outcome
    return folder


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(images, tmp_path_factory.mktemp("whole") / "run", "finished")


@pytest.fixture(scope="module")
def stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same run, stopped after two steps."""
    with interrupted(signal.SIGINT):
        return made(images, tmp_path_factory.mktemp("stopped") / "run", "cancelled")


@pytest.fixture
def broken(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run, at `runs/cat-001`."""
    return Path(shutil.copytree(stopped, tmp_path / "runs" / "cat-001"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_says_how_to_go_on_and_does_so_to_the_bit(
    lorasmith: Command, images: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with interrupted(number):
        ran = lorasmith("train", images, *RUN, "--output", "my run")
    assert ran.code == 128 + number, ran.err
    assert "Stopping after this step" in ran.out
    assert "the LoRA of those steps is saved. To continue:\n  lorasmith resume 'my run' --as-recorded\n" in ran.out
    assert tensors_of(tmp_path / "my run") != tensors_of(whole)

    ran = lorasmith("resume", "my run", "--as-recorded", "--json")
    assert ran.code == 0, ran.err
    assert "Resumed: The run in my run continues from step 2, bit-identically." in ran.err
    assert (json.loads(ran.out)["reason"], len(json.loads(ran.out)["losses"])) == ("finished", 5)
    assert tensors_of(tmp_path / "my run") == tensors_of(whole)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize(("moment", "number"), [(ModelLoading, signal.SIGTERM), (ImageEncoded, signal.SIGINT)])
def test_a_signal_while_a_run_is_prepared_ends_it_at_once(
    lorasmith: Command, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: type, number: int
) -> None:
    @contextlib.contextmanager
    def preparation() -> Iterator[EventHandler]:
        with planning_shown() as show:

            def hear(event: Event) -> None:
                show(event)
                if isinstance(event, moment):
                    signal.raise_signal(number)

            yield hear

    planning_shown = run_output._planning_shown
    monkeypatch.setattr(run_output, "_planning_shown", preparation)
    ran = lorasmith("train", images, *RUN)
    assert (ran.code, ran.err) == (128 + number, "stopped: interrupted\n")
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_stopped_before_it_was_validated_says_that_it_is_too_early(
    lorasmith: Command, tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "photos", 13)
    with interrupted(signal.SIGINT, at=1):
        ran = lorasmith("train", folder, *RUN, "--validate-every", 5)
    assert "11 in an epoch (13 images, 2 held out)" in ran.out
    assert "too early to say: no validation yet" in ran.out and "nothing is held out" not in ran.out
    (loss,) = (line for line in ran.out.splitlines() if line.startswith("Loss  "))
    (report,) = (tmp_path / "runs").glob("*/report.html")
    assert loss.split()[1] in report.read_text("utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_a_second_ctrl_c_waits_for_no_hash_of_the_base_model(
    lorasmith: Command, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashing = threading.Event()

    def hashed(path: Path, remembered: object, *, each_block: Callable[[], object]) -> str:
        while not hashing.wait(0.01):
            each_block()
        return "it was not stopped"

    monkeypatch.setattr(results, "file_sha256", hashed)
    with interrupted(signal.SIGINT, signal.SIGINT):
        ran = lorasmith("train", images, *RUN)
    hashing.set()
    assert ran.code == 130
    assert "stopped: interrupted; the LoRA of 2 steps is at runs/cat-001/cat.safetensors; the same command" in ran.err


@pytest.mark.slow
def test_fresh_moves_what_is_in_the_output_aside_and_says_so(
    lorasmith: Command, images: Path, broken: Path, tmp_path: Path
) -> None:
    before = tensors_of(broken)
    ran = lorasmith("train", images, *RUN, "--fresh", "--output", "runs/cat-001")
    assert ran.code == 0, ran.err
    assert "The previous run in runs/cat-001 was moved to runs/cat-001-old-1." in ran.out
    assert tensors_of(tmp_path / "runs" / "cat-001-old-1") == before
    assert RunFolder(broken).outcome() == "finished"


@pytest.mark.slow
def test_a_run_goes_on_when_its_images_have_moved_but_not_with_others(
    lorasmith: Command, images: Path, whole: Path, broken: Path, tmp_path: Path
) -> None:
    with_record(broken, source={"folder": str(tmp_path / "gone")})
    assert "gone" in lorasmith("resume", broken, "--as-recorded").err
    ran = lorasmith("resume", broken, "--as-recorded", "--data", pictures(tmp_path / "others", 4, seed=1))
    assert (ran.code, "differs in the images or captions; undo that" in ran.err) == (1, True)
    shutil.copytree(images, tmp_path / "here")
    ran = lorasmith("resume", broken, "--as-recorded", "--data", "here")
    assert ran.code == 0, ran.err
    assert tensors_of(broken) == tensors_of(whole)


def test_what_cannot_go_on_is_said_in_a_sentence(lorasmith: Command, broken: Path) -> None:
    with_record(broken, source={"command": "run"})
    ran = lorasmith("resume", broken, "--as-recorded")
    assert (ran.code, "start its workflow or script again" in ran.err) == (1, True)
    assert "Traceback" not in ran.err


@pytest.mark.slow
def test_a_finished_lora_is_reproduced(lorasmith: Command, whole: Path, tmp_path: Path) -> None:
    ran = lorasmith("reproduce", whole / "cat.safetensors", "--as-recorded")
    assert ran.code == 0, ran.err
    assert "are bit-identical." in ran.out
    assert "Differs" not in ran.out
    assert tensors_of(tmp_path / "runs" / "cat-001") == tensors_of(whole)
    ran = lorasmith("reproduce", whole / "cat.safetensors", "--as-recorded", "--output", "runs/cat-001")
    assert (ran.code, "output must not contain a run, but runs/cat-001 does" in ran.err) == (1, True)


def test_a_dry_run_trains_nothing(lorasmith: Command, whole: Path, tmp_path: Path) -> None:
    ran = lorasmith("reproduce", whole / "cat.safetensors", "--as-recorded", "--dry-run")
    assert ran.code == 0, ran.err
    assert "Base model, images, settings and initial weights are the same." in ran.out
    ran = lorasmith("reproduce", whole / "cat.safetensors", "--as-recorded", "--dry-run", "--json")
    assert json.loads(ran.out) == {"differs": [], "same": None, "result": None}
    assert not (tmp_path / "runs").exists()


def test_what_decides_the_result_is_named_and_nothing_trained(lorasmith: Command, whole: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(whole / "cat.safetensors", tmp_path))
    with_metadata(file, lambda run: run["fingerprint"]["config"].update(noise_offset=0.5))
    ran = lorasmith("reproduce", file, "--as-recorded", "--data", pictures(tmp_path / "others", 4, seed=1))
    assert ran.code == 1
    assert "Differs: noise_offset 0.5 then, 0.0 now; the result would differ." in ran.out
    assert "Differs: the images or captions; the result would differ." in ran.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_best_lora_is_reproduced_too(lorasmith: Command, images: Path, tmp_path: Path) -> None:
    held_out = pictures(tmp_path / "held out", 2, seed=2)
    ran = lorasmith("train", images, *JUDGED, "--validation", held_out, "--output", "run")
    assert ran.code == 0, ran.err
    best = tmp_path / "run" / "cat-best.safetensors"
    assert f"Best LoRA  run/{best.name}" in ran.out
    ran = lorasmith("reproduce", best, "--as-recorded")
    assert ran.code == 0, ran.err
    assert "of 4; training ends there" in ran.out
    assert "are bit-identical." in ran.out


@pytest.mark.slow
def test_a_demo_that_is_stopped_is_drawn_when_it_is_resumed(lorasmith: Command, tmp_path: Path) -> None:
    with interrupted(signal.SIGINT, at=1):
        ran = lorasmith("demo", "--output", "run", "--steps", 3, "--json")
    assert ran.code == 130, ran.err
    assert (json.loads(ran.out)["reason"], json.loads(ran.out)["steps"]) == ("cancelled", 1)
    assert (tmp_path / "run" / "high-contrast.safetensors").is_file()
    sheet = tmp_path / "run" / "samples" / "strengths.png"
    assert not sheet.exists()
    ran = lorasmith("resume", "run", "--as-recorded")
    assert ran.code == 0, ran.err
    assert ran.out[ran.out.index("Strengths") :].startswith(f"Strengths  {sheet.relative_to(tmp_path)}")
    assert "cannot be judged" not in ran.out
