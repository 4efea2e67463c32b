"""Training and drawing on checkpoints that are quantized: on the weights that their codes stand for, kept as codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import packed_files
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import write
from lever_cases import flux_dataset, one_step
from safetensors.torch import save_file
from test_engine import assert_same, tensors
from torch import Tensor

from lorasmith.adapters.frozen_layer import packed_layers
from lorasmith.core.errors import LoraError
from lorasmith.core.quantized_products import has_products
from lorasmith.families.loading import load_model
from lorasmith.families.model import Denoiser, Model
from lorasmith.runs.library import train
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Warned
from lorasmith.training.job import plan_job
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.fingerprint import fingerprint
from tests.covering import slow_except

Pair = tuple[Model, Model]


def write_gguf(path: Path) -> dict[str, Tensor]:
    """Returns what it stands for."""
    return write(path, models.tiny_flux_checkpoint(0), Kind.Q8_0)


def write_fp8(path: Path) -> dict[str, Tensor]:
    """Scaled, one scale for a tensor."""
    file: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    meant = {}
    for name, tensor in models.tiny_flux_checkpoint(0).items():
        file[name] = meant[name] = tensor.contiguous()
        if tensor.ndim > 1:
            scale = tensor.abs().max() / 448
            file[name] = (tensor / scale).to(torch.float8_e4m3fn).contiguous()
            file[name.removesuffix(".weight") + ".scale_weight"] = scale
            meant[name] = file[name].float() * scale
    save_file(file, path)
    return meant


def make_pair(folder: Path, kind: str) -> Pair:
    path = folder / ("model.gguf" if kind == "gguf" else "model.safetensors")
    if kind in ("gguf", "fp8"):
        meant = (write_gguf if kind == "gguf" else write_fp8)(path)
    else:
        meant = packed_files.write(path, models.tiny_flux_checkpoint(0), kind)
    save_file(meant, folder / "plain.safetensors")
    return load_model(path), load_model(folder / "plain.safetensors")


@pytest.fixture(scope="module", params=["gguf", "fp8"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model whose weights are codes, and one with the same weights as plain numbers."""
    return make_pair(tmp_path_factory.mktemp("pair"), request.param)


def run(model: Model, **settings: Any) -> TrainResult:
    base = {"steps": 3, "rank": 4, "training_dtype": "fp32", "learning_rate": 1e-3, "lora_dtype": "fp32", "seed": 3}
    return train(model, flux_dataset(), **(base | {"targets": "attention"} | settings))


CHANGES: list[dict[str, Any]] = [
    {},
    {"offloading": True},
    {"checkpoint_depth": 1},
    {"activations": "selective"},
    {"quantization": "nf4"},
]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("changes", slow_except(CHANGES, CHANGES[0], CHANGES[-1]), ids=str)
def test_a_step_is_that_of_the_plain_weights(pair: Pair, changes: dict[str, Any]) -> None:
    assert_same_step(pair, changes)


def assert_same_step(pair: Pair, changes: dict[str, Any]) -> None:
    packed, plain = pair
    expected = one_step(plain, flux_dataset(), {"quantization": changes.get("quantization", "none")})
    found = one_step(packed, flux_dataset(), changes)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    assert packed_layers(packed.components.denoiser)


NEEDS_INT8 = pytest.mark.skipif(
    not has_products("int8", torch.device("cpu")), reason="sums of int8 products saturate here"
)
MULTIPLIED = [
    *(pytest.param(kind, "int8", marks=NEEDS_INT8) for kind in ("int8", "int8 by row", "int8 with ConvRot")),
    ("fp8", "fp8"),
    ("mxfp8", "mxfp8"),
    ("nvfp4 with factors", "nvfp4"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "products"), MULTIPLIED)
@pytest.mark.parametrize("changes", [{}, {"offloading": True}, {"checkpoint_depth": 1}], ids=str)
def test_codes_of_a_file_are_multiplied_in_their_format(
    tmp_path: Path, kind: str, products: str, changes: dict[str, Any]
) -> None:
    model, _ = make_pair(tmp_path, kind)
    plain = one_step(model, flux_dataset(), changes)
    found = one_step(model, flux_dataset(), {"products": products, **changes})
    assert found["loss"] != pytest.approx(plain["loss"], rel=1e-6)
    torch.testing.assert_close(found["loss"], plain["loss"], rtol=0.03, atol=0)
    one, other = (torch.cat([t.flatten() for name, t in each.items() if name != "loss"]) for each in (found, plain))
    assert torch.cosine_similarity(one, other, dim=0) > (0.9 if products == "nvfp4" else 0.97)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("bypass_mode", slow_except([False, True], True))
