"""What a step costs a GPU by count, on tensors without numbers: budgets that may only fall."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cuda.costs import Cost
from tests.cuda.fake_device import FakeDevice

BUDGETS: dict[str, tuple[int, float, float, dict[str, Any]]] = {
    "bf16": (294, 11.3, 14.0, {}),
    "fp8": (336, 13.7, 14.9, {"quantization": "fp8_e4m3"}),
    "nf4": (336, 13.4, 14.8, {"quantization": "nf4"}),
    "fp8 products": (344, 11.8, 12.5, {"quantization": "fp8_e4m3", "changes": {"products": "fp8"}}),
    "int8 products": (316, 10.1, 11.9, {"quantization": "int8", "changes": {"products": "int8"}}),
}
"""Most kernels, GB and ms of a gradient, with the settings: a double and a single block of Flux.1, 1024 px."""


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_costs_no_more_than_before(device: FakeDevice, name: str) -> None:
    kernels, gigabytes, milliseconds, settings = BUDGETS[name]
    found = device.costs("flux-12b", 128, blocks=(1, 1), rank=16, **settings)
    total = {key: sum(getattr(cost, key) for cost in found.values()) for key in vars(Cost())}
    measured = total["kernels"], total["bytes"] / 1e9, 1e3 * total["seconds"]
    most = (kernels, gigabytes, milliseconds)
    assert all(one <= bound for one, bound in zip(measured, most, strict=True)), f"{measured} exceed {most}"


def test_quantized_weights_are_unpacked_in_one_kernel_each(device: FakeDevice) -> None:
    """Once forward and once backward, with bytes of codes, scales and the weight alone."""
    plain, packed = (
        device.costs("flux-12b", 64, blocks=(1, 1), rank=16, quantization=kind) for kind in ("none", "nf4")
    )
    moved = sum(cost.bytes for cost in packed.values()) - sum(cost.bytes for cost in plain.values())
    unpacking = packed["unpacking"]
    assert abs(moved - unpacking.bytes) < 0.02 * unpacking.bytes
    numbers = unpacking.bytes / (0.5 + 4 / 64 + 2)
    assert numbers / unpacking.kernels > 1e6
