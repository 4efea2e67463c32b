"""The model of a step over several processes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bases import MODELS
from benchmarks.together import Costs, _forward_flops, step_seconds, sum_seconds, waiting_seconds
from lorasmith.bench.measure import Counter, synthetic_samples


def test_a_sum_moves_the_bytes_of_a_ring() -> None:
    assert sum_seconds(1000, 1, 1.0) == 0
    assert sum_seconds(1000, 2, 4.0) == 1000
    assert sum_seconds(1000, 4, 4.0) == 1500


def test_buckets_hide_behind_the_backward_pass_but_the_last() -> None:
    assert waiting_seconds(6.0, 100.0, 1) == 6.0
    assert waiting_seconds(6.0, 100.0, 3) == 2.0
    assert waiting_seconds(6.0, 3.0, 3) == 4.0


def test_a_step_has_the_samples_of_one_process() -> None:
    costs = Costs(sample=2.0, backward=1.0, update=0.5, parameters=1, buckets=1)
    assert step_seconds(costs, 8, 1, 99.0) == 16.5
    assert step_seconds(costs, 8, 3, 4.0) == 6 + 0.5 + 4


@pytest.mark.slow
def test_flops_on_paper_are_those_of_a_forward_pass() -> None:
    cpu, dtype = torch.device("cpu"), torch.float32
    model = MODELS["sdxl-tiny"].make(dtype, cpu)
    (sample,) = synthetic_samples(model, 1, 128, 128)
    with Counter(cpu) as counter, torch.no_grad():
        model.denoiser.predict(sample.latents[None], torch.ones(1), sample.conditioning)
    on_paper = _forward_flops(MODELS["sdxl-tiny"].make(torch.bfloat16, torch.device("meta")))
    assert on_paper == pytest.approx(counter.flops, rel=0.01)
