"""The methods of a run, in the order in which a step asks them."""

from __future__ import annotations

from lorasmith.training.config import ResolvedConfig
from lorasmith.training.methods.method import Method
from lorasmith.training.methods.preservation import Preservation

_METHODS: tuple[type[Method], ...] = (Preservation,)


def methods_of(config: ResolvedConfig) -> tuple[Method, ...]:
    """Those that the settings turn on."""
    return tuple(method for kind in _METHODS if (method := kind.of(config)) is not None)
