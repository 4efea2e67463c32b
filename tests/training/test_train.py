"""From settings to a saved LoRA: continuing, capping, metadata, refusals, and what other programs make of the file."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorasmith.core.errors import OutputError
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from lorasmith.formats.metadata import autov1, sha256_file
from lorasmith.training import results
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import RunStarted, StepDone, Warned
from lorasmith.training.job import plan_job
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from tests.launched import LONG_S

Run = Callable[..., TrainResult]


def test_a_continued_run_meets_new_noise_and_the_rest_of_the_epoch(
    quick_run: Run, dataset: EncodedDataset, tmp_path: Path
) -> None:
    """At a rate that moves nothing, two runs of two steps have the losses of one run of four."""
    still = {"learning_rate": 1e-7, "optimizer": "SGD"}
    whole = quick_run(dataset, steps=4, **still)
    first = quick_run(dataset, steps=2, **still)
    file = first.lora.save(tmp_path / "first.safetensors")
    second = quick_run(dataset, steps=2, existing_lora=str(file), **still)
    assert first.losses + second.losses == pytest.approx(whole.losses, rel=1e-4)


def test_continuing_counts_on_keeps_rank_and_alpha_and_starts_missing_targets_fresh(
    run: Run, dataset: EncodedDataset, tmp_path: Path
) -> None:
    first = run(dataset, steps=3, rank=2, alpha=7.0, targets="*.attn1.to_q")
    file = first.lora.save(tmp_path / "first.safetensors")
    events: list[object] = []
    second = run(dataset, steps=2, rank=5, targets="*.attn1.to_*", existing_lora=str(file), on_event=events.append)
    assert second.steps == 5
    assert second.lora.state.metadata["lorasmith.steps"] == "5"
    ranks = {ref.path: (one.tensors["down"].shape[0], one.alpha) for ref, one in second.lora.state.adapters.items()}
    assert all(ranks[path] == ((2, 7.0) if path.endswith("to_q") else (5, 5.0)) for path in ranks)
    assert any(isinstance(event, Warned) and "3 steps" in event.message for event in events)
    assert next(event for event in events if isinstance(event, RunStarted)).steps_before == 3


def test_steps_are_read_from_comfyuis_file_names(quick_run: Run, dataset: EncodedDataset, tmp_path: Path) -> None:
    first = quick_run(dataset, steps=1)
    bare = tmp_path / "ComfyUI_trained_lora_70_steps_00001_.safetensors"
    save_file(load_file(first.lora.save(tmp_path / "a.safetensors")), bare)
    assert quick_run(dataset, steps=2, existing_lora=str(bare)).steps == 72


def test_what_belongs_to_no_layer_of_the_denoiser_is_carried_along(
    run: Run, dataset: EncodedDataset, tmp_path: Path
) -> None:
    tensors = load_file(run(dataset, steps=1).lora.save(tmp_path / "a.safetensors"))
    extra = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(512, 2),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(2, 128),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(2.0),
        "lora_te_text_model_encoder_layers_0_mlp_fc2.hada_w1_a": torch.randn(128, 2),
        "lora_te_text_model_encoder_layers_0_mlp_fc2.hada_w1_b": torch.randn(2, 512),
        "lora_te_text_model_encoder_layers_0_mlp_fc2.hada_w2_a": torch.randn(128, 2),
        "lora_te_text_model_encoder_layers_0_mlp_fc2.hada_w2_b": torch.randn(2, 512),
        "lora_te_text_model_encoder_layers_0_mlp_fc2.alpha": torch.tensor(1.0),
        "lora_te_text_model_encoder_layers_0_mlp_fc2.dora_scale": torch.randn(1, 512),
        "lora_te_text_model_encoder_layers_0_layer_norm1.w_norm": torch.randn(128),
        "somebody.elses.tensor": torch.randn(3),
    }
    save_file({**tensors, **extra}, tmp_path / "b.safetensors")
    carried = run(dataset, steps=1, existing_lora=str(tmp_path / "b.safetensors"))
    saved = load_file(carried.lora.save(tmp_path / "c.safetensors"))
    for key, tensor in extra.items():
        assert torch.equal(saved[key], tensor), key


def test_a_run_folder_holds_everything(run: Run, dataset: EncodedDataset, tmp_path: Path) -> None:
    result = run(dataset, output=tmp_path / "run", title="cat", trigger="sks cat")
    assert result.path == tmp_path / "run" / "cat.safetensors"
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["steps"] == 2
    assert record["config"]["alpha"] == 4.0
    assert len(record["samples"]) == 6
    assert record["environment"]["versions"]["torch"] == version("torch")
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["RunStarted", *["StepDone"] * 2, "StateSaved", "RunFinished"]
    with safe_open(result.path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == "sks cat"
    assert metadata["ss_base_model_version"] == "sd_v1_v"
    assert metadata["ss_network_dim"] == "4"
    assert len(metadata["sshs_model_hash"]) == 64
    with pytest.raises(OutputError, match="holds this run, which is complete"):
        run(dataset, output=tmp_path / "run")


def test_a_full_disk_while_saving_is_one_sentence(
    quick_run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = quick_run(dataset, steps=1)
    target = tmp_path / "lora.safetensors"
    target.write_bytes(b"the old file")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="was not written because the disk is full; free some space"):
        result.lora.save(target)
    assert target.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [target]


def test_the_models_own_rate_goes_down_from_twice_its_value_and_a_given_one_stays(tiny: Model) -> None:
    own = tiny.defaults.learning_rate

    def planned(**settings: Any) -> tuple[float | None, str | None]:
        config = plan_job(tiny.denoiser, TrainConfig(rank=4, **settings)).config
        return config.learning_rate, config.schedule

    assert planned() == (2 * own, "linear")
    assert planned(algorithm="LoKr") == (6 * own, "linear")
    assert planned(learning_rate=own) == (own, "constant")
    assert planned(schedule="cosine") == (own, "cosine")
    assert planned(optimizer="SGD") == (own, "constant")
    assert planned(targets="attention lr=1e-3, *.ff.*") == (own, "constant")


@pytest.fixture
def endless_hashing(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hashing of the base model ends only if it is stopped, which sets the event."""
    stopped = threading.Event()

    def hashed(path: Path, remembered: object, *, each_block: Callable[[], object]) -> str:
        for _ in range(60_000):
            try:
                each_block()
            except OSError:
                stopped.set()
                raise
            stopped.wait(0.01)
        return "it was not stopped"

    monkeypatch.setattr(results, "file_sha256", hashed)
    yield stopped
    assert stopped.wait(LONG_S)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_is_cancelled_waits_for_no_hash(
    run: Run, dataset: EncodedDataset, tmp_path: Path, endless_hashing: threading.Event, steps: int
) -> None:
    events: list[object] = []

    def cancelled() -> bool:
        return sum(isinstance(event, StepDone) for event in events) >= steps

    result = run(dataset, output=tmp_path / "run", on_event=events.append, cancelled=cancelled, steps=50)
    assert (result.reason, result.path is None) == ("cancelled", steps == 0)
    assert "ss_new_sd_model_hash" not in result.lora.metadata


def test_a_finished_run_waits_for_the_hash_until_it_is_cancelled(
    run: Run, dataset: EncodedDataset, tmp_path: Path, endless_hashing: threading.Event
) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 5

    result = run(dataset, output=tmp_path / "run", cancelled=cancelled, steps=2)
    assert (result.reason, len(result.losses)) == ("finished", 2)
    assert asked == 6 and "ss_new_sd_model_hash" not in result.lora.metadata


def test_a_finished_run_has_the_hashes_of_its_base_model(run: Run, dataset: EncodedDataset, tiny: Model) -> None:
    assert tiny.path is not None
    metadata = run(dataset, steps=1).lora.metadata
    assert metadata["ss_new_sd_model_hash"] == sha256_file(tiny.path)
    assert metadata["ss_sd_model_hash"] == autov1(tiny.path)


def test_an_interruption_after_the_last_step_says_where_the_lora_is(
    quick_run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(result: TrainResult, path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainResult, "plot", interrupt)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        quick_run(dataset, output=tmp_path / "run", steps=1)
    assert interrupted.value.__notes__[0] == f"the LoRA of 1 step is at {tmp_path / 'run' / 'lora.safetensors'}"
    assert Lora.load(tmp_path / "run" / "lora.safetensors").steps == 1
