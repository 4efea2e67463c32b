"""Nothing is lost: going on to the bit, going back after a fault, and smaller pieces when memory runs out."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.core import files
from lorasmith.core.errors import LorasmithError, OutputError, TrainingError
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset
from lorasmith.families.model import Denoiser, Model
from lorasmith.formats.container import read_safetensors
from lorasmith.report.contact_sheet import PreviewFolder
from lorasmith.runs import run as running
from lorasmith.training import engine
from lorasmith.training.batches import Batch, BatchMaker
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import (
    Event,
    Previewed,
    Resumed,
    RolledBack,
    RunFinished,
    Shrunk,
    StateSaved,
    StepDone,
    Warned,
)
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.loop import Loop
from lorasmith.training.lora_handle import Lora
from lorasmith.training.recovery import RunState, exploded
from lorasmith.training.results import Results, TrainResult
from lorasmith.training.step_results import Taken
from lorasmith.training.storage import run_states
from lorasmith.training.storage.run_folder import RunFolder, unfinished_run
from lorasmith.training.trainable import Trainable
from lorasmith.training.validation import History
from tests.covering import slow_except
from tests.training.run_cases import damaged

Run = Callable[..., TrainResult]


@pytest.fixture
def run(quick_run: Run) -> Run:
    """Nothing here depends on the model, but for text encoders and previews."""
    return quick_run


def saved(folder: Path) -> dict[str, Tensor]:
    """The tensors of all LoRAs in a folder, averages included."""
    files = [path for path in folder.rglob("*.safetensors") if path.parent.name != "states"]
    return {f"{path.name} {name}": one for path in files for name, one in read_safetensors(path)[0].items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Audience:
    """Keeps events, and cancels behind a step."""

    def __init__(self, cancel_at: int = 10**9) -> None:
        self.events: list[Any] = []
        self._cancel_at = cancel_at

    def __call__(self, event: object) -> None:
        self.events.append(event)

    def cancelled(self) -> bool:
        return any(isinstance(one, StepDone) and one.step >= self._cancel_at for one in self.events)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"training_dtype": "bf16", "batch_size": 2},
    "accumulated": {"batch_size": 2, "grad_accumulation_steps": 2, "schedule": "cosine", "warmup_steps": 3},
    "averaged": {"ema_decay": 0.9, "optimizer": "RMSprop"},
    "T-LoRA": {
        "tlora": "orthogonal",
        "rank_dropout": 0.3,
        "post_hoc_ema": 2,
        "validation_share": 0.3,
        "validation_draws": 2,
    },
    "dropped": {"rank_dropout": 0.3, "module_dropout": 0.2},
    "validated": {"validation_share": 0.3, "validate_every": 2, "validation_draws": 2},
    "schedule-free": {"optimizer": "ScheduleFree", "validation_share": 0.3, "validate_every": 2, "validation_draws": 2},
    "prodigy": {"optimizer": "Prodigy"},
    "start from the gradient": {"init": "lora-ga", "init_steps": 2},
    "matrices": {"optimizer": "Adafactor"},
    "preserved": {"preserve": "class", "preserve_class": "animal", "weight_change": 0.01, "input_perturbation": 0.1},
    "slider": {"slider_positive": "a red apple", "slider_negative": "a bus", "pyramid_noise": 0.3},
    "pairs": {"pairs": "slider", "preserve": "blank", "ema_decay": 0.9},
    "preference": {"pairs": "dpo", "rank_dropout": 0.3, "grad_accumulation_steps": 2},
    "text": {"train_text_encoder": True, "text_encoder_steps": 4, "new_word": "cat", "ema_decay": 0.5},
    "quantized": {"quantization": "nf4", "gradient_checkpointing": True, "validation_share": 0.3, "validate_every": 2},
    "products": {"quantization": "int8_convrot", "products": "int8"},
}


@pytest.mark.parametrize("name", slow_except(SETTINGS, "T-LoRA", "pairs", "text", "start from the gradient"))
@pytest.mark.filterwarnings("ignore::UserWarning")  # of optimizers, about their own arguments
def test_a_run_that_is_broken_off_goes_on_to_the_bit(
    quick_run: Run, built_in_run: Run, tiny: Model, mixed: EncodedDataset, tmp_path: Path, name: str
) -> None:
    run = built_in_run if name == "text" else quick_run
    settings, mixed = SETTINGS[name], replace(mixed, captions=EncodedCaptions(tiny.text_encoder.encode))
    if "pairs" in settings:
        mixed = replace(mixed, samples=tuple(replace(one, opposite=one.latents.flip(-1)) for one in mixed.samples))
    whole = run(mixed, steps=5, output=tmp_path / "whole", **settings)
    first, second = Audience(cancel_at=3), Audience()
    broken = run(mixed, steps=5, output=tmp_path / "broken", on_event=first, cancelled=first.cancelled, **settings)
    assert (broken.reason, len(broken.losses)) == ("cancelled", 3)
    resumed = run(mixed, steps=5, output=tmp_path / "broken", on_event=second, **settings)
    (continued,) = second.of(Resumed)
    assert continued.step == 3 and "from step 3, bit-identically" in continued.message
    assert resumed.losses == whole.losses and resumed.verdict == whole.verdict
    assert [event.step for event in second.of(StepDone)] == [4, 5]
    assert same(saved(tmp_path / "whole"), saved(tmp_path / "broken"))
    log = [json.loads(line) for line in (tmp_path / "broken" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in log if event["event"] == "StepDone"] == [1, 2, 3, 4, 5]
    assert [event["reason"] for event in log if event["event"] == "RunFinished"] == ["finished"]


def test_checkpoints_come_by_steps_and_the_last_ones_are_kept(
    run: Run, dataset: EncodedDataset, tmp_path: Path
) -> None:
    audience = Audience()
    run(dataset, steps=7, output=tmp_path, save_state_every=2, keep_states=2, on_event=audience)
    assert [event.step for event in audience.of(StateSaved)] == [2, 4, 6, 7]
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == [
        "step-000006.safetensors",
        "step-000007.safetensors",
    ]


def killed(work: Callable[[], object]) -> None:
    """Do it in a forked process, which must kill itself."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 9


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


