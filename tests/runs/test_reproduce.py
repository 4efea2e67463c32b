from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.data.data_config import ImageSource
from lorasmith.families.locating import built_in_models
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.formats.metadata import RUN_ENTRY
from lorasmith.runs.plan import plan
from lorasmith.runs.reproduce import Differs, Reproduced, Reproduction
from lorasmith.runs.run import Host, run
from lorasmith.runs.spec import RunSpec
from lorasmith.training.storage import records
from lorasmith.training.storage.fingerprint import fingerprint
from tests.hosts import Audience
from tests.runs.folder_cases import CONFIRMED, asked, pictures, placed, planned, tensors_of, with_metadata


@pytest.fixture
def lora(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished LoRA, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(whole / "cat.safetensors", tmp_path))


def differences(audience: Audience) -> list[Differs]:
    return [event for event in audience.events if isinstance(event, Differs)]


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("dry_run", [False, True])
def test_the_run_of_a_lora_is_repeated_and_its_fingerprint_taken_once(
    lora: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(records, "fingerprint", lambda *given: taken.append(given) or fingerprint(*given))
    audience = Audience()
    found = Reproduction(lora, audience, CONFIRMED, dry_run=dry_run).reproduce()
    assert len(taken) == 1
    assert differences(audience) == []
    if dry_run:
        assert found == Reproduced()
        assert not Path("runs").exists()
    else:
        assert (found.is_complete, found.is_same) == (True, True)
        assert tensors_of(Path("runs/cat-001")) == tensors_of(whole)


@pytest.mark.slow
def test_the_lora_of_a_stopped_run_is_repeated_up_to_its_step(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    again = Reproduction(
        stopped / "cat.safetensors", Host(), replace(CONFIRMED, spec=RunSpec(output=str(tmp_path / "again")))
    )
    found = again.reproduce()
    assert (again.steps, again.plan.summary.config.steps, found.is_same) == (2, 5, True)
    assert found.result is not None and found.result.folder == tmp_path / "again"


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [2, None])
def test_other_tensors_are_not_the_same_and_a_stopped_repetition_is_not_compared(
    lora: Path, stop_at: int | None
) -> None:
    tensors, metadata = read_safetensors(lora)
    write_safetensors(lora, {key: 2 * tensor for key, tensor in tensors.items()}, metadata)
    found = Reproduction(lora, Audience(stop_at), CONFIRMED).reproduce()
    assert found.result is not None and (found.is_complete, found.is_same) == (stop_at is None, False)


def test_what_decides_the_result_is_named_and_nothing_trained(lora: Path, tmp_path: Path) -> None:
    with_metadata(lora, lambda run: run["fingerprint"]["config"].update(noise_offset=0.5))
    audience = Audience()
    others = pictures(tmp_path / "others", 4, seed=1)
    typed = replace(CONFIRMED, spec=RunSpec(sources=(ImageSource(str(others)),)))
    found = Reproduction(lora, audience, typed).reproduce()
    assert found.differs == ("noise_offset 0.5 then, 0.0 now", "the images or captions")
    assert found.result is None
    assert [(event.what, event.is_decisive) for event in differences(audience)] == [(x, True) for x in found.differs]
    assert not Path("runs").exists()


def test_every_environment_of_a_lora_is_compared(lora: Path) -> None:
    with_metadata(
        lora, lambda run: run.update(environments=[{**run["environment"], "threads": 99}, run["environment"]])
    )
    audience = Audience()
    assert Reproduction(lora, audience, CONFIRMED, dry_run=True).reproduce() == Reproduced()
    (differs,) = differences(audience)
    assert "threads 99 then" in differs.what and not differs.is_decisive


def test_a_run_that_is_there_is_not_written_over(lora: Path, whole: Path) -> None:
    with pytest.raises(OutputError, match="output must not contain a run"):
        Reproduction(lora, Host(), replace(CONFIRMED, spec=RunSpec(output=str(whole))))


@pytest.mark.slow
def test_whole_files_are_compared_on_request(
    lora: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match=r"has no digests of the base model's whole files, .* leave --verify out"):
        Reproduction(lora, Host(), CONFIRMED, dry_run=True).reproduce(verify=True)
    model = Path(shutil.copy(built_in_models()["lorasmith-tiny"], tmp_path / "m.safetensors"))
    spec = replace(asked(images, steps=1), model=str(model))
    made = run(replace(plan(placed(spec, tmp_path / "run"), Host()), verify=True), Host()).path
    assert made is not None
    assert Reproduction(made, Host(), CONFIRMED, dry_run=True).reproduce(verify=True) == Reproduced()
    content = bytearray(model.read_bytes())
    content[-(2 * 10_007)] ^= 1  # one value of thousands
    model.write_bytes(content)
    again = Reproduction(made, Host(), CONFIRMED, dry_run=True)
    assert again.reproduce() == Reproduced()
    assert again.reproduce(verify=True).differs == ("the base model",)


@pytest.mark.parametrize("entry", [None, "{", "[]", '{"source": {"command": "train"}}'])
def test_a_file_that_does_not_say_how_it_was_made(lora: Path, entry: str | None) -> None:
    tensors, metadata = read_safetensors(lora)
    del metadata[RUN_ENTRY]
    write_safetensors(lora, tensors, metadata | ({RUN_ENTRY: entry} if entry else {}))
    with pytest.raises(OptionError, match=r"cat.safetensors has no record of its run"):
        Reproduction(lora, Host(), CONFIRMED)


def test_files_of_workflows_and_private_ones_are_refused(lora: Path, images: Path, tmp_path: Path) -> None:
    with_metadata(lora, lambda run: run["source"].update(command="run"))
    with pytest.raises(OptionError, match="was not made by lorasmith train; run its script"):
        Reproduction(lora, Host(), CONFIRMED)
    private = run(planned(images, tmp_path / "private", steps=1, private=True), Host()).path
    assert private is not None
    with pytest.raises(OptionError, match="was saved with --private"):
        Reproduction(private, Host())
