"""An algorithm is one class: that of the example of an extension learns and is saved, read, checked, converted, merged
and folded in."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorasmith.adapters import algorithms, catalogue
from lorasmith.adapters.inject import Attached, Rule, adapters_attached, create_adapters, plan_adapters
from lorasmith.adapters.patch import Patch, patches_merged
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
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
from tests.installed import EXAMPLE, install


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path / "packages", EXAMPLE)


def scaled(names: ModelNames) -> AdapterState:
    """Random scales on some of the layers, the fused ones of a transformer among them."""
    generator = torch.Generator().manual_seed(0)
    paths = [path for path, shape in names.weight_shapes.items() if path.endswith(("to_q", "to_k", "to_v", "conv1"))]
    tensors = {path: torch.randn(names.weight_shapes[path][0], 1, generator=generator) / 10 for path in paths}
    adapters = {path: AdapterWeights("ia3", {"scales": scales}) for path, scales in tensors.items()}
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


@pytest.mark.usefixtures("installed")
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
    assert set(summary.algorithms) == {"ia3"}
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


@pytest.mark.usefixtures("installed")
def test_it_learns_beside_a_model(tiny: Model) -> None:
    denoiser = tiny.denoiser.module
    plan = plan_adapters(denoiser, [Rule(("*.attn1.to_q",))], rank=4)
    adapters = create_adapters(denoiser, plan, algorithm="IA3", alpha=None, seed=0, zero="up")
    latents, context = torch.ones(1, 4, 8, 8), tiny.text_encoder.encode("a cat")
    with adapters_attached(denoiser, [Attached(adapters)]):
        tiny.family.predict(denoiser, latents, torch.tensor([400.0]), context).square().sum().backward()
    assert all(parameter.grad.any() for adapter in adapters.values() for parameter in adapter.parameters())


def test_formats_are_there_for_whoever_reads_files_alone() -> None:
    assert [name for name, _ in algorithms.algorithms()] == [name.casefold() for name in catalogue.ALGORITHMS]
