"""Counter of torch operations: their number, FLOPs, live bytes, and bytes copied to the device.

The numbers are deterministic. Memory inside kernels (scratch memory, their own copies) is not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_flops: Callable[..., int] = sdpa_flop_count
_backward_flops: Callable[..., int] = sdpa_backward_flop_count
_aten = torch.ops.aten


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(_flops(query.shape, key.shape, value.shape))


def _cpu_attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(_backward_flops(grad.shape, query.shape, key.shape, value.shape))


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch's table of FLOP formulas lacks attention on the CPU.
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations inside its context, which may be entered repeatedly; frees are also counted outside.

    `operations` exclude views; `flops` are of products and attention, a multiplication and an addition being two.
    `live` are bytes of `device` allocated inside and not yet freed, `peak` the highest of these, `held` the highest at
    the start of a backward pass (the saved activations). `sent` are bytes copied to the device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._sizes: dict[int, int] = {}
        self._backward = -1
        self.live = 0
        self.reset()

    def reset(self) -> None:
        """Reset all counts but `live`."""
        self.operations = self.flops = self.sent = self.held = 0
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._notice_backward()
        result = func(*args, **kwargs)
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        known = {one.untyped_storage()._cdata for one in inputs}
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        fresh = [one for one in made if one.untyped_storage()._cdata not in known]
        self.operations += bool(fresh) or func._schema.is_mutable
        for one in fresh:
            self._follow(one)
        if any(one.device.type != self._device.type for one in inputs if one.ndim):
            self.sent += sum(one.nbytes for one in fresh if one.device.type == self._device.type)
        return result

    def _notice_backward(self) -> None:
        task = torch._C._current_graph_task_id()
        # Recomputing a block starts no backward pass of its own, so each pass is counted once.
        if task not in (-1, self._backward):
            self.held = max(self.held, self.live)
        self._backward = task if task != -1 else self._backward

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != self._device.type or storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, storage._cdata).atexit = False

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
