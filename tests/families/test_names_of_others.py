"""LoRAs under names of other trainers: recognised, without faults, converted, and applied with all of their modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from original_models import save
from safetensors.torch import load_file
from torch import Tensor
from transformer_models import Case

from lorasmith.core.adapter_state import DENOISER
from lorasmith.formats.inspect import faults_of
from lorasmith.formats.lora_file import load_lora, save_lora, unapplied
from lorasmith.formats.names import ModelNames
from lorasmith.formats.spelling import guessed_family
from lorasmith.training.lora_handle import Lora

Shapes = Mapping[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return lambda name: Case.of(name, tmp_path_factory.mktemp(name))


def linear(case: Case) -> Shapes:
    """Shapes of the denoiser's linear layers by diffusers path."""
    module = case.ours.components.denoiser
    return {
        path: shape
        for path, shape in case.ours.names.weight_shapes.items()
        if isinstance(module.get_submodule(path), torch.nn.Linear)
    }


def plain(stem: str, shape: tuple[int, ...], down: str = "lora_down", up: str = "lora_up") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(stem))
    return {
        f"{stem}.{down}.weight": torch.randn(2, shape[1], generator=generator),
        f"{stem}.{up}.weight": torch.randn(shape[0], 2, generator=generator) * 0.1,
        f"{stem}.alpha": torch.tensor(2.0),
    }


def flat(path: str) -> str:
    return path.replace(".", "_")


ONE_TRAINER: dict[str, Callable[[str, ModelNames], tuple[str, ...]]] = {
    "internal": lambda path, names: (f"transformer.{path}",),
    "legacy": lambda path, names: (f"lora_transformer_{flat(path)}",),
    "kohya": lambda path, names: (f"lora_unet_{flat(names.denoiser[path].path)}",),
    "comfy": lambda path, names: (f"diffusion_model.{names.denoiser[path].path}", "lora_A", "lora_B"),
    "original": lambda path, names: (names.denoiser[path].path, "lora_A", "lora_B"),
}
"""OneTrainer's formats of a LoRA: the start of a module's keys, and its names of the factors."""


@pytest.mark.parametrize("spelling", ONE_TRAINER)
def test_krea_2_of_onetrainer(cases: Callable[[str], Case], spelling: str, tmp_path: Path) -> None:
    case = cases("krea2")
    names = case.ours.names
    tensors: dict[str, Tensor] = {}
    for path, shape in linear(case).items():
        stem, *factors = ONE_TRAINER[spelling](path, names)
        tensors |= plain(stem, shape, *factors)
    assert len(tensors) == 3 * 40
    assert_of_use(case, tensors, tmp_path)


def test_krea_2_of_simpletuner_with_fused_lokr_and_dora(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("krea2")
    tensors: dict[str, Tensor] = {}
    shapes = linear(case)
    generator = torch.Generator().manual_seed(0)
    for path, (_, columns) in shapes.items():
        if not path.endswith("attn.to_q"):
            continue
        rows = [shapes[f"{path.removesuffix('q')}{part}"][0] for part in "qkv"]
        block = math.gcd(*rows)
        base = f"lycoris_{flat(path.removesuffix('to_q'))}to_qkv"
        tensors |= {
            f"{base}.lokr_w1": torch.randn(sum(rows) // block, 2, generator=generator) * 0.1,
            f"{base}.lokr_w2": torch.randn(block, columns // 2, generator=generator) * 0.1,
            f"{base}.dora_scale": torch.rand(sum(rows), 1, generator=generator) + 0.5,
        }
    assert "lycoris_text_fusion_layerwise_blocks_0_attn_to_qkv.dora_scale" in tensors
    assert_of_use(case, tensors, tmp_path)


def assert_of_use(case: Case, tensors: dict[str, Tensor], folder: Path) -> None:
    names = case.ours.names
    assert guessed_family({key: tuple(one.shape) for key, one in tensors.items()}) == case.ours.family.title
    assert [one.problem for one in faults_of(tensors, {}, names, is_model_sure=True) if one.is_error] == []
    file = save(folder / "theirs.safetensors", tensors)
    state = load_lora(file, names)
    assert unapplied(state, names) == [] and state.unknown == {}
    save_lora(folder / "ours.safetensors", state, names)
    again = load_lora(folder / "ours.safetensors", names)
    assert again.adapters.keys() == state.adapters.keys()
    x, time = torch.randn(1, *case.ours.components.latent.shape(64, 64)), torch.tensor([0.5])
    given = case.ours.text_encoder.encode("a fox")
    found = []
    for lora in (None, *(Lora.load(one, case.ours) for one in (file, folder / "ours.safetensors"))):
        denoiser = case.ours.denoiser if lora is None else lora.applied_to(case.ours.denoiser, strict=True)
        with denoiser.active(), torch.no_grad():
            found.append(denoiser.predict(x, time, given))
    bare, theirs, ours = found
    assert not torch.allclose(bare, theirs, rtol=1e-3)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["lora_te_", "text_encoders.qwen3_06b.transformer.model."])
def test_animas_text_encoder_of_sd_scripts(cases: Callable[[str], Case], start: str, tmp_path: Path) -> None:
    case = cases("anima")
    names, encoder = case.ours.names, case.ours.components.text_encoders["text_encoder"]
    tensors: dict[str, Tensor] = {}
    for path in names.text_encoders["text_encoder"].paths:
        layer = encoder.get_submodule(path)
        assert isinstance(layer, torch.nn.Linear)
        factors = () if start == "lora_te_" else ("lora_A", "lora_B")
        tensors |= plain(start + (flat(path) if start == "lora_te_" else path), tuple(layer.weight.shape), *factors)
    assert {key.removeprefix(start).split(".lora")[0] for key in tensors} >= {
        "layers_0_self_attn_q_proj" if start == "lora_te_" else "layers.0.self_attn.q_proj"
    }
    path, shape = next(iter(linear(case).items()))
    tensors |= plain(f"lora_unet_{flat(names.denoiser[path].path)}", shape)
    assert [one.problem for one in faults_of(tensors, {}, names, is_model_sure=True) if one.is_error] == []
    file = save(tmp_path / "theirs.safetensors", tensors)
    state = load_lora(file, names)
    assert state.unknown == {} and {ref.component for ref in state.adapters} == {DENOISER, "text_encoder"}
    save_lora(tmp_path / "comfy.safetensors", state, names, layout="comfy")
    written = load_file(tmp_path / "comfy.safetensors")
    assert any(
        key.startswith("text_encoders.qwen3_06b.transformer.model.layers.0.self_attn.q_proj.") for key in written
    )
    found = []
    for lora in (None, *(Lora.load(one, case.ours) for one in (file, tmp_path / "comfy.safetensors"))):
        text = case.ours.text_encoder if lora is None else lora.applied_to_text(case.ours.text_encoder, strict=True)
        with text.active():
            found.append(text.encode("a fox").tensors["context"])
    bare, theirs, ours = found
    assert not torch.allclose(bare, theirs, rtol=1e-3)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