def test_training_works_whatever_bypass_mode_says(pair: Pair, bypass_mode: bool) -> None:
    packed, plain = (run(model, bypass_mode=bypass_mode) for model in pair)
    assert packed.losses == pytest.approx(plain.losses, rel=1e-4)
    assert_same(tensors(packed), tensors(plain), rtol=1e-2)


def test_it_says_what_is_rounded_twice(pair: Pair) -> None:
    said: list[str] = []
    run(pair[0], steps=1, quantization="int8", on_event=lambda event: said.extend(_warnings(event)))
    assert any("quantized in the checkpoint already" in one for one in said)


def _warnings(event: object) -> list[str]:
    return [event.message] if isinstance(event, Warned) else []


def predicted(denoiser: Denoiser) -> Tensor:
    sample = flux_dataset().samples[0]
    with torch.no_grad(), denoiser.active():
        return denoiser.predict(sample.latents[None], torch.tensor([0.5]), sample.conditioning)


@pytest.mark.slow
def test_a_lora_runs_beside_codes_and_is_not_merged_into_them(pair: Pair) -> None:
    packed, plain = pair
    lora = run(packed, learning_rate=1e-2).lora
    with pytest.raises(LoraError, match=r"plain weights only, but \d+ of \d+ layers .* set bypass on"):
        lora.applied_to(packed.denoiser, bypass=False)
    expected = predicted(run(plain, learning_rate=1e-2).lora.applied_to(plain.denoiser, bypass=True))
    for bypass in (None, True):
        found = predicted(lora.applied_to(packed.denoiser, bypass=bypass))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, predicted(plain.denoiser), atol=1e-2)


@pytest.mark.parametrize("kind", slow_except(packed_files.KINDS, "int8 with ConvRot"))
def test_it_predicts_what_its_weights_do(tmp_path: Path, kind: str) -> None:
    packed, plain = make_pair(tmp_path, kind)
    tensors = models.tiny_flux_checkpoint(0)
    save_file({name: one.contiguous() for name, one in tensors.items()}, tmp_path / "original.safetensors")
    original = predicted(load_model(tmp_path / "original.safetensors").denoiser)
    found = predicted(packed.denoiser)
    torch.testing.assert_close(found, predicted(plain.denoiser), rtol=1e-4, atol=1e-4)
    assert 0 < (found - original).norm() < 5 * packed_files.ROUNDING[kind] * original.norm()


@pytest.mark.slow_after(1)
def test_adapters_start_from_the_weights_with_what_runs_beside_them(pair: Pair) -> None:
    packed, plain = pair
    lora = run(plain, learning_rate=1e-2).lora
    found, expected = (
        plan_job(lora.applied_to(model.denoiser, bypass=True), TrainConfig(rank=4, dora="output", targets="attention"))
        for model in pair
    )
    before = packed_layers(packed.components.denoiser)
    for path, adapter in expected.adapters.items():
        for name, tensor in adapter.to_weights().tensors.items():
            torch.testing.assert_close(found.adapters[path].to_weights().tensors[name], tensor, rtol=1e-5, atol=1e-6)
    bare = plan_job(packed.denoiser, TrainConfig(rank=4, dora="output", targets="attention"))
    scales = [
        {path: one.to_weights().tensors["dora_scale"] for path, one in job.adapters.items()} for job in (found, bare)
    ]
    assert any(not torch.equal(scale, scales[1][path]) for path, scale in scales[0].items())
    assert packed_layers(packed.components.denoiser) == before


@pytest.mark.slow_after(1)
def test_a_difference_of_a_whole_weight_runs_beside_codes(pair: Pair) -> None:
    packed, plain = pair
    lora = run(plain, algorithm="Full", learning_rate=1e-2).lora
    expected = predicted(lora.applied_to(plain.denoiser))
    torch.testing.assert_close(predicted(lora.applied_to(packed.denoiser)), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, predicted(plain.denoiser), atol=1e-2)


def test_a_model_of_other_codes_is_another_one(pair: Pair) -> None:
    assert_codes_are_in_the_print(pair)


def assert_codes_are_in_the_print(pair: Pair) -> None:
    packed, plain = pair
    module = packed.components.denoiser
    prints = [base_print(model) for model in (packed, packed, plain)]
    assert prints[0] == prints[1] != prints[2]
    codes = packed_layers(module)["transformer_blocks.0.attn.to_q"].tensors[0].view(torch.uint8)
    original = codes.clone()
    codes.zero_()
    assert base_print(packed) != prints[0]
    codes.copy_(original)
    assert base_print(packed) == prints[0]


def base_print(model: Model) -> object:
    return fingerprint(plan_job(model.denoiser, TrainConfig(rank=4)), flux_dataset(), None)["base"]
