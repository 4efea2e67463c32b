"""The contract of a LoRA layout: a convention for naming tensors in a LoRA file.

A layout is one module that subclasses `Layout` and registers an instance. It reads what it recognises and leaves the
rest, so that a file which mixes conventions is read by several layouts in turn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from torch import Tensor

from lorasmith.core.adapter_state import AdapterState
from lorasmith.core.errors import LoraError
from lorasmith.core.registry import Registry
from lorasmith.formats.names import ModelNames
from lorasmith.formats.places import Parts

__all__ = ["LAYOUTS", "Layout"]


class Layout(ABC):
    """A convention for naming tensors in a LoRA file.

    Attributes:
        name: registered name.
        title: what people call it.
    """

    name: str
    title: str

    @abstractmethod
    def detects(self, keys: Iterable[str]) -> int:
        """How many of a file's keys look like this layout's, whatever the model."""

    @abstractmethod
    def bases(self, names: ModelNames) -> Mapping[str, Parts]:
        """Every name that this layout may use for modules of a model, less the suffix that says which tensor it is."""

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: ModelNames) -> AdapterState:
        """What this layout recognises of a file; every other tensor is in `unknown`. The state has no metadata."""

    @abstractmethod
    def write(self, state: AdapterState, names: ModelNames) -> dict[str, Tensor]:
        """Adapters and differences by key; `unknown` is the caller's business."""

    @abstractmethod
    def header(self, state: AdapterState, names: ModelNames) -> dict[str, str]:
        """Metadata that belongs to the tensors `write` gives, as other programs expect it of this layout."""


LAYOUTS: Registry[Layout] = Registry("LoRA layout", LoraError)
