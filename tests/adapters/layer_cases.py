"""Layers of every kind that can carry an adapter, with activations smaller than their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["LAYERS", "LayerCase", "randomised", "snapshot"]


@dataclass(frozen=True)
class LayerCase:
    """A kind of layer.

    Attributes:
        make: a new layer with random weights.
        shape: of an input.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A frozen model of two layers, of which the first, `layer`, is the one in question."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential()
            model.add_module("layer", self.make())
            model.add_module("last", nn.Tanh())
            return model.to(dtype).eval().requires_grad_(False)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


LAYERS: Mapping[str, LayerCase] = {
    "linear": LayerCase(lambda: nn.Linear(48, 40), (2, 3, 48)),
    "linear without bias": LayerCase(lambda: nn.Linear(48, 40, bias=False), (2, 3, 48)),
    "conv 1x1": LayerCase(lambda: nn.Conv2d(24, 32, 1), (2, 24, 3, 3)),
    "conv 3x3 stride 2": LayerCase(lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 5, 6)),
    "conv without bias": LayerCase(lambda: nn.Conv2d(8, 12, 3, padding=1, bias=False), (2, 8, 5, 6)),
    "conv dilated": LayerCase(lambda: nn.Conv2d(8, 12, (3, 2), padding=(2, 1), dilation=(2, 1)), (1, 8, 4, 4)),
    "conv in groups": LayerCase(lambda: nn.Conv2d(16, 32, 3, padding=1, groups=4), (2, 16, 4, 4)),
    "conv padded same": LayerCase(lambda: nn.Conv2d(8, 12, 3, padding="same"), (2, 8, 5, 6)),
    "conv1d": LayerCase(lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 7)),
    "conv3d": LayerCase(lambda: nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), (2, 4, 1, 4, 4)),
}


def randomised(module: nn.Module, *, seed: int = 2, std: float = 0.3) -> None:
    """Fill an adapter's tensors with noise, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, std, generator=generator)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a model that attaching and merging must leave as it was."""
    state: dict[str, object] = {}
    for name, parameter in model.named_parameters():
        state[name] = (
            id(parameter),
            parameter.data_ptr(),
            parameter.requires_grad,
            parameter.detach().clone().tolist(),
        )
    for name, module in model.named_modules():
        state[f"{name} (module)"] = (id(module), sorted(module.__dict__))
    return state
