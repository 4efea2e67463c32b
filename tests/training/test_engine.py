"""The loop: same seed same tensors, batches that are batches, and nothing left behind in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Denoiser, Model
from lorasmith.training import engine
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import prepared, sample_losses
from lorasmith.training.events import StepDone
from lorasmith.training.job import plan_job
from lorasmith.training.optim import flat
from lorasmith.training.results import TrainResult
from tests.covering import slow_except

Run = Callable[..., TrainResult]


def tensors(result: TrainResult) -> dict[str, Tensor]:
    return {
        f"{ref.path}.{name}": tensor
        for ref, one in result.lora.state.adapters.items()
        for name, tensor in one.tensors.items()
    }


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, rtol: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if rtol == 0:
            assert torch.equal(tensor, theirs[key]), key
        else:
            torch.testing.assert_close(tensor, theirs[key], rtol=rtol, atol=rtol * 0.1, msg=key)


def fingerprint(model: Model) -> tuple[dict[str, int], list[str], dict[str, Tensor]]:
    """Where the denoiser's tensors are, which modules have a forward of their own, and the values."""
    module = model.components.denoiser
    places = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    patched = [path for path, one in module.named_modules() if "forward" in vars(one)]
    return places, patched, {name: parameter.clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("dtype", slow_except(["fp32", "bf16"], "bf16"))
def test_the_same_seed_gives_the_same_tensors(run: Run, mixed: EncodedDataset, dtype: str) -> None:
    before = [one.latents.clone() for one in mixed.samples]
    first, second = (run(mixed, training_dtype=dtype, batch_size=3) for _ in range(2))
    assert first.losses == second.losses
    assert_same(tensors(first), tensors(second))
    other = run(mixed, training_dtype=dtype, batch_size=3, seed=2**64 - 1)
    assert not set(first.losses) & set(other.losses)
    assert all(torch.equal(a.latents, b) for a, b in zip(mixed.samples, before, strict=True)), "data are left alone"


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_added_as_on_a_gpu_are_the_same(
    quick_run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    settings = {"steps": 2, "grad_accumulation_steps": 2, "targets": "all", "training_dtype": dtype}
    by_autograd = quick_run(dataset, **settings)
    monkeypatch.setattr(flat, "_ADDED_BY_AUTOGRAD", ())
    assert_same(tensors(quick_run(dataset, **settings)), tensors(by_autograd))


def test_a_batch_costs_one_forward_of_its_size(
    run: Run, dataset: EncodedDataset, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    original = Denoiser.predict

    def counting(self: Denoiser, latents: Tensor, time: Tensor, conditioning: Any) -> Tensor:
        seen.append((len(latents), len(conditioning.tensors["context"])))
        return original(self, latents, time, conditioning)

    monkeypatch.setattr(Denoiser, "predict", counting)
    run(dataset, steps=3, batch_size=4)
    assert seen == [(4, 4)] * 3


def test_each_sample_meets_its_own_caption(
    quick_run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = {sample.name: sample.conditioning.tensors["context"] for sample in dataset.samples}
    original = engine.sample_losses
    checked = 0

    def checking(denoiser: Denoiser, batch: Any, config: Any, way: Any, *target: Any) -> Tensor:
        nonlocal checked
        for name, context in zip(batch.names, batch.conditioning.tensors["context"], strict=True):
            assert torch.equal(context[: captions[name].shape[1]], captions[name][0])
            checked += 1
        return original(denoiser, batch, config, way, *target)

    monkeypatch.setattr(engine, "sample_losses", checking)
    quick_run(dataset, steps=2, batch_size=5)
    assert checked == 10


def test_ctrl_c_at_step_k_leaves_the_lora_of_k_steps(quick_run: Run, dataset: EncodedDataset) -> None:
    seen: list[int] = []

    def on_event(event: object) -> None:
        if isinstance(event, StepDone):
            seen.append(event.step)

    stopped = quick_run(dataset, steps=50, on_event=on_event, cancelled=lambda: len(seen) >= 3)
    assert stopped.reason == "cancelled"
    assert stopped.steps == 3
    assert_same(tensors(stopped), tensors(quick_run(dataset, steps=3)))


def test_an_interruption_keeps_what_there_is_and_says_where(
    quick_run: Run, dataset: EncodedDataset, tmp_path: Path
) -> None:
    def on_event(event: object) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        quick_run(dataset, output=tmp_path / "run", on_event=on_event)
    kept = tmp_path / "run" / "lora.safetensors"
    assert str(kept) in caught.value.__notes__[0]
    assert kept.is_file() and not (tmp_path / "run" / "loss.png").exists()


@pytest.mark.parametrize("settings", [{}, {"quantization": "fp8_e4m3", "targets": "all"}], ids=["plain", "packed"])
def test_everything_is_as_before_after_every_exit(
    run: Run, dataset: EncodedDataset, tiny: Model, settings: dict[str, Any]
) -> None:
    before = fingerprint(tiny)

    def explode(event: object) -> None:
        if isinstance(event, StepDone):
            raise RuntimeError("a bug")

    run(dataset, training_dtype="bf16", gradient_checkpointing=True, **settings)
    with pytest.raises(RuntimeError, match="a bug"):
        run(dataset, training_dtype="bf16", on_event=explode, **settings)
    after = fingerprint(tiny)
    assert not any("weight_source" in vars(module) for module in tiny.components.denoiser.modules())
    assert before[0] == after[0]
    assert before[1] == after[1] == []
    assert_same(before[2], after[2])
    assert not any(parameter.requires_grad for parameter in tiny.components.denoiser.parameters())


@pytest.mark.parametrize("depth", slow_except([1, 2, 3, 5], 2))
def test_checkpointing_changes_neither_loss_nor_gradients(run: Run, dataset: EncodedDataset, depth: int) -> None:
    plain = run(dataset, steps=2, targets="all")
    spared = run(dataset, steps=2, targets="all", gradient_checkpointing=True, checkpoint_depth=depth)
    assert plain.losses == pytest.approx(spared.losses, rel=1e-6)
    assert_same(tensors(plain), tensors(spared), rtol=1e-3)


def kept_for_backward(tiny: Model, dataset: EncodedDataset, **settings: Any) -> list[Tensor]:
    """What a training step keeps for its backward pass, frozen weights themselves aside."""
    config = TrainConfig(**({"rank": 4, "training_dtype": "fp32", "targets": "all", "learning_rate": 1e-3} | settings))
    job = plan_job(tiny.denoiser, config)
    maker = engine.batch_maker(job.model, dataset.samples, job.config, job.way)
    kept: list[Tensor] = []
    with prepared(job.model, job.adapters, job.config, job.way):
        frozen = {parameter.data_ptr() for parameter in tiny.components.denoiser.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in frozen:
                kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sample_losses(job.model, maker.step(0)[0], job.config, job.way).sum().backward()
    return kept


def test_nothing_of_a_frozen_weights_size_is_kept(tiny: Model, dataset: EncodedDataset) -> None:
    """Latents of 8×8 make every activation smaller than the large weights, so that only copies of those would show."""
    weights = [p.numel() for p in tiny.components.denoiser.parameters()]
    largest_activation = 64 * 8 * 8 * 4  # the widest feed-forward layer on the finest level
    big = {size for size in weights if size > 2 * largest_activation}
    assert len(big) >= 5
    kept = kept_for_backward(tiny, dataset)
    assert kept
    assert max(tensor.numel() for tensor in kept) <= 2 * largest_activation
    assert not big & {tensor.numel() for tensor in kept}


def test_checkpointing_saves_memory_and_less_the_deeper_it_goes(tiny: Model, dataset: EncodedDataset) -> None:
    def size(**settings: Any) -> int:
        kept = kept_for_backward(tiny, dataset, **settings)
        return sum(t.numel() for t in {t.data_ptr(): t for t in kept}.values())

    plain = size()
    by_depth = [size(gradient_checkpointing=True, checkpoint_depth=depth) for depth in (1, 2, 3)]
    assert by_depth[0] < 0.6 * plain
    assert by_depth == sorted(by_depth)
