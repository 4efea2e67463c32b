"""Sharded weights: the run is that without sharding, a process holds its part, and none waits for a lost one."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from lever_cases import VARIANTS, flux_dataset, planned
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lorasmith.adapters.frozen_layer import packable_layers
from lorasmith.core.blocks import blocks_at_depth
from lorasmith.core.errors import TrainingError
from lorasmith.core.processes import Processes, current
from lorasmith.core.quantization import packed
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.training import engine as engines
from lorasmith.training.engine import batch_maker
from lorasmith.training.events import Event, Planned, Validated, Warned
from lorasmith.training.job import engine_of
from lorasmith.training.memory import compilation, memory_plan, sharding
from lorasmith.training.results import TrainResult
from lorasmith.training.trainable import Trainable, trainable
from tests.training.processes_together import outcomes_together, processes_together
from tests.training.together_cases import ALIKE, weights

SETTINGS: dict[str, Any] = {**ALIKE, "steps": 2, "batch_size": 4}

Outcome = tuple[list[float], dict[str, Tensor], list[Event]]
"""Losses, weights and events of a run."""


def outcome(result: TrainResult, events: list[Event]) -> Outcome:
    return result.losses, weights(result), events


def trained(model: Model | Trainable, data: EncodedDataset, **settings: Any) -> Outcome:
    events: list[Event] = []
    return outcome(train(model, data, on_event=events.append, **{**SETTINGS, **settings}), events)


def both(
    model: Model | Trainable, data: EncodedDataset, processes: int = 2, *, within_s: float = 300, **settings: Any
) -> tuple[Outcome, Outcome]:
    """A run in several processes without sharding, and with it."""

    def one(_: Processes) -> tuple[Outcome, Outcome]:
        return trained(model, data, **settings), trained(model, data, sharding=True, **settings)

    module = trainable(model).module
    before = models.digest(module.state_dict())
    found = processes_together(processes, one, within_s=within_s)
    assert models.digest(module.state_dict()) == before
    for plain, sharded in found:
        assert plain[0] == found[0][0][0]
        assert sharded[0] == found[0][1][0]
        assert all(torch.equal(sharded[1][name], tensor) for name, tensor in found[0][1][1].items())
    return found[0]


def assert_alike(plain: Outcome, sharded: Outcome, tolerance: float = 1e-4) -> None:
    assert sharded[0] == pytest.approx(plain[0], rel=tolerance)
    whole = torch.cat([tensor.flatten() for tensor in plain[1].values()])
    difference = torch.cat([(sharded[1][name] - tensor).flatten() for name, tensor in plain[1].items()])
    assert difference.norm() <= 0.1 * tolerance * whole.norm()


CASES: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "half precision": {"training_dtype": "bf16"},
    "nf4": {"quantization": "nf4"},
    "int8": {"quantization": "int8"},
    "int8 products": {"quantization": "int8_convrot", "products": "int8"},
    "fp8": {"quantization": "fp8_e4m3"},
    "fp8 by tensor": {"quantization": "fp8_e5m2_tensor"},
    "blocks recomputed": {"checkpoint_depth": 1, "gradient_checkpointing": True},
    "inner blocks recomputed": {"checkpoint_depth": 2, "gradient_checkpointing": True, "quantization": "int8"},
    "innermost blocks recomputed": {"checkpoint_depth": 5, "gradient_checkpointing": True},
    "lean": {"activations": "lean"},
    "selective": {"activations": "selective", "targets": "attention+ff"},
    "auto": {"activations": "auto"},
    "deterministic": {"deterministic": True},
    "dropout": {"rank_dropout": 0.3, "module_dropout": 0.2, "grad_accumulation_steps": 2},
    "average": {"ema_decay": 0.9},
    "held out": {"validation_share": 0.3, "validate_every": 1},
    "OFT, recomputed": {"algorithm": "OFT", "checkpoint_depth": 2, "gradient_checkpointing": True},
    "BOFT": {"algorithm": "BOFT", "quantization": "nf4"},
    "Full": {"algorithm": "Full", "learning_rate": 1e-4},
    "T-LoRA": {"tlora": "plain", "validation_share": 0.3, "validate_every": 1},
    "convolutions": {"targets": "all"},
}


def test_a_run_of_a_few_layers_is_that_without_sharding(hand_made: Trainable, mixed: EncodedDataset) -> None:
    assert_alike(*both(hand_made, mixed, targets="*attn*", **CASES["nf4"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_is_that_without_sharding(tiny: Model, mixed: EncodedDataset, name: str) -> None:
    plain, sharded = both(tiny, mixed, **CASES[name])
    # Numbers that differ in their last bits may be rounded to another code.
    assert_alike(plain, sharded, 2e-2 if name in ("half precision", "int8 products") else 1e-4)
    held_out = [[one.loss for one in events if isinstance(one, Validated)] for _, _, events in (plain, sharded)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)
    assert len(held_out[0]) == (2 if "validate_every" in CASES[name] else 0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "backend"), [("none", "aot_eager"), ("nf4", "aot_eager"), ("int8", "inductor")])
def test_compiled_blocks(flux: Model, monkeypatch: pytest.MonkeyPatch, kind: str, backend: str) -> None:
    monkeypatch.setattr(compilation, "BACKEND", backend)
    settings = {"compile": True, "quantization": kind, "steps": 3, "learning_rate": 1e-3}
    plain, sharded = both(flux, flux_dataset(), within_s=1800, **settings)
    assert_alike(plain, sharded, 1e-3)
    warned = [one.message for _, _, events in (plain, sharded) for one in events if isinstance(one, Warned)]
    assert not any("compile" in message for message in warned)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_holds_its_part_between_steps(
    tiny: Model, dataset: EncodedDataset, kind: str, processes: int
) -> None:
    def one(_: Processes) -> tuple[int, int]:
        job = planned(tiny, quantization=kind, sharding=True, batch_size=4)
        engine = engine_of(job)
        batch = batch_maker(job.model, dataset.samples, job.config, job.way).step(0)
        with engine.prepared():
            engine.gradient(batch)
            parts = [each for each in gc.get_objects() if type(each) is sharding._Bytes]
            assert len(parts) == len(blocks_at_depth(tiny.components.denoiser, 1))
            own = sum(each.whole.to_local().untyped_storage().nbytes() for each in parts)
            return own, sum(each.whole.numel() for each in parts)

    found = processes_together(processes, one)
    blocks = blocks_at_depth(tiny.components.denoiser, 1)
    weights = sum(packed_bytes(layer, kind) for block in blocks for layer in packable_layers(block))
    assert {whole for _, whole in found} == {found[0][1]}
    assert weights <= found[0][1] <= 1.01 * weights
    for own, whole in found:
        assert whole / processes <= own <= whole / processes + 64 * len(blocks)


def packed_bytes(layer: Any, kind: str) -> int:
    return packed(layer.weight.detach(), kind, torch.float32).size_bytes


def test_all_processes_make_as_many_passes(tiny: Model, mixed: EncodedDataset) -> None:
    job = planned(tiny, batch_size=3, grad_accumulation_steps=3)
    counts = set()
    for step in range(8):
        for sharded in (False, True):
            made = []
            for rank in range(2):
                processes = Processes()
                processes.rank, processes.size = rank, 2
                way = replace(job.way, processes=processes, sharding=sharded)
                made.append(batch_maker(job.model, mixed.samples, job.config, way).step(step))
            draws = sorted(draw for batches in made for batch in batches for draw in batch.draws)
            assert draws == list(range(9 * step, 9 * step + 9))
            if sharded:
                assert len(made[0]) == len(made[1])
                padding = [batch for batches in made for batch in batches if not batch.draws]
                assert all(not batch.names and not batch.weights.any() for batch in padding)
                counts.add(len(padding))
    assert counts > {0}


def failing(
    monkeypatch: pytest.MonkeyPatch, rank: int, fail: Callable[[], Tensor], *, step: int = 1, module: str = "mid_block"
) -> None:
    """In one process, a block fails in the forward pass of a step, counted from 0."""
    whole = engines.sample_losses
    taken = []

    def losses(denoiser: Any, batch: Any, config: Any, way: Any) -> Tensor:
        taken.append(None)
        if len(taken) == step + 1 and way.processes.rank == rank:
            layer = denoiser.module.get_submodule(module)
            with torch.nn.modules.module.register_module_forward_pre_hook(
                lambda each, _: fail() if each is layer else None
            ):
                return whole(denoiser, batch, config, way)
        return whole(denoiser, batch, config, way)

    monkeypatch.setattr(engines, "sample_losses", losses)


def out_of_memory() -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def killed() -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "fail"), [(1, out_of_memory), (0, out_of_memory), (1, killed)])
def test_an_end_in_the_middle_of_a_pass_is_that_of_all(
    tiny: Model, dataset: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, fail: Any
) -> None:
    failing(monkeypatch, rank, fail)

    def one(_: Processes) -> None:
        trained(tiny, dataset, sharding=True, steps=4, output=tmp_path / "run")

    found = outcomes_together(2, one)
    if fail is killed:
        assert found.pop(rank) is None
    else:
        assert "ran out in process" in str(found[rank])
        assert str(found[rank]).startswith("memory must hold a step in each process of a sharded run")
        if rank:  # else the first one takes the store along, but it has said why itself
            assert f"process {rank}: memory must hold" in str(found[0])
    assert all(isinstance(error, TrainingError) for error in found)
    if rank == 0 and fail is killed:
        return  # who writes files is gone; the same command continues from the last run state
    assert "the LoRA of 1 step is at" in str(found[0])
    (saved,) = (tmp_path / "run").glob("*.safetensors")
    assert load_file(saved)


@pytest.mark.slow
def test_a_process_that_is_stopped_stops_all(tiny: Model, dataset: EncodedDataset, tmp_path: Path) -> None:
    """And the run goes on without sharding, and with it again, as if nothing had been."""

    def one(processes: Processes) -> tuple[Outcome, list[int]]:
        whole = trained(tiny, dataset, steps=6, sharding=True)
        steps = iter((False, processes.rank == 1))
        stopped = trained(
            tiny, dataset, steps=6, sharding=True, output=tmp_path / "run", cancelled=lambda: next(steps, False)
        )
        more = iter((False, True))
        longer = trained(tiny, dataset, steps=6, output=tmp_path / "run", cancelled=lambda: next(more, False))
        last = trained(tiny, dataset, steps=6, sharding=True, output=tmp_path / "run")
        assert_alike(whole, last)
        return last, [len(each[0]) for each in (stopped, longer, last)]

    for _, counts in processes_together(2, one):
        assert counts == [2, 4, 6]


def test_one_process_keeps_all_and_says_so(tiny: Model, dataset: EncodedDataset) -> None:
    job = planned(tiny, sharding=True)
    assert not job.way.sharding
    assert any(note.startswith("sharding has no effect in one process") for note in job.notes)


COMMAND = ["train", "photos", "--model", "lorasmith-tiny", "--steps", "4", "--batch-size", "2", "--optimizer", "SGD"]
COMMAND += ["--learning-rate", "0.05", "--no-previews", "--dtype", "fp32", "--seed", "1", "--validation-share", "0"]
LAUNCHER = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
LAUNCHER += ["--rdzv-endpoint", "localhost:0", "--max-restarts", "0", "-m", "lorasmith"]


def launched(folder: Path, *flags: str) -> dict[str, Tensor]:
    """The LoRA of a run in two processes, as the command line trains it."""
    (folder / "photos").mkdir(exist_ok=True)
    for index in range(4):
        Image.new("RGB", (64, 64), (60 * index, 120, 200)).save(folder / "photos" / f"{index}.png")
    name = "-".join(["run", *flags])
    command = [sys.executable, *LAUNCHER, *COMMAND, "--output", name, *flags]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode == 0, ran.stderr
    return load_file(folder / name / "photos.safetensors")


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert (found[name].float() - tensor.float()).norm() <= 2e-3 * (tensor.float().norm() + 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_weights(tmp_path: Path) -> None:
    plain = launched(tmp_path)
    for flags in ([], ["--gradient-checkpointing"], ["--activations", "host"]):
        assert_close(launched(tmp_path, "--sharding", *flags), plain)


@pytest.mark.slow
def test_one_plan_for_all(tiny: Model, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process with the least memory decides."""
    monkeypatch.setattr(memory_plan, "free_memory", lambda *_: 1 if current().rank else 1 << 40)

    def one(_: Processes) -> list[tuple[str, int]]:
        _, _, events = trained(tiny, dataset, activations="auto", sharding=True, steps=1)
        return [(event.activations, event.checkpoint_depth) for event in events if isinstance(event, Planned)]

    first, second = processes_together(2, one)
    assert first == second
    assert first[0][1] > 0