@needs_fork
@pytest.mark.parametrize(
    ("setting", "save", "files"), [("post_hoc_ema", "save_averages", 4), ("save_every", "save_result", 1)]
)
def test_a_run_that_is_killed_while_it_writes_files_of_a_step_has_them_in_the_end(
    run: Run, dataset: EncodedDataset, tmp_path: Path, setting: str, save: str, files: int
) -> None:
    def work() -> None:
        setattr(Results, save, lambda *given: os._exit(9))
        run(dataset, steps=4, output=tmp_path, save_state_every=2, **{setting: 2})

    killed(work)
    run(dataset, steps=4, output=tmp_path, save_state_every=2, **{setting: 2})
    assert len([path for path in tmp_path.rglob("*step*.safetensors") if path.parent.name != "states"]) == files


@needs_fork
def test_a_preview_that_a_kill_prevented_is_drawn_when_the_run_continues(
    built_in_run: Run, dataset: EncodedDataset, tmp_path: Path
) -> None:
    settings = {"steps": 4, "save_state_every": 2, "previews": "a lion", "preview_every": 2, "preview_steps": 1}

    def work() -> None:
        PreviewFolder.write_step = lambda *given: os._exit(9)  # type: ignore[method-assign]
        built_in_run(dataset, output=tmp_path, **settings)

    killed(work)
    assert not list((tmp_path / "samples").glob("step-*"))
    for cancel_at, drawn in ((3, 2), (10**9, 4)):
        audience = Audience(cancel_at)
        built_in_run(dataset, output=tmp_path, on_event=audience, cancelled=audience.cancelled, **settings)
        assert [event.step for event in audience.of(Previewed) if event.strength == 1] == [drawn]
        assert (tmp_path / "samples" / f"step-{drawn:06}-1.png").is_file()


