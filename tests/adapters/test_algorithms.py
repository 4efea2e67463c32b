"""An algorithm is one module and an entry in the catalogue: one that is invented here learns and is saved, read,
checked, converted, merged and folded in without any other change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith.adapters import algorithms, catalogue
from lorasmith.adapters.adapter import ADAPTERS, Adapter, misfit, taken, wide
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import Attached, Rule, adapters_attached, create_adapters, plan_adapters
from lorasmith.adapters.patch import Patch, patches_merged
from lorasmith.core.adapter_state import DENOISER, AdapterFormat, AdapterState, AdapterWeights, ModuleRef
from lorasmith.families.loading import load_model
from lorasmith.families.locating import built_in_models
from lorasmith.families.model import Model
from lorasmith.formats.container import read_safetensors
from lorasmith.formats.inspect import describe
from lorasmith.formats.lora_file import load_lora, save_lora
from lorasmith.formats.names import ModelNames
from lorasmith.toolbox.check import check_lora
from lorasmith.toolbox.convert import convert_lora
from lorasmith.toolbox.merge import fold_into, merge_loras
from lorasmith.toolbox.model_files import open_model
from tests.covering import slow_except


class Scaling(Adapter):
    """IA³'s idea (Liu et al. 2022, arXiv:2205.05638) for the outputs of any layer: W' = (1 + scales) ∘ W."""

    algorithm = "scaling"
    transforms_output = True
    format = AdapterFormat(
        suffixes={"scales": ".output_scales"},
        needed=(frozenset({"scales"}),),
        rules=({"scales": "out 1"},),
        weight_shape=lambda shapes: (shapes["scales"][0],),
        vital=("scales",),
        rows=lambda weights: {"scales": 1},
        programs=frozenset(),
    )
    about = catalogue.Algorithm(summary="Scales outputs.", rank_meaning="", default_alpha=1.0)

    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.scales = nn.Parameter(scales)

    @classmethod
    def create(cls, layer: FrozenLayer, **settings: Any) -> Scaling:
        return cls(torch.zeros(layer.out_features, 1))

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> Scaling:
        scales = taken(weights, ["scales"])["scales"]
        if scales.shape != (layer.out_features, 1):
            raise misfit(weights, layer)
        return cls(scales)

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        scales = wide(self.scales).to(weight.device).reshape(-1, *(1,) * (weight.ndim - 1))
        return (wide(weight) * (1 + strength * scales)).to(weight.dtype)

    def attached(self, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, strength: float) -> Tensor:
        y = inner(x)
        return y + y * layer.channelwise(strength * self.scales.flatten())


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in vars(ADAPTERS).items():
        monkeypatch.setattr(ADAPTERS, name, copy.copy(value))
    ADAPTERS.register("Scaling")(Scaling)


def scaled(names: ModelNames) -> AdapterState:
    """Random scales on some of the layers, the fused ones of a transformer among them."""
    generator = torch.Generator().manual_seed(0)
    paths = [path for path, shape in names.weight_shapes.items() if path.endswith(("to_q", "to_k", "to_v", "conv1"))]
    tensors = {path: torch.randn(names.weight_shapes[path][0], 1, generator=generator) / 10 for path in paths}
    adapters = {path: AdapterWeights("scaling", {"scales": scales}) for path, scales in tensors.items()}
    return AdapterState({ModuleRef(DENOISER, path): weights for path, weights in adapters.items()})


def weights_with(model: Model, state: AdapterState) -> dict[str, Tensor]:
    denoiser = model.denoiser.module
    with patches_merged(denoiser, [Patch({ref.path: one for ref, one in state.adapters.items()})]):
        return {name: parameter.detach().clone() for name, parameter in denoiser.named_parameters()}


@pytest.fixture(scope="module", params=slow_except(["unet", "transformer"], "transformer"))
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's file in fp32."""
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    if request.param == "transformer":
        save_file(models.tiny_flux_checkpoint(0), path)
        return path
    tensors, metadata = read_safetensors(built_in_models()["lorasmith-tiny"])
    save_file({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, path, metadata)
    return path


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("layout", slow_except(["kohya", "comfy"], "kohya"))
def test_files_and_tools_serve_it(file: Path, layout: str, tmp_path: Path) -> None:
    model, files = load_model(file), open_model(file)
    state, lora = scaled(model.names), tmp_path / "a.safetensors"
    save_lora(lora, state, model.names, layout=layout)
    again = load_lora(lora, model.names)
    assert {ref: one.tensors["scales"].tolist() for ref, one in again.adapters.items()} == {
        ref: one.tensors["scales"].tolist() for ref, one in state.adapters.items()
    }
    assert not again.unknown

    summary = describe(lora)
    assert set(summary.algorithms) == {"scaling"}
    assert (summary.norms, summary.ranks, summary.findings) == ({}, {}, ())
    assert check_lora(lora, file).is_fine
    assert convert_lora(lora, "kohya" if layout == "comfy" else "comfy", tmp_path / "b.safetensors", file).modules

    expected = weights_with(model, state)
    folded = fold_into(files, [(lora, 1.0)], tmp_path / "folded.safetensors").output
    merge_loras([(lora, 1.0)], tmp_path / "merged.safetensors", rank=2**10, model=files)
    cut = load_lora(tmp_path / "merged.safetensors", model.names)
    assert {one.algorithm for one in cut.adapters.values()} == {"lora"}
    found = dict(load_model(folded).denoiser.module.named_parameters()), weights_with(model, cut)
    plain = dict(model.denoiser.module.named_parameters())
    for name, weight in expected.items():
        for one in found:
            torch.testing.assert_close(one[name], weight, rtol=1e-4, atol=1e-5)
    assert not all(torch.equal(weight, plain[name]) for name, weight in expected.items())


@pytest.mark.usefixtures("registered")
def test_it_learns_beside_a_model(tiny: Model) -> None:
    denoiser = tiny.denoiser.module
    plan = plan_adapters(denoiser, [Rule(("*.attn1.to_q",))], rank=4)
    adapters = create_adapters(denoiser, plan, algorithm="Scaling", alpha=None, seed=0, zero="up")
    latents, context = torch.ones(1, 4, 8, 8), tiny.text_encoder.encode("a cat")
    with adapters_attached(denoiser, [Attached(adapters)]):
        tiny.family.predict(denoiser, latents, torch.tensor([400.0]), context).square().sum().backward()
    assert all(parameter.grad.any() for adapter in adapters.values() for parameter in adapter.parameters())


def test_formats_are_there_for_whoever_reads_files_alone() -> None:
    assert [name for name, _ in algorithms.algorithms()] == [name.casefold() for name in catalogue.ALGORITHMS]
