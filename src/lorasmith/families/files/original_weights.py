"""Models built on the tensors of files; missing and unknown tensors are refused.

Modules are made without weights: parameters are on the meta device, and no time is spent on random numbers for them.
This concerns the calling thread alone: a server reads the structure of one model while another thread creates adapters.
"""

from __future__ import annotations

import contextlib
import operator
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from lorasmith.adapters.frozen_layer import give_source, packable_layers
from lorasmith.core.errors import LorasmithError, ModelError
from lorasmith.core.quantization import Packed, of_rows, placeholder
from lorasmith.formats.names import OriginalName

_NORM_SCALE = "scale"  # Black Forest Labs' name of the weight of an RMS norm


def module_paths(model: nn.Module) -> list[str]:
    """Paths of all modules that own parameters (Linear, convolution, norm, embedding), in the model's order.

    The model itself is "", if it has parameters of its own.
    """
    return [path for path, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of the weight of each module that owns parameters, by path."""
    parameters = dict(model.named_parameters())
    weights = ((path, parameters.get(f"{path}.weight")) for path in module_paths(model))
    return {path: tuple(weight.shape) for path, weight in weights if weight is not None}


def block_count(tensors: Collection[str], stem: str) -> int:
    """Number of blocks whose tensors' names begin with `stem` and a number, such as `layers.` for `layers.3.norm`."""
    return numbered(tensors, re.escape(stem))


def numbered(names: Iterable[str], start: str) -> int:
    """One more than the highest number after this regular expression at the start of names; 0 if there is none.

    Numbers have three digits at most, so that a file of few tensors builds no model of millions of blocks.
    """
    pattern = re.compile(rf"{start}(\d{{1,3}})\.")
    return 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)


def norm_name(path: str, names: Collection[str]) -> str:
    """Name of the weight of an RMS norm among the names of a file's tensors, of which some say `scale`."""
    scale = f"{path}.{_NORM_SCALE}"
    return scale if scale in names else f"{path}.weight"


@dataclass(frozen=True)
class PartSource:
    """The source of one part of a model."""

    where: str  # the file or folder, for messages
    tensors: Mapping[str, Tensor | Packed]  # by name in the file
    settings: Mapping[str, Any] = field(default_factory=dict)  # of its configuration that shapes leave open
    config: Mapping[str, Any] | None = None  # its full configuration, if it comes from a diffusers folder


def build(
    make: Callable[[], nn.Module], tensors: Callable[[nn.Module], Mapping[str, Tensor | Packed]], *, where: str
) -> nn.Module:
    """A model with given tensors as its parameters, uncopied; no random weights are allocated.

    Packed weights stay packed where their layer can compute with them (`adapters.frozen_layer`).
    """
    try:
        with weights_empty():
            model = make()
        packable = set(packable_layers(model))
        able = {f"{path}.weight": layer for path, layer in model.named_modules() if layer in packable}
        weights = {
            name: tensor.weight() if isinstance(tensor, Packed) and name not in able else tensor
            for name, tensor in tensors(model).items()
        }
        needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if missing := [name for name in needed if name not in weights]:
            raise ModelError(f"{where} lacks {missing[0]}; it is incomplete, so get it again")
        for name in needed.keys() & weights.keys():
            if (shape := tuple(_tensor(weights[name]).shape)) != needed[name]:
                raise ModelError(
                    f"{where} does not fit its architecture: {name} must have the shape {needed[name]}, got {shape}; "
                    "it is damaged or of an unsupported variant"
                )
        packed = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Packed)}
        model.load_state_dict({name: _tensor(tensor) for name, tensor in weights.items()}, assign=True)
    except LorasmithError:
        raise
    except Exception as error:  # constructors of diffusers and transformers raise many kinds for odd settings
        raise ModelError(
            f"{where} does not fit its architecture: {' '.join(str(error).split())[:300]}; "
            "it is incomplete or of an unsupported variant"
        ) from error
    for name, weight in packed.items():
        give_source(able[name], weight, device=weight.tensors[0].device, dtype=weight.dtype)
    return model.eval().requires_grad_(False)


def from_original_tensors(
    model: nn.Module, table: Mapping[str, OriginalName], tensors: Mapping[str, Tensor | Packed]
) -> dict[str, Tensor | Packed]:
    """The state dict of a diffusers denoiser from original-layout tensors.

    Fused tensors are cut into rows and swapped halves put in order. Tensors may have any of a module's names in files.
    """
    state: dict[str, Tensor | Packed] = {}
    unused = set(tensors)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in shapes:
        path, _, leaf = name.rpartition(".")
        usual = table[path]
        places = {other.tensor(key): other for other in (usual, *usual.others) for key in (leaf, _NORM_SCALE)}
        original = next((key for key in places if key in tensors), None)
        if original is None:
            raise ModelError(f"the checkpoint lacks {usual.tensor(leaf)}; it is incomplete or was cut short")
        tensor, place = tensors[original], places[original]
        unused.discard(original)
        if place.rows is not None:
            tensor = of_rows(tensor, operator.itemgetter(slice(*place.rows)))
        if place.swap_halves:
            tensor = of_rows(tensor, lambda rows: torch.cat(tuple(reversed(rows.chunk(2)))))
        if leaf in place.parameters and isinstance(tensor, Tensor):
            tensor = tensor.reshape(shapes[name])
        state[name] = tensor
    if unused:
        raise ModelError(
            f"the checkpoint has {len(unused)} denoiser tensors that this architecture lacks, such as {min(unused)}; "
            "it is of an unsupported variant"
        )
    return state


def _tensor(weight: Tensor | Packed) -> Tensor:
    """The tensor of a parameter: a plain weight, or a packed one's placeholder."""
    return placeholder(weight.shape, weight.tensors[0].device, weight.dtype) if isinstance(weight, Packed) else weight


@contextlib.contextmanager
def weights_empty() -> Iterator[None]:
    """Modules that are created inside have their parameters on the meta device; buffers keep their values."""
    depth = getattr(_thread, "depth", 0)
    _thread.depth = depth + 1
    try:
        with _InitializationSkipped():
            yield
    finally:
        _thread.depth = depth


def _emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """The parameter to register instead; None for no other."""
    if parameter is None or parameter.is_meta or not getattr(_thread, "depth", 0):
        return None
    empty = type(parameter)(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    empty.__dict__.update(parameter.__dict__)
    return empty


_thread = threading.local()

# Once and for good: to take it away would break threads that register parameters just then.
register_module_parameter_registration_hook(cast(Callable[..., None], _emptied))


class _InitializationSkipped(TorchFunctionMode):
    """Initializers do nothing to tensors on the meta device; they would take most of the time of text encoders."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        keywords: Mapping[str, Any] = kwargs or {}
        if func.__name__ in _INITIALIZERS:
            target = args[0] if args else keywords.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **keywords)


# Of torch.Tensor and torch.nn.init.
_INITIALIZERS = frozenset(
    f"{name}_"
    for name in ("normal", "uniform", "trunc_normal", "kaiming_uniform", "kaiming_normal", "xavier_uniform",
                 "xavier_normal", "zero", "zeros", "ones", "fill", "constant")
)  # fmt: skip
