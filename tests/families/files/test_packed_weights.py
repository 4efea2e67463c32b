"""Checkpoints with packed weights: they stay so, and what they are computed with is the weight, never the code."""

from __future__ import annotations

import json
from pathlib import Path

import models
import packed_files
import pytest
import torch
from original_models import SD1, SMALLEST
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import packable_layers, packed_layers
from lorasmith.core.errors import ModelError
from lorasmith.core.quantization import Packed
from lorasmith.families.files.packed_weights import PackedWeights
from lorasmith.families.loading import load_model, load_structure
from lorasmith.toolbox.model_files import open_model
from tests.covering import slow_except

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


@pytest.mark.pairwise(
    newer={"scale_weight": False, "weight_scale": True},
    by_row={"by tensor": False, "by row": True},
    dtype={"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2},
)
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
        assert one.tensors[0].dtype == torch.float8_e5m2
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
    for name in ("convrot_w4a4", "asym_w4a8_int8"):
        said = packed_files.described(format=name)
        with pytest.raises(
            ModelError, match=rf"{stem} of a.safetensors is stored as {name}; get the bf16, fp16 or fp8"
        ):
            state(tmp_path / "a.safetensors", {**file, f"{stem}.comfy_quant": said})
    with pytest.raises(ModelError, match="must be JSON with a format"):
        state(tmp_path / "b.safetensors", {**file, f"{stem}.comfy_quant": torch.zeros(3, dtype=torch.uint8)})
    layers = json.dumps({"layers": {stem: {"format": "svdquant"}}})
    with pytest.raises(ModelError, match="is stored as svdquant"):
        state(tmp_path / "c.safetensors", file, {"_quantization_metadata": layers})
    with pytest.raises(ModelError, match="must be JSON with a format"):
        state(tmp_path / "d.safetensors", file, {"_quantization_metadata": "[1]"})


NAME = "x.weight"
WEIGHT = models.seeded("damage", (32, 64), seed=0)


def read(parts: Tensors, metadata: dict[str, str] | None = None) -> Packed | Tensor:
    """A layer `x` of these tensors."""
    return PackedWeights("file", {f"x.{leaf}": one for leaf, one in parts.items()}, metadata or {}).read(NAME)


DAMAGE: dict[str, tuple[str, dict[str, Tensor | None], str]] = {
    "fp8 without a scale": ("fp8", {"weight_scale": None}, "must have a weight_scale, but has none"),
    "fp8 with other scales": ("fp8", {"weight_scale": torch.ones(3)}, "of 1 or 32 numbers, but it has 3"),
    "fp8 of other codes": ("fp8", {"weight": WEIGHT}, "codes in float8_e4m3fn or float8_e5m2, but has float32"),
    "fp8 with whole scales": ("fp8", {"weight_scale": torch.ones((), dtype=torch.int32)}, "but it is int32"),
    "int8 without a scale": ("int8", {"weight_scale": None}, "must have a weight_scale, but has none"),
    "int8 of other codes": ("int8", {"weight": WEIGHT.half()}, "must have codes in int8, but has float16"),
    "int8 with other scales": ("int8 by row", {"weight_scale": torch.ones(64, 1)}, "of 1 or 32 numbers, but it has 64"),
    "groups that do not divide": (
        "int8 with ConvRot",
        {"comfy_quant": packed_files.described(format="int8_tensorwise", convrot=True)},
        "power of 4 that divides their number 64, but the group is 256",
    ),
    "groups of no power of 4": (
        "int8 with ConvRot",
        {"comfy_quant": packed_files.described(format="int8_tensorwise", convrot=True, convrot_groupsize=32)},
        "but the group is 32",
    ),
    "groups whose rotation is larger than any": (
        "int8 with ConvRot",
        {"comfy_quant": packed_files.described(format="int8_tensorwise", convrot=True, convrot_groupsize=4**9)},
        "but the group is 262144",
    ),
    "codes of one dimension": ("fp8", {"weight": torch.ones(64).to(torch.float8_e4m3fn)}, "must have 2 or more"),
    "nvfp4 without a scale of blocks": ("nvfp4", {"weight_scale": None}, "must have a weight_scale, but has none"),
    "nvfp4 without a scale": ("nvfp4", {"weight_scale_2": None}, "must have a weight_scale_2, but has none"),
    "nvfp4 with scales of other blocks": ("nvfp4", {"weight_scale": torch.zeros(32, 4, dtype=torch.uint8)}, "of 512"),
    "nvfp4 with plain scales": ("nvfp4", {"weight_scale": torch.ones(128, 4)}, "in float8_e4m3fn, but it is float32"),
    "nvfp4 of other codes": ("nvfp4", {"weight": WEIGHT}, "must have codes in uint8, but has float32"),
    "nvfp4 of a convolution": (
        "nvfp4",
        {"weight": torch.zeros(8, 8, 3, 3, dtype=torch.uint8)},
        "must have 2 dimensions",
    ),
    "nvfp4 in half a block": ("nvfp4", {"weight": torch.zeros(32, 20, dtype=torch.uint8)}, "multiple of 16 inputs"),
    "nvfp4 with other factors": ("nvfp4 with factors", {"pre_quant_scale": torch.ones(32)}, "of 64 numbers"),
    "mxfp8 without a scale": ("mxfp8", {"weight_scale": None}, "must have a weight_scale, but has none"),
    "mxfp8 with scales in fp8": ("mxfp8", {"weight_scale": torch.zeros(128, 4).to(torch.float8_e4m3fn)}, "e8m0fnu"),
    "mxfp8 in half a block": ("mxfp8", {"weight": torch.zeros(32, 48).to(torch.float8_e4m3fn)}, "multiple of 32"),
}
"""A kind, its tensors that are others or missing, and a part of the message."""


def test_damage_is_one_sentence() -> None:
    for case in DAMAGE:
        kind, changes, message = DAMAGE[case]
        parts = {**packed_files.pack(kind, WEIGHT)[0], **changes}
        with pytest.raises(ModelError, match=r"x.weight of file is stored as .* get it again") as raised:
            read({leaf: tensor for leaf, tensor in parts.items() if tensor is not None})
        assert message in str(raised.value)


def test_formats_that_are_no_json_are_refused() -> None:
    for said in [
        torch.frombuffer(bytearray(b"[" * 50_000), dtype=torch.uint8),
        torch.frombuffer(bytearray(b'{"format": NaN}'), dtype=torch.uint8),
        torch.zeros(2**17, dtype=torch.uint8),
        torch.ones(3),
    ]:
        tensors = {"x.weight": torch.zeros(4, 4, dtype=torch.int8), "x.comfy_quant": said}
        with pytest.raises(ModelError, match="must be JSON with a format for each"):
            PackedWeights("file", tensors, {})
        with pytest.raises(ModelError, match="must be JSON with a format for each"):
            PackedWeights("file", {}, {"_quantization_metadata": "[" * 50_000})


def test_scales_without_a_format_are_of_fp8(tmp_path: Path) -> None:
    parts, meant = packed_files.pack("fp8", WEIGHT)
    del parts["comfy_quant"]
    packed = read(parts)
    assert isinstance(packed, Packed)
    assert torch.equal(packed.weight(), meant)
    with pytest.raises(ModelError, match="must have codes in float8"):
        read({**parts, "weight": torch.zeros(32, 64, dtype=torch.int8)})


def test_formats_in_the_metadata_count() -> None:
    """Also with the denoiser's prefix left out, which ComfyUI cuts off before it looks for them."""
    for nested in [False, True]:
        for prefix in ["", "model.diffusion_model."]:
            parts, meant = packed_files.pack("int8 with ConvRot", WEIGHT)
            del parts["comfy_quant"]
            details = {"convrot": True, "convrot_groupsize": packed_files.GROUP}
            said = {"format": "int8_tensorwise", **({"params": details} if nested else details)}
            metadata = {"_quantization_metadata": json.dumps({"layers": {f"{prefix}x": said, f"{prefix}gone": said}})}
            tensors = {f"model.diffusion_model.x.{leaf}": one for leaf, one in parts.items()}
            packed = PackedWeights("file", {"y.x.bias": torch.ones(3), **tensors}, metadata).read(
                "model.diffusion_model.x.weight"
            )
            assert isinstance(packed, Packed)
            torch.testing.assert_close(packed.weight(), meant, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_scales_of_blocks_may_be_bytes(kind: str) -> None:
    parts, meant = packed_files.pack(kind, WEIGHT)
    packed = read(parts | {"weight_scale": parts["weight_scale"].view(torch.uint8)})
    assert isinstance(packed, Packed)
    torch.testing.assert_close(packed.weight(), meant, rtol=1e-6, atol=1e-7)


def test_factors_of_the_input_are_in_the_weight() -> None:
    """ComfyUI's layer multiplies its input by `pre_quant_scale` before the product."""
    parts, _ = packed_files.pack("nvfp4 with factors", WEIGHT)
    factors = parts.pop("pre_quant_scale")
    x = models.seeded("x", (5, 64), seed=0)
    without, found = read(parts), read(parts | {"pre_quant_scale": factors})
    assert isinstance(without, Packed)
    assert isinstance(found, Packed)
    torch.testing.assert_close(x @ found.weight().t(), (x * factors) @ without.weight().t())


@pytest.mark.parametrize("kind", slow_except(packed_files.KINDS, "nvfp4"))
def test_a_checkpoint_is_the_weights_it_stands_for(tmp_path: Path, kind: str) -> None:
    """Fused queries, keys and values are cut and halves swapped, and all of it is packed still."""
    meant = packed_files.write(tmp_path / "packed.safetensors", models.tiny_flux_checkpoint(0), kind)
    module = load_model(tmp_path / "packed.safetensors").components.denoiser
    packed = packed_layers(module)
    assert len(packed) == len(packable_layers(module))
    expected = state(tmp_path / "plain.safetensors", meant)
    for path, one in packed.items():
        torch.testing.assert_close(one.weight(), expected[f"{path}.weight"], rtol=1e-6, atol=1e-6, msg=path)


def test_formats_and_plain_layers_may_be_mixed(tmp_path: Path) -> None:
    """As in files called fp8mixed and the like, and whose structure is known without reading them."""
    kinds = [*packed_files.KINDS, None]
    file, meant = {}, {}
    for number, (name, tensor) in enumerate(models.tiny_flux_checkpoint(0).items()):
        kind = kinds[number % len(kinds)]
        file[name] = meant[name] = tensor.to(torch.bfloat16)
        if tensor.ndim == 2 and kind is not None:
            parts, meant[name] = packed_files.pack(kind, tensor)
            file |= {f"{name.removesuffix('weight')}{leaf}": one for leaf, one in parts.items()}
    loaded = state(tmp_path / "mixed.safetensors", file)
    expected = state(tmp_path / "plain.safetensors", meant)
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=1e-6, atol=1e-6, msg=name)
    outline = load_structure(tmp_path / "mixed.safetensors")
    assert outline.names.weight_shapes == load_structure(tmp_path / "plain.safetensors").names.weight_shapes


def test_tools_refuse_to_compute_on_codes(tmp_path: Path) -> None:
    file, _ = scaled(SMALLEST.unet_tensors(), by_row=False, dtype=torch.float8_e4m3fn, newer=False)
    path = tmp_path / "fp8.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in file.items()}, path)
    model = open_model(path)
    weight = next(one for one in model.places if one.name == "weight" and len(model.places[one].shape) > 1)
    with pytest.raises(ModelError, match="is packed, and the tools do not compute on codes"):
        model.read(weight)
