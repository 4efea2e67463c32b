"""What an adapted layer costs the host: operations of a step that compute, which may only fall.

A GPU takes about 7 µs of the host's time for each, which limits steps of small pictures.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.cuda.conftest import FakeDevice

BUDGET: dict[str, tuple[float, dict[str, Any]]] = {
    "LoRA": (9.0, {}),
    "LoRA with checkpointing": (11.0, {"gradient_checkpointing": True}),
    "LoRA on int8": (9.7, {"quantization": "int8"}),
    "LoKr": (16.3, {"algorithm": "LoKr"}),
    "LoHa": (23.5, {"algorithm": "LoHa"}),
    "OFT": (27.3, {"algorithm": "OFT"}),
    "BOFT": (222.3, {"algorithm": "BOFT"}),
    "GLoRA": (24.2, {"algorithm": "GLoRA"}),
    "DoRA": (47.4, {"dora": "output"}),
}
"""Most operations for each layer beyond those of the frozen one, with the settings."""

RATIOS: dict[str, tuple[float, dict[str, Any]]] = {
    "LoRA": (1.12, {}),
    "LoRA with checkpointing": (1.33, {"gradient_checkpointing": True}),
}
"""Most operations of a gradient of attention and feed-forward layers, as a multiple of the floor's, with the settings.

Of those of the small model, which has two blocks, noise and loss are 0.04.
"""


@pytest.mark.parametrize(
    "name", ["LoRA", *(pytest.param(name, marks=pytest.mark.slow) for name in BUDGET if name != "LoRA")]
)
def test_an_adapted_layer_takes_no_more_operations_than_before(device: FakeDevice, name: str) -> None:
    most, settings = BUDGET[name]
    few, many = (device.traced("flux1", targets=targets, **settings) for targets in ("*.0.ff.*", "*blocks.*"))
    assert many.layers > few.layers
    assert (many.operations - few.operations) / (many.layers - few.layers) <= most


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", RATIOS)
def test_a_gradient_takes_few_operations_more_than_the_floor(device: FakeDevice, name: str) -> None:
    most, settings = RATIOS[name]
    floor = device.floor("flux1").operations
    assert floor < device.traced("flux1", targets="attention+ff", **settings).operations <= most * floor
