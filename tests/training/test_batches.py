"""Batches: which samples, at which levels, with which noise, however they are cut into forward passes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lever_cases import resolved
from torch import Tensor

from lorasmith.core.processes import Processes
from lorasmith.core.random import keyed_normal
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.diffusion.schedule import FlowSchedule, quantile_map, uniform_numbers
from lorasmith.families.conditionings import collate
from lorasmith.families.model import Model
from lorasmith.training import batches as making
from lorasmith.training.batches import BatchMaker, no_masks, prefetched
from lorasmith.training.way import Way

CPU = torch.device("cpu")


def maker(
    dataset: EncodedDataset, tiny: Model, *, masks: Any = no_masks, repeatable: bool = True, **settings: Any
) -> BatchMaker:
    config = resolved(**({"batch_size": 4, "stratified": False} | settings))
    return BatchMaker(
        samples=dataset.samples,
        schedule=tiny.components.schedule,
        quantiles=quantile_map("uniform", None, tiny.components.schedule),
        join=functools.partial(collate, repeatable=repeatable),
        memory_format=torch.contiguous_format,
        config=config,
        way=Way.of(config, tiny.components.denoiser, CPU),
        masks=masks,
    )


@given(batch_size=st.integers(1, 9), accumulation=st.integers(1, 3), seed=st.integers(0, 2**64 - 1))
def test_every_sample_is_seen_once_before_any_is_seen_twice(
    dataset: EncodedDataset, tiny: Model, batch_size: int, accumulation: int, seed: int
) -> None:
    made = maker(dataset, tiny, batch_size=batch_size, grad_accumulation_steps=accumulation, seed=seed)
    drawn = [made.sample(draw).name for draw in range(4 * len(dataset))]
    for epoch in range(4):
        assert len(set(drawn[epoch * len(dataset) : (epoch + 1) * len(dataset)])) == len(dataset)


def test_draws_do_not_depend_on_how_they_are_batched(mixed: EncodedDataset, tiny: Model) -> None:
    def draws(**settings: Any) -> dict[tuple[str, float], torch.Tensor]:
        made = maker(mixed, tiny, **settings)
        found = {}
        for step in range(24 // made.per_step):
            for batch in made.step(step):
                for name, time, noised in zip(batch.names, batch.level.time, batch.noised, strict=True):
                    found[name, time.item()] = noised
        return found

    one, six = draws(batch_size=1), draws(batch_size=6, grad_accumulation_steps=2)
    assert one.keys() == six.keys()
    assert all(torch.equal(one[key], six[key]) for key in one)


def test_sizes_are_grouped_and_contexts_repeated(mixed: EncodedDataset, tiny: Model) -> None:
    batches = maker(mixed, tiny, batch_size=8).step(0)
    assert sorted(tuple(batch.clean.shape[2:]) for batch in batches) == [(8, 8), (8, 12)]
    assert sum(len(batch.names) for batch in batches) == 8


def test_captions_of_different_length_are_filled_up_and_masked_where_repeating_would_change_them(
    mixed: EncodedDataset, tiny: Model
) -> None:
    batches = maker(mixed, tiny, batch_size=8, repeatable=False).step(0)
    lengths = {sample.name: sample.conditioning.tensors["context"].shape[1] for sample in mixed.samples}
    assert len(batches) == 2
    for batch in batches:
        own = [lengths[name] for name in batch.names]
        assert batch.conditioning.tensors["context"].shape[1] == max(own)
        mask = batch.conditioning.mask
        assert (mask is None) == (len(set(own)) == 1)
        assert mask is None or mask.sum(1).tolist() == own


def drawn(made: BatchMaker, steps: range) -> dict[int, tuple[int, float, Tensor]]:
    """Each draw's sample, quantile and noised latents."""
    return {
        draw: (index, quantile, noised)
        for step in steps
        for batch in made.step(step)
        for draw, index, quantile, noised in zip(batch.draws, batch.indices, batch.quantiles, batch.noised, strict=True)
    }


@given(
    batch_size=st.integers(1, 7),
    accumulation=st.integers(1, 3),
    micro_batch=st.integers(1, 7),
    step=st.integers(0, 5),
    stratified=st.booleans(),
)
def test_a_step_in_smaller_pieces_has_the_same_draws(
    mixed: EncodedDataset,
    tiny: Model,
    batch_size: int,
    accumulation: int,
    micro_batch: int,
    step: int,
    stratified: bool,
) -> None:
    settings = {"batch_size": batch_size, "grad_accumulation_steps": accumulation, "stratified": stratified}
    made = maker(mixed, tiny, noise_offset=0.1, **settings)
    small = replace(made, way=replace(made.way, micro_batch=min(micro_batch, batch_size)))
    whole, pieces = drawn(made, range(step, step + 1)), drawn(small, range(step, step + 1))

    assert sorted(pieces) == list(range(step * made.per_step, (step + 1) * made.per_step))
    assert max(len(batch.names) for batch in small.step(step)) <= min(micro_batch, batch_size)
    assert whole.keys() == pieces.keys()
    for draw, (index, quantile, noised) in whole.items():
        assert pieces[draw][:2] == (index, quantile)
        assert torch.equal(pieces[draw][2], noised)


