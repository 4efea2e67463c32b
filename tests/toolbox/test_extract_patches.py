"""What patches change is extracted whatever their algorithm, and at the rank of the file's tensors."""

from __future__ import annotations

from collections.abc import Sequence

import cases
import pytest
import torch
from torch import Tensor

from lorasmith.adapters.patch import Patch, patches_applied
from lorasmith.core.adapter_state import DENOISER, AdapterState
from lorasmith.families.model import Model
from lorasmith.toolbox.extract import PatchedPart, extract_patches


def patch_of(state: AdapterState, strength: float = 1.0) -> Patch:
    return Patch({ref.path: one for ref, one in state.adapters.items() if ref.component == DENOISER}, {}, strength)


def extracted(model: Model, patches: Sequence[Patch], rank: int | None) -> AdapterState:
    part = PatchedPart(DENOISER, model.components.denoiser, patches)
    return extract_patches([part], model.names, rank=rank, differences=True)


def change(model: Model, patches: Sequence[Patch]) -> dict[str, Tensor]:
    module = model.components.denoiser
    before = {name: one.detach().float().clone() for name, one in module.named_parameters()}
    with patches_applied(module, patches):
        return {name: one.detach().float() - before[name] for name, one in module.named_parameters()}


@pytest.mark.slow_after(3)
@pytest.mark.parametrize("algorithm", ["loha", "lokr", "oft", "lora"])
@pytest.mark.parametrize("rank", [400, None])
def test_every_algorithm_comes_out(tiny: Model, algorithm: str, rank: int | None) -> None:
    shapes = {ref: shape for ref, shape in cases.shapes_of(tiny, ("attn2.to_q",)).items() if ref.component == DENOISER}
    variant = "dora" if algorithm == "lora" else ""
    patches = [
        patch_of(cases.lora_state(shapes, algorithm, variant=variant), 0.5),
        patch_of(cases.lora_state(shapes, rank=2, seed=1), -1.0),
    ]
    state = extracted(tiny, patches, rank)
    assert (len(state.adapters), len(state.differences)) == ((7, 0) if rank else (0, 7))
    again = Patch(
        {ref.path: one for ref, one in state.adapters.items()},
        {ref.path: one for ref, one in state.differences.items()},
    )
    wanted, found = change(tiny, patches), change(tiny, [again])
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 1e-3 * tensor.norm()


def test_fused_projections_are_one_matrix_of_the_rank(flux: Model) -> None:
    shapes = cases.shapes_of(flux, ("transformer_blocks.0.attn.to_q",))
    shapes = {ref: shape for ref, shape in shapes.items() if not ref.path.startswith("single")}
    patches = [patch_of(cases.lora_state(shapes, rank=2))]
    state = extracted(flux, patches, 8)
    downs = [one.tensors["down"] for one in state.adapters.values()]
    assert all(torch.equal(down, downs[0]) for down in downs)
    wanted, found = change(flux, patches), change(flux, [patch_of(state)])
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 2e-3 * max(float(tensor.norm()), 1e-3)
