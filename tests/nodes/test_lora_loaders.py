from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.adapters.frozen_layer import cast_weights
from lorasmith.core.adapter_state import AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Denoiser, Model
from lorasmith.training.lora_handle import Lora

Make = Callable[..., Any]


def weights(module: torch.nn.Module, seed: int = 0) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = module.weight.shape
    tensors = {
        "up": torch.randn(rows, 4, generator=generator) * 0.1,
        "down": torch.randn(4, columns, generator=generator) * 0.1,
    }
    return AdapterWeights("LoRA", tensors, alpha=4.0)


@pytest.fixture
def lora(tiny: Model) -> Lora:
    """A LoRA with something for the denoiser and for the text encoder."""
    adapters = {
        ModuleRef("denoiser", path): weights(module)
        for path, module in tiny.components.denoiser.named_modules()
        if path.endswith(("attn2.to_q", "attn1.to_v"))
    }
    encoder = tiny.components.text_encoders["text_encoder"]
    path = next(path for path, _ in encoder.named_modules() if path.endswith("layers.0.self_attn.q_proj"))
    written = path if path.startswith("text_model.") else f"text_model.{path}"
    adapters[ModuleRef("text_encoder", written)] = weights(encoder.get_submodule(path))
    return Lora(AdapterState(adapters), tiny.names)


@pytest.fixture
def saved(lora: Lora, tmp_path: Path) -> Path:
    return lora.save(tmp_path / "models" / "loras" / "mine.safetensors")


@pytest.fixture
def predict(captions: list[Conditioning], latents: Make) -> Callable[[Denoiser], torch.Tensor]:
    def run(denoiser: Denoiser) -> torch.Tensor:
        with torch.no_grad(), denoiser.active():
            return denoiser.predict(latents()["samples"] / 5, torch.tensor([500.0]), captions[0])

    return run


def test_strength_zero_is_the_model_itself(bench: Any, tiny: Model, lora: Lora) -> None:
    model = tiny.denoiser
    assert bench.one("LoraModelLoader", model=model, lora=lora, strength_model=0.0) is model
    assert bench.call("LoraLoader", model=model, clip=tiny.text_encoder, lora_name="absent", strength_model=0.0,
                      strength_clip=0.0).outputs[0][0] is model  # fmt: skip


@pytest.mark.parametrize("strength", [1.0, -0.5, 3.0])
def test_bypass_on_and_off_predict_the_same(
    bench: Any, tiny: Model, lora: Lora, predict: Callable[[Denoiser], torch.Tensor], strength: float
) -> None:
    merged, beside = (
        predict(bench.one("LoraModelLoader", model=tiny.denoiser, lora=lora, strength_model=strength, bypass=bypass))
        for bypass in (False, True)
    )
    base = predict(tiny.denoiser)
    assert (merged - base).abs().max() > 1e-3
    torch.testing.assert_close(merged, beside, atol=1e-4, rtol=1e-4)


def test_a_lora_file_acts_like_the_lora_in_memory(
    bench: Any, tiny: Model, lora: Lora, saved: Path, predict: Callable[[Denoiser], torch.Tensor]
) -> None:
    in_memory = predict(bench.one("LoraModelLoader", model=tiny.denoiser, lora=lora, strength_model=0.7))
    from_file = bench.one("LoraLoaderModelOnly", model=tiny.denoiser, lora_name=saved.name, strength_model=0.7)
    torch.testing.assert_close(predict(from_file), in_memory)
    assert bench.messages("warning") == []


