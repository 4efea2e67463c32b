"""Checkpoints in fp8: they stay so, and what they are computed with is the weight, never the code."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from original_models import SD1, SMALLEST
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith.adapters.packed_layers import packable_layers, packed_layers
from lorasmith.core.errors import ModelError
from lorasmith.core.quantization import packed
from lorasmith.families.loading import load_model
from lorasmith.toolbox.model_files import open_model

PREFIX = "model.diffusion_model."
Tensors = dict[str, Tensor]


def weights_of(tensors: Tensors, prefix: str = PREFIX) -> list[str]:
    """Names of the denoiser's matrices and kernels."""
    return [name for name, t in tensors.items() if name.startswith(prefix) and t.ndim > 1]


def denoiser(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> nn.Module:
    """The denoiser that a file of these tensors is loaded as."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return load_model(path).components.denoiser


def state(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Tensors:
    """Its parameters, those that are packed as the weights they stand for."""
    model = denoiser(path, tensors, metadata)
    packed = {f"{path}.weight": one.weight() for path, one in packed_layers(model).items()}
    return {name: packed.get(name, parameter.data) for name, parameter in model.named_parameters()}


def scaled(
    tensors: Tensors, *, by_row: bool, dtype: torch.dtype, newer: bool, prefix: str = PREFIX
) -> tuple[Tensors, Tensors]:
    """The tensors as a scaled checkpoint has them, and the weights that these stand for."""
    file, meant = dict(tensors), dict(tensors)
    for name in weights_of(tensors, prefix):
        weight, stem = tensors[name].float(), name.removesuffix(".weight")
        scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) / torch.finfo(dtype).max
        scale = scale if by_row else scale.max().reshape(())
        file[name] = (weight / scale).to(dtype)
        meant[name] = file[name].float() * scale
        file[f"{stem}.weight_scale" if newer else f"{stem}.scale_weight"] = scale.flatten() if by_row else scale
        file[f"{stem}.input_scale" if newer else f"{stem}.scale_input"] = torch.tensor(3.0)
        if newer:
            said = json.dumps({"format": str(dtype).removeprefix("torch.")}).encode()
            file[f"{stem}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    if not newer:
        file[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=dtype)
    return file, meant


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_is_the_weight_itself(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = SMALLEST.unet_tensors()
    rounded = {name: t.to(dtype) for name, t in tensors.items()}
    loaded = state(tmp_path / "fp8.safetensors", rounded)
    expected = state(tmp_path / "plain.safetensors", {name: t.float() for name, t in rounded.items()})
    assert {t.dtype for t in loaded.values()} == {torch.float32}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("newer", [False, True], ids=["scale_weight", "weight_scale"])
@pytest.mark.parametrize("by_row", [False, True], ids=["by tensor", "by row"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_fp8_is_multiplied_by_its_scales(tmp_path: Path, dtype: torch.dtype, by_row: bool, newer: bool) -> None:
    tensors = SMALLEST.unet_tensors()
    file, meant = scaled(tensors, by_row=by_row, dtype=dtype, newer=newer)
    loaded = state(tmp_path / "fp8.safetensors", file)
    expected = state(tmp_path / "plain.safetensors", meant)
    original = state(tmp_path / "original.safetensors", tensors)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    for name, tensor in loaded.items():
        assert (tensor - original[name]).norm() <= 0.2 * original[name].norm()


@pytest.mark.parametrize("by_row", [False, True])
def test_codes_are_what_is_held(tmp_path: Path, by_row: bool) -> None:
    file, _ = scaled(SMALLEST.unet_tensors(), by_row=by_row, dtype=torch.float8_e5m2, newer=True)
    model = denoiser(tmp_path / "fp8.safetensors", file)
    packed, layers = packed_layers(model), packable_layers(model)
    assert len(packed) == len(layers)
    for path, one in packed.items():
        weight = model.get_submodule(path).weight
        assert one.code == torch.float8_e5m2
        assert one.size_bytes == weight.numel() + 4 * (len(weight) if by_row else 1)
        assert weight.untyped_storage().nbytes() == 4


def test_fused_weights_are_cut_with_their_scales(tmp_path: Path) -> None:
    """Flux' query, key and value are one tensor in the file, and halves of its last norm's layer change places."""
    tensors = models.tiny_flux_checkpoint(0)
    for by_row in (False, True):
        file, meant = scaled(tensors, by_row=by_row, dtype=torch.float8_e4m3fn, newer=False, prefix="")
        loaded = state(tmp_path / "fp8.safetensors", file)
        expected = state(tmp_path / "plain.safetensors", meant)
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_a_whole_checkpoint_keeps_its_other_parts(tmp_path: Path) -> None:
    file, _ = scaled(SD1.tensors(), by_row=False, dtype=torch.float8_e4m3fn, newer=False)
    save_file({name: tensor.contiguous() for name, tensor in file.items()}, tmp_path / "whole.safetensors")
    model = load_model(tmp_path / "whole.safetensors")
    assert model.components.vae is not None
    assert model.components.text_encoders


def test_formats_that_are_not_known_are_refused(tmp_path: Path) -> None:
    file, _ = scaled(SMALLEST.unet_tensors(), by_row=False, dtype=torch.float8_e4m3fn, newer=True)
    stem = weights_of(file)[0].removesuffix(".weight")
    said = list(json.dumps({"format": "nvfp4"}).encode())
    with pytest.raises(ModelError, match="is stored as nvfp4; get the bf16, fp16 or fp8"):
        state(tmp_path / "a.safetensors", {**file, f"{stem}.comfy_quant": torch.tensor(said, dtype=torch.uint8)})
    with pytest.raises(ModelError, match="must be JSON with a format"):
        state(tmp_path / "b.safetensors", {**file, f"{stem}.comfy_quant": torch.zeros(3, dtype=torch.uint8)})
    layers = json.dumps({"layers": {stem: {"format": "int8_tensorwise"}}})
    with pytest.raises(ModelError, match="is stored as int8_tensorwise"):
        state(tmp_path / "c.safetensors", file, {"_quantization_metadata": layers})


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file, _ = scaled(SMALLEST.unet_tensors(), by_row=False, dtype=torch.float8_e4m3fn, newer=False)
    name = weights_of(file)[0]
    scale = name.removesuffix("weight") + "scale_weight"
    with pytest.raises(ModelError, match="must be one number or one for each of"):
        state(tmp_path / "a.safetensors", {**file, scale: torch.ones(3)})
    with pytest.raises(ModelError, match="has a scale and must be fp8"):
        codes = packed(SMALLEST.unet_tensors()[name], "int8", torch.float32).tensors[0]
        state(tmp_path / "b.safetensors", {**file, name: codes})


def test_tools_refuse_to_compute_on_codes(tmp_path: Path) -> None:
    file, _ = scaled(SMALLEST.unet_tensors(), by_row=False, dtype=torch.float8_e4m3fn, newer=False)
    path = tmp_path / "fp8.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in file.items()}, path)
    model = open_model(path)
    weight = next(one for one in model.places if one.name == "weight" and len(model.places[one].shape) > 1)
    with pytest.raises(ModelError, match="is scaled fp8, which the tools do not compute on"):
        model.read(weight)
