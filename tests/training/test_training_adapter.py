"""A training adapter: applied while training, and in nothing that comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorasmith.core.adapter_state import AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from lorasmith.runs import run as running
from lorasmith.runs.library import train
from lorasmith.training.config import NONE_LORA, TrainConfig
from lorasmith.training.events import Resumed
from lorasmith.training.job import plan_job
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.fingerprint import differences, fingerprint

Run = Callable[..., TrainResult]
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def adapter(tiny: Model, tmp_path: Path) -> Path:
    """A LoRA that changes one layer a lot."""
    return lora(tiny, 1.0).save(tmp_path / "adapter.safetensors")


def lora(tiny: Model, size: float, component: str = "denoiser", path: str = LAYER) -> Lora:
    module = tiny.components.modules()[component].get_submodule(path)
    out, inside = module.weight.shape  # type: ignore[misc]
    tensors = {"down": torch.full((2, inside), size), "up": torch.full((out, 2), 0.1)}
    state = AdapterState({ModuleRef(component, path): AdapterWeights("lora", tensors, alpha=2.0)})
    return Lora(state, tiny.names, torch.float32)


def test_it_is_trained_on_and_left_out(run: Run, dataset: EncodedDataset, tiny: Model, adapter: Path) -> None:
    settings: dict[str, Any] = {"steps": 2, "targets": "*.attn2.to_q", "rank": 2, "seed": 3}
    result = run(dataset, **settings, training_adapter=str(adapter))
    patched = Lora.load(adapter, tiny).applied_to(tiny.denoiser)
    given = {"training_dtype": "fp32", "lora_dtype": "fp32", "learning_rate": 1e-3}
    beneath = train(patched, dataset, config=TrainConfig(**settings, **given))

    assert result.losses != run(dataset, **settings).losses
    assert result.losses == beneath.losses
    assert {ref.path for ref in result.lora.state.adapters} == {
        path for path, _ in tiny.denoiser.module.named_modules() if path.endswith("attn2.to_q")
    }
    assert tiny.denoiser.patches == ()


def test_previews_are_drawn_without_it(
    dataset: EncodedDataset, tiny: Model, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(running, "previews_of", lambda plan, *_: seen.append(plan.denoiser))
    train(
        tiny,
        dataset,
        output=tmp_path / "run",
        steps=1,
        rank=1,
        targets=LAYER,
        training_adapter=str(adapter),
        previews="a cat",
    )
    assert [one.patches for one in seen] == [()]


def test_it_is_part_of_what_makes_a_run_the_same_wherever_the_file_is(
    dataset: EncodedDataset, tiny: Model, adapter: Path, tmp_path: Path
) -> None:
    def taken(file: Path | None) -> dict[str, Any]:
        config = TrainConfig(steps=1, rank=1, targets=LAYER, training_adapter=file and str(file))
        return fingerprint(plan_job(tiny.denoiser, config, "cpu"), dataset, None)

    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(adapter.read_bytes())
    other = lora(tiny, 0.5).save(tmp_path / "other.safetensors")
    assert differences(taken(adapter), taken(moved)) == []
    assert differences(taken(adapter), taken(other)) == ["LoRAs applied to the base model"]
    assert differences(taken(adapter), taken(None)) == ["LoRAs applied to the base model"]


@pytest.mark.slow
def test_a_run_with_it_is_resumed(dataset: EncodedDataset, tiny: Model, adapter: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 3, "rank": 2, "targets": LAYER, "training_adapter": str(adapter)}
    whole = train(tiny, dataset, **settings)
    steps = iter((False, True))
    train(tiny, dataset, output=tmp_path / "run", **settings, cancelled=lambda: next(steps, True))
    events: list[Any] = []
    resumed = train(tiny, dataset, output=tmp_path / "run", **settings, on_event=events.append)
    assert any(isinstance(event, Resumed) for event in events)
    assert resumed.losses == whole.losses


def test_a_lora_of_another_family_is_refused(run: Run, dataset: EncodedDataset, tiny: Model, tmp_path: Path) -> None:
    flux = {
        f"lora_unet_double_blocks_{i}_img_attn_proj.lora_{name}.weight": torch.zeros(shape)
        for i in range(4)
        for name, shape in (("down", (4, 3072)), ("up", (3072, 4)))
    }
    save_file(flux, tmp_path / "flux.safetensors")
    with pytest.raises(LoraError, match=r"flux\.safetensors looks like a LoRA for Flux\.1"):
        run(dataset, steps=1, training_adapter=str(tmp_path / "flux.safetensors"))


def test_a_lora_of_text_encoders_alone_is_refused(
    run: Run, dataset: EncodedDataset, tiny: Model, tmp_path: Path
) -> None:
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    width = tiny.components.text_encoders["text_encoder"].config.hidden_size
    tensors = {"down": torch.ones(2, width), "up": torch.ones(width, 2)}
    state = AdapterState({ModuleRef("text_encoder", path): AdapterWeights("lora", tensors, alpha=2.0)})
    file = Lora(state, tiny.names, torch.float32).save(tmp_path / "text.safetensors")
    with pytest.raises(LoraError, match="must have layers of the denoiser"):
        run(dataset, steps=1, training_adapter=str(file))


def test_no_file_is_spelled_as_in_lists() -> None:
    assert TrainConfig(training_adapter=NONE_LORA).training_adapter is None


@pytest.mark.parametrize(("title", "with_adapter", "noted"), [
    ("z_image_TURBO_bf16", False, True), ("z_image_TURBO_bf16", True, False), ("z_image_bf16", False, False),
])  # fmt: skip
def test_a_distilled_base_without_it_is_noted(
    tiny: Model, adapter: Path, monkeypatch: pytest.MonkeyPatch, title: str, with_adapter: bool, noted: bool
) -> None:
    monkeypatch.setattr(tiny.family, "distilled", {"turbo": 8}, raising=False)
    base = replace(tiny, title=title)
    config = TrainConfig(targets=LAYER, training_adapter=str(adapter) if with_adapter else None)
    notes = [note for note in plan_job(base.denoiser, config, "cpu").notes if "distilled" in note]
    sentence = (
        "z_image_TURBO_bf16 is a model distilled to few steps, as turbo in its name says, which training undoes; train "
        "on the base model of Stable Diffusion 1.x, or set training_adapter to a LoRA made for that."
    )
    assert notes == ([sentence] if noted else [])
