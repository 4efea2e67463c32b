"""Measurement of a training step: its time compared with the floor, its parts, memory and FLOPs.

The floor is one forward and one backward pass to the latents of the frozen diffusers model; no trainer that needs
gradients of all layers can be faster. Inputs are random, as they do not affect the cost.

Counts of operations are deterministic; memory inside kernels (scratch memory, their own copies) is not counted. torch's
profiler has the time of products, of other operations, and between operations.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lorasmith.adapters.weight_stream import streams_of
from lorasmith.core.placement import placed
from lorasmith.core.quantization import Packed, weight_source
from lorasmith.data.dataset import Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.training.batches import prefetched, stand_in_captions
from lorasmith.training.engine import batch_maker
from lorasmith.training.events import EventHandler
from lorasmith.training.job import TrainJob, engine_of
from lorasmith.training.loop import Loop, Watcher
from lorasmith.training.trainable import Trainable

Clock = Callable[[], float]

_PART_STEPS = 2  # steps whose parts are timed, after one warm-up step


@dataclass(frozen=True)
class Spread:
    """Seconds of repeated runs of the same work."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        return min(self.seconds)

    @property
    def high(self) -> float:
        return max(self.seconds)


@dataclass(frozen=True)
class Steps:
    """Seconds of each step of the training loop, and of its wait for batches, which another thread makes."""

    seconds: Spread
    waited: Spread

    @property
    def waiting(self) -> float:
        """Share of the time spent waiting, 0 to 1."""
        return min(1.0, sum(self.waited.seconds) / sum(self.seconds.seconds))


@dataclass(frozen=True)
class Counts:
    """Counts of one step or pass, memory in bytes; see `Counter`."""

    flops: int
    operations: int
    sent: int  # copied to the device
    held: int  # activations saved for the backward pass
    peak: int  # above the frozen weights
    state: int  # kept between steps: trained weights, gradients, optimizer state


@dataclass(frozen=True)
class PartTimes:
    """Median seconds of the parts of a step, each synchronized."""

    making: float  # its batches, on another thread
    gradient: float  # forward and backward pass
    update: float  # clipping, optimizer, publishing
    busy: float | None  # CPU seconds per second and thread; None on other devices


def synthetic_samples(
    model: Model,
    count: int,
    height: int,
    width: int,
    *,
    frames: int = 1,
    tokens: int | None = None,
    controls: Sequence[tuple[int, int]] = (),
    are_pairs: bool = False,
) -> tuple[Sample, ...]:
    """Samples with random latents and conditioning in a model's shapes; `height`, `width` are of the latents.

    `frames` is 1 for pictures; `tokens` is the length of the context, None for the family's usual one; `controls` are
    heights and widths of the latents of each. Samples of `are_pairs` have opposites.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = dict(model.family.conditioning_shapes(model.components.denoiser))
    if tokens is not None:
        shapes["context"] = (1, tokens, *shapes["context"][2:])

    def sample(index: int) -> Sample:
        latent = model.components.latent
        shape = latent.shape(height * latent.downscale, width * latent.downscale, frames)
        latents = torch.randn(shape, generator=generator)
        shapes_beside = _shapes_beside(model, height * latent.downscale, width * latent.downscale, frames)
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in {**shapes, **shapes_beside}.items()}
        sizes = [(1, *size) if latent.frames else size for size in controls]
        beside = [torch.randn(1, latent.channels, *size, generator=generator) for size in sizes]
        opposite = torch.randn(shape, generator=generator) if are_pairs else None
        return Sample(
            latents, Conditioning(tensors, text="").with_controls(beside), f"random {index}", opposite=opposite
        )

    return tuple(sample(index) for index in range(count))


def _shapes_beside(model: Model, height: int, width: int, frames: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what the model is given of a picture or clip of these pixels itself."""
    form, latent = model.control_form, model.components.latent
    if form.are_files:
        return {}

    def encode(pixels: Tensor) -> Tensor:
        return torch.empty(1, *latent.shape(height, width, *pixels.shape[2:-2]), device="meta")

    pixels = torch.empty(1, 3, *([frames] if latent.frames else []), height, width, device="meta")
    mask, parts = torch.empty(height, width, device="meta"), replace(model.components, image_encoder=None)
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.family.picture_inputs(form, parts, encode, pixels, mask).items()
    }


