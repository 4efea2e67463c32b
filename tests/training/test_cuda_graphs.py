"""CUDA graphs: replayed passes give the losses and weights of passes without them, to the bit."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lever_cases import VARIANTS
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lorasmith.core.errors import TrainingError
from lorasmith.core.quantization import PACKINGS
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset
from lorasmith.families.model import Model
from lorasmith.training import cuda_graphs, engine
from lorasmith.training.batches import Batch
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import batch_maker
from lorasmith.training.events import Event, Warned
from lorasmith.training.job import TrainJob, engine_of, plan_job
from lorasmith.training.loop import Loop
from lorasmith.training.methods.weight_change import WeightChange
from lorasmith.training.trainable import Trainable
from tests.covering import slow_except
from tests.cuda.cases import FAMILIES, samples_of, small_model
from tests.cuda.tape import Tape, graphs_on_tape

SETTINGS: dict[str, Any] = {
    "rank": 4, "training_dtype": "fp32", "learning_rate": 1e-3, "targets": "attention", "batch_size": 2,
    "grad_accumulation_steps": 2, "max_grad_norm": 1.0,
}  # fmt: skip

LEVERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"training_dtype": "bf16", "exact_dtype": True},
    "averages": {"ema_decay": 0.9, "optimizer": "Prodigy", "learning_rate": 1.0},
    "checkpointing": {"gradient_checkpointing": True},
    "lean": {"activations": "lean"},
    "selective": {"activations": "selective"},
    "x0": {"objective": "x0", "loss_weighting": "min_snr", "loss_function": "PseudoHuber", "huber_schedule": "snr"},
    "preserve": {"preserve": "class", "preserve_class": "animal"},
    "slider": {"slider_positive": "a cat", "slider_negative": "a dog", "slider_anchors": "a tree"},
    "pairs": {"pairs": "slider", "pair_focus": 0.5},
    "dpo": {"pairs": "dpo"},
    "penalty": {"weight_change": 0.1},
    **VARIANTS,
    **{kind: {"quantization": kind} for kind in PACKINGS if kind != "none"},
}


def planned(model: Model | Trainable, *, graphs: bool, **settings: Any) -> TrainJob:
    given = model.denoiser if isinstance(model, Model) else model
    job = plan_job(given, TrainConfig(**{**SETTINGS, **settings}), torch.device("cpu"))
    return replace(job, way=replace(job.way, cuda_graphs=graphs))  # which it leaves out on the CPU


def stepped(
    model: Model | Trainable, data: Any, *, graphs: bool, steps: int = 2, **settings: Any
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What updates returned, and the state after them."""
    job = planned(model, graphs=graphs, **settings)
    ours = engine_of(job)
    maker = batch_maker(job.model, data, job.config, job.way, ours.rank_masks)
    with ours.prepared():
        found = [ours.update(step, *ours.gradient(maker.step(step))) for step in range(steps)]
    return found, ours.state()[0]


