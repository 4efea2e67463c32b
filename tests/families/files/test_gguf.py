"""GGUF checkpoints: the weights that the package `gguf` decodes, kept as codes, and files that are no good."""

from __future__ import annotations

import builtins
import json
import struct
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import models
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import write
from hypothesis import given, settings
from hypothesis import strategies as st
from original_models import SMALLEST, save
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer, packable_layers, packed_layers
from lorasmith.core.errors import ModelError
from lorasmith.core.placement import placed
from lorasmith.families.files.gguf import GgufFile, names_of
from lorasmith.families.loading import load_model, load_structure
from lorasmith.toolbox.model_files import open_model
from tests.covering import slow_except

FLUX = models.tiny_flux_checkpoint(0)
UNET = {name.removeprefix("model.diffusion_model."): one for name, one in SMALLEST.unet_tensors().items()}
WRITABLE = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]  # that the package can encode
CPU = torch.device("cpu")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, unpacked."""
    packed = {f"{path}.weight": one.weight() for path, one in packed_layers(model).items()}
    return {name: packed.get(name, parameter.data).float() for name, parameter in model.named_parameters()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", slow_except([*WRITABLE, Kind.F16, Kind.BF16, Kind.F32], Kind.Q8_0, Kind.BF16))
@pytest.mark.parametrize("tensors", [FLUX, UNET], ids=["flux", "sd1"])
def test_a_file_is_loaded_as_the_weights_it_stands_for(tmp_path: Path, tensors: dict[str, Tensor], kind: Kind) -> None:
    meant = write(tmp_path / "model.gguf", tensors, kind)
    loaded = load_model(tmp_path / "model.gguf").components.denoiser
    plain = load_model(save(tmp_path / "plain.safetensors", meant)).components.denoiser
    assert_same(weights(loaded), weights(plain))
    layers = packable_layers(loaded)
    packed = packed_layers(loaded)
    if kind not in WRITABLE:
        assert not packed
        return
    assert len(packed) > 0.8 * len(layers)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    numbers = sum(one.shape.numel() for one in packed.values())
    assert sum(one.size_bytes for one in packed.values()) == numbers * size / block
    assert {loaded.get_submodule(path).weight.untyped_storage().nbytes() for path in packed} == {4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_predicts_as_the_plain_model_does(tmp_path: Path, dtype: torch.dtype) -> None:
    meant = write(tmp_path / "model.gguf", UNET, Kind.Q8_0)
    models_ = [load_model(tmp_path / "model.gguf"), load_model(save(tmp_path / "plain.safetensors", meant))]
    x, time = models.seeded("x", (2, 4, 8, 8), seed=0), torch.tensor([3.0, 700.0])
    context = models.seeded("context", (2, 7, SMALLEST.unet.context), seed=0)
    found = []
    for one in models_:
        module = one.components.denoiser
        with torch.no_grad(), placed(module, device=CPU, dtype=dtype):
            found.append(module(x.to(dtype), time, encoder_hidden_states=context.to(dtype), return_dict=False)[0])
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_placing_keeps_codes_and_puts_them_back(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", UNET, Kind.Q5_1)
    module = load_model(tmp_path / "model.gguf").components.denoiser
    before = {path: (id(one), one.dtype) for path, one in packed_layers(module).items()}
    whole = weights(module)
    with placed(module, device=CPU, dtype=torch.bfloat16):
        inside = packed_layers(module)
        assert inside.keys() == before.keys()
        for path, one in inside.items():
            layer = module.get_submodule(path)
            assert layer.weight.dtype == FrozenLayer(layer).weight.dtype == one.weight().dtype == torch.bfloat16
            assert layer.weight.untyped_storage().nbytes() == 2
    assert {path: (id(one), one.dtype) for path, one in packed_layers(module).items()} == before
    assert_same(weights(module), whole, 0)


@pytest.mark.parametrize(
    "kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS, *WRITABLE]
)
def test_blocks_become_the_numbers_that_the_package_reads(tmp_path: Path, kind: Kind) -> None:
    """K-quants and others that it cannot encode: any bytes are codes, if the scales in them are finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(0).integers(0, 256, (96, 256 // block * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(rows, kind)
    fine = np.isfinite(expected).all(1)
    rows, expected = rows[fine][:32], expected[fine][:32]
    assert len(rows) == 32
    name = "txt_in.weight"
    writer = gguf.GGUFWriter(tmp_path / "codes.gguf", "flux")
    writer.add_tensor(name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "codes.gguf")
    assert file.shapes == {name: (32, 256)}
    ((_, packed),) = file.read([name])
    assert not isinstance(packed, Tensor)
    torch.testing.assert_close(packed.weight(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_what_the_file_says_of_its_architecture_counts(tmp_path: Path) -> None:
    said = {"lorasmith.architecture": json.dumps({"defaults": {"resolution": 96}})}
    write(tmp_path / "model.gguf", UNET, Kind.Q8_0, metadata=said)
    assert load_model(tmp_path / "model.gguf").defaults.resolution == 96


def test_its_structure_is_known_without_its_weights(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", FLUX, Kind.Q4_0)
    outline, loaded = load_structure(tmp_path / "model.gguf"), load_model(tmp_path / "model.gguf")
    assert outline.names.weight_shapes == loaded.names.weight_shapes
    assert not packed_layers(outline.components.denoiser)


def test_types_that_nobody_decodes_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "flux")
    for name, tensor in FLUX.items():
        if name == "img_in.weight":
            writer.add_tensor(name, np.zeros((tensor.shape[0], 64), dtype=np.int8))
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"img_in.weight of model.gguf is stored as I8, which is not supported .*Q4_0"):
        load_model(tmp_path / "model.gguf")


def test_a_shape_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "sd1")
    writer.add_tensor("x.weight", np.zeros((2, 256), dtype=np.float32))
    writer.add_array("comfy.gguf.orig_shape.x.weight", [3, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"x.weight of .* must have as many numbers as its shape \(3, 3\) says"):
        load_model(tmp_path / "model.gguf")


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model.gguf", UNET, Kind.Q8_0)
    original = builtins.__import__

    def lacking(name: str, *rest: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(ModelError, match="needs the package gguf; install it with: pip install gguf"):
        load_model(tmp_path / "model.gguf")


def test_the_tools_refuse_it(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", UNET, Kind.Q8_0)
    with pytest.raises(ModelError, match="the tools do not compute on"):
        open_model(tmp_path / "model.gguf")


def header(entry: bytes = b"", *, tensors: int = 0, entries: int = 1, tail: bytes = b"") -> bytes:
    """A GGUF header with one entry named `k`, of which `entry` is type and value."""
    named = (1).to_bytes(8, "little") + b"k" + entry if entry else b""
    counts = b"".join(count.to_bytes(8, "little") for count in (tensors, entries))
    return b"GGUF" + (3).to_bytes(4, "little") + counts + named + tail


ARRAY = (9).to_bytes(4, "little")
TEXTS = ARRAY + (8).to_bytes(4, "little")
ONE, TWO, MANY = (count.to_bytes(8, "little") for count in (1, 2, 2**40))
SHAPE = b"comfy.gguf.orig_shape.t"


def tensor(*sizes: int, kind: int = 0, offset: int = 0) -> bytes:
    """The entry of a tensor named `t`, with sizes in the file's order."""
    shape = b"".join(size.to_bytes(8, "little") for size in sizes)
    return (
        ONE
        + b"t"
        + len(sizes).to_bytes(4, "little")
        + shape
        + kind.to_bytes(4, "little")
        + offset.to_bytes(8, "little")
    )


def shaped(value: bytes) -> bytes:
    """A file of one tensor of 32 numbers, whose shape the metadata says."""
    entry = len(SHAPE).to_bytes(8, "little") + SHAPE + value
    content = header(tensors=1, tail=entry + tensor(8, 4))
    return content + bytes(-len(content) % 32 + 128)


HEADERS = {
    "deep arrays": (header(ARRAY + (ARRAY + ONE) * 5_000), "nested too deeply"),
    "a large array": (header(ARRAY + ARRAY + MANY), "more than 4,000,000 elements"),
    "arrays that are large together": (
        header(ARRAY + ARRAY + TWO + TEXTS[4:] + ONE + bytes(8) + TEXTS[4:] + (3_999_999).to_bytes(8, "little")),
        "more than 4,000,000 elements",
    ),
    "many entries": (header(entries=100_001), "more than the 100,000"),
    "many tensors": (header(entries=0, tensors=2**40), "more than the 100,000"),
    "many dimensions": (
        header(entries=0, tensors=1, tail=ONE + b"t" + (1_000).to_bytes(4, "little") + bytes(9_000)), "1,000 dimensions"
    ),
    "sizes that overflow": (header(entries=0, tensors=1, tail=tensor(2**33 + 1, 2**31)), "tensors end at byte"),
    "an offset beyond the file": (header(entries=0, tensors=1, tail=tensor(8, offset=2**63)), "tensors end at byte"),
    "an offset that wraps": (header(entries=0, tensors=1, tail=tensor(8, offset=2**64 - 64)), "tensors end at byte"),
    "half a block": (header(entries=0, tensors=1, tail=tensor(33, kind=8)), r"type Q8_0 has the shape \(33,\)"),
    "a size of nothing": (header(entries=0, tensors=1, tail=tensor(0, 8)), r"has the shape \(8, 0\)"),
    "an unknown type": (header(entries=0, tensors=1, tail=tensor(8, kind=999)), "type 999 of a tensor is not known"),
    "a tensor twice": (header(entries=0, tensors=2, tail=2 * tensor(8)) + bytes(99), "has a tensor twice"),
    "tensors on one another": (
        header(entries=0, tensors=2, tail=tensor(8) + tensor(8).replace(b"t", b"u")) + bytes(99), "tensors overlap"
    ),
    "infinite sizes": (shaped(ARRAY + (6).to_bytes(4, "little") + ONE + b"\0\0\x80\x7f"), r"its shape \(\) says"),
    "negative sizes": (
        shaped(ARRAY + struct.pack("<IQii", 5, 2, -4, -8)),
        r"its shape \(-4, -8\) says",
    ),
}  # fmt: skip


def test_headers_without_bounds_are_refused(tmp_path: Path) -> None:
    for case in HEADERS:
        content, said = HEADERS[case]
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ModelError, match=said):
            GgufFile(tmp_path / "x.gguf")


def test_a_vocabulary_is_passed_over_without_an_object_for_each_element(tmp_path: Path) -> None:
    elements = ARRAY + bytes(4) + (3_900_000).to_bytes(8, "little") + bytes(3_900_000)
    (tmp_path / "x.gguf").write_bytes(header(elements) + bytes(32))
    tracemalloc.start()
    try:
        assert not GgufFile(tmp_path / "x.gguf").shapes
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_a_weight_by_two_names_is_refused() -> None:
    with pytest.raises(ModelError, match="must not have a weight by two names"):
        names_of("qwen3", ["token_embd.weight", "model.embed_tokens.weight"])


@pytest.mark.slow
@settings(max_examples=60)
@given(st.integers(0, 2**16), st.integers(0, 255), st.floats(0, 1))
def test_damage_is_told_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, share: float
) -> None:
    """A byte of the header is another, or the file is cut short; what loads all the same is a model."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    whole = folder / "whole.gguf"
    if not whole.exists():
        write(whole, UNET, Kind.Q8_0)
    data = bytearray(whole.read_bytes())
    data[4 + place % 20_000] = value
    damaged = folder / "damaged.gguf"
    damaged.write_bytes(data[: max(4, int(len(data) * share))] if value % 2 else data)
    try:
        load_model(damaged)
    except ModelError as error:
        assert damaged.name in str(error) or "checkpoint" in str(error) or "architecture" in str(error)
