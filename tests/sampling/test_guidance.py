from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.families.conditionings import Conditioning
from lorasmith.sampling.sample import guided


def prompt(*values: float, tokens: int = 1) -> Conditioning:
    """One conditioning whose context holds a value for each sample."""
    return Conditioning({"context": torch.tensor(values).reshape(-1, 1, 1).repeat(1, tokens, 1)})


class Network:
    """Answers the context's value and keeps count of what it was asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        self.batches.append(len(latents))
        context = conditioning.tensors["context"]
        assert len(latents) == len(time) == len(context)
        return latents * 0 + context.mean((1, 2)).reshape(-1, 1) + time.reshape(-1, 1)


def predict(
    network: Network, positive: list[Conditioning], negative: list[Conditioning], cfg: float, batch: int = 2
) -> Tensor:
    prediction = guided(network, positive=positive, negative=negative, cfg=cfg, batch=batch)
    result, lacking = prediction(torch.ones(batch, 3), torch.zeros(batch), 0.5)
    assert not lacking
    return result[:, 0]


def test_guidance_is_negative_plus_scaled_difference_in_one_forward() -> None:
    network = Network()
    result = predict(network, [prompt(5.0)], [prompt(1.0)], cfg=3.0)

    torch.testing.assert_close(result, torch.tensor([13.0, 13.0]))
    assert network.batches == [4]


def test_without_guidance_the_negative_is_never_computed() -> None:
    network = Network()
    result = predict(network, [prompt(5.0)], [], cfg=1.0)

    torch.testing.assert_close(result, torch.tensor([5.0, 5.0]))
    assert network.batches == [2]


def test_several_conditionings_of_a_side_are_averaged() -> None:
    result = predict(Network(), [prompt(2.0), prompt(4.0)], [prompt(0.0), prompt(1.0), prompt(2.0)], cfg=2.0)

    torch.testing.assert_close(result, torch.tensor([5.0, 5.0]))  # 1 + 2 · (3 − 1)


def test_contexts_of_different_length_run_apart() -> None:
    network = Network()
    result = predict(network, [prompt(5.0, tokens=2)], [prompt(1.0)], cfg=3.0)

    torch.testing.assert_close(result, torch.tensor([13.0, 13.0]))
    assert network.batches == [2, 2]


def test_each_latent_meets_its_own_conditioning_and_short_batches_repeat() -> None:
    torch.testing.assert_close(
        predict(Network(), [prompt(1.0, 2.0)], [], cfg=1.0, batch=5), torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    )
    torch.testing.assert_close(predict(Network(), [prompt(1.0, 2.0, 3.0)], [], cfg=1.0), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(("positive", "negative", "side"), [(0, 1, "positive"), (1, 0, "negative")])
def test_a_missing_side_is_refused(positive: int, negative: int, side: str) -> None:
    with pytest.raises(OptionError, match=f"at least one {side} conditioning"):
        predict(Network(), [prompt(1.0)] * positive, [prompt(1.0)] * negative, cfg=2.0)


def test_conditionings_count_within_their_spans() -> None:
    network = Network()
    early, late = replace(prompt(2.0), span=(0.0, 0.5)), replace(prompt(4.0), span=(0.5, 1.0))
    guide = guided(
        network,
        positive=[early, late],
        negative=[prompt(1.0)],
        cfg=3.0,
        batch=1,
        sigma_at=lambda progress: 1 - progress,
    )

    def at(sigma: float) -> tuple[float, float]:
        total, lacking = guide(torch.ones(1, 3), torch.zeros(1), sigma)
        return total[0, 0].item(), lacking

    assert at(0.9) == (4.0, 0)  # 1 + 3 · (2 − 1)
    assert at(0.1) == (10.0, 0)
    assert at(0.5) == (7.0, 0)  # both, averaged
    assert network.batches == [2, 2, 3]


def test_a_side_out_of_its_span_is_lacking() -> None:
    late = replace(prompt(1.0), span=(0.5, 1.0))
    guide = guided(
        Network(), positive=[prompt(5.0)], negative=[late], cfg=3.0, batch=1, sigma_at=lambda progress: 1 - progress
    )
    total, lacking = guide(torch.ones(1, 3), torch.zeros(1), 0.9)
    assert total[0, 0].item() == 15.0
    assert lacking == -2.0
