"""The sides of a comparison: the frozen model, a step of ours with some settings, a step of diffusers and PEFT.

Every side does the same work on the same model and the same samples. Measured are seconds a step, bytes that the
forward pass keeps for the backward pass, and the peak of bytes above the frozen weights, which includes trained
weights, gradients and optimizer state on every side. Bytes are those of torch's tensors, counted at allocation and
release (`lorasmith.bench.measure`), so they are deterministic; on a GPU the peak is the allocator's, allocations of
libraries included.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from benchmarks.bases import clock_of, structural_copy
from lorasmith.bench.measure import (
    Counter,
    counted,
    frozen_pass,
    measured_steps,
    pass_seconds,
    training_steps,
)
from lorasmith.core.allocator import is_out_of_memory
from lorasmith.core.errors import TrainingError
from lorasmith.data.dataset import Sample
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, Shrunk, Warned
from lorasmith.training.job import plan_job
from lorasmith.training.trainable import trainable

MIB = 2**20
Once = Callable[[], None]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Work:
    """The work of all sides.

    Attributes:
        model: the base model.
        plain: its denoiser as diffusers gives it, see `structural_copy`.
        samples: a batch.
        settings: of the run, which each side adds to.
        steps: timed of each side in each round.
    """

    model: Model
    plain: nn.Module
    samples: Sequence[Sample]
    settings: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    steps: int

    def timed(self, once: Once, *, warmup: int = 0) -> Sequence[float]:
        """Seconds of each of a round's steps."""
        device = self.device
        return pass_seconds(once, steps=self.steps, warmup=warmup, device=device, clock=clock_of(device)).seconds


class Side(ABC):
    """One side.

    Attributes:
        parameters: trained numbers.
    """

    parameters: int = 0

    @abstractmethod
    def seconds(self) -> Sequence[float]:
        """Seconds of each step, one round of them."""

    @abstractmethod
    def opened(self, counter: Counter | None = None) -> contextlib.AbstractContextManager[Once]:
        """Steps one by one; what is trained is made inside of `counter`."""

    def close(self) -> None:
        """Free what is kept between rounds."""
        return


class Frozen(Side):
    """Forward, or forward and backward to the latents, of the frozen model: nothing is trained."""

    def __init__(self, work: Work, *, backward: bool) -> None:
        self._work = work
        self._once = frozen_pass(
            trainable(replace(work.model, components=replace(work.model.components, denoiser=work.plain))),
            work.samples,
            device=work.device,
            dtype=work.dtype,
            backward=backward,
        )

    def seconds(self) -> Sequence[float]:
        return self._work.timed(self._once)

    def opened(self, counter: Counter | None = None) -> contextlib.AbstractContextManager[Once]:
        return contextlib.nullcontext(self._once)


class Ours(Side):
    """A run of ours, in the loop that trains."""

    def __init__(self, work: Work, **settings: Any) -> None:
        # Attaching adapters again may make torch.compile look up its kernels again.
        self._warmup = 2 if settings.get("compile") else 1
        config = TrainConfig(**{**work.settings, **settings, "steps": work.steps + self._warmup})
        self._work = work
        self.job = plan_job(work.model.denoiser, config, work.device)
        self.parameters = self.job.parameters

    def seconds(self) -> Sequence[float]:
        clock = clock_of(self._work.device)
        steps = measured_steps(self.job, self._work.samples, warmup=self._warmup, clock=clock, on_event=_as_asked)
        return steps.seconds.seconds

    def opened(self, counter: Counter | None = None) -> contextlib.AbstractContextManager[Once]:
        return training_steps(self.job, self._work.samples, counter)


