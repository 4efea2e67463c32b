"""What limits a training step, from what was measured: rates of this device, shares of a step, and the words for them.

A step is products, other operations and the time between operations, as the profiler sees them; the optimizer, waiting
for batches and transfers are parts of it that are measured besides.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lorasmith.bench.measure import Counts, Parts, Spread
from lorasmith.bench.profiling import Profile
from lorasmith.training.memory.memory_plan import MemoryPlan

__all__ = ["Measured", "Rates", "Share", "device_memory", "limits", "measured_rates", "shares"]

_LONG_ENOUGH_S = 0.02
_PINNED_BYTES = 2**26


@dataclass(frozen=True)
class Rates:
    """What a device reaches.

    Attributes:
        products: FLOP/s of a large matrix product in the training dtype.
        copies: bytes/s from pinned host memory; None on the CPU, which copies nothing.
    """

    products: float
    copies: float | None


@dataclass(frozen=True)
class Measured:
    """A step and what it is compared with.

    Attributes:
        plan: how activations are kept, where that was to be measured.
        step: seconds of a step.
        images: that one takes in.
        parts, counts, profile: of the step.
        floor, floor_counts: of the frozen model's pass; None where it does not fit.
        forward: of the forward pass alone; None where the floor does not fit.
        passes: of the batch in a step, as many as gradients are accumulated over.
        weights: bytes of the frozen weights on the device.
        above: bytes at the most during a step, above the frozen weights.
        peak: bytes at the most that the process had of the device's memory, all included.
        memory: bytes that the device has; None where that is not known.
        rates: of the device.
    """

    plan: MemoryPlan | None
    step: Spread
    images: int
    parts: Parts
    counts: Counts
    profile: Profile
    floor: Spread | None
    floor_counts: Counts | None
    forward: Spread | None
    passes: int
    weights: int
    above: int
    peak: int
    memory: int | None
    rates: Rates

    @property
    def images_per_hour(self) -> float:
        """At the median step."""
        return 3600 * self.images / self.step.median

    @property
    def of_floor(self) -> float | None:
        """The floor's time over the step's: 1 is as fast as can be."""
        return None if self.floor is None else self.passes * self.floor.median / self.step.median

    @property
    def again(self) -> float:
        """Share of the FLOPs beyond the floor's, of recomputing and of what is trained."""
        if self.floor_counts is None or not self.counts.flops:
            return 0.0
        return max(0.0, 1 - self.passes * self.floor_counts.flops / self.counts.flops)

    @property
    def efficiency(self) -> float:
        """Rate of the step's products over that of a large one; 0 where there are none."""
        seconds = self.step.median * self.profile.products / self.profile.whole
        return self.counts.flops / seconds / self.rates.products if seconds else 0.0


@dataclass(frozen=True)
class Share:
    """A part of a step's time.

    Attributes:
        name: what takes it.
        of_step: 0 to 1.
        words: where the number comes from, and what lowers it.
    """

    name: str
    of_step: float
    words: str


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """What the device reaches now, in about a second."""
    return Rates(_product_rate(device, dtype), _copy_rate(device) if device.type == "cuda" else None)


def shares(measured: Measured) -> list[Share]:
    """The three that a step is made of, the largest first; their sum is 1."""
    profile, counts = measured.profile, measured.counts
    longest = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in list(profile.longest.items())[:3])
    found = [
        Share("products", profile.products / profile.whole, _on_products(measured)),
        Share(
            "other operations",
            profile.others / profile.whole,
            "additions, norms, activations and copies, which memory limits rather than arithmetic; of all operations "
            f"{longest} took longest",
        ),
        Share(
            "between operations",
            profile.between / profile.whole,
            f"Python and starting {counts.operations:,} operations, with the device waiting; larger batches give each "
            "operation more to do, fewer targets leave some out",
        ),
    ]
    return sorted(found, key=lambda one: one.of_step, reverse=True)


def limits(measured: Measured) -> list[str]:
    """What limits the step, in sentences; the first is about the largest share."""
    said = [f"{one.name.capitalize()}, {one.of_step:.0%}: {one.words}." for one in shares(measured)]
    return [*said, *_on_parts(measured), *_on_memory(measured)]


def _on_products(measured: Measured) -> str:
    counts, rates, reached = measured.counts, measured.rates, measured.efficiency
    words = (
        f"{counts.flops / 1e9:,.1f} GFLOP, at {reached:.0%} of the {rates.products / 1e9:,.0f} GFLOP/s that a large "
        "matrix product reaches here"
    )
    if reached < 0.5:
        words += "; they are small or narrow ones, which larger batches or pictures make use the device better"
    if measured.again > 0.15:
        words += (
            f"; {measured.again:.0%} of them are not in the floor, but recompute something or belong to what is trained"
        )
    return words


def _on_parts(measured: Measured) -> Iterator[str]:
    """Parts of a step that are worth a word."""
    step, parts, counts, rates = measured.step.median, measured.parts, measured.counts, measured.rates
    if parts.waiting > 0.05 * step:
        yield (
            f"Waiting for batches, {parts.waiting / step:.0%}: one takes {_ms(parts.making)} to make beside a step; "
            "smaller pictures or more processor cores make them faster."
        )
    if parts.update > 0.05 * step:
        yield (
            f"The optimizer, {parts.update / step:.0%}: {_ms(parts.update)}; a lower rank or fewer targets leave it "
            "less, and grad_accumulation_steps runs it less often."
        )
    if counts.sent and rates.copies:
        needed = counts.sent / rates.copies
        yield (
            f"Transfers: {counts.sent / 2**20:,.0f} MiB come from the host in each step, which takes "
            f"{needed / step:.0%} of its time, beside the work or before it; quantization makes them smaller."
        )
    if parts.busy is not None and parts.busy < 0.8:
        yield (
            f"The processors work for {parts.busy:.0%} of the time: other programs have them meanwhile, or some work "
            "is for one thread alone."
        )


def _on_memory(measured: Measured) -> Iterator[str]:
    if measured.memory is not None and measured.peak > 0.9 * measured.memory:
        yield (
            f"Memory is next to its limit: {measured.peak / measured.memory:.0%} of {measured.memory / 2**30:.1f} GiB; "
            "activations auto, quantization or a smaller batch make room."
        )


def device_memory(device: torch.device) -> int | None:
    """Bytes that the device has, or that this process may have of the machine's; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square product that takes long enough to be measured."""
    side = 512
    while True:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _best(functools.partial(torch.mm, a, b), device)
        if seconds >= _LONG_ENOUGH_S or side >= 8192:
            return 2.0 * side**3 / seconds
        side *= 2


def _copy_rate(device: torch.device) -> float:
    waiting = torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    return _PINNED_BYTES / _best(lambda: waiting.to(device, non_blocking=True), device)


def _best(once: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some calls: what else the machine does makes a rate no lower."""
    return min(_several(once, device, 4))


def _several(once: Callable[[], object], device: torch.device, times: int) -> Iterator[float]:
    for _ in range(times):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield time.perf_counter() - start


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
