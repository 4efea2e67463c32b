"""The sides of a comparison: the frozen model, a step of ours with some settings, a step of diffusers and PEFT.

Every side does the same work on the same model and the same samples. What is measured of it: seconds a step; bytes that
the forward pass keeps for the backward pass; bytes at the most above the frozen weights, in which trained weights,
gradients and optimizer state count for everybody. Bytes are those of torch's tensors, counted as they come and go
(`lorasmith.bench.counting`), so they are the same each time; on a GPU the second of them is the allocator's.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.bases import clock
from lorasmith.bench.counting import Counter
from lorasmith.bench.measure import (
    Counts,
    counted,
    frozen_pass,
    pass_seconds,
    step_seconds,
    training_steps,
)
from lorasmith.data.dataset import Sample
from lorasmith.families.base import collate
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job

Once = Callable[[], None]


@dataclass(frozen=True)
class Work:
    """What all sides do.

    Attributes:
        model: the base model.
        plain: a copy of its denoiser, as diffusers gives it.
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
        """Let go of what was kept between rounds."""
        return


class Frozen(Side):
    """Forward, or forward and backward to the latents, of the frozen model: nothing is trained."""

    def __init__(self, work: Work, *, backward: bool) -> None:
        self._work = work
        self._once = frozen_pass(
            work.model.denoiser,
            work.plain,
            work.samples,
            device=work.device,
            dtype=work.dtype,
            backward=backward,
        )

    def seconds(self) -> Sequence[float]:
        return pass_seconds(self._once, steps=self._work.steps, device=self._work.device, clock=clock).seconds

    def opened(self, counter: Counter | None = None) -> contextlib.AbstractContextManager[Once]:
        return contextlib.nullcontext(self._once)


class Ours(Side):
    """A run of ours, in the loop that trains."""

    def __init__(self, work: Work, **settings: Any) -> None:
        # Compiled kernels may be looked for anew where adapters are attached again.
        self._warmup = 2 if settings.get("compile") else 1
        config = TrainConfig(**{**work.settings, **settings, "steps": work.steps + self._warmup})
        self._work = work
        self.job = plan_job(work.model.denoiser, config, work.device)
        self.parameters = self.job.parameters

    def seconds(self) -> Sequence[float]:
        return step_seconds(self.job, self._work.samples, warmup=self._warmup, clock=clock).seconds

    def opened(self, counter: Counter | None = None) -> contextlib.AbstractContextManager[Once]:
        return training_steps(self.job, self._work.samples, counter)


class Peft(Side):
    """diffusers' own text-to-image LoRA recipe: fp32 adapters under autocast, clipping, AdamW."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._network: Any = copy.deepcopy(work.plain)
        self._kept = contextlib.ExitStack()
        self._once: Once | None = None

    def seconds(self) -> Sequence[float]:
        if self._once is None:
            self._once = self._kept.enter_context(self.opened())
        return pass_seconds(self._once, steps=self._work.steps, device=self._work.device, clock=clock).seconds

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
        conditioning = collate([sample.conditioning for sample in work.samples]).to(work.device, work.dtype)
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
    """A step as training scripts write it: noise, loss, backward pass, clipping, update."""
    noise = torch.randn_like(latents)
    loss = nn.functional.mse_loss(predict(latents + noise).float(), noise.float())
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def counts_of(side: Side, device: torch.device) -> Counts:
    """Counts of a step of a side."""
    return counted(side.opened, device)


def allocated_peak(side: Side, device: torch.device) -> int:
    """Bytes of GPU memory at the most in its first steps, above what was there before it was opened."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    with side.opened() as once:
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(2):
            once()
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def resident_peak(side: Side) -> int:
    """Bytes of resident memory at the most in its first steps, above what was there before it was opened.

    For a process that has done nothing else: freed memory that the allocator keeps counts as resident.
    """
    gc.collect()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
    before = _status_bytes("VmRSS")
    with side.opened() as once:
        for _ in range(3):
            once()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
