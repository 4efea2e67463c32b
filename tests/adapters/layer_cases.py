"""Layers of every kind that can carry an adapter, with activations smaller than their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter
from lorasmith.adapters.catalogue import facts_of
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import load_adapters
from lorasmith.adapters.lora import LoraAdapter
from lorasmith.adapters.variants import InputDora, OutputDora, PissaAdapter
from lorasmith.core.adapter_state import AdapterWeights


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
        torch.default_generator.manual_seed(0)
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


class Small(nn.Module):
    """A convolution and two Linear layers, one without bias: what peers are compared on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.inner = nn.Linear(6, 8)
        self.outer = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.gelu(self.inner(self.conv(x).flatten(2).transpose(1, 2))))


@dataclass(frozen=True)
class Kind:
    """A way to adapt a layer: an algorithm, or a variant of one.

    Attributes:
        create: as `Adapter.create`.
        algorithm: registered name that its tensors are saved under.
        start_is_random: whether initial values depend on seed and path.
        gradient_is_exact: whether gradients are the derivatives of the output, with nothing held constant on purpose.
    """

    create: Callable[..., Adapter]
    algorithm: str
    start_is_random: bool = True
    gradient_is_exact: bool = True

    def from_weights(self, weights: AdapterWeights, layer: FrozenLayer) -> Adapter:
        return load_adapters(nn.ModuleDict({"layer": layer.module}), {"layer": weights})["layer"]


def dora_around(algorithm: str, kind: Any) -> Callable[..., Adapter]:
    return lambda layer, **settings: kind.around(ADAPTERS[algorithm].create(layer, **settings), layer)


def pissa(layer: FrozenLayer, *, rank: int, **settings: Any) -> PissaAdapter:
    """Of a lower rank, as twice the tests' rank is the whole width of the smallest layer."""
    return PissaAdapter.create(layer, rank=rank - 1, **settings)


KINDS: Mapping[str, Kind] = {
    **{
        name: Kind(algorithm.create, name, start_is_random="zero_init" not in facts_of(name).unused)
        for name, algorithm in ADAPTERS.items()
    },
    "Tucker": Kind(LoraAdapter.create_tucker, "LoRA"),
    "PiSSA": Kind(pissa, "LoRA", start_is_random=False),
    "DoRA per output": Kind(OutputDora.create, "LoRA", gradient_is_exact=False),
    "DoRA per input": Kind(InputDora.create, "LoRA", gradient_is_exact=False),
    "DoRA per input, LoHa": Kind(dora_around("LoHa", InputDora), "LoHa", gradient_is_exact=False),
    "DoRA per output, PiSSA": Kind(
        lambda layer, **settings: OutputDora.around(pissa(layer, **settings), layer),
        "LoRA",
        start_is_random=False,
        gradient_is_exact=False,
    ),
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