def test_checkpoints_come_by_minutes_whatever_the_clock_on_the_wall_does(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1e9 - 1e6 * now[0])  # jumps back by eleven days with each step
    audience = Audience()

    def on_event(event: object) -> None:
        audience(event)
        if isinstance(event, StepDone):
            now[0] += 61.0

    run(dataset, steps=5, output=tmp_path, save_state_every=0, save_state_minutes=2.0, on_event=on_event)
    assert [event.step for event in audience.of(StateSaved)] == [2, 4, 5]


def test_a_checkpoint_that_cannot_be_read_is_passed_over_and_without_another_the_run_is_not_started_over(
    run: Run, dataset: EncodedDataset, tmp_path: Path
) -> None:
    settings = {"steps": 4, "save_state_every": 1, "output": tmp_path}
    first, second = Audience(cancel_at=2), Audience(cancel_at=2)
    run(dataset, on_event=first, cancelled=first.cancelled, **settings)
    *_, two = sorted((tmp_path / "states").iterdir())
    two.write_bytes(two.read_bytes()[:-100])
    run(dataset, on_event=second, cancelled=second.cancelled, **settings)
    assert second.of(Resumed)[0].step == 1
    for path in (tmp_path / "states").iterdir():
        path.write_bytes(b"spoilt")
    with pytest.raises(OutputError, match=r"no state of this run can be read .*; start fresh"):
        run(dataset, **settings)


def test_another_run_in_the_folder_is_left_alone_and_what_differs_is_named(
    run: Run, dataset: EncodedDataset, tmp_path: Path
) -> None:
    audience = Audience(cancel_at=2)
    run(dataset, output=tmp_path / "run", on_event=audience, cancelled=audience.cancelled)
    with pytest.raises(OutputError, match="holds another run, which differs in rank 4 then, 8 now"):
        run(dataset, output=tmp_path / "run", rank=8)
    fewer = EncodedDataset(dataset.samples[:-1])
    with pytest.raises(OutputError, match="differs in the images or captions; undo that, choose another output"):
        run(fewer, output=tmp_path / "run")
    run(dataset, output=tmp_path / "run", rank=8, fresh=True)
    assert (tmp_path / "run-old-1" / "run.json").is_file()
    assert RunFolder(tmp_path / "run").outcome() == "finished"


def test_a_folder_is_for_one_process_at_a_time(run: Run, dataset: EncodedDataset, tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "run").claimed(),
        pytest.raises(OutputError, match="is in use by a run in another process"),
    ):
        run(dataset, output=tmp_path / "run")


def test_another_environment_is_named_and_settings_that_change_no_number_may_change(
    run: Run, dataset: EncodedDataset, tmp_path: Path
) -> None:
    first, second = Audience(cancel_at=1), Audience()
    run(dataset, output=tmp_path, on_event=first, cancelled=first.cancelled)
    record = json.loads((tmp_path / "run.json").read_text())
    record["environment"]["threads"] = 99
    record["environment"]["versions"]["torch"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(record))
    result = run(dataset, output=tmp_path, save_state_every=1, keep_states=5, private=True, on_event=second)
    assert result.reason == "finished"
    assert re.search(
        r"not bit-identically, because of torch 1.0 then, .* now; threads 99 then, \d+ now",
        second.of(Resumed)[0].message,
    )


