"""What a step costs a GPU, counted on tensors without numbers: operations, bytes and FLOPs, and a time by a roofline.

Every operation that computes is a kernel that reads its inputs and writes its results once. Kernels of the project are
one operation each. A kernel takes the longer of the times for its FLOPs and for its bytes, at rates that are published
for an H100 SXM; what the host does, and gaps between kernels, are not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

BYTES_PER_S = 2.6e12
FLOPS_PER_S = {
    "products": 680e12,
    "quantized products": 1200e12,
    "convolutions": 450e12,
    "attention": 350e12,
    "attention, backward": 300e12,
}
"""Of an H100 SXM: what products in bf16 and flash attention 2 are published to reach; for codes, 60 % of the peak."""

NARROW = 64
"""Rank up to which a product is one of a LoRA."""


@dataclass
class Cost:
    """What kernels of a kind take."""

    kernels: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0


class Costs(TorchDispatchMode):
    """Counts the kernels of operations inside of the context; `found` is by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.found: defaultdict[str, Cost] = defaultdict(Cost)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if computes(func) and any(_is_there(one) for one in tree_leaves((args, kwargs, result))):
            flops = _flops(func, args, kwargs, result)
            kind = _kind(func, args, kwargs, flops)
            moved = sum(map(_size, _read(func, args, kwargs))) + sum(map(_size, _written(func, args, kwargs, result)))
            rate = FLOPS_PER_S.get("products" if kind == "narrow products" else kind, 1e15)
            cost = self.found[kind]
            cost.kernels += 1
            cost.bytes += moved
            cost.flops += flops
            cost.seconds += max(moved / BYTES_PER_S, flops / rate)
        return result

    def as_numbers(self) -> dict[str, list[float]]:
        """By kind: kernels, bytes, FLOPs, seconds."""
        return {kind: [one.kernels, one.bytes, one.flops, one.seconds] for kind, one in self.found.items()}


def computes(func: Any) -> bool:
    """Whether an operation makes or changes numbers, for which a GPU is given work."""
    if func._opname in _MAKING_NONE:
        return False
    aliases = [returned.alias_info for returned in func._schema.returns]
    return not aliases or any(alias is None or alias.is_write for alias in aliases)


_MAKING_NONE = {"_unsafe_view", "device", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def _is_there(one: Any) -> bool:
    return isinstance(one, Tensor) and one.device.type == "cuda"


def _size(tensor: Tensor) -> int:
    """Bytes of the numbers that a tensor has in memory, of which expanded ones are the same."""
    numbers = tensor.itemsize
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride else 1
    return numbers


def _distinct(tree: Any) -> list[Tensor]:
    found: dict[int, Tensor] = {id(one): one for one in tree_leaves(tree) if _is_there(one)}
    return list(found.values())


_WRITE_ALONE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "unpacked", "between_products", "int8_product"}
"""Operations in place that do not read what is there."""


def _read(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    given = {name: value for name, value in kwargs.items() if name not in ("out", "grad_input")}
    skipped = func._opname in _WRITE_ALONE or kwargs.get("beta") == 0
    return _distinct((args[1:] if skipped else args, given))


def _written(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> list[Tensor]:
    changed = [
        value
        for argument, value in _arguments(func, args, kwargs)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return _distinct((changed, result))


def _arguments(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    for index, argument in enumerate(func._schema.arguments):
        if index < len(args):
            yield argument, args[index]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _flops(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> int:
    name = func._opname
    if name in ("addmm_", "int8_product"):
        y, a, b = (args[0], args[1], args[2]) if name == "addmm_" else (args[0], args[1], args[3])
        added = args[5] if name == "int8_product" else ()
        inner = a.shape[1] + sum(one.shape[1] for one in added[:1] if one.ndim == 2 and one is not y)
        return int(2 * a.shape[0] * inner * b.shape[1])
    if name in ("attention", "attention_backward"):  # two products, and five
        q, k = args[:2] if name == "attention" else args[1:3]
        return int((4 if name == "attention" else 10) * q.numel() * k.shape[-2])
    if name == "_int_mm":
        return int(2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1])
    count: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
    if count is None:
        return 0
    given = {name: value for name, value in kwargs.items() if name not in ("out", "grad_input")}
    return int(count(*args, **given, out_val=result))


def _kind(func: Any, args: Any, kwargs: Mapping[str, Any], flops: int) -> str:
    name = func._opname
    if name in ("_scaled_mm", "_int_mm", "int8_product"):
        return "quantized products"
    if "attention" in name:
        return "attention, backward" if "backward" in name else "attention"
    if "convolution" in name:
        return "convolutions"
    if flops:
        sizes = [size for one in _distinct((args, kwargs)) if one.ndim == 2 for size in one.shape]
        return "narrow products" if min(sizes, default=NARROW + 1) <= NARROW else "products"
    return "unpacking" if name == "unpacked" else "others"
