"""Runs that are stopped, killed, continued and repeated, as people do it from the command line."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lorasmith.cli import run_output
from lorasmith.cli.main import main
from lorasmith.cli.run_output import training_progress
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.runs.run_plan import ImageEncoded, ImagesChecked, ModelLoading
from lorasmith.training import results
from lorasmith.training.events import Event, EventHandler, StepDone
from lorasmith.training.storage.records import read_history
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


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(sys, "argv", ["lorasmith", *map(str, ("train", images, *RUN, "--output", folder))])
        main()
    assert RunFolder(folder).outcome() == "finished"
    return folder


@pytest.fixture(scope="module")
def stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, stopped after a few steps; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch, interrupted(signal.SIGINT):
        patch.setattr(sys, "argv", ["lorasmith", *map(str, ("train", images, *RUN, "--output", folder))])
        with contextlib.suppress(SystemExit):
            main()
    assert RunFolder(folder).outcome() == "cancelled"
    return folder


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


@pytest.mark.slow_after(2)
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", [ModelLoading, ImagesChecked, ImageEncoded])
def test_a_signal_while_a_run_is_prepared_ends_it_at_once(
    lorasmith: Command,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    moment: type[Event],
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
@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once_and_loses_nothing(
    lorasmith: Command, images: Path, whole: Path, tmp_path: Path
) -> None:
    with interrupted(signal.SIGINT, signal.SIGINT):
        ran = lorasmith("train", images, *RUN)
    assert ran.code == 130
    assert (
        "stopped: interrupted; the LoRA of 2 steps is at runs/cat-001/cat.safetensors; the same command resumes the run"
        in ran.err
    )
    assert lorasmith("train", images, *RUN).code == 0
    assert tensors_of(tmp_path / "runs" / "cat-001") == tensors_of(whole)


@pytest.mark.slow_after(1)
@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
@pytest.mark.parametrize("at", [2, 5], ids=["between steps", "after the last step"])
def test_a_second_ctrl_c_waits_for_no_hash_of_the_base_model(
    lorasmith: Command, images: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    hashing = threading.Event()

    def hashed(path: Path, remembered: object, *, each_block: Callable[[], object]) -> str:
        while not hashing.wait(0.01):
            each_block()
        return "it was not stopped"

    monkeypatch.setattr(results, "file_sha256", hashed)
    with interrupted(signal.SIGINT, signal.SIGINT, at=at):
        ran = lorasmith("train", images, *RUN)
    hashing.set()
    assert ran.code == 130
    assert f"stopped: interrupted; the LoRA of {at} steps is at runs/cat-001/cat.safetensors" in ran.err


def test_an_exit_visits_no_objects_of_libraries_again(lorasmith: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's last collection took two seconds of processor time after `stopped: interrupted`."""
    registered: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", lambda function, *_: registered.append(function))
    assert lorasmith("models", "--help").code == 0
    called: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: called.append("freeze"))
    monkeypatch.setattr(gc, "unfreeze", lambda: called.append("unfreeze"))
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    at_exit = next(one for one in registered if one.__module__ == "lorasmith.cli.main")
    at_exit()
    # Its bindings print what they take to be leaked.
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    at_exit()
    assert called == ["freeze", "unfreeze"]


@pytest.mark.slow
def test_the_same_command_goes_on_where_it_stopped(
    lorasmith: Command, images: Path, whole: Path, broken: Path, tmp_path: Path
) -> None:
    ran = lorasmith("train", images, *RUN)
    assert ran.code == 0, ran.err
    assert "Resumed: The run in runs/cat-001 continues from step 2, bit-identically." in ran.out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["cat-001"]
    assert tensors_of(broken) == tensors_of(whole)


@pytest.mark.slow
def test_fresh_begins_in_a_new_folder(lorasmith: Command, images: Path, broken: Path, tmp_path: Path) -> None:
    ran = lorasmith("train", images, *RUN, "--fresh")
    assert ran.code == 0, ran.err
    assert "Resumed" not in ran.out
    assert RunFolder(broken).outcome() == "cancelled"
    assert RunFolder(tmp_path / "runs" / "cat-002").outcome() == "finished"


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
def test_another_run_in_the_output_is_refused_with_what_differs(lorasmith: Command, images: Path, broken: Path) -> None:
    ran = lorasmith("train", images, *RUN, "--seed", 7, "--output", "runs/cat-001")
    assert ran.code == 1
    assert "runs/cat-001 holds another run, which differs in seed 0 then, 7 now; undo that, choose" in ran.err
    assert "0/5" not in ran.out
    assert RunFolder(broken).outcome() == "cancelled"


