"""The contract of a LoRA layout: a convention for naming tensors in a LoRA file.

A layout is one module that subclasses `Layout` and registers an instance. It reads the tensors that it recognises and
leaves the rest, so that several layouts in turn read a file of mixed conventions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, SD_SCRIPTS, AdapterState, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.core.registry import Registry, instance_of
from lorasmith.formats.layouts.adapter_config import stated_alphas
from lorasmith.formats.names import ModelNames, PlacedModules, in_original_naming, read_tensors, unfusable
from lorasmith.formats.spelling import KOHYA, ModuleTensors, grouped, spelled


@dataclass(frozen=True)
class Lost:
    """Something that a layout, or the programs that it is named for, does not keep of a LoRA."""

    module: ModuleRef  # whose adapter or differences
    reason: str  # what is lost, as text after "12 modules, such as x: "
    left_out: bool = True  # whether the module is left out of the file; otherwise it is written and applied differently


Loss = Lost  # its name in earlier versions


def sentences(losses: Sequence[Lost]) -> list[str]:
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
        title: display name.
        writes_cores: whether Tucker cores of all algorithms are written; else they are multiplied in.
        in_folder: whether it is a folder of files; keys then begin with the subfolder's name and a slash.
        has_alphas: whether a LoRA of it has `.alpha` tensors.
        has_diffusers_names: whether modules and tensors have the names of diffusers and PEFT.
        alphas_misread: whether diffusers reads several alphas as one (`ProgramLimits.diffusers_one_alpha`).
        holds_words: whether a file of it may hold words, too. Files for all programs do, if they are no folders.
        refused_by: programs that do not open it → why.
    """

    name: str
    title: str
    writes_cores: bool = False
    in_folder: bool = False
    has_alphas: bool = False
    has_diffusers_names: bool = False
    alphas_misread: bool = False
    holds_words: bool = True
    refused_by: Mapping[str, str] = MappingProxyType({SD_SCRIPTS: "it reads kohya's layout alone"})

    @abstractmethod
    def detects(self, keys: Iterable[str]) -> int:
        """Number of keys that look like this layout's, for any model."""

    @abstractmethod
    def bases(self, names: ModelNames) -> Mapping[str, PlacedModules]:
        """Every name of this layout for modules of a model, without the tensor's suffix."""

    @abstractmethod
    def base_of(self, ref: ModuleRef, names: ModelNames) -> str:
        """Name of a module under its path in diffusers' model."""

    def follows_original(self, names: ModelNames) -> bool:
        """Whether the denoiser's modules have names by their path in the original checkpoint, where they have one."""
        return False

    def original_base(self, path: str) -> str:
        """Name of a module of the original checkpoint."""
        return path

    def spelled(self, module: ModuleTensors) -> dict[str, Tensor]:
        """The tensors of a module by the end of their key, after the base."""
        return spelled(module, KOHYA)

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: ModelNames) -> AdapterState:
        """Read a file's tensors.

        Args:
            tensors: by key.
            metadata: the file's.
            names: the model's name table.

        Returns:
            The recognised adapters and differences; every other tensor is in `unknown`. No metadata.

        Raises:
            LoraError: the file is malformed, such as its configuration in the header.
        """
        return read_tensors(tensors, self.bases(names), names, stated_alphas(tensors, grouped(tensors), metadata))

    def write(self, state: AdapterState, names: ModelNames) -> dict[str, Tensor]:
        """Adapters and differences by key; `unknown` is not written here."""
        refs = dict.fromkeys((*state.adapters, *state.differences))
        modules = {ref: ModuleTensors(state.adapters.get(ref), state.differences.get(ref, {})) for ref in refs}
        placed: dict[str, ModuleTensors] = {}
        if self.follows_original(names):
            denoiser = {ref.path: module for ref, module in modules.items() if ref.component == DENOISER}
            original, left = in_original_naming(denoiser, names)
            placed = {self.original_base(path): module for path, module in original.items()}
            others = {ref: module for ref, module in modules.items() if ref.component != DENOISER}
            modules = {ModuleRef(DENOISER, path): module for path, module in left.items()} | others
        placed |= {self.base_of(ref, names): module for ref, module in modules.items()}
        return {
            base + suffix: tensor for base, module in placed.items() for suffix, tensor in self.spelled(module).items()
        }

    def header(self, state: AdapterState, names: ModelNames) -> dict[str, str]:
        """Metadata that other programs read with the tensors of `write`."""
        return {}

    def losses(self, state: AdapterState, names: ModelNames) -> list[Lost]:
        """What the layout, or its own programs, would not keep of a state."""
        return []

    def unfused(self, state: AdapterState, names: ModelNames) -> list[ModuleRef]:
        """Modules under diffusers' names, because they cannot be rows of the original's fused layer."""
        return unfusable(state, names)

    def companions(self, state: AdapterState, names: ModelNames) -> dict[str, str]:
        """Text files beside the tensors in a layout's folder, by path within it."""
        return {}


LAYOUTS: Registry[Layout] = Registry(
    "LoRA layout", LoraError, group="layouts", home="lorasmith.formats.lora_file", checked=instance_of(Layout)
)
