"""A complete run given again with more steps trains on, and stays itself when it is interrupted and given again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_loop import Audience

from lorasmith.core.errors import LorasmithError, OutputError
from lorasmith.data.dataset import EncodedDataset
from lorasmith.formats.metadata import sha256_body
from lorasmith.training.events import Resumed, StepDone, Warned
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.records import read_history
from lorasmith.training.storage.run_folder import RunFolder

Run = Callable[..., TrainResult]


@pytest.fixture(scope="module")
def run(quick_run: Run) -> Run:
    return quick_run


@pytest.fixture(scope="module")
def complete(run: Run, dataset: EncodedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of three steps, of which each test has a copy."""
    folder = tmp_path_factory.mktemp("complete") / "run"
    run(dataset, steps=3, output=folder)
    return folder


@pytest.fixture
def short(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "run"))


def tensors(folder: Path) -> str:
    return sha256_body(folder / "lora.safetensors")


def test_more_steps_train_on_and_the_draws_go_on(
    run: Run, dataset: EncodedDataset, short: Path, tmp_path: Path
) -> None:
    """The rate is constant, so the result is that of the longer run in one piece, to the bit."""
    before, ear = tensors(short), Audience()
    whole = run(dataset, steps=6)
    result = run(dataset, steps=6, output=short, on_event=ear)
    assert result.losses == whole.losses and result.steps == 6
    aside = tmp_path / "run-old-1"
    assert (tensors(aside), tensors(short)) == (before, sha256_body(whole.lora.save(tmp_path / "whole.safetensors")))
    (moved,) = (one.message for one in ear.of(Warned) if "moved" in one.message)
    assert moved == f"The complete run in {short} was moved to {aside}; this one starts from its end."
    (resumed,) = ear.of(Resumed)
    assert "continues from step 3 of" in resumed.message and "constant schedule over 6 steps" in resumed.message
    assert [one.step for one in ear.of(StepDone)] == [4, 5, 6]
    record = read_history(short).record
    assert record.asked["existing_state"] == str((aside / "states" / "step-000003.safetensors").resolve())
    assert read_history(aside).record.asked["existing_state"] is None

    run(dataset, steps=8, output=short)
    assert tensors(tmp_path / "run-old-2") != before and RunFolder(short).record().config["steps"] == 8


@pytest.mark.parametrize(
    "steps, sentence", [(3, "which is complete; give more steps"), (2, "with 3 steps, and 2 were")]
)
def test_the_same_and_fewer_steps_are_refused_with_what_can_be_done(
    run: Run, dataset: EncodedDataset, short: Path, steps: int, sentence: str
) -> None:
    with pytest.raises(OutputError, match=f"holds this run, .*{sentence}.*start fresh, which moves it aside"):
        run(dataset, steps=steps, output=short)


def test_what_cannot_be_trained_on_stays_where_it_is(
    run: Run, dataset: EncodedDataset, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = short / "states" / "step-000003.safetensors"
    content = bytearray(state.read_bytes())
    with pytest.raises(OutputError, match="differs in steps 3 then, 6 now; seed 3 then, 4 now"):
        run(dataset, steps=6, seed=4, output=short)
    with monkeypatch.context() as patch:
        patch.chdir(short)
        with pytest.raises(OutputError, match="is to be moved aside, but holds the current folder"):
            run(dataset, steps=6, output=Path())
    with RunFolder(short).claimed(), pytest.raises(OutputError, match="is in use by a run"):
        run(dataset, steps=6, output=short)
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(OutputError, match="its SHA-256 is another"):
        run(dataset, steps=6, output=short)
    state.unlink()
    with pytest.raises(LorasmithError, match="has no run state to continue from; choose another output"):
        run(dataset, steps=6, output=short)
    assert list(tmp_path.iterdir()) == [short]


def test_a_state_without_its_run_is_started_from_with_a_remark(
    run: Run, dataset: EncodedDataset, short: Path, tmp_path: Path
) -> None:
    state, ear = shutil.copy(short / "states" / "step-000003.safetensors", tmp_path), Audience()
    run(dataset, steps=4, existing_state=str(state), on_event=ear)
    (said,) = (one for one in ear.of(Warned) if "as its run is not beside it" in one.message)
    assert said.is_remark


@pytest.mark.slow
def test_a_longer_run_that_was_interrupted_is_continued_by_the_same_call(
    run: Run, dataset: EncodedDataset, short: Path, tmp_path: Path
) -> None:
    whole, ear = run(dataset, steps=6), Audience(4)
    run(dataset, steps=6, output=short, on_event=ear, cancelled=ear.cancelled)
    kept = shutil.copytree(short, tmp_path / "kept")
    assert run(dataset, steps=6, output=short).losses == whole.losses
    with pytest.raises(OutputError, match="holds this run, which is complete"):
        run(dataset, steps=6, output=short)
    # Killed before it saved a state, and moved with the run that it starts from.
    shutil.rmtree(kept / "states")
    there = tmp_path / "there"
    there.mkdir()
    shutil.move(kept, there / "run")
    shutil.move(tmp_path / "run-old-1", there / "run-old-1")
    assert run(dataset, steps=6, output=there / "run").losses == whole.losses


@pytest.mark.parametrize("named", ["../../etc/step", "/x/y/z/step-000003.safetensors", "a", 7])
def test_a_record_leads_to_no_other_file(run: Run, dataset: EncodedDataset, short: Path, named: object) -> None:
    """Its path is that of a state beside the folder, or the folder holds another run."""
    record = json.loads((short / "run.json").read_text())
    record["config"]["existing_state"] = named
    record["fingerprint"]["initial"] += "+" + "0" * 64
    (short / "run.json").write_text(json.dumps(record))
    shutil.rmtree(short / "states")
    with pytest.raises(OutputError, match="holds another run, which differs in the LoRA that training starts from"):
        run(dataset, steps=3, output=short)