@pytest.mark.slow
def test_the_unfinished_run_is_found_among_others(run: Run, dataset: EncodedDataset, tmp_path: Path) -> None:
    audience = Audience(cancel_at=1)
    run(dataset, output=tmp_path / "lora-001", on_event=audience, cancelled=audience.cancelled)
    run(dataset, output=tmp_path / "lora-002", rank=2)
    record = RunFolder(tmp_path / "lora-001").record()
    assert unfinished_run(tmp_path, "lora", record.fingerprint) == tmp_path / "lora-001"
    assert unfinished_run(tmp_path, "other", record.fingerprint) is None
    with RunFolder(tmp_path / "lora-001").claimed():  # by another process
        assert unfinished_run(tmp_path, "lora", record.fingerprint) is None
    run(dataset, output=tmp_path / "lora-001")
    assert unfinished_run(tmp_path, "lora", record.fingerprint) is None
    assert unfinished_run(tmp_path / "nowhere", "lora", record.fingerprint) is None


# Faults


def poison(monkeypatch: pytest.MonkeyPatch, spoilt: Callable[[int], float], *, start: int = 0) -> None:
    """Multiply the losses of each batch by a number of its own, counted from 1."""
    count = start
    original = engine.sample_losses

    def poisoned(denoiser: Denoiser, batch: Any, config: Any, way: Any, *target: Any) -> Tensor:
        nonlocal count
        count += 1
        return original(denoiser, batch, config, way, *target) * spoilt(count)

    monkeypatch.setattr(engine, "sample_losses", poisoned)


def test_after_nan_a_run_goes_back_and_on(run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda step: math.nan if step == 3 else 1.0)
    audience = Audience()
    result = run(dataset, steps=6, on_event=audience, learning_rate=1e-3)
    (back,) = audience.of(RolledBack)
    assert (back.step, back.to_step, back.rate_factor) == (3, 0, 0.5)
    assert re.search(r"at step 3 \(images: \d\.png\); that step is skipped", back.message)
    assert result.reason == "finished"
    assert [math.isnan(loss) for loss in result.losses] == [False, False, True, False, False, False]
    assert [event.learning_rate for event in audience.of(StepDone)] == [1e-3, 1e-3, 5e-4, 5e-4, 5e-4]
    for one in result.lora.state.adapters.values():
        assert all(tensor.isfinite().all() for tensor in one.tensors.values())


@pytest.mark.parametrize("clipped", [0.0, 1.0])
def test_a_layer_whose_gradient_is_nan_is_named_and_no_image(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clipped: float
) -> None:
    spoilt, original = "blocks.1.attn2.to_q", engine.Engine.gradient

    def gradient(self: engine.Engine, batches: Any) -> Any:
        found = original(self, batches)
        self.flat.view(self.flat.grad, f"{spoilt}.up")[0, 0] = math.nan
        return found

    monkeypatch.setattr(engine.Engine, "gradient", gradient)
    audience = Audience()
    with pytest.raises(TrainingError, match=f"gradient of {spoilt} became NaN .*leave that layer out"):
        run(dataset, steps=6, max_grad_norm=clipped, max_rollbacks=1, on_event=audience)
    (back,) = audience.of(RolledBack)
    assert (back.layers, back.images) == ((spoilt,), ())


def test_an_image_is_named_for_its_own_loss_alone() -> None:
    taken = Taken(("a", "b", "a", "c"), (0, 1, 2, 3), (0.5,) * 4, 4, ())
    assert taken.at_fault([1.0, math.nan, 2.0, 30.0], bound=10) == ("b", "c")
    assert taken.at_fault([math.nan] * 4, bound=10) == ()
    assert Taken(("a",), (0,), (0.5,), 1, ()).at_fault([math.inf], bound=math.inf) == ("a",)


