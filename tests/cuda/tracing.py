"""Whole steps of the engine on fake tensors of a CUDA device, and what they ask of it.

`FakeTensorMode` computes shapes, strides, dtypes and devices of every operation, and no numbers. A step is the engine's
own: batches, preparation of the model, forward and backward pass, clipping, optimizer. A `Watch` lists what a GPU
would wait for: copies from memory that is not pinned, copies to the host, values that the host reads.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lorasmith.bench.measure import frozen_floor
from lorasmith.core import pinned_memory, quantization, quantized_products
from lorasmith.core.kernels import Kernel
from lorasmith.data.dataset import Sample
from lorasmith.families.model import Model
from lorasmith.training import cuda_graphs
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine, batch_maker
from lorasmith.training.job import plan_job
from lorasmith.training.memory import activations, backward_passes, fused_blocks
from lorasmith.training.trainable import trainable
from tests.cuda.costs import Costs, computes
from tests.cuda.streams import Streams

DEVICE = torch.device("cuda:0")

_STAGED_BYTES = 1 << 16
"""Size up to which CUDA copies from pageable memory without a wait, through a buffer of its own."""

_PINNED = "_is_pinned"

_aten = torch.ops.aten


class Devices(TorchFunctionMode):
    """What fake tensors lack: addresses, pinned memory, devices of `tensor.data = other`, and copies of real tensors.

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
        if func is Tensor.data_ptr and isinstance(args[0], FakeTensor):
            return 0  # on no file
        if func is Tensor.is_pinned:
            return hasattr(args[0].untyped_storage(), _PINNED)
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
    setattr(tensor.untyped_storage(), _PINNED, True)
    return tensor


def _wait(source: Tensor, target: Tensor, *, is_async: bool) -> str | None:
    """What is waited for by a copy from one device to another; None for nothing."""
    if source.device.type == target.device.type or target.is_meta or not source.numel():
        return None
    to_device = target.device.type == "cuda"
    host = source if to_device else target
    # A conversion of dtype or layout goes through pageable memory.
    is_same = (source.dtype, source.stride()) == (target.dtype, target.stride())
    is_pinned = is_same and hasattr(host.untyped_storage(), _PINNED)
    if is_async and (is_pinned or (to_device and source.nbytes <= _STAGED_BYTES)):
        return None
    how = "a copy of pageable memory" if is_async else "a blocking copy"
    return f"{how} to the {'device' if to_device else 'host'}: {_place()}"


class Watch(TorchDispatchMode):
    """Counts operations, and what the device or the host waits for, by place in the source.

    Attributes:
        operations: number of each operation that computes, which views and allocations do not.
        waits: number of each kind of wait by its place, such as `families/wan.py:374 in predict`.
        refused: products that CUDA refuses, by place.
    """

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._streams = streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_of_host(args, kwargs):  # such as lengths of texts, whose numbers are known
            with _disable_current_modes():
                return func(*args, **kwargs)
        if computes(func):
            self.operations[func._opname] += 1
        if func is _aten._local_scalar_dense.default and args[0].device.type == "cuda":
            self.waits[f"reads a value: {_place()}"] += 1
            return args[0].dtype == torch.bool or 1
        if func in _SHAPED_BY_VALUES and args[0].device.type == "cuda":
            self.waits[f"has a shape that depends on values ({func._opname}): {_place()}"] += 1
        if func in _PRODUCTS and (why := _PRODUCTS[func](*args, **kwargs)):
            self.refused[f"{why}: {_place()}"] += 1
        result = func(*args, **kwargs)
        if kwargs.get("pin_memory"):  # in hooks of autograd, where no function mode is
            _as_pinned(result)
        if self._streams.are_several:
            self._streams.operation(*_uses(func, args, kwargs, result), _place)
        if func is _aten._to_copy.default:
            wait = _wait(args[0], result, is_async=kwargs.get("non_blocking", False))
        elif func is _aten.copy_.default:
            wait = _wait(args[1], args[0], is_async=(*args, *kwargs.values(), False)[2])
        else:
            return result
        if wait is not None:
            self.waits[wait] += 1
        return result


