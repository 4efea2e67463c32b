"""What the tools write is applied by diffusers in full and as it is meant, whatever ranks and alphas come out.

In kohya's layout diffusers takes one alpha for all attention layers of a UNet, so that files with several would be
applied at other strengths.
"""

from __future__ import annotations

import copy
from pathlib import Path

import cases
import pytest
from torch import Tensor, nn

from lorasmith.core.adapter_state import DENOISER, AdapterState
from lorasmith.families.model import Model
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.lora_file import load_lora
from lorasmith.toolbox.merge import merge_loras
from lorasmith.toolbox.resize import resize

ENDS = ("to_q", "to_k", "proj_in", "conv1", "ff.net.2")


@pytest.fixture
def state(tiny: Model) -> AdapterState:
    """A LoRA with a rank and an alpha of its own for every third module."""
    shapes = {ref: shape for ref, shape in cases.shapes_of(tiny, ENDS).items() if ref.component == DENOISER}
    return AdapterState(
        {
            ref: cases.random_weights(shape, rank=2 + n % 3, alpha=1.0 + n % 3, seed=n)
            for n, (ref, shape) in enumerate(shapes.items())
        }
    )


def in_diffusers(path: Path, unet: nn.Module) -> dict[str, Tensor]:
    """The change of each weight that diffusers makes, by module path."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    tensors, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(path.parent), weight_name=path.name, return_lora_metadata=True
    )
    unet = copy.deepcopy(unet)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(tensors, alphas, unet, metadata=metadata)
    return {
        path: module.get_delta_weight(module.active_adapters[0]).detach().flatten(1).double()
        for path, module in unet.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def assert_applied(path: Path, tiny: Model) -> None:
    expected = load_lora(path, tiny.names).adapters
    applied = in_diffusers(path, tiny.components.denoiser)
    assert applied.keys() == {ref.path for ref in expected}
    for ref, weights in expected.items():
        change = cases.weight_change(weights)
        assert float((applied[ref.path] - change).norm()) < 1e-5 * float(change.norm()), ref


def test_a_merge_is_applied(tiny: Model, state: AdapterState, tmp_path: Path) -> None:
    other = cases.lora_state({ref: cases.shapes_of(tiny, ENDS)[ref] for ref in list(state.adapters)[::2]}, seed=5)
    parts = [
        (cases.saved(tmp_path / "a.safetensors", state, tiny.names), 0.7),
        (cases.saved(tmp_path / "b.safetensors", other, tiny.names), -1.2),
    ]
    assert_applied(merge_loras(parts, tmp_path / "out.safetensors").output, tiny)
    assert_applied(merge_loras(parts, tmp_path / "cut.safetensors", rank=3).output, tiny)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_ranks_by_energy_are_applied(tiny: Model, state: AdapterState, tmp_path: Path, layout: str) -> None:
    path = cases.saved(tmp_path / "a.safetensors", state, tiny.names, layout)
    report = resize(path, tmp_path / "out.safetensors", energy=0.7)
    assert len({one.after for one in report.modules}) > 1
    assert_applied(report.output, tiny)
    if layout == "kohya":
        assert check_safetensors(report.output).metadata["ss_network_alpha"] != "Dynamic"