def assert_replayed(model: Model | Trainable, data: Any, **settings: Any) -> list[Tape]:
    expected = stepped(model, data, graphs=False, **settings)
    with graphs_on_tape() as tapes:
        found = stepped(model, data, graphs=True, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(tape.replays > 1 for tape in tapes)
    return tapes


@pytest.fixture(scope="session")
def texts(tiny: Model, dataset: EncodedDataset) -> EncodedDataset:
    """Samples with the encoder of further texts."""
    return EncodedDataset(dataset.samples, EncodedCaptions(tiny.text_encoder.encode), trigger="cat")


@pytest.mark.usefixtures("small_is_worth_it")
@pytest.mark.parametrize("lever", slow_except(LEVERS, "dropout"))
def test_replayed_steps_are_those_without_graphs(tiny: Model, texts: EncodedDataset, lever: str) -> None:
    data = texts
    if "pairs" in LEVERS[lever]:
        pairs = [replace(one, opposite=one.latents.flip(-1)) for one in texts.samples]
        data = replace(texts, samples=tuple(pairs))
    (tape,) = assert_replayed(tiny, data, **LEVERS[lever])
    assert tape.replays == 3  # of four batches


@pytest.mark.slow
@pytest.mark.parametrize("captions", ["plain", "masked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_of_every_family(family: str, captions: str, tmp_path: Path) -> None:
    data = samples_of(small_model(family, tmp_path), 2, is_masked=captions == "masked")
    settings = {"targets": "all", "batch_size": 1}
    assert assert_replayed(small_model(family, tmp_path), data, steps=4, **settings)


@pytest.mark.slow
def test_replayed_steps_with_token_routing(tmp_path: Path) -> None:
    data = samples_of(small_model("flux1", tmp_path), 2, is_masked=True)
    settings = {"batch_size": 1, "tread_rate": 0.5, "tread_first": 1, "tread_last": 1}
    assert assert_replayed(small_model("flux1", tmp_path), data, **settings)


FEW: dict[str, Any] = {"targets": "*.attn2.to_q", "grad_accumulation_steps": 1}


def test_nodes_of_a_penalty_are_gone_before_a_pass(
    hand_made: Trainable, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, plain, penalty = list[weakref.ref[Tensor]](), engine.sample_losses, WeightChange.penalty

    def noted(*given: Any) -> Tensor:
        alive.append(weakref.ref(result := penalty(*given)))
        return result

    def checked(*given: Any) -> Tensor:
        assert alive.pop()() is None
        return plain(*given)

    monkeypatch.setattr(WeightChange, "penalty", noted)
    monkeypatch.setattr(engine, "sample_losses", checked)
    stepped(hand_made, dataset, graphs=False, weight_change=0.1, **FEW)


def test_each_shape_has_a_graph(hand_made: Trainable, mixed: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_MOST", 2)
    shapes = {(one.latents.shape, one.conditioning.tensors["context"].shape): one for one in mixed.samples}
    data = EncodedDataset(tuple(shapes.values()))
    assert len(data.samples) == 3
    assert (
        len(assert_replayed(hand_made, data, steps=9, **FEW | {"batch_size": 1})) == 2
    )  # the third is computed without


def run_twice(hand_made: Trainable, dataset: EncodedDataset, prepare: Callable[[], None] = lambda: None) -> list[str]:
    """Warnings of a run with graphs, which has the losses of one without."""
    loops, heard = [], list[Event]()
    for graphs in (False, True):
        job = planned(hand_made, graphs=graphs, steps=3, **FEW)
        loops.append(Loop(engine_of(job), dataset, on_event=heard.append))
        with graphs_on_tape():
            if graphs:
                prepare()
            loops[-1].run()
    assert loops[0].losses == loops[1].losses
    return [event.message for event in heard if isinstance(event, Warned)]


def test_a_value_of_a_batch_in_a_capture_is_found(
    hand_made: Trainable, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = engine.sample_losses

    def of_the_host(model: Trainable, batch: Batch, *given: Any) -> Tensor:
        return plain(model, batch, *given) * (1 + batch.draws[0])

    monkeypatch.setattr(engine, "sample_losses", of_the_host)
    (warning,) = run_twice(hand_made, dataset)
    assert re.fullmatch(
        "cuda_graphs needs a pass that the GPU repeats alone, but that of hand-made has another gradient when it "
        r"is replayed, by 0\.\d+ of its norm; step 2 is repeated and the run continues without\.",
        warning,
    )


def test_a_pass_that_asks_the_host_is_not_captured(
    hand_made: Trainable, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "_refusal", lambda *_: "reads a value")
    (warning,) = run_twice(hand_made, dataset, lambda: monkeypatch.setattr(torch.cuda, "graph", failing("a capture")))
    assert "hand-made reads a value; step 2 is repeated" in warning


def failing(text: str) -> Any:
    def graph(*_: Any, **__: Any) -> Any:
        raise RuntimeError(text)

    return graph


def test_a_capture_that_fails_ends_the_run(
    hand_made: Trainable, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        graphs_on_tape(),
        pytest.raises(TrainingError, match=r"cuda_graphs needs a step that CUDA can capture") as error,
    ):
        monkeypatch.setattr(torch.cuda, "graph", failing("CUDA error: operation not permitted\nCUDA kernel errors ..."))
        stepped(hand_made, dataset, graphs=True, **FEW)
    assert "(CUDA error: operation not permitted)" in str(error.value)


def test_where_memory_runs_out_the_run_continues_without(
    hand_made: Trainable, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = failing("CUDA out of memory. Tried to allocate 2.00 GiB.")
    warnings = run_twice(hand_made, dataset, lambda: monkeypatch.setattr(torch.cuda, "graph", fails))
    assert warnings == ["Memory ran out at step 2: it is repeated without CUDA graphs."]


def test_what_a_graph_reads_stays_alive_and_what_it_makes_does_not() -> None:
    table, noise = torch.ones(2), torch.ones(1)
    with (reads := cuda_graphs._Reads([noise])):
        made = table[:1] * 2 + noise
        made += table.sum()
    seen = [StorageWeakRef(one.untyped_storage()) for one in (table, noise, made)]
    del table, noise, made
    assert [one.expired() for one in seen] == [False, True, True]
    assert not reads.refusal


def test_elsewhere_it_has_no_effect(tiny: Model) -> None:
    job = plan_job(tiny.denoiser, TrainConfig(cuda_graphs=True, **SETTINGS), torch.device("cpu"))
    assert not job.way.cuda_graphs
    assert any(note.startswith("cuda_graphs has no effect here") for note in job.notes)