def _uses(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of the device that an operation reads, and that it writes; views are neither."""
    given, made = (
        [one for one in tree_leaves(tree) if isinstance(one, Tensor) and one.device.type == "cuda"]
        for tree in ((args, kwargs), result)
    )
    known = {one.untyped_storage()._cdata for one in given}
    new = [one for one in made if one.untyped_storage()._cdata not in known]
    changed = [
        one
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for one in tree_leaves(value)
        if isinstance(one, Tensor) and one.device.type == "cuda"
    ]
    is_view = bool(made) and not new and not changed
    return [] if is_view else given, [*new, *changed]


def _scaled_mm_refused(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *_: Any, **settings: Any) -> str:
    """Why CUDA refuses a product in fp8 or in blocks (`_scaled_mm`); empty if it takes it."""
    if a.dtype == b.dtype == torch.float8_e5m2:
        return "e5m2 times e5m2"
    if a.stride(1) != 1 or a.stride(0) < a.shape[1]:
        return f"the first matrix must have rows in memory, has strides {a.stride()}"
    if b.stride(0) != 1 or b.stride(1) < b.shape[0]:
        return f"the second matrix must have columns in memory, has strides {b.stride()}"
    if a.shape[1] % 16 or b.shape[1] % 16:
        return f"sizes must be multiples of 16, are {tuple(a.shape)} and {tuple(b.shape)}"
    if scale_a.dtype.itemsize == 1:  # of blocks, for which compute capability 10.0 is needed
        sides = ((a, scale_a), (b.t(), scale_b))
        return next((why for one, scale in sides if (why := _blocks_refused(one, scale))), "")
    by_row = scale_a.numel() > 1 or scale_b.numel() > 1
    if by_row and (scale_a.shape, scale_b.shape) != ((a.shape[0], 1), (1, b.shape[1])):
        return f"scales by row must be (rows, 1) and (1, columns), are {scale_a.shape} and {scale_b.shape}"
    if not scale_a.is_contiguous() or not scale_b.is_contiguous():
        return "scales must be contiguous"
    if scale_a.dtype != torch.float32 or scale_b.dtype != torch.float32:
        return "scales must be in fp32"
    return ""


def _blocks_refused(rows: Tensor, scales: Tensor) -> str:
    """Why CUDA refuses rows of codes with scales of blocks: whole tiles of 128 rows and 4 blocks, padded."""
    sizes = {
        (torch.float8_e4m3fn, torch.float8_e8m0fnu): 32,
        (torch.float4_e2m1fn_x2, torch.float8_e4m3fn): 16 // 2,
    }
    if (block := sizes.get((rows.dtype, scales.dtype))) is None:
        return f"there are no blocks of {rows.dtype} with scales in {scales.dtype}"
    wanted = -(-rows.shape[0] // 128) * 128 * -(-rows.shape[1] // (4 * block)) * 4
    if scales.numel() != wanted or not scales.is_contiguous():
        return f"there must be {wanted} scales in a row, are {tuple(scales.shape)}"
    return ""


def _int_mm_refused(a: Tensor, b: Tensor, **_: Any) -> str:
    """Why CUDA refuses a product in int8 (`_int_mm`); empty if it takes it."""
    if a.shape[0] <= 16:
        return f"there must be more than 16 rows, are {a.shape[0]}"
    if a.shape[1] % 8 or b.shape[1] % 8:
        return f"sizes must be multiples of 8, are {tuple(a.shape)} and {tuple(b.shape)}"
    if a.stride(1) != 1:
        return f"the first matrix must have rows in memory, has strides {a.stride()}"
    if 1 not in b.stride():
        return f"the second matrix must have rows or columns in memory, has strides {b.stride()}"
    return ""


_PRODUCTS = {_aten._scaled_mm.default: _scaled_mm_refused, _aten._int_mm.default: _int_mm_refused}


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
            if root in name and frame.name != "__torch_function__":
                return f"{name.partition(root)[2]}:{frame.lineno} in {frame.name}"
    return "?"


def faked(module: nn.Module) -> None:
    """Replace the tensors of a module by fake ones on the CPU."""
    known: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                fake = known.get(id(parameter)) or nn.Parameter(
                    MODE.from_tensor(parameter.detach()), requires_grad=parameter.requires_grad
                )
                known[id(parameter)] = fake
                part._parameters[name] = fake
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = MODE.from_tensor(buffer)


@dataclass
class Traced:
    """What steps asked of the device.

    Attributes:
        waits: of the steps after the first, by place; `first` has those of the first.
        batches: of making batches.
        refused: products that CUDA refuses.
        races: uses on several streams that may come too early.
        captured: what a captured pass does that its replays would not, or with other memory; `graphs` is their number.
        operations: number of operations that compute, of the gradient of the last step.
        layers: adapted layers.
        streams: made in the last step.
        costs: of the gradient of the last step, as `costs.Costs.as_numbers`, if they are counted.
    """

    waits: Counter[str] = field(default_factory=Counter)
    first: Counter[str] = field(default_factory=Counter)
    batches: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    races: Counter[str] = field(default_factory=Counter)
    captured: Counter[str] = field(default_factory=Counter)
    graphs: int = 0
    operations: int = 0
    layers: int = 0
    streams: int = 0
    costs: dict[str, list[float]] = field(default_factory=dict)


def floor(model: Model, samples: Sequence[Sample]) -> Traced:
    """A forward and backward pass to the latents of the frozen model, as docs/benchmarks.md has it."""
    with Devices(MODE):
        with MODE:
            faked(model.components.denoiser)
        with (
            frozen_floor(trainable(model), samples, device=DEVICE, dtype=torch.bfloat16) as once,
            MODE,
            Watch(Streams()) as watch,
        ):
            once()
    return Traced(operations=watch.operations.total())


class Capturing(TorchDispatchMode):
    """Lists what does not belong into the capture of a CUDA graph.

    Attributes:
        made: storages that were allocated.
    """

    def __init__(self, streams: Streams, found: Counter[str]) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, str] = {}
        self._streams, self._stream, self._found = streams, streams.current, found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, new = ([one for one in tree_leaves(t) if isinstance(one, Tensor)] for t in ((args, kwargs), result))
        devices = {one.device.type for one in (*given, *new)}
        if len(devices) > 1:
            self._found[f"uses memory of the host ({func._opname}): {_place()}"] += 1
        if (func is _aten._local_scalar_dense.default or func in _SHAPED_BY_VALUES) and given[0].device.type == "cuda":
            self._found[f"reads a value ({func._opname}): {_place()}"] += 1
        if self._streams.current is not self._stream:
            self._found[f"is on another stream ({func._opname}): {_place()}"] += 1
        known = {one.untyped_storage()._cdata for one in given}
        for one in new:
            if one.device.type == "cuda" and (storage := one.untyped_storage())._cdata not in known:
                self.made[StorageWeakRef(storage)] = _place()
        return result


@contextlib.contextmanager
def graphs_watched(streams: Streams, found: Traced) -> Iterator[None]:
    """Inside the context, captures of CUDA graphs are watched, and replays do nothing."""

    @contextlib.contextmanager
    def captured(graph: object, pool: object, stream: Any, *, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "another thread copies batches meanwhile"
        found.graphs += 1
        # Nothing runs during a capture, so that it is in nobody's way.
        with streams.chosen(stream), mock.patch.object(streams, "operation", lambda *_: None):
            watching = Capturing(streams, found.captured)
            with watching:
                yield
        gc.collect()
        kept = [place for storage, place in watching.made.items() if not storage.expired()]
        if len(kept) > 1:  # than the losses
            found.captured.update(f"keeps memory of the graph: {place}" for place in kept)

    with (
        mock.patch.object(torch.cuda, "graph_pool_handle", tuple),
        mock.patch.object(torch.cuda, "CUDAGraph", mock.Mock),
        mock.patch.object(torch.cuda, "graph", captured),
        mock.patch.object(cuda_graphs, "_TOLERANCE", 1.0),  # a value that is read is 1
    ):
        yield


@torch.library.custom_op("lorasmith_tests::turned", mutates_args=())
def _turned(x: Tensor, turns: Tensor, direction: float) -> Tensor:
    """In place of the kernel of rotary embeddings."""
    raise AssertionError("is called with fake tensors")


_turned.register_fake(lambda x, turns, direction: torch.empty_like(x, memory_format=torch.contiguous_format))


@torch.library.custom_op("lorasmith_tests::unpacked", mutates_args=("y",))
def _unpacked(y: Tensor, tensors: Sequence[Tensor]) -> None:
    """In place of the kernel that unpacks weights."""
    raise AssertionError("is called with fake tensors")


def _int8_product(a: Tensor, scale_a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    assert b.stride(0) == 1, "tensor cores take int8 in column order, and rows byte by byte"
    return quantized_products._int8_product(a, scale_a, b, *rest)


def unpacked_in_place(y: Tensor, *tensors: Tensor) -> Tensor:
    """What unpacks fake weights as `core.unpacking_kernel` does, in one operation."""
    _unpacked(y, tensors)
    return y


@torch.library.custom_op("lorasmith_tests::int8_product", mutates_args={"y"})
def _int8_onto(y: Tensor, a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, added: list[Tensor]) -> None:
    """In place of the kernel of products in int8."""
    raise AssertionError("is called with fake tensors")


_int8_onto.register_fake(lambda *_: None)


def _int8_in_one(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    narrow: tuple[Tensor, Tensor, float] | None = None,
    total: Tensor | None = None,
) -> Tensor:
    added = [one for one in (*(narrow or ())[:2], bias, total) if isinstance(one, Tensor)]
    y = a.new_empty(a.shape[0], b.shape[1], dtype=dtype) if total is None else total
    _int8_onto(y, a, scale_a, b, scale_b, added)
    return y


@torch.library.custom_op("lorasmith_tests::transposed", mutates_args=())
def _transposed(codes: Tensor) -> Tensor:
    """In place of the kernel that transposes codes."""
    raise AssertionError("is called with fake tensors")


_transposed.register_fake(lambda codes: codes.new_empty(codes.shape[1], codes.shape[0]))


@torch.library.custom_op("lorasmith_tests::rounded", mutates_args=())
def _rounded(rows: Tensor, kind: torch.dtype, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """In place of the kernel that rounds rows."""
    raise AssertionError("is called with fake tensors")


_rounded.register_fake(
    lambda rows, kind, factors: (
        rows.new_empty(rows.shape, dtype=kind),
        rows.new_empty(rows.shape[0], 1, dtype=torch.float32),
    )
)


@torch.library.custom_op("lorasmith_tests::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In place of a fused kernel of attention."""
    raise AssertionError("is called with fake tensors")


@torch.library.custom_op("lorasmith_tests::attention_backward", mutates_args=())
def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place of its backward pass."""
    raise AssertionError("is called with fake tensors")


_attention.register_fake(lambda q, k, v: torch.empty_like(q))
_attention_backward.register_fake(lambda grad, q, k, v, y: tuple(map(torch.empty_like, (q, k, v))))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = _attention(q, k, v)
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _attention_backward(grads[0], *ctx.saved_tensors)


def _attention_in_one(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    y: Tensor = _Attention.apply(query, key, value)
    return y


@torch.library.custom_op("lorasmith_tests::between_products", mutates_args={"written"})
def _between_products(written: list[Tensor], read: list[Tensor]) -> None:
    """In place of a kernel of `block_kernels`."""
    raise AssertionError("is called with fake tensors")


_between_products.register_fake(lambda written, read: None)


def _block_in_one(name: str, *args: Any) -> Any:
    """The functions of `block_kernels`, one operation each."""
    first = args[0]
    like = torch.empty_like
    if name in ("modulated", "modulated_gradient"):
        gate = args[5]
        total = first if gate is None else like(first)
        results = (total, like(first)) if name == "modulated" else (like(first), None if gate is None else total)
        written = [one for one in results if one is not None and one is not first]
    elif name == "turned_norm":
        results, written = None, [args[4]]
    elif name == "gated":
        results = first.new_empty((*first.shape[:-1], first.shape[-1] // 2))
    elif name == "joined":
        results = first.new_empty((*first.shape[:-1], first.shape[-1] + args[1].shape[-1]))
    else:
        results = like(args[1]) if name.endswith("_gradient") else like(first)
    if isinstance(results, Tensor):
        written = [results]
    read = [one for one in args if isinstance(one, Tensor) and not any(one is other for other in written)]
    _between_products(written, read)
    return results


@contextlib.contextmanager
def kernels_alone() -> Iterator[None]:
    """Inside the context, attention, products in int8, transposing, rounding and what is between products are one
    operation each, as their kernels are."""
    by_kernel = partial(Kernel, "")
    with (
        mock.patch.object(quantized_products, "int8_product_on", lambda *_: by_kernel(_int8_in_one)),
        mock.patch.object(quantized_products, "transposing_on", lambda *_: by_kernel(_transposed)),
        mock.patch.object(
            quantized_products,
            "rounding_on",
            lambda *_: by_kernel(lambda rows, kind, largest, factors: _rounded(rows, kind, factors)),
        ),
        mock.patch.object(fused_blocks, "kernels_on", lambda *_: by_kernel(_block_in_one)),
        mock.patch.object(F, "scaled_dot_product_attention", _attention_in_one),
    ):
        yield


MODE = FakeTensorMode(allow_non_fake_inputs=True)
"""One for all steps of a process: what they cache outlives them."""


def traced(
    model: Model,
    samples: Sequence[Sample],
    changes: Mapping[str, Any] | None = None,
    *,
    steps: int = 2,
    scales_by_row: bool = True,
    counts: bool = False,
    **settings: Any,
) -> Traced:
    """Steps on the fake device; `model` cannot be used afterwards.

    Args:
        changes: to the way, behind the plan.
        scales_by_row: whether the device multiplies with a scale for each row.
        counts: whether costs are counted; every kernel of the project is then one operation.
    """
    given = {"rank": 4, "training_dtype": "bf16", "exact_dtype": True, "learning_rate": 1e-3, **settings}
    # Planned on the CPU: some algorithms compute their first weights.
    job = plan_job(model.denoiser, TrainConfig(**given), torch.device("cpu"))
    way = replace(job.way, device=DEVICE, **(changes or {}))
    found, streams = Traced(layers=len(job.adapters)), Streams()
    dtypes = {torch.float32: False, torch.bfloat16: True} if scales_by_row else {}
    by_torch = partial(Kernel, "")
    with (
        contextlib.ExitStack() as prepared,
        streams.in_place(),
        graphs_watched(streams, found),
        Devices(MODE) as devices,
        mock.patch.object(pinned_memory, "_registered", lambda _: None),
        mock.patch.object(quantized_products, "_dtypes_scaled_by_row", lambda *_: dtypes),
        # Triton compiles for a device alone.
        mock.patch.object(
            quantized_products, "int8_product_on", lambda *_: Kernel("", _int8_product, "it is not there")
        ),
        mock.patch.object(
            quantized_products, "transposing_on", lambda *_: by_torch(quantized_products._transposed_by_torch)
        ),
        mock.patch.object(quantized_products, "rounding_on", lambda *_: by_torch(quantized_products.rounded_by_torch)),
        mock.patch.object(quantization, "unpacking_on", lambda *_: by_torch(unpacked_in_place)),
        mock.patch.object(backward_passes, "rotation_on", lambda *_: by_torch(_turned)),
        mock.patch.object(fused_blocks, "kernels_on", lambda *_: Kernel("", print, "it is not there")),
        # The tiny models' weights and activations are below the sizes from which anything is done about them.
        mock.patch.object(pinned_memory, "_LEAST_BYTES", 0),
        mock.patch.object(activations, "_SMALL", 256),
        mock.patch.object(activations, "_WORTH_MOVING", 256),
        kernels_alone() if counts else contextlib.nullcontext(),
    ):
        with MODE:
            for module in (model.components.denoiser, *job.adapters.values(), *job.differences.values()):
                faked(module)
            engine = Engine(job.model, job.adapters, job.config, way, job.differences)
            prepared.enter_context(engine.prepared())
        maker = batch_maker(job.model, samples, job.config, way, engine.rank_masks)
        for step in range(steps):
            devices.waits.clear()
            streams_before = streams.count
            batches = maker.step(step)
            found.batches += devices.waits
            counting = Costs() if counts else contextlib.nullcontext()
            with MODE, Watch(streams) as watch:
                with counting:
                    results = engine.gradient(batches)
                found.operations = watch.operations.total()
                engine.update(step, *results)
            found.streams = streams.count - streams_before
            if step:
                found.waits += watch.waits
            else:
                found.first = watch.waits
            found.refused += watch.refused
            found.costs = counting.as_numbers() if isinstance(counting, Costs) else {}
        found.races = streams.races
        with MODE:
            prepared.close()
    return found
