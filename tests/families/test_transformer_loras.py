"""LoRAs of every transformer family: trained, resumed, and applied by diffusers' own pipeline module for module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformer_models import Case

from lorasmith.cli.main import main
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.loading import released_names
from lorasmith.families.model import Model
from lorasmith.formats.lora_file import save_lora
from lorasmith.formats.names import matches
from lorasmith.formats.spelling import guessed_family
from lorasmith.runs.library import train
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from tests.covering import slow_except

CAPTIONS = ("a fox", "a bus", "a penguin on a pink background, " * 12, "")


@pytest.fixture(scope="module")
def four(case: Case) -> EncodedDataset:
    """Four pictures of one colour each, with captions of different length."""
    model, shape = case.ours, case.ours.components.latent.shape(32, 32)
    with model.text_encoder.active():
        captions = [model.text_encoder.encode(text) for text in CAPTIONS]
    colours = [models.seeded(f"colour {index}", (shape[0], *(1,) * (len(shape) - 1)), seed=0) for index in range(4)]
    samples = (
        Sample(colour.expand(shape).contiguous(), caption, f"{index}.png")
        for index, (colour, caption) in enumerate(zip(colours, captions, strict=True))
    )
    return EncodedDataset(tuple(samples))


def run(model: Model, data: EncodedDataset, **settings: Any) -> TrainResult:
    given = {"rank": 4, "training_dtype": "fp32", "lora_dtype": "fp32", "validation_share": 0.0, "seed": 1}
    return train(model, data, **{**given, **settings})


@pytest.mark.slow_by_family
def test_a_step_changes_adapters_alone(case: Case, four: EncodedDataset) -> None:
    model = case.ours

    def digests() -> dict[str, str]:
        return {name: models.digest(part.state_dict()) for name, part in model.components.modules().items()}

    before = digests()
    result = run(model, four, steps=1, batch_size=4, learning_rate=1e-2)
    preset = model.family.presets[model.defaults.targets]
    assert digests() == before
    assert result.lora.state.adapters.keys() == {
        ModuleRef(DENOISER, path)
        for path, shape in model.names.weight_shapes.items()
        if matches(path, preset.include) and len(shape) > 1
    }
    assert_reached(case, result.lora)


def assert_reached(case: Case, lora: Lora) -> None:
    """Every adapter has changed, but for those that no prediction depends on."""
    still = {
        ref.path
        for ref, one in lora.state.adapters.items()
        if not all(one.tensors[role].any() for role in ("down", "up"))
    }
    assert still == {ref.path for ref in lora.state.adapters if matches(ref.path, case.tiny.unreached)}


@pytest.mark.slow_by_family
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_batch_of_four_is_four_steps_of_one(case: Case, four: EncodedDataset, rate: float) -> None:
    given = {"steps": 1, "learning_rate": 1e-2, "tread_rate": rate, "tread_first": 0, "tread_last": 1}
    together = run(case.ours, four, batch_size=4, **given)
    apart = run(case.ours, four, batch_size=1, grad_accumulation_steps=4, **given)
    assert together.losses == pytest.approx(apart.losses, rel=1e-4)
    assert_reached(case, together.lora)


@pytest.mark.slow
def test_four_pictures_are_learnt(case: Case, four: EncodedDataset) -> None:
    given = {"steps": 400, "batch_size": 4, "algorithm": "Full", "learning_rate": 3e-3, "targets": "all-linear"}
    result = run(case.ours, four, **given | case.tiny.learnt_with)
    assert np.mean(result.losses[-20:]) - case.tiny.unlearnt < 0.1 * np.mean(result.losses[:5])


def layers_of_diffusers(module: Any) -> dict[str, Tensor]:
    """The change of each weight that diffusers makes, by module path."""
    return {
        path: layer.get_delta_weight(layer.active_adapters[0]).detach()
        for path, layer in module.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def change(weights: AdapterWeights) -> Tensor:
    """The change of the weight by definition."""
    down, up = weights.tensors["down"].float(), weights.tensors["up"].float()
    product = (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    return product * ((len(down) if weights.alpha is None else weights.alpha) / len(down))


def assert_applied(case: Case, path: Path) -> Lora:
    """diffusers' pipeline applies the file: every module, with the change that is meant."""
    lora, pipeline = Lora.load(path, case.ours), case.tiny.made()
    has_loader = hasattr(pipeline, "load_lora_weights")
    try:
        if has_loader:
            pipeline.load_lora_weights(str(path))
        else:
            pipeline.transformer.load_lora_adapter(load_file(path))
        applied = layers_of_diffusers(pipeline.transformer)
        for name in case.ours.family.denoiser_parts:
            inner = layers_of_diffusers(getattr(pipeline, name))
            applied |= {f"{name}.{layer}": changed for layer, changed in inner.items()}
    finally:
        pipeline.unload_lora_weights() if has_loader else pipeline.transformer.unload_lora()
    assert applied.keys() == {ref.path for ref in lora.state.adapters}
    for ref, weights in lora.state.adapters.items():
        torch.testing.assert_close(applied[ref.path], change(weights), rtol=1e-4, atol=1e-6)
    return lora


