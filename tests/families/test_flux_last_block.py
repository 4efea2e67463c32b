"""The shortened last block beside diffusers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lorasmith.families.base import FAMILIES
from lorasmith.families.parts.flux_layout import attention_arguments

TEXT, PICTURE = 5, 12


@pytest.fixture
def network() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).double()


def predicted(network: Any, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Of two samples, one with padded text."""
    given = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True] * TEXT, [True] * 3 + [False] * 2])

    def random(*shape: int) -> Tensor:
        return scale * torch.randn(shape, generator=given, dtype=torch.float64).to(dtype)

    result: Tensor = network(
        hidden_states=random(2, PICTURE, 4),
        encoder_hidden_states=random(2, TEXT, 8),
        pooled_projections=random(2, 8),
        timestep=torch.tensor([0.2, 0.7], dtype=dtype),
        img_ids=torch.randn(PICTURE, 3, generator=given),
        txt_ids=torch.zeros(TEXT, 3),
        joint_attention_kwargs=attention_arguments(mask, PICTURE),
        return_dict=False,
    )[0]
    return result


def test_predictions_and_gradients_are_those_of_diffusers(network: Any) -> None:
    rows: list[int] = []
    last = network.single_transformer_blocks[-1]
    last.proj_mlp.register_forward_hook(lambda _module, _given, result: rows.append(result.shape[1]))

    def numbers() -> tuple[Tensor, ...]:
        y = predicted(network)
        return y, *torch.autograd.grad(y.square().sum(), [*network.parameters()])

    expected = numbers()
    with FAMILIES["flux1"].unread_left_out(network):
        found = numbers()
    assert rows == [TEXT + PICTURE, PICTURE]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # rotary embeddings are in fp32
    assert "forward" not in vars(last)


def test_fp16_is_clipped_as_by_diffusers(network: Any) -> None:
    network.half()
    last = network.single_transformer_blocks[-1]
    last.norm.linear.bias.data[-16:] = 2.0  # the gate
    last.proj_out.bias.data[::2] = 60000.0
    expected = predicted(network, torch.float16)
    with FAMILIES["flux1"].unread_left_out(network):
        found = predicted(network, torch.float16)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