def test_batches_know_their_draws_samples_and_quantiles(mixed: EncodedDataset, tiny: Model) -> None:
    made = maker(mixed, tiny, batch_size=8, stratified=True)
    for batch in made.step(3):
        assert batch.names == tuple(mixed.samples[index].name for index in batch.indices)
        assert batch.names == tuple(made.sample(draw).name for draw in batch.draws)
        assert torch.equal(batch.level.time, made.schedule.at(torch.tensor(batch.quantiles)).time)
        uniform = uniform_numbers(batch.draws, seed=0, stratified=True)
        assert torch.equal(torch.tensor(batch.quantiles), uniform)


def test_each_size_has_the_shift_that_suits_it(mixed: EncodedDataset, tiny: Model) -> None:
    schedule = FlowSchedule(3.0)
    made = replace(
        maker(mixed, tiny, batch_size=8), schedule=schedule, quantiles=quantile_map("shifted", None, schedule)
    )
    for batch in made.step(0):
        u = uniform_numbers(batch.draws, seed=0, stratified=False)
        shift = tiny.components.schedule.resolution_shift(*batch.clean.shape[-2:])
        torch.testing.assert_close(batch.level.sigma, shift * u / (1 + (shift - 1) * u))
    assert len({tiny.components.schedule.resolution_shift(*batch.clean.shape[-2:]) for batch in made.step(0)}) == 2


def test_offset_noise_is_one_value_for_each_channel_of_a_draw(dataset: EncodedDataset, tiny: Model) -> None:
    [plain] = maker(dataset, tiny).step(2)
    [offset] = maker(dataset, tiny, noise_offset=0.25).step(2)
    added = (offset.noise - plain.noise) / 0.25

    for draw, one in zip(offset.draws, added, strict=True):
        expected = keyed_normal((4, 1, 1), 0, "noise offset", draw)
        torch.testing.assert_close(one, expected.expand_as(one), rtol=0, atol=1e-5)
    assert added.mean((2, 3)).unique().numel() == 16
    torch.testing.assert_close(offset.noised, offset.level.noised(offset.clean, offset.noise))
    assert torch.equal(offset.clean, plain.clean)


def test_a_perturbation_is_in_the_input_alone(dataset: EncodedDataset, tiny: Model) -> None:
    [plain], [perturbed] = (maker(dataset, tiny, input_perturbation=one).step(2) for one in (0.0, 0.2))
    assert torch.equal(plain.noise, perturbed.noise)
    added = (perturbed.noised - plain.noised) / perturbed.level.sigma.reshape(-1, 1, 1, 1) / 0.2
    expected = torch.stack([keyed_normal((4, 8, 8), 0, "perturbation", draw) for draw in plain.draws])
    torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-3)


def test_pyramid_noise_is_coarser_and_as_strong(dataset: EncodedDataset, tiny: Model) -> None:
    [plain], [pyramid] = (maker(dataset, tiny, pyramid_noise=one).step(2) for one in (0.0, 0.6))
    assert torch.equal(plain.clean, pyramid.clean)
    for one, other in zip(plain.noise, pyramid.noise, strict=True):
        assert float(other.std()) == pytest.approx(1.0, abs=1e-5)
        means = [noise.reshape(4, 4, 2, 4, 2).mean((2, 4)).std() for noise in (one, other)]
        assert means[1] > 1.2 * means[0]


def test_coarse_noise_is_drawn_by_seed_and_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "keyed_uniform", lambda *key: 0.0)  # of which sizes are drawn
    drawn = [making._pyramid(torch.ones(1, 8, 8), 0.5, seed, draw) for seed, draw in ((1, 0), (2, 0), (1, 1))]
    assert not any(torch.allclose(one, other) for one, other in itertools.combinations(drawn, 2))


@pytest.mark.parametrize("steps", [range(5), range(3, 7), range(4, 5), range(4, 4)])
def test_prefetching_gives_every_step_in_order_from_any(dataset: EncodedDataset, tiny: Model, steps: range) -> None:
    made = maker(dataset, tiny)
    got = list(prefetched(made, steps))

    assert [step for step, _ in got] == list(steps)
    for step, batches in got:
        assert torch.equal(batches[0].noised, made.step(step)[0].noised)
    assert not threads()


def test_a_run_that_stops_early_or_cannot_make_a_batch_leaves_no_thread(dataset: EncodedDataset, tiny: Model) -> None:
    def masks(draws: Any, share: Any) -> None:
        if 8 in draws:
            raise MemoryError("no room for a mask")

    got = []
    with pytest.raises(MemoryError, match="no room for a mask"):
        for step, _ in prefetched(maker(dataset, tiny, masks=masks), range(5)):
            got.append(step)
    assert got == [0, 1]
    assert not threads()
    with contextlib.closing(prefetched(maker(dataset, tiny), range(100))) as coming:
        assert next(coming)[0] == 0 and threads()
    assert not threads()


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("lorasmith-batches")]


class OneOfTwo(Processes):
    rank, size = 1, 2


def test_a_process_draws_only_captions_of_its_share(
    mixed: EncodedDataset, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = maker(mixed, tiny)
    together = replace(alone, way=replace(alone.way, processes=OneOfTwo()))
    drawn, original = [], Sample.drawn
    monkeypatch.setattr(Sample, "drawn", lambda one, seed, draw: (drawn.append(draw), original(one, seed, draw))[1])
    batches, facts = together.step(1), together.drawn(1)
    share = [draw for batch in batches for draw in batch.draws]
    assert sorted(drawn) == sorted(share) and len(share) == 2
    whole = {fact for batch in alone.step(1) for fact in zip(batch.names, batch.indices, batch.quantiles, strict=True)}
    assert set(facts or ()) == whole
