"""Linear layers with one input, computed together (q, k and v of an attention)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorasmith.adapters.adapter import Adapter
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.lora import LowRank
from lorasmith.adapters.low_rank_products import linear_group

__all__ = ["SharedInput"]


class SharedInput:
    """Linear layers that receive the same input (q, k and v), each with a low-rank adapter: one pass for all.

    The first call computes the results of the others too, which they return when called with the same input: the down
    matrices are one product, their gradients another, and the gradient of the input is summed in place.

    Args:
        members: adapter, layer and strength of each.

    Attributes:
        is_complete: whether none of them has another adapter on top; else each is computed separately.
    """

    def __init__(self, members: Sequence[tuple[LowRank, FrozenLayer, float]]) -> None:
        self.is_complete = True
        self._members = members
        self._x: Tensor | None = None
        self._results: dict[int, Tensor] = {}

    @staticmethod
    def takes(adapter: Adapter, layer: FrozenLayer) -> bool:
        """Whether an adapter on a layer can be a member."""
        return type(adapter).attached is LowRank.attached and not layer.is_conv

    def __call__(self, index: int, x: Tensor) -> Tensor | None:
        """`W x + b + change` of a member; None if it must be computed separately, as with dropout."""
        if self._x is not x or index not in self._results:
            if not self.is_complete or any(adapter.mask is not None for adapter, _, _ in self._members):
                return None
            downs, ups, layers, factors = [], [], [], []
            for adapter, layer, strength in self._members:
                down, up, _ = adapter.factors()
                downs.append(down)
                ups.append(up)
                layers.append(layer)
                factors.append(strength * adapter.scale)
            self._x = x
            self._results = dict(enumerate(linear_group(x, layers, factors, *downs, *ups)))
        result = self._results.pop(index)
        if not self._results:
            self._x = None
        return result
