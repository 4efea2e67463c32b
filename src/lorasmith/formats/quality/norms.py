"""The norm of an adapter's change, from its tensors alone, without a matrix of the weight's size."""

from __future__ import annotations

from lorasmith.adapters.algorithms import format_of
from lorasmith.formats.names.spelling import ModuleTensors, without_core
from lorasmith.formats.scales import scale_of

__all__ = ["squared_change"]


def squared_change(module: ModuleTensors) -> float | None:
    """Squared Frobenius norm of a module's change at strength 1.

    None if the change depends on the weight: OFT, BOFT, GLoRA. DoRA's magnitudes, which do so too, are left out.
    """
    total = sum(float(tensor.float().square().sum()) for tensor in module.differences.values())
    weights = module.adapter
    if weights is None:
        return total
    squared_norm = format_of(weights).squared_norm
    if squared_norm is None:
        return None
    plain = without_core(weights)
    return total + scale_of(plain) ** 2 * squared_norm(plain.tensors)
