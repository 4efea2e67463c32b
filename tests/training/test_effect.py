"""A LoRA that does nothing is named while it is trained, and in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from lorasmith.training import engine
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, StepDone, Warned
from lorasmith.training.job import plan_job
from lorasmith.training.results import TrainResult

Run = Callable[..., TrainResult]


@pytest.fixture
def run(quick_run: Run) -> Run:
    return quick_run


def named(run: Run, dataset: EncodedDataset, **settings: Any) -> list[tuple[int, str]]:
    """The warnings about no effect, each with the steps taken before it."""
    events: list[Event] = []
    run(dataset, on_event=events.append, **{"steps": 8, "learning_rate": 1e-7, **settings})
    taken = [sum(isinstance(one, StepDone) for one in events[:index]) for index in range(len(events))]
    return [
        (step, one.message)
        for step, one in zip(taken, events, strict=True)
        if isinstance(one, Warned) and "LoRA does" in one.message
    ]


def test_a_tiny_rate_is_named_after_a_quarter_and_at_the_end(
    run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (early, first), (end, last) = named(run, dataset)
    assert (early, end) == (2, 8)
    assert first.startswith("The LoRA does next to nothing after 2 steps: it changes no weight by more than ")
    assert last.startswith("The LoRA does nothing: it changes no weight by more than ")
    assert "at a learning rate above 1e-07" in first and "at a learning rate above 1e-07" in last
    assert named(run, dataset, steps=4, learning_rate=1e-3) == []
    assert named(run, dataset, learning_rate=3e-4, schedule="cosine", warmup_steps=7) == []
    original = engine.sample_losses
    monkeypatch.setattr(engine, "sample_losses", lambda *given: original(*given) * 0)
    assert "no gradient reached one; look at masks" in named(run, dataset, steps=2)[-1][1]


@pytest.mark.slow_after(3)
@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "LoKr", "rank": 4},
        {"algorithm": "OFT", "rank": 4},
        {"dora": "output"},
        {"quantization": "nf4"},
        {"differences": "norms"},
        {"train_text_encoder": True},
    ],
    ids=str,
)
def test_every_kind_of_layer_is_compared(built_in_run: Run, dataset: EncodedDataset, settings: dict[str, Any]) -> None:
    assert [step for step, _ in named(built_in_run, dataset, steps=2, **settings)] == [1, 2]


def test_targets_that_match_few_layers_are_named(tiny: Model) -> None:
    def few(targets: str) -> list[str]:
        notes = plan_job(tiny.denoiser, TrainConfig(rank=2, targets=targets), "cpu").notes
        return [one for one in notes if one.startswith("targets match")]

    (note,) = few("mid_block.attentions.0.proj_in")
    assert "such as mid_block.attentions.0.proj_in, by which a LoRA can change little" in note
    assert few("*.attn2.to_q") == []
