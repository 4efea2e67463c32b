"""The contract of a LoRA layout: a convention for naming tensors in a LoRA file.

A layout is one module that subclasses `Layout` and registers an instance. It reads what it recognises and leaves the
rest, so that a file which mixes conventions is read by several layouts in turn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorasmith.core.adapter_state import AdapterState, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.core.registry import Registry
from lorasmith.formats.names.model_names import ModelNames
from lorasmith.formats.names.places import Parts

__all__ = ["LAYOUTS", "Layout", "Loss", "named", "sentences"]


@dataclass(frozen=True)
class Loss:
    """What the programs that a layout is named for do not take over from a LoRA.

    Attributes:
        module: whose adapter or differences.
        reason: what is lost, in words that follow "12 modules, such as x: ".
        left_out: whether the file has to do without the module; otherwise it is written and applied differently.
    """

    module: ModuleRef
    reason: str
    left_out: bool = True


def sentences(losses: Sequence[Loss]) -> list[str]:
    """Losses as one sentence for each reason."""
    by_reason: dict[str, list[ModuleRef]] = {}
    for loss in losses:
        by_reason.setdefault(loss.reason, []).append(loss.module)
    return [f"{named(modules)}: {reason}" for reason, modules in by_reason.items()]


def named(modules: Sequence[ModuleRef]) -> str:
    """`12 modules, such as mid_block…`, or the one module by name."""
    first = modules[0].path
    return f"{len(modules)} modules, such as {first}" if len(modules) > 1 else first


class Layout(ABC):
    """A convention for naming tensors in a LoRA file.

    Attributes:
        name: registered name.
        title: what people call it.
        writes_cores: whether Tucker cores of all algorithms are written as they are.
        in_folder: whether it is a folder of files; then keys have the names of subfolders and a slash in front.
    """

    name: str
    title: str
    writes_cores: bool = False
    in_folder: bool = False

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

    def losses(self, state: AdapterState, names: ModelNames) -> list[Loss]:
        """What the layout's own programs would not take over of a state; empty where they take over all of it."""
        return []

    def companions(self, state: AdapterState, names: ModelNames) -> dict[str, str]:
        """Text files that stand beside the tensors in a layout's folder, by path within it."""
        return {}


LAYOUTS: Registry[Layout] = Registry("LoRA layout", LoraError)
