"""The adapter contract: what is trained, for one layer; and what its implementations share.

For a frozen layer `W x + b` an adapter computes

    attached(x) = g(W f(x) + h(f(x))) + b          in activation space, while training or in bypass mode
    merged(W)                                       in weight space, the same function folded into one weight

where f, g, h are the identity or zero unless the algorithm says otherwise: LoRA, LoHa, LoKr and Full have only h; OFT,
BOFT and output-axis DoRA g; input-axis DoRA f; GLoRA f and h, of which h sees x itself. The bias stays outside g.
`strength` interpolates from the frozen layer (0) to the adapter as trained (1) and beyond. A fresh adapter is exactly
the identity, and `attached` agrees with `merged` to rounding.

Adding a built-in algorithm is one module that subclasses `Adapter`, declares the format of its tensors and registers
itself in `ADAPTERS`, and an entry of the module's name in the catalogue. docs/extending.md has those of other packages.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorasmith.adapters import catalogue
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.core.adapter_state import AdapterFormat, AdapterWeights
from lorasmith.core.errors import LoraError
from lorasmith.core.registry import Registry


class Adapter(nn.Module, ABC):
    """One layer's adapter. Its parameters are the trained tensors; everything else is plain data.

    Attributes:
        algorithm: registered name in lower case, as `AdapterWeights` has it.
        format: what its tensors are to files, tools and other programs.
        about: its facts for help texts and defaults, if it is an extension's; the catalogue has the others.
        transforms_input: whether f differs from the identity.
        transforms_output: whether g differs from the identity; the bias is then added after it.
        is_additive: whether it adds to the weight, so that every program has its opposite at a negative strength.
        reads_weight: whether `attached` reads the layer's weight; it then includes the adapters below.
        compiles: whether torch.compile takes `attached` in one graph, and keeps nothing of the weight's size for it.
    """

    algorithm: ClassVar[str]
    format: ClassVar[AdapterFormat]
    about: ClassVar[catalogue.Algorithm]
    transforms_input: ClassVar[bool] = False
    transforms_output: ClassVar[bool] = False
    is_additive: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False
    compiles: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> Adapter:
        """A fresh adapter, exactly the identity.

        Args:
            layer: the layer it is for.
            rank: inner dimension (LoKr: the factor; OFT: the block size; Full: nothing).
            alpha: numerator of the scale (OFT: the constraint; LoKr, Full: nothing).
            seed, path: key of the initial values.
            zero: factor that starts at zero, `up` (the usual choice) or `down` (ComfyUI's).
        """

    @classmethod
    @abstractmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> Adapter:
        """An adapter with the given tensors. Raises LoraError when their shapes do not fit the layer."""

    def to_weights(self) -> AdapterWeights:
        """The adapter as data, in fp32 on the CPU."""
        tensors = {name: copied(parameter) for name, parameter in self.named_parameters()}
        return AdapterWeights(self.algorithm, tensors, getattr(self, "alpha", None))

    @abstractmethod
    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """The layer's weight with the adapter folded in, in the weight's dtype (computed in fp32)."""

    def delta(self, x: Tensor, layer: FrozenLayer, strength: float) -> Tensor | None:
        """h, added to the layer's product for x (..., in); None for zero."""
        return self.beside(x, layer, strength)

    def beside(self, x: Tensor, layer: FrozenLayer, strength: float) -> Tensor | None:
        """The former name of `delta`, which adapters of other packages may have, for one release."""
        return None

    def attached(self, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, strength: float) -> Tensor:
        """`g(inner(f(x)) + h(f(x)))`, where `inner` is the layer or the adapters attached before this one.

        Adapters whose f or g is not the identity override this.
        """
        y, added = inner(x), self.delta(x, layer, strength)
        return y if added is None else y + added


ADAPTERS: Registry[type[Adapter]] = catalogue.ADAPTERS


def taken(weights: AdapterWeights, needed: Iterable[str], optional: Sequence[str] = ()) -> dict[str, Tensor]:
    """Copies of an adapter's tensors in fp32 on the CPU, by canonical name."""
    needed = tuple(needed)
    if not set(needed) <= weights.tensors.keys() or not weights.tensors.keys() <= {*needed, *optional}:
        also = f", and may have {', '.join(optional)}" if optional else ""
        raise LoraError(
            f"an adapter of the kind {weights.algorithm} needs {', '.join(needed)}{also}; "
            f"this one has {', '.join(weights.tensors) or 'nothing'}; get a complete file"
        )
    for name, tensor in weights.tensors.items():
        if tensor.ndim < 2 or not tensor.numel():
            raise LoraError(
                f"{name} of an adapter of the kind {weights.algorithm} must be a matrix, got shape "
                f"{tuple(tensor.shape)}; get an intact file"
            )
    return {name: copied(tensor) for name, tensor in weights.tensors.items()}


def misfit(weights: AdapterWeights, layer: FrozenLayer) -> LoraError:
    """The error for tensors whose shapes do not fit a layer."""
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in weights.tensors.items())
    return LoraError(
        f"an adapter of the kind {weights.algorithm} with {shapes} does not fit a layer with weight "
        f"{tuple(layer.shape)}; it was made for another model"
    )


def fill_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """kaiming_uniform(a=√5), the default of torch's own layers, which is uniform within 1/√fan_in."""
    bound = 1 / math.sqrt(tensor[0].numel())
    tensor.uniform_(-bound, bound, generator=generator)


def squared_product(up: Tensor, down: Tensor) -> Tensor:
    """Squared Frobenius norm of up (out, rank, ...) · down (rank, in, ...), fp32, from two rank × rank products."""
    up, down = up.flatten(1).float(), down.flatten(1).float()
    # Rounding can leave a zero norm a little below zero.
    return ((up.T @ up) * (down @ down.T)).sum().clamp_min(0.0)


def wide(tensor: Tensor) -> Tensor:
    """In fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def scaled(factor: float, tensor: Tensor) -> Tensor:
    """`tensor · factor`; the tensor itself for a factor of 1."""
    return tensor if factor == 1 else tensor * factor


def copied(tensor: Tensor) -> Tensor:
    """A copy in fp32 on the CPU."""
    return tensor.detach().to("cpu", torch.float32, copy=True)
