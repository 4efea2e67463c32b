"""Whole steps of the engine on fake tensors of a CUDA device, and what they ask of it.

`FakeTensorMode` computes shapes, strides, dtypes and devices of every operation, and no numbers. A step is the engine's
own: batches, preparation of the model, forward and backward pass, clipping, optimizer. A `Watch` lists what a GPU
would wait for: copies from memory that is not pinned, copies to the host, values that the host reads.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine, batch_maker
from lorasmith.training.job import TrainJob, plan_job

DEVICE = torch.device("cuda:0")

_STAGED_BYTES = 1 << 16
"""Size up to which CUDA copies from pageable memory without a wait, through a buffer of its own."""

_PINNED = "_is_pinned"

_aten = torch.ops.aten


class Devices(TorchFunctionMode):
    """What fake tensors do not have: pinned memory, devices of `tensor.data = other`, and copies of real tensors.

    A batch is made of real numbers, as much of it depends on them, and becomes fake where it is copied to the device.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()  # of copies of real tensors, as `Watch.waits`
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _SET_DATA:
            target, value = args
            assert isinstance(target, FakeTensor) == isinstance(value, FakeTensor), "a real tensor beside fake ones"
            func(target, value)
            if isinstance(target, FakeTensor):
                target.fake_device = value.fake_device
            return None
        if func is Tensor.pin_memory:
            return _as_pinned(args[0].clone())
        if func is Tensor.to and not isinstance(args[0], FakeTensor) and _names_device(args[1:], kwargs):
            source = args[0]
            with self._mode, torch._C.DisableTorchFunction():
                copy = self._mode.from_tensor(source).to(*args[1:], **kwargs)
            # Within a step, a `Watch` counts it.
            if (wait := _wait(source, copy, is_async=kwargs.get("non_blocking", False))) is not None:
                self.waits[wait] += 1
            return copy
        if kwargs.get("pin_memory"):
            return _as_pinned(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def _names_device(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    named = [one for one in (*args, *kwargs.values()) if isinstance(one, str | torch.device)]
    return any(torch.device(one).type == "cuda" for one in named)


def _as_pinned(tensor: Tensor) -> Tensor:
    setattr(tensor, _PINNED, True)
    return tensor


def _wait(source: Tensor, target: Tensor, *, is_async: bool) -> str | None:
    """What is waited for by a copy from one device to another; None for nothing."""
    if source.device.type == target.device.type or not source.numel():
        return None
    to_device = target.device.type == "cuda"
    # A conversion goes through pageable memory.
    is_pinned = hasattr(source if to_device else target, _PINNED) and source.dtype == target.dtype
    if is_async and (is_pinned or (to_device and source.nbytes <= _STAGED_BYTES)):
        return None
    how = "a copy of pageable memory" if is_async else "a blocking copy"
    return f"{how} to the {'device' if to_device else 'host'}: {_place()}"


class Watch(TorchDispatchMode):
    """Counts operations, and what the device or the host waits for, by place in the source.

    Attributes:
        operations: number of each operation.
        waits: number of each kind of wait by its place, such as `families/wan.py:374`.
        is_first: whether reads of values are allowed, which an optimizer needs to make its state.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_of_host(args, kwargs):  # such as lengths of texts, whose numbers are known
            with _disable_current_modes():
                return func(*args, **kwargs)
        self.operations[func._opname] += 1
        if func is _aten._local_scalar_dense.default and args[0].device.type == "cuda":
            self.waits[f"reads a value: {_place()}"] += 1
            return args[0].dtype == torch.bool or 1
        if func in _SHAPED_BY_VALUES and args[0].device.type == "cuda":
            self.waits[f"has a shape that depends on values ({func._opname}): {_place()}"] += 1
        result = func(*args, **kwargs)
        if func is _aten._to_copy.default:
            wait = _wait(args[0], result, is_async=kwargs.get("non_blocking", False))
        elif func is _aten.copy_.default:
            wait = _wait(args[1], args[0], is_async=(*args, *kwargs.values(), False)[2])
        else:
            return result
        if wait is not None:
            self.waits[wait] += 1
        return result


def _is_of_host(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation has to do with real tensors of the CPU alone."""
    leaves = tree_leaves((args, kwargs))
    if any(isinstance(one, torch.device) and one.type == "cuda" for one in leaves):
        return False
    return not any(isinstance(one, FakeTensor) for one in leaves)


_SHAPED_BY_VALUES = (
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.unique_consecutive.default,
    _aten._unique2.default,
    _aten.repeat_interleave.Tensor,
)


def _place() -> str:
    """The innermost line of the package, or of a library of models, that is being run."""
    for frame in reversed(traceback.extract_stack()):
        name = frame.filename.replace("\\", "/")
        for root in ("/src/lorasmith/", "/site-packages/diffusers/", "/site-packages/transformers/"):
            if root in name:
                return f"{name.partition(root)[2]}:{frame.lineno} in {frame.name}"
    return "?"


def faked(mode: FakeTensorMode, module: nn.Module) -> None:
    """Replace the tensors of a module by fake ones on the CPU."""
    known: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = known.get(id(parameter)) or nn.Parameter(
                    mode.from_tensor(parameter.detach()), requires_grad=parameter.requires_grad
                )
                known[id(parameter)] = fake
                part._parameters[name] = fake
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = mode.from_tensor(buffer)


@dataclass
class Traced:
    """What a few steps asked of the device.

    Attributes:
        waits: of the steps after the first, by place; `first` has those of the first.
        batches: of making batches.
        operations: of the last step.
    """

    waits: Counter[str] = field(default_factory=Counter)
    first: Counter[str] = field(default_factory=Counter)
    batches: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)


def traced(
    model: Model,
    samples: Sequence[Sample],
    changes: dict[str, Any] | None = None,
    *,
    steps: int = 2,
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    **settings: Any,
) -> Traced:
    """Steps on the fake device; `model` cannot be used afterwards.

    Args:
        changes: to the runtime, behind the plan.
        around: a context for the steps.
    """
    config = TrainConfig(**{"rank": 4, "training_dtype": "bf16", "exact_dtype": True, "learning_rate": 1e-3, **settings})
    # Planned on the CPU: some algorithms compute their first weights.
    job = plan_job(model.denoiser, config, torch.device("cpu"))
    runtime = replace(job.runtime, device=DEVICE, **(changes or {}))
    found = Traced()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with Devices(mode) as devices, around():
        with mode:
            for module in (model.components.denoiser, *job.adapters.values(), *job.differences.values()):
                faked(mode, module)
            engine = Engine(job.model, job.adapters, job.config, runtime, job.differences)
        with contextlib.ExitStack() as stack:
            with mode:
                stack.enter_context(engine.prepared())
            maker = batch_maker(job.model, samples, job.config, runtime, engine.rank_masks)
            for step in range(steps):
                batches = maker.step(step)
                found.batches += devices.waits
                with mode, Watch() as watch:
                    engine.update(step, *engine.gradient(batches))
                if step:
                    found.waits += watch.waits
                else:
                    found.first = watch.waits
                found.operations = watch.operations
                devices.waits.clear()
            stack.enter_context(mode)
    return found
