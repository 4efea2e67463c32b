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
from lorasmith.core.folders import Folders
from lorasmith.core.options import config_from
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from lorasmith.runs import run as running
from lorasmith.runs.library import train
from lorasmith.training.adapter_settings import NONE_LORA
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.fingerprint import differences, fingerprint
from lorasmith.training.storage.records import parsed_record, read_record
from tests.families.transformer_models import TINY

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


def test_a_lora_of_another_family_is_refused(run: Run, dataset: EncodedDataset, tiny: Model, tmp_path: Path) -> None:
    flux = {
        f"lora_unet_double_blocks_{i}_img_attn_proj.lora_{name}.weight": torch.zeros(shape)
        for i in range(4)
        for name, shape in (("down", (4, 3072)), ("up", (3072, 4)))
    }
    save_file(flux, tmp_path / "flux.safetensors")
    with pytest.raises(LoraError, match=r"flux\.safetensors looks like a LoRA for Flux\.1"):
        run(dataset, steps=1, training_adapter=str(tmp_path / "flux.safetensors"))


def test_no_file_is_spelled_as_in_lists() -> None:
    assert TrainConfig(training_adapter=NONE_LORA).training_adapter is None


NOTE = (
    "z_image_TURBO_bf16 is a model distilled to few steps, as turbo in its name says, which training undoes; train "
    "on the base model of Stable Diffusion 1.x, or set training_adapter to {}."
)


def noted(model: Model, adapter: Path | None = None, folders: Folders | None = None) -> list[str]:
    config = TrainConfig(targets=LAYER, training_adapter=adapter and str(adapter))
    return [one for one in plan_job(model.denoiser, config, "cpu", folders=folders).notes if "distilled" in one]


def test_a_distilled_base_without_it_is_noted_with_the_usual_one(
    tiny: Model, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.family, "distilled", {"turbo": 8}, raising=False)
    base = replace(tiny, title="z_image_TURBO_bf16")
    assert noted(base, adapter) == noted(tiny) == []
    assert noted(base) == [NOTE.format("a LoRA made for that")]
    usual = {"turbo": "some/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors"}
    monkeypatch.setattr(tiny.family, "training_adapters", usual, raising=False)
    file = "zimage_turbo_training_adapter_v2.safetensors of some/zimage_turbo_training_adapter"
    there = NOTE.format(f"the LoRA made for that, {file}, in models/loras")
    assert noted(base) == noted(base, folders=Folders(tmp_path)) == [there]
    loras = tmp_path / "models" / "loras" / "ZImage-Turbo-Training-Adapter"
    loras.mkdir(parents=True)
    (loras.parent / "zimage_turbo_style.safetensors").touch()
    (loras / "pytorch_lora_weights.safetensors").touch()
    (found,) = noted(base, folders=Folders(tmp_path))
    assert found.endswith(
        f"made for that, which is there (--training-adapter {loras / 'pytorch_lora_weights'}.safetensors)."
    )


def test_its_place_is_recorded_and_repeats_the_run(
    dataset: EncodedDataset, tiny: Model, adapter: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": 2, "rank": 2, "targets": LAYER, "training_adapter": str(adapter)}
    result = train(tiny, dataset, output=tmp_path / "run", **settings)
    assert result.path is not None
    record = read_record(tmp_path / "run")
    assert record.asked["training_adapter"] == str(adapter)
    inside = parsed_record(result.lora.state.metadata["lorasmith.run"])
    assert inside.asked["training_adapter"] == str(adapter)
    again = train(tiny, dataset, config=config_from(TrainConfig, dict(inside.asked)))
    assert again.losses == result.losses


KEYS = {
    "z-image": ("layers.{n}.attention.{m}", ("to_q", "to_k", "to_v", "to_out.0"), 2),
    "flux1": ("single_transformer_blocks.{n}.attn.{m}", ("to_q", "to_k", "to_v"), 1),
}


@pytest.mark.parametrize(("family", "prefix"), [("z-image", "diffusion_model."), ("flux1", "transformer.")])
def test_ostris_keys_apply_completely(family: str, prefix: str, tmp_path: Path) -> None:
    """Those of the adapters for Z-Image-Turbo and Flux.1 schnell."""
    model = TINY[family].loaded(TINY[family].saved(tmp_path))
    pattern, members, blocks = KEYS[family]
    tensors = {}
    for n in range(blocks):
        for m in members:
            path = pattern.format(n=n, m=m)
            out, inside = model.components.denoiser.get_submodule(path).weight.shape
            tensors[f"{prefix}{path}.lora_A.weight"] = torch.ones(2, inside)
            tensors[f"{prefix}{path}.lora_B.weight"] = torch.ones(out, 2)
    save_file(tensors, tmp_path / "adapter.safetensors")
    config = TrainConfig(training_adapter=str(tmp_path / "adapter.safetensors"), strict=True, rank=2)
    job = plan_job(model.denoiser, config, "cpu")
    (patch,) = job.model.patches
    assert len(patch.adapters) == blocks * len(members)
