"""Nodes called one at a time with their defaults filled in, as editors do, and small things to call them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.core.folders import Folders
from lorasmith.nodes import load_nodes
from lorasmith.workflow import NodeContext
from lorasmith.workflow.execution_events import Event, NodeMessage
from lorasmith.workflow.executor import NodeResult, call_node


@dataclass
class Bench:
    """Calls nodes one at a time, the way an executor does, and keeps what they say."""

    folders: Folders
    events: list[Event] = field(default_factory=list)
    context: NodeContext = field(init=False)

    def __post_init__(self) -> None:
        self.context = NodeContext(
            self.folders, "7", {"7": {"class_type": "X"}}, {"nodes": []}, report=self.events.append
        )

    def call(self, name: str, /, *, lists: dict[str, list[Any]] | None = None, **values: Any) -> NodeResult:
        """The node's result for plain `values` and for inputs that arrive as `lists`; the rest has its default."""
        node = load_nodes()[name]
        given = {key: [value] for key, value in values.items()} | (lists or {})
        defaults = {key: [one.default] for key, one in node.slots.items() if one.default is not None}
        return call_node(node, {**defaults, **given}, self.context)

    def one(self, name: str, /, **values: Any) -> Any:
        """The only item of the first output."""
        (item,) = self.call(name, **values).outputs[0]
        return item

    def messages(self, level: str) -> list[str]:
        return [event.text for event in self.events if isinstance(event, NodeMessage) and event.level == level]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(Folders(tmp_path))


@pytest.fixture
def pictures() -> Callable[..., Tensor]:
    """Smooth random pictures as IMAGE."""

    def make(count: int = 1, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
        coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").movedim(1, -1)

    return make


@pytest.fixture
def latents() -> Callable[..., dict[str, Tensor]]:
    """LATENT of noise about as wide as an autoencoder's latents."""

    def make(count: int = 1, height: int = 16, width: int = 16, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"samples": torch.randn(count, 4, height, width, generator=generator) * 5}

    return make