def test_the_text_encoder_has_its_own_strength(bench: Any, tiny: Model, saved: Path) -> None:
    denoiser = tiny.denoiser

    def context(strength: float) -> torch.Tensor:
        loader = {"model": denoiser, "clip": tiny.text_encoder, "lora_name": saved.name, "strength_model": 0.0}
        (model,), (clip,) = bench.call("LoraLoader", **loader, strength_clip=strength).outputs
        assert model is denoiser
        encoded: torch.Tensor = bench.one("CLIPTextEncode", text="a fox", clip=clip)[0].tensors["context"]
        return encoded

    plain, once, twice = (context(strength) for strength in (0.0, 1.0, 2.0))
    assert not torch.allclose(plain, once)
    assert not torch.allclose(once, twice)
    assert torch.equal(context(0.0), plain)


def test_beside_the_weights_a_file_acts_alike(
    bench: Any, tiny: Model, saved: Path, predict: Callable[[Denoiser], torch.Tensor]
) -> None:
    given = {"model": tiny.denoiser, "lora_name": saved.name, "strength_model": 0.7}
    merged = bench.one("LoraLoaderModelOnly", **given)
    beside = bench.one("LoraLoaderBypassModelOnly", **given)
    (both,), (clip,) = bench.call("LoraLoaderBypass", **given, clip=tiny.text_encoder, strength_clip=0.5).outputs
    assert [patch.bypass for patch in (*merged.patches, *beside.patches, *both.patches)] == [False, True, True]
    assert len(clip.patches) == 1
    torch.testing.assert_close(predict(beside), predict(merged), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(predict(both), predict(beside))


def test_a_lora_goes_beside_packed_weights_by_itself(bench: Any, lora: Lora, saved: Path) -> None:
    model = load_model(BUILT_IN)
    cast_weights(model.components.denoiser, torch.float8_e4m3fn)
    in_memory = bench.one("LoraModelLoader", model=model.denoiser, lora=lora, strength_model=1.0, bypass=False)
    from_file = bench.one("LoraLoaderModelOnly", model=model.denoiser, lora_name=saved.name)
    assert in_memory.patches[0].bypass
    assert from_file.patches[0].bypass


def test_a_lora_for_the_denoiser_alone_goes_to_a_model_with_clip(bench: Any, tiny: Model, lora: Lora) -> None:
    adapters = {ref: one for ref, one in lora.state.adapters.items() if ref.component == "denoiser"}
    replace(lora, state=AdapterState(adapters)).save(bench.folders.base / "models" / "loras" / "unet.safetensors")
    loader = {"model": tiny.denoiser, "clip": tiny.text_encoder, "lora_name": "unet.safetensors"}
    (model,), (clip,) = bench.call("LoraLoader", **loader).outputs
    assert len(model.patches) == 1
    assert clip == tiny.text_encoder
    assert bench.messages("warning") == []


def test_what_has_no_place_in_the_model_is_told(bench: Any, tiny: Model, lora: Lora, tmp_path: Path) -> None:
    lora.state.unknown["lora_unet_elsewhere.lora_up.weight"] = torch.zeros(4, 2)
    lora.state.unknown["lora_unet_elsewhere.lora_down.weight"] = torch.zeros(2, 4)
    lora.save(tmp_path / "models" / "loras" / "odd.safetensors")
    bench.call("LoraLoaderModelOnly", model=tiny.denoiser, lora_name="odd.safetensors")
    (warning,) = bench.messages("warning")
    assert "lora_unet_elsewhere" in warning


def test_a_lora_for_another_model_is_refused(bench: Any, tiny: Model, lora: Lora) -> None:
    for_flux = replace(lora, names=replace(lora.names, family="flux"))
    with pytest.raises(LoraError, match=r"made for \(flux\), got lorasmith-tiny \(sd1\)"):
        bench.call("LoraModelLoader", model=tiny.denoiser, lora=for_flux)
    path = next(ref.path for ref in lora.state.adapters)
    wider = replace(lora, names=replace(lora.names, weight_shapes={**lora.names.weight_shapes, path: (640, 640)}))
    with pytest.raises(LoraError, match=f"whose {path} has another shape"):
        bench.call("LoraModelLoader", model=tiny.denoiser, lora=wider)
