"""Too many steps on too few images: noticed, stopped, and the best LoRA is what comes out."""

from __future__ import annotations

import pytest
import torch

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.dataset import EncodedDataset, split
from lorasmith.data.encoding import load_dataset
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.training.events import Event, Validated
from lorasmith.training.validation import Validator


@pytest.mark.slow
def test_an_overfit_run_is_called_so_and_stopped_and_its_best_lora_is_kept(tiny: Model) -> None:
    data = EncodedDataset(load_dataset(BUILT_IN_BASE / "input" / "high-contrast", tiny).samples[:8])
    seen: list[Validated] = []

    def listen(event: Event) -> None:
        if isinstance(event, Validated):
            seen.append(event)

    result = train(
        tiny,
        data,
        steps=300,
        validate_every=20,
        patience=5,
        validation_share=0.25,
        batch_size=2,
        rank=16,
        learning_rate=2e-3,
        targets="all",
        training_dtype="fp32",
        lora_dtype="fp32",
        device="cpu",
        on_event=listen,
    )
    best, last = min(seen, key=lambda event: event.loss), seen[-1]
    assert (result.reason, result.steps) == ("stopped", best.step)
    assert last.step == best.step + 100 < 300
    assert last.loss > 1.1 * best.loss
    assert best.loss < 0.75 * best.base_loss
    for verdict in (last.verdict, result.verdict):
        assert verdict == f"best at step {best.step}, overfitting since (on 2 held-out images alone)"
    held_out = split(data, share=0.25).held_out
    assert held_out is not None
    losses = Validator(
        tiny.denoiser, held_out.samples, draws=8, batch_size=4, device=torch.device("cpu"), dtype=torch.float32
    )
    assert abs(losses().mean().item() - best.base_loss) < 1e-4
    with result.lora.applied_to(tiny.denoiser).active():
        assert abs(losses().mean().item() - best.loss) < 1e-3
