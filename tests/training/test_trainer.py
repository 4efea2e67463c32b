"""The loop in one's hands: the numbers of a run, its gradients and weights, states, and what it refuses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import tensors
from torch import Tensor

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.data.dataset import EncodedDataset
from lorasmith.runs.library import train
from lorasmith.runs.trainer import Trainer
from lorasmith.training.trainable import Trainable

SETTINGS: dict[str, Any] = {
    "rank": 4,
    "training_dtype": "fp32",
    "learning_rate": 1e-3,
    "lora_dtype": "fp32",
    "targets": "*.attn2.to_q",
    "batch_size": 2,
}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    "changes", [{"validation_share": 0.3}, {"grad_accumulation_steps": 2, "ema_decay": 0.9, "rank_dropout": 0.2}]
)
def test_its_numbers_are_those_of_a_run(hand_made: Trainable, mixed: EncodedDataset, changes: dict[str, Any]) -> None:
    settings = {**SETTINGS, "steps": 3, **changes}
    run, trainer = train(hand_made, mixed, **settings), Trainer(hand_made, list(mixed), **settings)
    assert [step.number for step in trainer] == [0, 1, 2]
    assert (trainer.step, trainer.losses, trainer.lora.steps) == (3, run.losses, 3)
    assert equal(tensors(trainer), tensors(run))
    assert trainer.lora.metadata["ss_num_train_images"] == run.lora.metadata["ss_num_train_images"]
    assert (trainer.held_out is None) == ("validation_share" not in changes)


def test_the_model_is_as_it_was_between_iterations(hand_made: Trainable, dataset: EncodedDataset) -> None:
    layer = next(layer for path, layer in hand_made.module.named_modules() if path.endswith("attn2.to_q"))
    trainer = Trainer(hand_made, dataset, **SETTINGS, steps=3)
    for step in trainer:
        assert "forward" in layer.__dict__
        if step.number == 1:
            break
    assert trainer.step == 1  # the second was not updated
    assert "forward" not in layer.__dict__
    assert [step.number for step in trainer] == [1, 2]
    assert trainer.losses == train(hand_made, dataset, **SETTINGS, steps=3).losses


def test_gradients_weights_and_rate_are_those_of_the_step(hand_made: Trainable, dataset: EncodedDataset) -> None:
    halved, plain = (
        Trainer(hand_made, dataset, **SETTINGS, steps=1, optimizer="SGD", max_grad_norm=0) for _ in range(2)
    )
    start = {name: tensor.clone() for name, tensor in plain.weights.items()}
    for step in halved:
        losses = step.gradient()
        assert losses.shape == (2,)
        for gradient in halved.gradients.values():
            gradient.mul_(0.5)
        result = step.update()
        assert result.loss == pytest.approx(losses.mean().item())
    for _ in plain:
        pass
    for name, weight in plain.weights.items():
        torch.testing.assert_close(halved.weights[name] - start[name], 0.5 * (weight - start[name]))
    trainer = Trainer(hand_made, dataset, **SETTINGS, steps=4, schedule="linear", progress=False)
    rates = []
    for step in trainer:
        if step.number == 2:
            trainer.engine.rate_factor = 0.5
        rates.append(trainer.learning_rate)
    assert rates == pytest.approx([1e-3, 7.5e-4, 2.5e-4, 1.25e-4])


def test_a_loss_of_ones_own_gives_the_gradient_of_ours(hand_made: Trainable, dataset: EncodedDataset) -> None:
    ours, own = (Trainer(hand_made, dataset, **SETTINGS, steps=2) for _ in range(2))
    for step in own:
        for batch in step.batches:
            prediction = own.predict(batch)
            step.backward((prediction - own.target(batch)).square().mean((1, 2, 3)))
    for _ in ours:
        pass
    assert own.losses == pytest.approx(ours.losses)
    for name, weight in ours.weights.items():
        torch.testing.assert_close(own.weights[name], weight)


def test_weights_that_are_written_count(hand_made: Trainable, dataset: EncodedDataset) -> None:
    settings = {**SETTINGS, "training_dtype": "bf16", "exact_dtype": True, "steps": 2}
    trainer = Trainer(hand_made, dataset, **settings)
    losses = []
    for step in trainer:
        losses.append(step.gradient())
        for name, weight in trainer.weights.items():
            weight.fill_(0.3 if name.endswith("up") else 0.1)
        step.skip()
    plain = Trainer(hand_made, dataset, **settings)
    expected = [(step.gradient(), step.skip())[0] for step in plain]
    assert torch.equal(losses[0], expected[0]) and not torch.equal(losses[1], expected[1])


def test_it_goes_on_from_a_state_bit_for_bit(hand_made: Trainable, dataset: EncodedDataset, tmp_path: Path) -> None:
    whole = Trainer(hand_made, dataset, **SETTINGS, steps=4)
    for step in whole:
        if step.number == 2:
            state = whole.save_state(tmp_path / "state.safetensors")
    resumed = Trainer(hand_made, dataset, **SETTINGS, steps=4)
    resumed.load_state(state)
    assert resumed.step == 2
    assert [step.number for step in resumed] == [2, 3]
    assert resumed.losses == whole.losses
    assert equal(tensors(resumed), tensors(whole))
    continued = train(hand_made, dataset, **SETTINGS, steps=4, existing_state=str(state))
    assert equal(tensors(continued), tensors(whole))
    begun = Trainer(hand_made, dataset, **SETTINGS, steps=4, existing_state=str(state))
    assert [step.number for step in begun] == [2, 3] and equal(tensors(begun), tensors(whole))


def test_a_loop_continues_from_the_state_that_it_loads(hand_made: Trainable, dataset: EncodedDataset) -> None:
    whole, back = (Trainer(hand_made, dataset, **SETTINGS, steps=4) for _ in range(2))
    losses = [step.update().loss for step in whole]
    numbers, state = [], None
    for step in back:
        numbers.append(step.number)
        if step.number == 1 and state is None:
            state = back.state()
        if step.number == 2 and numbers.count(2) == 1:
            step.gradient()
            back.load(state)  # type: ignore[arg-type]
            with pytest.raises(OptionError, match="step 3 is over, as a state was loaded"):
                step.update()
    assert numbers == [0, 1, 2, 1, 2, 3]
    assert back.losses == losses
    assert equal(tensors(back), tensors(whole))


def test_nothing_stays_open_if_the_model_cannot_be_prepared(
    hand_made: Trainable, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(hand_made, dataset, **SETTINGS, steps=1)
    open_now = []

    @contextlib.contextmanager
    def ready(*args: Any, **others: Any) -> Iterator[None]:
        open_now.append("captions")
        try:
            yield
        finally:
            open_now.clear()

    def interrupted(**others: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorasmith.runs.trainer.captions_ready", ready)
    with monkeypatch.context() as until_now:
        until_now.setattr(trainer.engine, "attached", interrupted)
        with pytest.raises(KeyboardInterrupt), trainer:
            pass
    assert not open_now
    assert len(list(trainer)) == 1


def test_a_step_that_is_not_finite_changes_nothing(hand_made: Trainable, dataset: EncodedDataset) -> None:
    trainer = Trainer(hand_made, dataset, **SETTINGS, steps=3)
    for step in trainer:
        if step.number == 1:
            step.gradient()
            before = {name: tensor.clone() for name, tensor in trainer.weights.items()}
            next(iter(trainer.gradients.values())).fill_(torch.nan)
            with pytest.raises(TrainingError, match="those of step 2 are not, and the weights are as before"):
                step.update()
            assert equal(before, dict(trainer.weights))
            step.skip()
    assert [math.isnan(loss) for loss in trainer.losses] == [False, True, False]


def test_what_it_refuses(hand_made: Trainable, dataset: EncodedDataset) -> None:
    with pytest.raises(OptionError, match=r"unknown option 'stepz' .did you mean 'steps'"):
        Trainer(hand_made, dataset, stepz=3)
    trainer = Trainer(hand_made, dataset, **SETTINGS, steps=1, rank_dropout=0.5)
    for step in trainer:
        with pytest.raises(OptionError, match="predict applies no rank_dropout"):
            trainer.predict(step.batches[0])
        with pytest.raises(OptionError, match=r"needs the loss of each sample of a batch, .* got \(\)"):
            step.backward(torch.zeros((), requires_grad=True))
        with pytest.raises(OptionError, match=r"of a batch, .* got 0.5; average"):
            step.backward(0.5)  # type: ignore[arg-type]
    assert repr(trainer).startswith("Trainer(hand-made: step 1 of 1, LoRA, ")
    with pytest.warns(match="leaves this to you: previews, max_rollbacks$"):
        Trainer(hand_made, dataset, **SETTINGS, previews="a cat", max_rollbacks=1)


def test_a_step_may_take_its_gradient_elsewhere(hand_made: Trainable, dataset: EncodedDataset) -> None:
    trainer = Trainer(hand_made, dataset, **SETTINGS, steps=2)
    for step in trainer:
        first = step.gradient()
        before = {name: weight.clone() for name, weight in trainer.weights.items()}
        for name, weight in trainer.weights.items():
            weight.add_(trainer.gradients[name])
        assert torch.equal(step.gradient(), first)
        step.reset()
        assert not any(gradient.any() for gradient in trainer.gradients.values())
        second = step.gradient()
        assert not torch.equal(first, second)
        for name, weight in trainer.weights.items():
            weight.copy_(before[name])
        assert step.update().loss == pytest.approx(second.mean().item())
    with pytest.raises(OptionError, match="in the trainer's loop alone"):
        trainer.predict(step.batches[0])
    with pytest.raises(OptionError, match="state must be a RunState, got 5"):
        trainer.load(5)  # type: ignore[arg-type]


def test_its_notes_are_shown_once_unless_progress_is_off(
    hand_made: Trainable, dataset: EncodedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(hand_made, dataset, **SETTINGS, steps=1, progress=False).lora.save(tmp_path / "a.safetensors")
    settings: dict[str, Any] = {**SETTINGS, "steps": 1, "rank": 8, "existing_lora": str(first)}
    sentence = "rank has no effect: every target continues existing_lora with its own values."
    capsys.readouterr()
    with pytest.warns(UserWarning, match="no effect on a Trainer, which leaves this to you: save_every"):
        shown = Trainer(hand_made, dataset, **settings, save_every=5)
    assert sentence in shown.job.notes and capsys.readouterr().err.count(sentence) == 1
    silent = Trainer(hand_made, dataset, **settings, save_every=5, progress=False)
    assert silent.job.notes == shown.job.notes and capsys.readouterr() == ("", "")
    assert silent.lora.metadata["ss_steps"] == "1", "with those of the LoRA that is continued"
