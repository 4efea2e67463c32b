"""LoRAs of Stable Diffusion XL: trained, resumed, and applied by diffusers' own pipeline module for module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from sdxl_models import diffusers_pipeline
from test_transformer_loras import change, layers_of_diffusers, run

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning, PictureSize
from lorasmith.families.model import Model
from lorasmith.formats.lora_file import save_lora
from lorasmith.formats.spelling import guessed_family
from lorasmith.training.lora_handle import Lora


@pytest.fixture(scope="module")
def four(sdxl: Model) -> EncodedDataset:
    """Four pictures of one colour each, of two sizes."""
    samples = []
    for index, caption in enumerate(("a fox", "a bus", "a penguin on a pink background, " * 20, "")):
        size = PictureSize((64 + index, 64), (0, index), (64, 64))
        conditioning = sdxl.family.sized(sdxl.text_encoder.encode(caption), size)
        colour = models.seeded(f"colour {index}", (4, 1, 1), seed=0)
        samples.append(Sample(colour.expand(4, 8, 8).contiguous(), conditioning, f"{index}.png"))
    return EncodedDataset(tuple(samples))


@pytest.fixture
def pipeline(sdxl_file: Path, tmp_path: Path) -> Any:
    return diffusers_pipeline(sdxl_file, tmp_path / "config")


def test_a_step_changes_adapters_alone(sdxl: Model, four: EncodedDataset) -> None:
    def digests() -> dict[str, str]:
        return {name: models.digest(part.state_dict()) for name, part in sdxl.components.modules().items()}

    before = digests()
    result = run(sdxl, four, steps=1, batch_size=4, learning_rate=1e-2)
    assert digests() == before
    assert result.lora.state.adapters.keys() == {
        ModuleRef(DENOISER, path)
        for path in sdxl.names.denoiser
        if path.endswith(("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", ".ff.net.0.proj", ".ff.net.2"))
    }
    assert all(one.tensors["up"].abs().max() > 0 for one in result.lora.state.adapters.values())


@torch.no_grad()
def assert_predictions_agree(pipeline: Any, lora: Lora, sdxl: Model) -> None:
    denoiser = lora.applied_to(sdxl.denoiser)
    latents, time = models.seeded("x", (1, 4, 8, 8), seed=0), torch.tensor([400.0])
    tensors = {
        "context": models.seeded("context", (1, 77, models.SDXL_TINY.context), seed=0),
        "pooled": models.seeded("pooled", (1, models.SDXL_TINY.pooled), seed=0),
        "time_ids": torch.tensor([[80, 70, 0, 3, 64, 64]]),
    }
    conditions = {"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]}
    theirs = pipeline.unet(latents, time, encoder_hidden_states=tensors["context"], added_cond_kwargs=conditions).sample
    plain = sdxl.denoiser.predict(latents, time, Conditioning(tensors))
    with denoiser.active():
        ours = denoiser.predict(latents, time, Conditioning(tensors))

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-2


@pytest.fixture(scope="module")
def whole(sdxl: Model) -> AdapterState:
    """A LoRA on every matrix and convolution of the UNet and on every layer of both text encoders."""
    shapes = {ModuleRef(DENOISER, path): shape for path, shape in sdxl.names.weight_shapes.items() if len(shape) > 1}
    for component, encoder in sdxl.components.text_encoders.items():
        weights = dict(encoder.named_parameters())
        for path in sdxl.names.paths(component):
            weight = weights.get(f"{path}.weight", weights.get(f"{path.removeprefix('text_model.')}.weight"))
            assert weight is not None
            shapes[ModuleRef(component, path)] = tuple(weight.shape)

    def random(ref: ModuleRef, shape: tuple[int, ...]) -> AdapterWeights:
        down = models.seeded(f"{ref} down", (2, *shape[1:]), seed=0, std=0.1)
        up = models.seeded(f"{ref} up", (shape[0], 2, *(1,) * (len(shape) - 2)), seed=0, std=0.1)
        return AdapterWeights("lora", {"down": down, "up": up}, alpha=1.0)

    return AdapterState({ref: random(ref, shape) for ref, shape in shapes.items()})


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["portable", "diffusers"])
def test_everything_that_can_be_trained_is_applied_by_diffusers(
    sdxl: Model, whole: AdapterState, pipeline: Any, tmp_path: Path, layout: str
) -> None:
    path = tmp_path / "lora.safetensors"
    save_lora(path, whole, sdxl.names, layout=layout, dtype=torch.float32, metadata={})
    lora = Lora.load(path, sdxl)
    assert lora.state.adapters.keys() == whole.adapters.keys()
    pipeline.load_lora_weights(str(path))
    parts = {"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2, DENOISER: pipeline.unet}
    for component, module in parts.items():
        wanted = {
            ref.path.removeprefix("text_model."): weights
            for ref, weights in whole.adapters.items()
            if ref.component == component
        }
        applied = {path.removeprefix("text_model."): delta for path, delta in layers_of_diffusers(module).items()}
        assert applied.keys() == wanted.keys()
        for path, weights in wanted.items():
            torch.testing.assert_close(applied[path], change(weights), rtol=1e-4, atol=1e-6)
    assert_predictions_agree(pipeline, lora, sdxl)


@pytest.mark.slow
def test_loras_of_both_text_encoders_change_prompts_as_in_diffusers(
    sdxl: Model, whole: AdapterState, pipeline: Any, tmp_path: Path
) -> None:
    path = tmp_path / "lora.safetensors"
    save_lora(path, whole, sdxl.names, layout="kohya", dtype=torch.float32, metadata={})
    encoder = Lora.load(path, sdxl).applied_to_text(sdxl.text_encoder)
    with encoder.active():
        changed = encoder.encode("a red fox")
    plain = sdxl.text_encoder.encode("a red fox")
    pipeline.load_lora_weights(str(path))
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt("a red fox", negative_prompt="")

    assert [component for component, _ in encoder.patches] == ["text_encoder", "text_encoder_2"]
    scale = float(context.abs().max())
    torch.testing.assert_close(changed.tensors["context"], context, rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(changed.tensors["pooled"], pooled, rtol=0, atol=1e-4 * float(pooled.abs().max()))
    for name, tensor in changed.tensors.items():
        assert (tensor - plain.tensors[name]).abs().max() > 1e-2


def test_files_are_recognised_without_a_model() -> None:
    block = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight"
    assert guessed_family({block: (4, 2048)}) == "Stable Diffusion XL"
    encoder = "lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_down.weight"
    assert guessed_family({encoder: (4, 1280)}) == "Stable Diffusion XL"