@pytest.mark.slow
def test_a_folder_of_pictures_becomes_a_lora_that_diffusers_applies(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.skip("pictures")
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (80, 64 + 48 * index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    parts = [f"--text-encoder={path}" for part, path in case.files.items() if part.startswith("text_encoder")]
    command = "lorasmith train photos --trigger fox --resolution 64 --steps 1 --rank 4 --learning-rate 0.05"
    files = [f"--model={case.files['transformer']}", f"--vae={case.files['vae']}", *parts]
    monkeypatch.setattr(sys, "argv", [*command.split(), *files])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    path = tmp_path / "runs" / "photos-001" / "photos.safetensors"
    if case.tiny.has_released_widths:
        path = Lora.load(path, case.ours).save(tmp_path / "diffusers.safetensors", layout="diffusers")
    lora = assert_applied(case, path)
    assert lora.state.adapters
    assert lora.state.metadata["ss_base_model_version"] == case.ours.family.kohya_version("flow")


@pytest.mark.slow_by_family
@pytest.mark.parametrize("layout", ["portable", "diffusers", "comfy", "kohya", "ai-toolkit"])
def test_every_layout_keeps_the_change(case: Case, layout: str, tmp_path: Path) -> None:
    blocks = {
        path: shape
        for path, shape in case.ours.names.weight_shapes.items()
        if len(shape) == 2 and ".".join(path.split(".")[:1]).endswith(("blocks", "layers"))
    }
    state = AdapterState(
        {
            ModuleRef(DENOISER, path): AdapterWeights(
                "lora",
                {
                    "down": models.seeded(f"{path} down", (2, shape[1]), seed=0, std=0.1),
                    "up": models.seeded(f"{path} up", (shape[0], 2), seed=0, std=0.1),
                },
                alpha=1.0,
            )
            for path, shape in blocks.items()
        }
    )
    path = tmp_path / "lora.safetensors"
    save_lora(path, state, case.ours.names, layout=layout, dtype=torch.float32, metadata={})
    back = Lora.load(path, case.ours).state
    assert not back.unknown
    assert back.adapters.keys() == state.adapters.keys()
    for ref, weights in state.adapters.items():
        torch.testing.assert_close(change(back.adapters[ref]), change(weights), rtol=1e-4, atol=1e-6)
    if layout == "diffusers" or (layout == "portable" and not case.tiny.has_released_widths):
        assert_applied(case, path)


@pytest.mark.slow_by_family
@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_its_files_are_recognised_without_a_model(case: Case, naming: str) -> None:
    """By the names and widths of the released model."""
    family = case.ours.family
    names = released_names(family.title)
    assert names is not None
    preset = family.presets[case.ours.defaults.targets]
    keys = {}
    for path, place in names.denoiser.items():
        if matches(path, preset.include) and len(names.weight_shapes.get(path, ())) == 2:
            base = f"transformer.{path}" if naming == "diffusers" else f"diffusion_model.{place.path}"
            keys[f"{base}.lora_A.weight"] = (4, names.weight_shapes[path][1])
    assert guessed_family(keys, {"ss_base_model_version": family.kohya_version("flow")}) == family.title


LEVERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "recomputed blocks": ({"checkpoint_depth": 2}, {}),
    "the whole recomputed": ({"checkpoint_depth": 1}, {}),
    "lean": ({"activations": "lean"}, {}),
    "selective": ({"activations": "selective"}, {}),
    "offloaded int8": (
        {"quantization": "int8", "offloading": True, "activations": "lean", "checkpoint_depth": 2},
        {"quantization": "int8"},
    ),
    "nf4": ({"quantization": "nf4", "activations": "selective"}, {"quantization": "nf4"}),
}


@pytest.mark.slow_by_family
@pytest.mark.parametrize("lever", slow_except(LEVERS, "offloaded int8"))
def test_levers_change_no_result(case: Case, four: EncodedDataset, lever: str) -> None:
    changed, plain = LEVERS[lever]
    common = {"steps": 1, "batch_size": 2, "learning_rate": 1e-2, "targets": "attention+ff"}
    with_lever = run(case.ours, four, **common, **changed)
    without = run(case.ours, four, **common, **plain)
    assert with_lever.losses == pytest.approx(without.losses, rel=1e-4)
    expected = without.lora.state.adapters
    for ref, weights in with_lever.lora.state.adapters.items():
        for role, tensor in weights.tensors.items():
            scale = max(1.0, float(expected[ref].tensors[role].abs().max()))
            torch.testing.assert_close(tensor, expected[ref].tensors[role], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.slow
def test_compiled_blocks_change_no_result(case: Case, four: EncodedDataset) -> None:
    common = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3}
    compiled, plain = run(case.ours, four, **common, compile=True), run(case.ours, four, **common)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-3)
