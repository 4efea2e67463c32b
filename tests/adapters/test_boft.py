"""BOFT: its stages, block sizes, what it keeps, and tensors that do not fit."""

from __future__ import annotations

import pytest
import torch
from layer_cases import randomised
from torch import Tensor, nn

from lorasmith.adapters.boft import BoftAdapter
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.core.errors import OptionError


def fresh(layer: nn.Module, rank: int) -> BoftAdapter:
    return BoftAdapter.create(FrozenLayer(layer), rank=rank, alpha=0.0, seed=0, path="the.layer", zero="up")


@pytest.mark.parametrize(
    ("outputs", "rank", "shape"),
    [
        (32, 2, (5, 16, 2, 2)),
        (32, 8, (3, 4, 8, 8)),
        (320, 16, (6, 32, 10, 10)),
        (320, 8, (6, 32, 10, 10)),  # no smaller block has a power of two of its kind
        (3072, 16, (9, 256, 12, 12)),
        (6, 64, (1, 1, 6, 6)),
    ],
)
def test_shapes(outputs: int, rank: int, shape: tuple[int, ...]) -> None:
    assert fresh(nn.Linear(4, outputs), rank).oft_blocks.shape == shape


@pytest.mark.parametrize("rank", [2, 4, 8, 32])
def test_every_output_depends_on_every_other_by_a_rotation(rank: int) -> None:
    layer = nn.Linear(32, 32)
    adapter = fresh(layer, rank)
    randomised(adapter)
    turn = adapter.merged(torch.eye(32))

    assert (turn != 0).all()
    torch.testing.assert_close(turn @ turn.T, torch.eye(32), rtol=1e-5, atol=1e-5)
    adapter = fresh(nn.Conv2d(16, 32, 1, groups=4), 2)
    randomised(adapter)

    assert adapter.oft_blocks.shape == (3, 16, 2, 2)
    assert torch.equal(adapter.merged(torch.eye(32)) != 0, torch.block_diag(*[torch.ones(8, 8)] * 4) != 0)


@pytest.mark.parametrize("layer", [nn.Linear(4, 7), nn.Conv2d(6, 6, 3, groups=6)], ids=["odd", "depthwise"])
def test_outputs_without_pairs_are_refused(layer: nn.Module) -> None:
    with pytest.raises(OptionError, match=r"^BOFT needs an even number .* the\.layer has [17]; exclude .* or use OFT$"):
        fresh(layer, 4)


def test_no_stage_is_kept_for_the_backward_pass() -> None:
    layer = nn.Linear(16, 64).requires_grad_(False)
    adapter = fresh(layer, 2)
    assert len(adapter.oft_blocks) == 6
    model, x = nn.Sequential(layer), torch.randn(50, 16)
    saved: list[Tensor] = []
    with (
        adapters_attached(model, [Attached({"0": adapter})]),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t),
    ):
        output = model(x)

    assert output.requires_grad
    assert sum(t.numel() == output.numel() for t in saved) <= 1