class Peft(Side):
    """diffusers' own text-to-image LoRA recipe: fp32 adapters under autocast, clipping, AdamW."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._network: Any = structural_copy(work.plain)
        self._kept = contextlib.ExitStack()
        self._once: Once | None = None

    def seconds(self) -> Sequence[float]:
        if self._once is None:
            self._once = self._kept.enter_context(self.opened())
        return self._work.timed(self._once)

    def close(self) -> None:
        self._once = None
        self._kept.close()

    @contextlib.contextmanager
    def opened(self, counter: Counter | None = None) -> Iterator[Once]:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        work = self._work
        rank = work.settings["rank"]
        paths = list(plan_job(work.model.denoiser, TrainConfig(**work.settings), work.device).adapters)
        network = self._network
        with counter or contextlib.nullcontext():
            network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=paths))
            cast_training_params(network, dtype=torch.float32)
            trained = [p for p in network.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.parameters = sum(p.numel() for p in trained)
        latents = torch.stack([sample.latents for sample in work.samples]).to(work.device, work.dtype)
        conditioning = work.model.family.join([sample.conditioning for sample in work.samples]).to(
            work.device, work.dtype
        )
        schedule = work.model.components.schedule
        time = schedule.at(torch.full((len(latents),), 0.5)).to(work.device).time
        autocast = torch.autocast(work.device.type, work.dtype, enabled=work.dtype != torch.float32)

        def predict(noised: torch.Tensor) -> torch.Tensor:
            with autocast:
                return work.model.family.predict(network, noised, time, conditioning)

        try:
            yield lambda: textbook_step(predict, latents, trained, optimizer)
        finally:
            network.delete_adapters("default")


def textbook_step(
    predict: Callable[[torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    trained: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """A plain training step: noise, loss, backward pass, clipping, update."""
    noise = torch.randn_like(latents)
    loss = nn.functional.mse_loss(predict(latents + noise).float(), noise.float())
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@dataclass
class Found:
    """The measurements of a side.

    Attributes:
        parameters: trained numbers.
        seconds: of a step, the median of each round.
        kept, peak: bytes that the forward pass keeps, and the peak above the frozen weights.
        trouble: why there are no numbers; empty if there are.
    """

    parameters: int = 0
    seconds: list[float] = field(default_factory=list)
    kept: int | None = None
    peak: int | None = None
    trouble: str = ""

    def titled(self, title: str) -> str:
        """A title with the trouble, if any."""
        return f"{title}: {self.trouble}" if self.trouble else title

    @property
    def mib(self) -> list[float | None]:
        """Kept and peak memory in MiB."""
        return [None if size is None else size / MIB for size in (self.kept, self.peak)]

    def ratio(self, *others: Found | None) -> float | None:
        """Ratio of seconds to the others' sum, the median over rounds; None if one of them was not measured."""
        known = [one.seconds for one in others if one is not None]
        if len(known) < len(others) or not self.seconds or not all(known):
            return None
        return statistics.median(a / sum(b) for a, *b in zip(self.seconds, *known, strict=True))

    @property
    def step(self) -> float | None:
        """Seconds of a step, the median over rounds."""
        return statistics.median(self.seconds) if self.seconds else None


def compared(makers: Mapping[Name, Callable[[], Side]], device: torch.device, rounds: int) -> dict[Name, Found]:
    """Memory of each side, then seconds of all in alternating rounds.

    Args:
        makers: name → function that makes the side. One that does not fit into memory has `trouble` alone.
        device: where they run.
        rounds: number of rounds, besides a first one that warms caches and lets libraries choose their kernels.
    """
    found = {name: Found() for name in makers}
    sides: dict[Name, Side] = {}

    def measure_memory(name: Name) -> None:
        sides[name] = makers[name]()
        counts = counted(sides[name].opened, device)
        found[name].kept = counts.held
        found[name].peak = counts.peak if device.type == "cpu" else _allocated_peak(sides[name], device)
        found[name].parameters = sides[name].parameters

    def measure_time(name: Name) -> None:
        found[name].seconds.append(statistics.median(sides[name].seconds()))

    names = list(makers)
    for name in names:  # memory first: what is too large for the device shows at once
        found[name].trouble = trouble_of(measure_memory, name)
    for round_ in range(rounds + 1):
        turn = round_ % len(names)  # the first side after another one starts with that one's caches
        for name in names[turn:] + names[:turn]:
            found[name].trouble = found[name].trouble or trouble_of(measure_time, name)
    for side in sides.values():
        side.close()
    for one in found.values():
        one.seconds = [] if one.trouble else one.seconds[1:]
    return found


def trouble_of(measure: Callable[[Any], None], name: object) -> str:
    """Measure; returns the reason if memory or a compiler is missing, else an empty string."""
    try:
        measure(name)
        return ""
    except (RuntimeError, MemoryError, TrainingError) as error:
        if not isinstance(error, TrainingError) and not is_out_of_memory(error):
            raise
        trouble = "does not fit" if is_out_of_memory(error) else str(error)
    let_go()  # only now that nothing holds the tensors of what failed
    return trouble


def let_go() -> None:
    """Release unused memory, on a GPU to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def _allocated_peak(side: Side, device: torch.device) -> int:
    """Peak of GPU memory in its first steps, in bytes above that before it was opened."""
    let_go()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with side.opened() as once:
        for _ in range(2):
            once()
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _as_asked(event: Event) -> None:
    """Raises if a run recovers from a fault with other settings than those to be measured."""
    if isinstance(event, Shrunk | Warned):
        raise TrainingError(event.message)


def resident_peak(side: Side) -> int:
    """Peak of resident memory in its first steps, in bytes above that before it was opened.

    For a fresh process: freed memory that the allocator keeps counts as resident.
    """
    gc.collect()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
    before = status_bytes("VmRSS")
    with side.opened() as once:
        for _ in range(3):
            once()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
