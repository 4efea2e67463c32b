"""The subject of a measurement: the settings on which the cost of a step depends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorasmith.training.config import cost_options


def measurement_subject(model: str, settings: Mapping[str, Any], device: str) -> str:
    """The key of a measurement in `JobStore`; leaves out settings that do not affect the cost of a step. `settings` are
    those of training and data, `device` is a type such as `cuda`.
    """
    relevant = {**{name: one.default for name, one in cost_options().items()}, "resolution": None}
    chosen = {name: settings.get(name, default) for name, default in relevant.items()}
    return json.dumps({"model": model, "settings": chosen, "device": device.partition(":")[0]}, sort_keys=True)