@pytest.mark.slow
def test_the_command_of_a_finished_run_with_more_steps_trains_on(
    lorasmith: Command, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    first = lorasmith("train", images, *QUICK, "--steps", 2, "--output", "mine")
    assert first.code == 0, first.err
    assert f"mine has files that are not a run's; the run is in {Path('mine/cat')}." in " ".join(first.out.split())
    again = lorasmith("train", images, *QUICK, "--steps", 3, "--output", "mine")
    assert again.code == 0, again.err
    told = " ".join(again.out.split())
    assert "was moved to mine/cat-old-1; this one starts from its end" in told.replace("\\", "/")
    assert "Resumed: The run continues from step 2 of" in told
    assert len(read_history(tmp_path / "mine" / "cat").of(StepDone)) == 1
    assert RunFolder(tmp_path / "mine" / "cat-old-1").outcome() == "finished"
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("output", ["file", "loras/dog.safetensors"])
def test_an_output_that_is_no_folder_is_refused_before_anything_is_loaded(
    lorasmith: Command, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    ran = lorasmith("train", images, *RUN, "--output", output)
    assert (ran.code, ran.out) == (1, "")
    assert "folder" in ran.err and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_state_begins_again(
    lorasmith: Command, whole: Path, broken: Path
) -> None:
    shutil.rmtree(broken / "states")
    ran = lorasmith("resume", broken, "--as-recorded")
    assert ran.code == 0, ran.err
    assert "ended before its first run state was saved and starts from the beginning" in ran.out
    assert tensors_of(broken) == tensors_of(whole)


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


@pytest.mark.slow
def test_what_differs_of_the_machine_is_said(lorasmith: Command, broken: Path) -> None:
    with_record(broken, environment={"threads": 99})
    ran = lorasmith("resume", broken, "--as-recorded")
    assert ran.code == 0, ran.err
    assert "not bit-identically, because of threads 99 there" in ran.out


def test_what_cannot_go_on_is_said_in_a_sentence(lorasmith: Command, broken: Path) -> None:
    with_record(broken, source={"command": "run"})
    ran = lorasmith("resume", broken, "--as-recorded")
    assert (ran.code, "start its workflow or script again" in ran.err) == (1, True)
    assert "Traceback" not in ran.err


def test_a_finished_run_is_not_taken_up_again(lorasmith: Command, whole: Path) -> None:
    ran = lorasmith("resume", whole, "--as-recorded")
    assert (ran.code, "is complete and cannot be resumed" in ran.err) == (1, True)


@pytest.mark.slow
def test_a_finished_lora_is_reproduced(lorasmith: Command, whole: Path, tmp_path: Path) -> None:
    ran = lorasmith("reproduce", whole / "cat.safetensors", "--as-recorded")
    assert ran.code == 0, ran.err
    assert "are bit-identical." in ran.out
    assert "Differs" not in ran.out
    assert tensors_of(tmp_path / "runs" / "cat-001") == tensors_of(whole)
    ran = lorasmith("reproduce", whole / "cat.safetensors", "--as-recorded", "--output", "runs/cat-001")
    assert (ran.code, "output must not contain a run, but runs/cat-001 does" in ran.err) == (1, True)


@pytest.mark.slow
def test_the_lora_of_a_stopped_run_is_reproduced_up_to_its_step(
    lorasmith: Command, stopped: Path, tmp_path: Path
) -> None:
    ran = lorasmith("reproduce", stopped / "cat.safetensors", "--as-recorded")
    assert ran.code == 0, ran.err
    assert "cat.safetensors is from step 2 of 5; training ends there." in ran.out
    assert "are bit-identical." in ran.out
    assert len(read_history(tmp_path / "runs" / "cat-001").of(StepDone)) == 2


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
def test_what_only_the_last_bits_depend_on_is_named_and_tried(
    lorasmith: Command, whole: Path, images: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(whole / "cat.safetensors", tmp_path))
    shutil.copytree(images, tmp_path / "here")

    def change(run: dict[str, Any]) -> None:
        run["environment"]["threads"] = 99
        run["source"] |= {"folder": "/gone", "model": "/gone/model.safetensors"}

    with_metadata(file, change)
    ran = lorasmith("reproduce", file, "--as-recorded", "--data", "here", "--model", "lorasmith-tiny")
    assert ran.code == 0, ran.err
    assert "Differs: threads 99 there" in ran.out
    assert "are bit-identical." in ran.out


@pytest.mark.slow
def test_other_tensors_are_called_so(lorasmith: Command, whole: Path, tmp_path: Path) -> None:
    tensors, metadata = read_safetensors(whole / "cat.safetensors")
    write_safetensors(tmp_path / "cat.safetensors", {key: 2 * tensor for key, tensor in tensors.items()}, metadata)
    ran = lorasmith("reproduce", "cat.safetensors", "--as-recorded")
    assert ran.code == 1
    assert "are not the same" in ran.out


@pytest.mark.slow
def test_a_reproduction_that_is_stopped_proves_nothing(lorasmith: Command, whole: Path) -> None:
    with interrupted(signal.SIGINT):
        ran = lorasmith("reproduce", whole / "cat.safetensors", "--as-recorded")
    assert ran.code == 130
    assert "are the same" not in ran.out


@pytest.mark.slow
def test_a_file_that_does_not_say_how_it_was_made(lorasmith: Command, images: Path) -> None:
    assert lorasmith("train", images, *QUICK, "--steps", 1, "--private", "--output", "private").code == 0
    ran = lorasmith("reproduce", "private/cat.safetensors", "--as-recorded")
    assert (ran.code, "was saved with --private" in ran.err) == (1, True)
    assert "Traceback" not in ran.err


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
def test_a_run_that_validation_stopped(lorasmith: Command, images: Path, tmp_path: Path) -> None:
    held_out = pictures(tmp_path / "held out", 2, seed=2)
    ran = lorasmith("train", images, *JUDGED, "--validation", held_out, "--patience", 1, "--output", "run")
    assert ran.code == 0, ran.err
    assert "Stopped early at step" in ran.out
    assert "Verdict " in ran.out
    assert "is complete" in lorasmith("resume", "run", "--as-recorded").err
    assert "are bit-identical." in lorasmith("reproduce", "run/cat.safetensors", "--as-recorded").out


def test_a_folder_that_is_trained_in_is_said_before_anything_is_loaded(lorasmith: Command, broken: Path) -> None:
    with RunFolder(broken).claimed():
        ran = lorasmith("resume", broken, "--as-recorded")
    assert (ran.code, "is in use by a run" in ran.err) == (1, True)
    assert "images" not in ran.out


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
