"""Models built around the tensors of files, with every tensor accounted for."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.packed_layers import give_source, packable_layers
from lorasmith.core.errors import ModelError
from lorasmith.core.quantization import Packed, of_rows, placeholder
from lorasmith.formats.names.model_names import OriginalName

__all__ = ["PartSource", "build", "from_original_tensors", "module_paths", "weight_shapes"]


def module_paths(model: nn.Module) -> list[str]:
    """Paths of all modules that own parameters (Linear, convolution, norm, embedding), in the model's order.

    The model itself is "", if it has parameters that no module of it has.
    """
    return [path for path, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of the weight of each module that owns parameters, by path."""
    parameters = dict(model.named_parameters())
    weights = ((path, parameters.get(f"{path}.weight")) for path in module_paths(model))
    return {path: tuple(weight.shape) for path, weight in weights if weight is not None}


@dataclass(frozen=True)
class PartSource:
    """Where one part of a model comes from.

    Attributes:
        where: the file or folder, as messages begin with it.
        tensors: by name, as the file has them.
        settings: of its configuration that shapes leave open.
        config: its whole configuration, where it comes from a diffusers folder.
    """

    where: str
    tensors: Mapping[str, Tensor | Packed]
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def build(
    make: Callable[[], nn.Module], tensors: Callable[[nn.Module], Mapping[str, Tensor | Packed]], *, where: str
) -> nn.Module:
    """A model that takes over given tensors, as they are, without ever holding random weights.

    Weights that are packed stay so where their layer can compute with them (`adapters.packed_layers`).

    Args:
        make: gives the model; called where parameters get no memory.
        tensors: state dict for the empty model.
        where: what the tensors come from, as messages begin with it.

    Raises:
        ModelError: tensors are missing, left over or of the wrong shape.
    """
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            model = make()
        packable = set(packable_layers(model))
        able = {f"{path}.weight": layer for path, layer in model.named_modules() if layer in packable}
        given = {
            name: one.weight() if isinstance(one, Packed) and name not in able else one
            for name, one in tensors(model).items()
        }
        if missing := [name for name in model.state_dict() if name not in given]:
            raise ModelError(f"{where} lacks {missing[0]}; it is incomplete, so get it again")
        packed = {name: one for name, one in given.items() if isinstance(one, Packed)}
        model.load_state_dict({name: _tensor(one) for name, one in given.items()}, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{where} does not fit its architecture: {' '.join(str(error).split())[:300]}; "
            "it is incomplete or of a variant that is not known here"
        ) from error
    for name, one in packed.items():
        give_source(able[name], one, device=one.tensors[0].device, dtype=one.dtype)
    return model.eval().requires_grad_(False)


def from_original_tensors(
    model: nn.Module, table: Mapping[str, OriginalName], tensors: Mapping[str, Tensor | Packed]
) -> dict[str, Tensor | Packed]:
    """The state dict of a diffusers denoiser from original-layout tensors.

    Fused tensors are cut into rows and swapped halves put in order, as the table says.

    Raises:
        ModelError: a tensor is missing, or one is left that the table does not name.
    """
    state: dict[str, Tensor | Packed] = {}
    unused = set(tensors)
    for name in model.state_dict():
        path, _, leaf = name.rpartition(".")
        place = table[path]
        stem = f"{place.path}." if place.path else ""
        # Black Forest Labs call the weight of their RMS norms "scale".
        original = next((key for key in (f"{stem}{leaf}", f"{stem}scale") if key in tensors), None)
        if original is None:
            raise ModelError(f"the checkpoint lacks {stem}{leaf}; it is incomplete or was cut short")
        tensor = tensors[original]
        unused.discard(original)
        if place.rows is not None:
            tensor = of_rows(tensor, operator.itemgetter(slice(*place.rows)))
        if place.swap_halves:
            tensor = of_rows(tensor, lambda rows: torch.cat(tuple(reversed(rows.chunk(2)))))
        state[name] = tensor
    if unused:
        raise ModelError(
            f"the checkpoint has {len(unused)} denoiser tensors that this architecture lacks, such as {min(unused)}; "
            "it is of a variant that is not known here"
        )
    return state


def _tensor(given: Tensor | Packed) -> Tensor:
    """What a parameter holds."""
    return placeholder(given.shape, given.tensors[0].device, given.dtype) if isinstance(given, Packed) else given
