"""Flux.1 from the original layout: every tensor, packing, guidance, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from original_models import save
from torch import Tensor

from lorasmith.core.errors import DataError, ModelError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.parts.flux_layout import image_positions, packed_latents, unpacked_latents
from lorasmith.formats.lora_file import state_from_tensors
from tests.covering import slow_except

WIDTH = models.FLUX_TINY.hidden
TENSORS = models.tiny_flux_checkpoint(0)
SCHNELL = {name: tensor for name, tensor in TENSORS.items() if not name.startswith("guidance_in.")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save(tmp_path_factory.mktemp("flux") / "flux.safetensors", TENSORS))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save(tmp_path_factory.mktemp("schnell") / "flux.safetensors", SCHNELL))


def conditioning(batch: int = 2, **extra: Tensor) -> Conditioning:
    context = models.seeded("context", (batch, 8, models.FLUX_TINY.context), seed=0)
    pooled = models.seeded("pooled", (batch, models.FLUX_TINY.pooled), seed=0)
    return Conditioning({"context": context, "pooled": pooled, **extra})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("img_in.weight", (64,)),
        ("txt_in.weight", (64,)),
        ("vector_in.in_layer.weight", ()),
        ("double_blocks.0.img_attn.norm.key_norm.scale", (0,)),
        ("double_blocks.0.img_attn.norm.key_norm.scale", ()),
    ],
)
def test_tensors_of_odd_dimensions_are_refused_in_a_sentence(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    assert name in TENSORS
    path = save(tmp_path / "flux.safetensors", {**TENSORS, name: torch.ones(shape)})
    with pytest.raises(ModelError, match=r"damaged|get the file again"):
        load_model(path)


def xlabs_file() -> dict[str, Tensor]:
    """A LoRA as XLabs' trainer writes it, on every layer that it knows."""
    width, tensors = WIDTH, {}
    for base, rows, inside in (
        *((f"double_blocks.0.processor.qkv_lora{stream}", 3 * width, width) for stream in (1, 2)),
        *((f"double_blocks.0.processor.proj_lora{stream}", width, width) for stream in (1, 2)),
        ("single_blocks.0.processor.qkv_lora", 3 * width, width),
        ("single_blocks.0.processor.proj_lora", width, 5 * width),
    ):
        tensors[f"{base}.down.weight"] = models.seeded(f"{base}.down", (4, inside), seed=0)
        tensors[f"{base}.up.weight"] = models.seeded(f"{base}.up", (rows, 4), seed=0)
    return tensors


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_names_are_read_as_diffusers_reads_them(model: Model, prefix: str) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    tensors = {prefix + key: tensor for key, tensor in xlabs_file().items()}
    state = state_from_tensors(tensors, {}, model.names)
    assert not state.unknown
    expected = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    assert len(state.adapters) == len(expected) / 2 == 12
    for ref, weights in state.adapters.items():
        for name, letter in (("down", "A"), ("up", "B")):
            assert torch.equal(weights.tensors[name], expected[f"transformer.{ref.path}.lora_{letter}.weight"])
        assert weights.alpha is None


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefixes_and_the_other_name_of_norms_are_known(model: Model, tmp_path: Path, prefix: str) -> None:
    tensors = {prefix + name.replace("norm.scale", "norm.weight"): tensor for name, tensor in TENSORS.items()}
    state = load_model(save(tmp_path / "flux.safetensors", tensors)).components.denoiser.state_dict()

    assert all(torch.equal(state[name], tensor) for name, tensor in model.components.denoiser.state_dict().items())


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_packing_is_undone_by_unpacking(batch: int, channels: int, rows: int, columns: int) -> None:
    latents = torch.arange(batch * channels * rows * columns * 4.0).reshape(batch, channels, 2 * rows, 2 * columns)
    tokens = packed_latents(latents)

    assert tokens.shape == (batch, rows * columns, 4 * channels)
    assert torch.equal(unpacked_latents(tokens, 2 * rows, 2 * columns), latents)


def test_packing_and_positions_are_diffusers() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(packed_latents(latents), FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    expected = FluxPipeline._prepare_latent_image_ids(2, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(image_positions(3, 5, torch.device("cpu")), expected)


@pytest.mark.parametrize("size", [(7, 8), (8, 9), (1, 1)])
def test_odd_latents_are_refused(model: Model, size: tuple[int, int]) -> None:
    with pytest.raises(DataError) as caught:
        model.denoiser.predict(torch.zeros(1, 16, *size), torch.tensor([0.5]), conditioning(1))

    assert str(caught.value) == (
        f"Flux.1 packs latents 2×2, so their sides must be even, got {size[0]}×{size[1]}; "
        "use picture sizes that are multiples of 16"
    )


def arguments_of(model: Model, given: Conditioning) -> dict[str, Any]:
    denoiser = model.components.denoiser
    with mock.patch.object(denoiser, "forward", side_effect=lambda **kwargs: (kwargs["hidden_states"],)) as forward:
        model.denoiser.predict(torch.zeros(2, 16, 4, 4), torch.tensor([0.9, 0.2]), given)
    return dict(forward.call_args.kwargs)


def test_guidance_comes_from_the_conditioning_and_is_3_5_where_it_has_none(model: Model) -> None:
    given = conditioning(guidance=torch.tensor([2.0, 7.0]))

    assert arguments_of(model, given)["guidance"].tolist() == [2.0, 7.0]
    assert arguments_of(model, conditioning())["guidance"].tolist() == [3.5, 3.5]


@torch.no_grad()
def test_a_model_without_guidance_embedding_ignores_guidance(schnell: Model) -> None:
    assert not schnell.components.denoiser.config.guidance_embeds
    latents, time = models.seeded("x", (1, 16, 4, 4), seed=0), torch.tensor([0.5])
    without = schnell.denoiser.predict(latents, time, conditioning(1))

    given = conditioning(1, guidance=torch.tensor([6.0]))
    assert torch.equal(schnell.denoiser.predict(latents, time, given), without)


NAMES = sorted({name.replace("blocks.1", "blocks.0") for name in TENSORS})


@pytest.mark.parametrize("name", slow_except(NAMES, *NAMES[::20]))
def test_any_missing_tensor_is_a_sentence(tmp_path: Path, name: str) -> None:
    tensors = {key: tensor for key, tensor in TENSORS.items() if key != name}
    with pytest.raises(ModelError, match=r"lacks|architecture"):
        load_model(save(tmp_path / "flux.safetensors", tensors))


@torch.no_grad()
def test_guidance_may_be_left_out(model: Model, schnell: Model) -> None:
    latents, time = models.seeded("latents", (2, 16, 4, 4), seed=0), torch.tensor([0.3, 0.8])

    def predicted(of: Model, given: Conditioning) -> Tensor:
        return of.denoiser.predict(latents, time, given)

    without = predicted(model, conditioning(no_guidance=torch.zeros(2)))
    assert not torch.allclose(without, predicted(model, conditioning()))
    # The same network without the embedding's tensors is one without guidance.
    torch.testing.assert_close(without, predicted(schnell, conditioning()), atol=1e-5, rtol=1e-5)
    assert torch.equal(predicted(schnell, conditioning(no_guidance=torch.zeros(2))), predicted(schnell, conditioning()))
    assert not model.components.denoiser.time_text_embed.guidance_embedder._forward_hooks