def frozen_pass(
    model: Trainable, samples: Sequence[Sample], *, device: torch.device, dtype: torch.dtype, backward: bool = True
) -> Callable[[], None]:
    """A function that runs a forward (and backward) pass to the latents of a frozen model on `device` in `dtype`."""
    latents = torch.stack([sample.latents for sample in samples]).to(device, dtype)
    joined = model.join([sample.conditioning for sample in samples])
    conditioning = replace(joined, texts=()).to(device, dtype)  # text encoders are not part of it
    schedule = model.diffusion.schedule
    level = schedule.at(torch.full((len(samples),), 0.5)).to(device)

    def once() -> None:
        x = latents.clone().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            prediction = model.predict(x, level.time, conditioning)
            if backward:
                torch.autograd.backward(prediction.float().square().mean())

    return once


@contextlib.contextmanager
def frozen_floor(
    model: Trainable, samples: Sequence[Sample], *, device: torch.device, dtype: torch.dtype, backward: bool = True
) -> Iterator[Callable[[], None]]:
    """Inside the context, the model's own module is contiguous on the device; yields a function that runs one pass."""
    with placed(model.module, device=device, dtype=dtype, layout=torch.contiguous_format):
        yield frozen_pass(model, samples, device=device, dtype=dtype, backward=backward)


@contextlib.contextmanager
def training_steps(
    job: TrainJob, samples: Sequence[Sample], counter: Counter | None = None
) -> Iterator[Callable[[], None]]:
    """Inside the context, the model is prepared for a run's steps; yields a function that runs the next one.

    `counter` counts the creation of trained weights and optimizer state, but not of the frozen weights.
    """
    with counter or contextlib.nullcontext():
        engine = engine_of(job)
    maker = batch_maker(job.model, stand_in_captions(samples), job.config, job.way, engine.rank_masks)
    steps = itertools.count()

    def once() -> None:
        step = next(steps)
        engine.update(step, *engine.gradient(maker.step(step)))

    try:
        with engine.prepared():
            yield once
    finally:
        engine.release()


def counted(
    steps: Callable[[Counter], contextlib.AbstractContextManager[Callable[[], None]]], device: torch.device
) -> Counts:
    """Counts of the second step, as the first allocates the optimizer's state; `steps` is like `training_steps`."""
    counter = Counter(device)
    with steps(counter) as once, torch.compiler.set_stance("force_eager"):
        with counter:
            once()
        state = counter.live
        counter.reset()
        with counter:
            once()
    return Counts(counter.flops, counter.operations, counter.sent, counter.held - state, counter.peak, state)


def pass_seconds(
    once: Callable[[], object], *, steps: int, device: torch.device, warmup: int = 0, clock: Clock = time.perf_counter
) -> Spread:
    """Seconds of each of `steps` calls after `warmup` ones.

    A GPU is not synchronized between calls, as in `measured_steps`, so that a slow host affects both equally; its
    events are the clock.
    """
    for _ in range(warmup):
        once()
    ends = _Ends(device, clock)
    ends.note()
    for _ in range(steps):
        once()
        ends.note()
    return Spread(ends.differences())


def measured_steps(
    job: TrainJob,
    samples: Sequence[Sample],
    *,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
    on_event: EventHandler = lambda event: None,
) -> Steps:
    """Steps of the training loop after the warm-up (at least 1, as the first batches are not prefetched).

    Each is timed from the end of the one before. A GPU is not synchronized between steps: the times are those of its
    events, and waiting is wall time of the host. `on_event` receives the run's events, such as a `Shrunk` if memory
    runs out.
    """
    ends = _Ends(job.way.device, clock)
    engine = engine_of(job)
    loop = Loop(engine, stand_in_captions(samples), on_event=on_event, watchers=[ends])
    try:
        loop.run()
    finally:
        engine.release()
    return Steps(Spread(ends.differences()[warmup - 1 :]), Spread(tuple(loop.waited_s[warmup:])))