@pytest.mark.slow
def test_a_run_that_went_back_goes_on_to_the_bit(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, cancel_at in (("whole", 10**9), ("broken", 29), ("broken", 10**9)):
        start = 0 if not (tmp_path / name).exists() else 29
        with monkeypatch.context() as patch:
            poison(patch, lambda step: math.nan if step in (27, 31) else 1.0, start=start)
            audience = Audience(cancel_at)
            run(dataset, steps=33, output=tmp_path / name, on_event=audience, cancelled=audience.cancelled)
            if cancel_at > 29:
                assert audience.of(RolledBack)[-1].to_step == 25
    assert same(saved(tmp_path / "whole"), saved(tmp_path / "broken"))


def test_what_counts_as_an_explosion() -> None:
    calm = [0.01, 1.0] * 30
    assert not exploded([*calm, 9.0])
    assert exploded([*calm, 11.0])
    assert not exploded([1.0] * 20 + [100.0])  # too early to tell
    doubling = [1.0] * 40 + [1.3**n for n in range(12)]
    assert exploded(doubling)
    assert not exploded(doubling[:-4])
    assert exploded([*calm, math.nan, math.nan, 11.0])
    once = [*calm[:30], math.inf, *calm[30:]]
    assert exploded([*once, 11.0]) and not exploded([*once, 9.0])


@pytest.mark.slow
def test_after_too_many_faults_the_best_there_is_is_kept(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda step: math.nan if step >= 4 else 1.0)
    audience = Audience()
    with pytest.raises(
        TrainingError, match=r"at step 6 .*, after 2 rollbacks in this run; the LoRA before that step"
    ) as error:
        run(dataset, steps=9, max_rollbacks=2, output=tmp_path, on_event=audience)
    assert len(audience.of(RolledBack)) == 2
    assert str(tmp_path / "lora.safetensors") in str(error.value)
    assert RunFolder(tmp_path).outcome() == "failed"


@pytest.mark.slow
def test_an_explosion_too_many_leaves_the_last_good_lora(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda step: 1e4 if step == 34 else 1.0)
    with pytest.raises(TrainingError, match=r"the loss exploded to .* at step 34 .*; the LoRA of step 25 is kept"):
        run(dataset, steps=36, learning_rate=1e-6, max_rollbacks=0, output=tmp_path / "run")
    monkeypatch.undo()
    good = run(dataset, steps=25, learning_rate=1e-6, output=tmp_path / "good")
    assert good.steps == 25
    assert same(saved(tmp_path / "run"), saved(tmp_path / "good"))


def test_a_run_without_a_sound_step_fails(run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda step: math.nan)
    with pytest.raises(TrainingError, match="at step 2"):
        run(dataset, steps=2)


def out_of_memory(monkeypatch: pytest.MonkeyPatch, too_large: Callable[[int, int], bool]) -> list[int]:
    """Let the forward pass fail where `too_large(batch, checkpoint depth)`; returns the sizes that went through."""
    seen: list[int] = []
    original = engine.sample_losses

    def scarce(denoiser: Denoiser, batch: Any, config: Any, way: Any, *target: Any) -> Tensor:
        if too_large(len(batch.names), way.checkpoint_depth):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")
        seen.append(len(batch.names))
        return original(denoiser, batch, config, way, *target)

    monkeypatch.setattr(engine, "sample_losses", scarce)
    return seen


def test_when_memory_runs_out_the_step_is_taken_in_smaller_pieces(
    run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(dataset, batch_size=5, steps=2)
    sizes = out_of_memory(monkeypatch, lambda batch, depth: batch > 2)
    audience = Audience()
    scarce = run(dataset, batch_size=5, steps=2, on_event=audience)
    assert [(event.step, event.micro_batch) for event in audience.of(Shrunk)] == [(1, 3), (1, 2)]
    assert sizes == [2, 2, 1] * 2
    assert scarce.losses == pytest.approx(plain.losses, rel=1e-4)


@pytest.mark.slow
def test_a_run_that_shrank_goes_on_to_the_bit(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory(monkeypatch, lambda batch, depth: batch > 2)
    run(dataset, batch_size=4, steps=4, output=tmp_path / "whole")
    audience = Audience(cancel_at=2)
    run(dataset, batch_size=4, steps=4, output=tmp_path / "run", on_event=audience, cancelled=audience.cancelled)
    audience = Audience()
    run(dataset, batch_size=4, steps=4, output=tmp_path / "run", on_event=audience)
    assert not audience.of(Shrunk)  # it knows already
    assert same(saved(tmp_path / "whole"), saved(tmp_path / "run"))


def test_a_kernel_that_is_not_used_is_named_once(
    run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.core.kernels._REFUSALS", ["The Triton kernel for doubling is not used."])
    audience = Audience()
    run(dataset, steps=3, on_event=audience)
    assert [one.message for one in audience.of(Warned)].count("The Triton kernel for doubling is not used.") == 1


@pytest.mark.slow
def test_too_little_memory_for_one_image_is_said(
    run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory(monkeypatch, lambda batch, depth: True)
    with pytest.raises(
        TrainingError, match=r"memory must hold one image's .* use smaller pictures or a lower rank"
    ) as error:
        run(dataset, batch_size=2)
    assert "More lines" not in str(error.value)


def test_other_errors_are_not_taken_for_scarce_memory(
    run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(engine, "sample_losses", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(dataset)


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.training.train.check_room", lambda *_: None)  # it fills up later
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_states.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    audience = Audience()
    result = run(dataset, steps=6, save_state_every=1, output=tmp_path, on_event=audience)
    told = [event.message for event in audience.of(Warned) if "is not saved" in event.message]
    assert len(told) == 1
    assert "The state of step 1 is not saved: a run state needs" in told[0]
    assert result.path is not None
    assert result.path.is_file()


def test_a_disk_that_fills_up_while_it_is_written_to_leaves_the_last_checkpoint(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    original = files.os.fsync

    def full(descriptor: int) -> None:
        nonlocal written
        written += 1
        if 6 < written < 12:
            raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    audience = Audience()
    run(dataset, steps=6, save_state_every=1, keep_states=9, output=tmp_path, on_event=audience)
    assert any("the disk is full" in event.message for event in audience.of(Warned))
    kept = run_states.RunStates(tmp_path / "states", keep=9)
    assert kept.paths()
    assert all(run_states.load_state(path) for path in kept.paths())
    assert not list(tmp_path.rglob("*.tmp"))


# What a second pair of eyes found


@pytest.mark.slow
def test_the_best_lora_is_there_after_a_run_went_on(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the step that is the best, the run has no second file; gone on with, it must have one."""
    add = History.add

    def best_at_two(self: History, step: int, losses: list[list[float]]) -> Any:
        return add(self, step, [[abs(step - 2) + draw for draw, _ in enumerate(row)] for row in losses])

    monkeypatch.setattr(History, "add", best_at_two)
    settings = {"validation_share": 0.3, "validate_every": 1, "validation_draws": 4, "steps": 4}
    whole = run(dataset, output=tmp_path / "whole", **settings)
    assert whole.best_path is not None
    audience = Audience(cancel_at=2)
    broken = run(dataset, output=tmp_path / "run", on_event=audience, cancelled=audience.cancelled, **settings)
    assert broken.best_path is None
    best = saved(tmp_path / "run")
    resumed = run(dataset, output=tmp_path / "run", **settings)
    assert resumed.best_path is not None
    assert same(read_safetensors(resumed.best_path)[0], read_safetensors(whole.best_path)[0])
    assert same(read_safetensors(resumed.best_path)[0], best)


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_new_best_costs_the_file_and_not_the_run(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audience = Audience()
    original = Lora.save
    failures = iter([True])

    def full(self: Lora, path: Path, **rest: Any) -> Path:
        if "-best" in path.name and next(failures, False):
            raise OutputError(f"{path} was not written because the disk is full; free some space and save again")
        return original(self, path, **rest)

    monkeypatch.setattr(Lora, "save", full)
    settings = {"validation_share": 0.3, "validate_every": 1, "validation_draws": 4}
    assert run(dataset, output=tmp_path, on_event=audience, **settings).reason == "finished"
    assert any("The best LoRA so far is not saved yet" in event.message for event in audience.of(Warned))


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_lora_takes_the_room_of_run_states_on_a_full_disk(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    original, states = Lora.save, tmp_path / "states"

    def full(self: Lora, path: Path, **rest: Any) -> Path:
        if len(list(states.iterdir())) > is_stopped:
            raise OutputError(f"{path} was not written because the disk is full") from OSError(errno.EDQUOT, "quota")
        return original(self, path, **rest)

    monkeypatch.setattr(Lora, "save", full)
    audience = Audience(cancel_at=3 if is_stopped else 10**9)
    settings = {"steps": 4, "save_state_every": 1, "keep_states": 3, "cancelled": audience.cancelled}
    result = run(dataset, output=tmp_path, on_event=audience, **settings)
    assert result.path is not None and result.path.is_file()
    assert len(list(states.iterdir())) == is_stopped
    assert any("a run state is removed" in event.message for event in audience.of(Warned))


def test_a_log_without_its_end_is_said(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the run ends; with space it is completed, and the same."""
    log = RunFolder.__call__

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(self: RunFolder, event: Event) -> None:
        with monkeypatch.context() as disk:
            if isinstance(event, RunFinished):
                self.close()
                disk.setattr(Path, "open", no_space)
            log(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "__call__", full)
        audience = Audience()
        run(dataset, output=tmp_path, on_event=audience)
    assert "counts as interrupted; free some space and resume it" in audience.of(Warned)[-1].message
    assert RunFolder(tmp_path).outcome() is None
    before, audience = saved(tmp_path), Audience()
    run(dataset, output=tmp_path, on_event=audience)
    assert RunFolder(tmp_path).outcome() == "finished" and same(saved(tmp_path), before)
    assert not any("counts as interrupted" in event.message for event in audience.of(Warned))


def test_a_report_that_fails_costs_the_report_alone(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "write_report", lambda folder, end: 1 / 0)
    audience = Audience()
    assert run(dataset, output=tmp_path, on_event=audience).reason == "finished"
    assert "the report is not: division by zero" in audience.of(Warned)[-1].message
    assert RunFolder(tmp_path).outcome() == "finished"


def test_a_run_that_is_killed_before_its_report_gets_it_when_it_is_given_again(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(folder: Path, end: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(running, "write_report", kill)
        with pytest.raises(Killed):
            run(dataset, output=tmp_path)
    first = saved(tmp_path)
    assert not (tmp_path / "report.html").exists() and RunFolder(tmp_path).outcome() is None
    assert run(dataset, output=tmp_path).reason == "finished"
    assert "Finished" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert same(first, saved(tmp_path))


ODD = [None, True, -1, 0, 10**9, 1e308, "x", [], {}, [[]], {"step": 1}]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_state_that_no_run_of_these_settings_saved_is_refused_in_a_sentence(
    hand_made: Trainable, dataset: EncodedDataset
) -> None:
    config = TrainConfig(steps=4, rank=2, targets="all", training_dtype="fp32", optimizer="Adam", ema_decay=0.9)
    made = Loop(engine_of(plan_job(hand_made, config, "cpu")), dataset.samples, until=2)
    made.run()
    state = made.state()
    loop = Loop(engine_of(plan_job(hand_made, config, "cpu")), dataset.samples, until=2)
    loop.load(state)
    chance, refused = random.Random(0), 0
    for _ in range(150):
        numbers, tensors = dict(state.numbers), dict(state.tensors)
        if chance.random() < 0.6:
            name = chance.choice(list(numbers))
            numbers[name] = damaged(numbers[name], chance, ODD)
        else:
            name = chance.choice(list(tensors))
            tensor = tensors.pop(name)
            if chance.random() < 0.7:
                tensors[name] = chance.choice([tensor.double(), tensor.reshape(-1)[:1], tensor[None], tensor.bool()])
        try:
            loop.load(RunState(state.step, tensors, numbers))
        except LorasmithError as error:
            assert "start fresh" in str(error)
            refused += 1
    assert refused > 75
    loop.load(state)


FORGED: dict[str, list[dict[str, Any]]] = {
    "Adam": [{"betas": 0.9}, {"amsgrad": True}],
    "ScheduleFree": [{"k": None}, {"k": -1}, {"train_mode": False}, {"rate_factor": 1e308}],
}


@pytest.mark.parametrize("optimizer", FORGED)
def test_forged_numbers_of_an_optimizer_are_refused_before_a_step(
    hand_made: Trainable, dataset: EncodedDataset, optimizer: str
) -> None:
    config = TrainConfig(steps=3, rank=2, targets="all", training_dtype="fp32", optimizer=optimizer)
    made = Loop(engine_of(plan_job(hand_made, config, "cpu")), dataset.samples, until=2)
    made.run()
    state = made.state()
    loop = Loop(engine_of(plan_job(hand_made, config, "cpu")), dataset.samples)
    for forged in FORGED[optimizer]:
        numbers = json.loads(json.dumps(state.numbers))
        changed = numbers["engine"] if "rate_factor" in forged else numbers["engine"]["optimizer"]["groups"][0]
        changed.update(forged)
        with pytest.raises(TrainingError, match="start fresh"):
            loop.load(RunState(state.step, state.tensors, numbers))
        assert loop.step == 0  # so that no LoRA is saved of it
    loop.load(state)
    assert loop.run() == "finished"


@pytest.mark.slow
def test_memory_that_runs_out_while_a_batch_is_made_is_handled_too(
    run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(dataset, batch_size=4, steps=3)
    original = BatchMaker.step

    def scarce(self: BatchMaker, step: int) -> list[Batch]:
        if step == 1 and self.way.micro_batch == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, step)

    monkeypatch.setattr(BatchMaker, "step", scarce)
    audience = Audience()
    result = run(dataset, batch_size=4, steps=3, on_event=audience)
    assert [(event.step, event.micro_batch) for event in audience.of(Shrunk)] == [(2, 2)]
    assert result.losses == pytest.approx(plain.losses, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 3])
def test_a_single_image_that_is_too_large_is_said_in_numbers(
    run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    settings = {"steps": 1, "gradient_checkpointing": bool(depth), "checkpoint_depth": depth or 1}
    plain, audience = run(dataset, **settings), Audience()
    out_of_memory(monkeypatch, lambda batch, used: used == depth)
    assert run(dataset, on_event=audience, **settings).losses == pytest.approx(plain.losses, rel=1e-4)
    assert "1 at a time, with activation checkpointing" in audience.of(Shrunk)[0].message


def test_a_gradient_that_is_not_finite_is_no_explosion(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine.Engine.gradient
    steps = 0

    def broken(self: engine.Engine, batches: Any) -> tuple[Tensor, Tensor]:
        nonlocal steps
        losses, first = original(self, batches)
        steps += 1
        if steps == 3:
            self.flat.grad.fill_(math.inf)
        return losses, first

    monkeypatch.setattr(engine.Engine, "gradient", broken)
    with pytest.raises(TrainingError, match=r"became NaN or infinite at step 3; the LoRA before that step"):
        run(dataset, steps=3, max_rollbacks=0, output=tmp_path / "run")
    monkeypatch.undo()
    run(dataset, steps=2, output=tmp_path / "two")
    assert same(saved(tmp_path / "run"), saved(tmp_path / "two"))


def test_little_room_on_the_disk_is_said_at_the_start(
    run: Run, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_states.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"the run writes \d+ MiB to .*whose disk has 0 MiB free"):
        run(dataset, steps=1, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("lorasmith.training.train.check_room", lambda *_: None)  # enough for two states
    audience = Audience()
    run(dataset, steps=1, output=tmp_path, on_event=audience)
    assert "are free on the disk, and 3 run states may take" in audience.of(Warned)[0].message
