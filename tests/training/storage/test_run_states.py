"""Run states whose bytes have changed: each is noticed before anything in it is used."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.errors import OutputError
from lorasmith.formats import container
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.training.recovery import RunState
from lorasmith.training.storage import run_states
from lorasmith.training.storage.run_states import RunStates, load_state, save_state

TENSORS = {"engine/master": torch.linspace(0, 1, 300), "engine/step": torch.tensor(3)}


def state(step: int, **numbers: Any) -> RunState:
    return RunState(step, TENSORS, {"losses": [0.5, None], "note": "é", **numbers})


def flipped(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_state_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path / "s.safetensors", state(7))
    found = load_state(tmp_path / "s.safetensors")
    assert (found.step, found.numbers) == (7, {"losses": [0.5, None], "note": "é"})
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())
    with pytest.raises(OutputError, match="must have finite numbers"):
        save_state(tmp_path / "s.safetensors", state(1, growth=float("inf")))
    with monkeypatch.context() as patch:
        patch.setattr(run_states, "_FORMAT", 1)
        save_state(tmp_path / "s.safetensors", state(1))
    with pytest.raises(OutputError, match="was written by another version of Lorasmith"):
        load_state(tmp_path / "s.safetensors")


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_state(path, state(7))
    whole = path.read_bytes()
    header = 8 * (8 + int.from_bytes(whole[:8], "little"))
    chance = random.Random(0)
    bits = [
        *range(0, 64, 5),
        *chance.sample(range(64, header), 150),
        *chance.sample(range(header, 8 * len(whole)), 100),
    ]
    for bit in bits:
        path.write_bytes(whole)
        flipped(path, bit)
        with pytest.raises(OutputError):
            load_state(path)


def test_a_damaged_state_is_passed_over_by_name_for_the_one_before(tmp_path: Path) -> None:
    states, said = RunStates(tmp_path, keep=3), list[str]()
    for step in (2, 4, 6):
        states.save(state(step))
    flipped(tmp_path / "step-000006.safetensors", 8 * ((tmp_path / "step-000006.safetensors").stat().st_size - 5))
    found = states.newest(said.append)
    assert found is not None and found.step == 4
    [sentence] = said
    assert "A run state is skipped: " in sentence and "step-000006.safetensors must have the bytes that" in sentence
    assert (tmp_path / "step-000006.unreadable").is_file() and [path.stem for path in states.paths()] == [
        "step-000004",
        "step-000002",
    ]
    states = RunStates(tmp_path / "alone", keep=1)
    flipped(states.save(state(2)), 8 * 200)
    with pytest.raises(OutputError, match=r"no state of this run can be read .*; start fresh"):
        states.newest()


@pytest.mark.parametrize(
    "change", [{"lorasmith.digest": None}, {"lorasmith.digest": "0" * 64}, {"lorasmith.digest": "x"}]
)
def test_a_state_without_its_digest_is_not_used(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "s.safetensors"
    save_state(path, state(7))
    tensors, metadata = read_safetensors(path)
    write_safetensors(path, tensors, {key: value for key, value in {**metadata, **change}.items() if value is not None})
    with pytest.raises(OutputError, match="must have the bytes that were written"):
        load_state(path)


@pytest.mark.parametrize("forged", [state(True), RunState(7, {"engine/master": torch.tensor([1.0, torch.nan])}, {})])
def test_what_no_run_saves_is_passed_over_also_with_a_right_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forged: RunState
) -> None:
    states, said = RunStates(tmp_path, keep=3), list[str]()
    states.save(state(2))
    (tmp_path / "step-000007.unreadable" / "inside").mkdir(parents=True)  # in the way of its new name
    with monkeypatch.context() as patch:
        patch.setattr(container, "_refuse_non_finite", lambda tensors: None)
        save_state(tmp_path / "step-000007.safetensors", forged)
    found = states.newest(said.append)
    assert found is not None and found.step == 2 and len(said) == 1


def test_folders_and_links_to_nothing_are_no_states(tmp_path: Path) -> None:
    states = RunStates(tmp_path, keep=2)
    (tmp_path / "step-000009.safetensors").mkdir()
    loop = tmp_path / "step-000008.safetensors"
    with contextlib.suppress(OSError):  # Windows without the right to make links
        loop.symlink_to(loop)
    for step in (1, 2, 3):
        states.save(state(step))
    assert [path.stem for path in states.paths()] == ["step-000003", "step-000002"]