def measured_parts(job: TrainJob, samples: Sequence[Sample]) -> PartTimes:
    """Time the parts of a step, one after the other."""
    steps = _PART_STEPS
    engine = engine_of(job)
    maker = batch_maker(job.model, stand_in_captions(samples), job.config, job.way, engine.rank_masks)
    device = job.way.device
    rows = []
    try:
        with engine.prepared(), contextlib.closing(prefetched(maker, range(steps + 1))) as coming:
            for step in range(steps + 1):
                times = [time.perf_counter()]
                _, batches = next(coming)
                times.append(time.perf_counter())
                gradient = engine.gradient(batches)
                _wait_for(device)
                times.append(time.perf_counter())
                engine.update(step, *gradient)
                _wait_for(device)
                times.append(time.perf_counter())
                rows.append(([b - a for a, b in itertools.pairwise(times)], time.process_time()))
            ended = time.perf_counter()
    finally:
        engine.release()
    gradient_s, update = (statistics.median(row[0][part] for row in rows[1:]) for part in (1, 2))
    making = pass_seconds(lambda: maker.step(0), steps=3, device=device).median
    began = ended - sum(sum(row[0]) for row in rows[1:])
    busy = (rows[-1][1] - rows[0][1]) / ((ended - began) * torch.get_num_threads())
    return PartTimes(making, gradient_s, update, busy if device.type == "cpu" else None)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a denoiser's frozen weights on the device, as quantized or offloaded at present."""
    total = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(module)}.values())
    for layer in module.modules():
        source = weight_source(layer)
        if isinstance(source, Packed):
            total += source.size_bytes
    return total + sum(stream.size_bytes for stream in streams_of(module))


class _Ends(Watcher):
    def __init__(self, device: torch.device, clock: Clock) -> None:
        self._device = device
        self._clock = clock
        self._ends: list[Any] = []

    def due(self, loop: Loop) -> bool:
        self.note()
        return False

    def note(self) -> None:
        """Record the time at which the device has finished all queued work."""
        if self._device.type == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record(torch.cuda.current_stream(self._device))
            self._ends.append(end)
        else:
            self._ends.append(self._clock())

    def differences(self) -> tuple[float, ...]:
        _wait_for(self._device)
        pairs = itertools.pairwise(self._ends)
        if self._device.type == "cuda":
            return tuple(before.elapsed_time(after) / 1000 for before, after in pairs)
        return tuple(after - before for before, after in pairs)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


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


class Counter(TorchDispatchMode):
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
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
        self.operations += bool(fresh) or func._schema.is_mutable
        for one in fresh:
            self._follow(one)
        if any(tensor.device.type != self._device.type for tensor in inputs if tensor.ndim):
            self.sent += sum(tensor.nbytes for tensor in fresh if tensor.device.type == self._device.type)
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


_PRODUCT = re.compile(r"aten::_?(add|b|badd|scaled_)?b?mm\b|convolution|attention|aten::(linear|_slow_conv|_conv)")
_MOST = 8
_QUIET = "6"  # log level of the profiler's library, which otherwise reports every start and stop on standard error


@dataclass(frozen=True)
class Profile:
    """Seconds of one step or pass, profiling overhead included."""

    whole: float
    products: float  # matrix products, convolutions and attention
    others: float  # other operations
    longest: Mapping[str, float]  # the longest operations, by name

    @property
    def between(self) -> float:
        """Time without a running operation: Python, launching operations, and on a GPU waiting for the host."""
        return max(0.0, self.whole - self.products - self.others)


def profiled(once: Callable[[], None], device: torch.device) -> Profile:
    """Profile one call."""
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", _QUIET)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        once()
        if on_gpu:
            torch.cuda.synchronize(device)
        whole = time.perf_counter() - start
    times: dict[str, float] = {}
    kernels = 0.0
    for event in seen.key_averages():
        if event.device_type.name == "CPU":
            # On a GPU, the kernels that an operation launched.
            times[event.key] = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        elif not event.is_user_annotation:
            kernels += event.self_device_time_total / 1e6
    products = sum(seconds for name, seconds in times.items() if _PRODUCT.search(name))
    ran = kernels if on_gpu else sum(seconds for name, seconds in times.items() if name.startswith("aten::"))
    longest = dict(sorted(times.items(), key=lambda entry: entry[1], reverse=True)[:_MOST])
    return Profile(whole, products, max(0.0, ran - products), longest)
