"""Runs with token routing: which tokens are dropped, and that everything else of a run keeps its meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lever_cases import flux_dataset, flux_model, one_step, planned, rounded
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lorasmith.core.errors import OptionError
from lorasmith.core.processes import Processes
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset, Sample
from lorasmith.families.conditionings import FIRST_FRAME, Conditioning
from lorasmith.families.forms import Routing
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.runs.memory_estimate import estimate_of
from lorasmith.runs.trainer import Trainer
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import batch_maker, prediction_of
from lorasmith.training.job import engine_of
from lorasmith.training.joint import check_alike
from lorasmith.training.memory import compilation
from lorasmith.training.memory.memory_plan import measured_plans
from lorasmith.training.token_routes import TokenRoutes
from lorasmith.training.trainable import Trainable
from tests.training.processes_together import processes_together

TREAD: dict[str, Any] = {"tread_rate": 0.5, "tread_first": 1, "tread_last": -2}
"""Of the four blocks of the small Flux.1: from the second double block to the first single one."""

RUN: dict[str, Any] = {
    **TREAD,
    "steps": 4,
    "rank": 4,
    "batch_size": 2,
    "training_dtype": "fp32",
    "lora_dtype": "fp32",
    "learning_rate": 1e-2,
    "validation_share": 0.0,
}


@pytest.fixture(scope="module")
def data() -> EncodedDataset:
    return flux_dataset()


def routes(rate: float = 0.5) -> TokenRoutes:
    return TokenRoutes(Routing(blocks={}), rate, 2, 5, seed=7)


def sample(frames: int = 1, **given: Any) -> Sample:
    tensors = {"context": torch.zeros(1, 2, 4), **given.pop("tensors", {})}
    return Sample(torch.randn(16, frames, 8, 12), Conditioning(tensors), "a", **given)


def kept_of(one: TokenRoutes, given: Sample, draw: int = 3) -> Tensor:
    found = one.route([given], [draw])
    assert found is not None
    return torch.zeros(found.tokens, dtype=torch.bool).scatter(0, found.kept[0], True)


def test_a_draw_keeps_its_tokens_in_any_batch() -> None:
    samples = [sample()] * 3
    together = routes(0.3).route(samples, [4, 5, 6])
    assert together is not None and (together.tokens, together.first, together.last) == (24, 2, 5)
    assert together.kept.shape == (3, 24 - 7)  # as many are dropped as make the share at most
    for row, draw in enumerate((4, 5, 6)):
        alone = routes(0.3).route(samples[:1], [draw])
        assert alone is not None and torch.equal(alone.kept[0], together.kept[row])
        assert (together.kept[row].diff() > 0).all()
    assert not torch.equal(together.kept[0], together.kept[1])
    counts = torch.stack([kept_of(routes(0.25), samples[0], draw) for draw in range(2000)]).float().mean(0)
    assert (counts - 0.75).abs().max() < 0.05
    assert routes(0.04).route(samples, [4, 5, 6]) is None


def test_masks_and_given_frames_are_kept_before_all_others() -> None:
    places = torch.full((8, 12), 0.1)
    places[2:5, 3:8] = 1.0  # the tokens that it touches: rows 1 and 2, columns 1 to 3
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[1:3, 1:4] = True
    for draw in range(20):
        assert kept_of(routes(0.5), sample(places=places), draw)[inside.flatten()].all()
    few = kept_of(routes(0.9), sample(places=places))
    assert int(few.sum()) == 3 and few[inside.flatten()].sum() == 3
    clip = sample(4, tensors={FIRST_FRAME: torch.zeros(1, 16, 2, 8, 12)})
    for draw in range(20):
        assert kept_of(routes(0.5), clip, draw)[:48].all()


def test_dropped_tokens_skip_the_blocks_bit_for_bit(flux: Model, data: EncodedDataset) -> None:
    job = planned(flux, **TREAD)
    engine = engine_of(job)
    (batch,) = batch_maker(job.model, data, job.config, job.way).step(0)
    network: Any = job.model.module
    seen: dict[str, Tensor] = {}

    def note(name: str, states: Tensor) -> None:
        seen[name] = states.detach()

    def noted(block: nn.Module, before: str, after: str) -> Iterator[Any]:
        yield block.register_forward_pre_hook(
            lambda _, __, given: note(before, given["hidden_states"]), with_kwargs=True
        )
        yield block.register_forward_hook(lambda _, __, result: note(after, result[1]))

    handles = [
        *noted(network.transformer_blocks[1], "first", "second"),
        *noted(network.single_transformer_blocks[0], "third", "fourth"),
    ]
    try:
        with engine.prepared():
            prediction_of(job.model, batch, job.way)
    finally:
        for handle in handles:
            handle.remove()
    assert batch.route is not None
    dropped = torch.ones(2, 16, dtype=torch.bool).scatter(1, batch.route.kept, False)
    assert seen["second"].shape[1] == seen["third"].shape[1] == 8
    assert torch.equal(seen["fourth"][dropped], seen["first"][dropped])
    assert not (seen["fourth"][~dropped] == seen["first"][~dropped]).all(1).any()


def test_a_share_below_a_token_is_the_plain_step(flux: Model, data: EncodedDataset) -> None:
    plain, none = one_step(flux, data), one_step(flux, data, **{**TREAD, "tread_rate": 0.05})
    assert all(torch.equal(none[name], tensor) for name, tensor in plain.items())
    assert not torch.equal(one_step(flux, data, **TREAD)["loss"], plain["loss"])


LEVERS: dict[str, dict[str, Any]] = {
    "blocks recomputed": {"checkpoint_depth": 1},
    "inner blocks recomputed": {"checkpoint_depth": 2},
    "lean": {"activations": "lean"},
    "selective": {"activations": "selective"},
    "host": {"activations": "host"},
    "offloading": {"offloading": True},
    "int8": {"quantization": "int8"},
}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("lever", LEVERS)
def test_levers_of_memory_keep_the_numbers(
    flux: Model, data: EncodedDataset, small_is_worth_it: None, lever: str
) -> None:
    changes = LEVERS[lever]
    with rounded(flux.components.denoiser, changes.get("quantization", "int8")):
        expected = one_step(flux, data, targets="all-linear", **TREAD)
        found = one_step(flux, data, changes, targets="all-linear", **TREAD)
    assert found.keys() == expected.keys()
    assert all(tensor.any() for name, tensor in found.items() if "transformer_blocks" in name)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * max(1.0, float(tensor.abs().max())))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_compiled_blocks_are_one_graph_of_a_kind_and_number_of_tokens(
    flux: Model, data: EncodedDataset, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    settings = {**TREAD, "batch_size": batch_size}
    expected = one_step(flux, data, **settings)
    found = one_step(flux, data, {"compile": True}, **settings)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * max(1.0, float(tensor.abs().max())))
    assert counters["stats"]["unique_graphs"] == 4  # double and single blocks, of all tokens and of those that are kept
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    "variant", [{}, {"algorithm": "LoKr"}, {"algorithm": "OFT"}, {"dora": "input"}, {"rank_dropout": 0.3}]
)
def test_micro_batches_have_the_routes_of_a_batch(flux: Model, data: EncodedDataset, variant: dict[str, Any]) -> None:
    given = {**RUN, "steps": 1, **variant}
    together = train(flux, data, **{**given, "batch_size": 4})
    apart = train(flux, data, **{**given, "batch_size": 1, "grad_accumulation_steps": 4})
    assert together.losses == pytest.approx(apart.losses, rel=1e-4)


@pytest.mark.parametrize("sharding", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_are_one(flux: Model, data: EncodedDataset, sharding: bool) -> None:
    def losses(processes: Processes | None) -> list[float]:
        is_sharded = sharding and processes is not None
        return train(flux, data, **{**RUN, "optimizer": "SGD", "sharding": is_sharded}).losses

    alone = losses(None)
    for found in processes_together(2, losses):
        assert found == pytest.approx(alone, rel=1e-5)


def test_validation_and_previews_have_all_tokens(flux: Model, data: EncodedDataset) -> None:
    given = {**RUN, "steps": 1, "validation_share": 0.5, "learning_rate": 1e-7}
    routed = train(flux, data, **given).validations
    plain = train(flux, data, **{**given, "tread_rate": 0.0}).validations
    assert [loss for _, loss in routed] == pytest.approx([loss for _, loss in plain], rel=1e-4)


def test_the_frozen_model_of_a_method_has_the_route_of_the_trained_one(flux: Model, data: EncodedDataset) -> None:
    """So that a fresh LoRA has nothing to preserve."""
    samples = tuple(replace(one, conditioning=replace(one.conditioning, text=one.name)) for one in data.samples)
    texts = EncodedDataset(samples, EncodedCaptions(lambda text: replace(samples[0].conditioning, text=text)))
    losses = {}
    for preserve in ("none", "blank"):
        job = planned(flux, preserve=preserve, preserve_weight=1000.0, **TREAD)
        engine = engine_of(job)
        with engine.prepared():
            engine.gradient(batch_maker(job.model, texts, job.config, job.way).step(0))
        losses[preserve] = engine.flat.grad.clone()
    assert torch.equal(losses["none"], losses["blank"])


def test_plans_of_memory_count_fewer_tokens(flux: Model, data: EncodedDataset) -> None:
    def needed(**settings: Any) -> int:
        job = planned(flux, **settings)
        with engine_of(job).prepared():
            return next(measured_plans(job.model, data.samples, job.config, job.way, 0)).needed_bytes

    assert needed(**TREAD) < needed()


def test_a_run_is_planned_without_weights(tmp_path: Path) -> None:
    def needed(**settings: Any) -> int:
        model = flux_model(tmp_path)  # which is moved to the meta device
        found = estimate_of(model, TrainConfig(batch_size=2, **settings), card_bytes=2**34, resolution=256)
        return found.plans[0].needed_bytes

    assert needed(**TREAD) < needed()


def test_refusals_and_settings_without_effect(flux: Model) -> None:
    with pytest.raises(OptionError, match=r"tread_rate is for the transformers .* got Linear; leave it out"):
        Trainer(Trainable(nn.Linear(2, 2)), flux_dataset(), tread_rate=0.2)
    for first, last in ((2, 1), (0, 4), (-5, 3)):
        with pytest.raises(OptionError, match=rf"two of the 4 blocks of .* got {first} and {last}; choose from 0 to 3"):
            planned(flux, tread_rate=0.2, tread_first=first, tread_last=last)
    with pytest.raises(OptionError, match=r"take plain steps, got tread_rate"):
        check_alike([planned(flux), planned(flux, **TREAD)])
    notes = planned(flux, tread_first=1, tread_last=2).notes
    assert "tread_first 1 has no effect without tread_rate." in notes
    assert "tread_last 2 has no effect without tread_rate." in notes
