"""Which samples a step sees, at which noise level, with which noise: all functions of the seed and the draw index.

A step takes batch_size × grad_accumulation_steps consecutive draws of the epochs' permutations, so batches cross the
ends of epochs and every image is seen once before any is seen twice. Draws of equal latent size share a forward pass;
each meets its own conditioning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.core.random import keyed_normal, keyed_permutation, keyed_uniform
from lorasmith.data.dataset import Sample
from lorasmith.diffusion.schedule import NoiseLevel, NoiseSchedule
from lorasmith.families.base import Conditioning, collate

__all__ = ["Batch", "BatchMaker", "prefetched"]


@dataclass(frozen=True)
class Batch:
    """Samples that go through the denoiser together.

    Attributes:
        clean, noise, noised: fp32 (batch, channels, height, width).
        level: their noise levels.
        conditioning: one batch.
        names: the samples' names.
        masks: dropout's, one row for each sample; None without dropout.
    """

    clean: Tensor
    noise: Tensor
    noised: Tensor
    level: NoiseLevel
    conditioning: Conditioning
    names: tuple[str, ...]
    masks: Tensor | None = None


@dataclass(frozen=True)
class BatchMaker:
    """Makes the batches of any step.

    Attributes:
        samples: the dataset.
        schedule: the model's noise schedule.
        distribution: uniform numbers → quantiles of diffusion time.
        seed: key of everything drawn.
        repeatable_context: whether captions of different length may share a forward pass; see `Family`.
        batch_size: draws per forward pass.
        accumulation: forward passes per step.
        device, dtype: where the denoiser runs and the dtype of its conditioning.
        memory_format: of the tensors that go through the denoiser.
        masks: dropout's masks for draws, by their index, one row each.
    """

    samples: Sequence[Sample]
    schedule: NoiseSchedule
    distribution: Callable[[Tensor], Tensor]
    seed: int
    repeatable_context: bool
    batch_size: int
    accumulation: int
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    masks: Callable[[Sequence[int]], Tensor | None] = lambda draws: None

    @property
    def per_step(self) -> int:
        """Draws per step."""
        return self.batch_size * self.accumulation

    def sample(self, draw: int) -> Sample:
        """The sample of a global draw index."""
        epoch, position = divmod(draw, len(self.samples))
        return self.samples[keyed_permutation(len(self.samples), self.seed, "order", epoch)[position]]

    def step(self, step: int) -> list[Batch]:
        """The batches of a step (counted from 0), one or more per micro-batch."""
        first = step * self.per_step
        batches = []
        for start in range(first, first + self.per_step, self.batch_size):
            groups: dict[object, list[int]] = {}
            for draw in range(start, start + self.batch_size):
                sample = self.sample(draw)
                groups.setdefault((sample.latents.shape, self._kind(sample.conditioning)), []).append(draw)
            batches += [self._batch(draws) for draws in groups.values()]
        return batches

    def _kind(self, conditioning: Conditioning) -> object:
        """What must agree between conditionings of a batch: tensors, shapes, the context's length if it matters."""
        return frozenset(
            (key, tensor.shape[2:] if key == "context" and self.repeatable_context else tensor.shape)
            for key, tensor in conditioning.tensors.items()
        )

    def _batch(self, draws: Sequence[int]) -> Batch:
        samples = [self.sample(draw) for draw in draws]
        clean = torch.stack([sample.latents for sample in samples])
        noise = torch.stack([keyed_normal(tuple(clean.shape[1:]), self.seed, "noise", draw) for draw in draws])
        uniform = torch.tensor([keyed_uniform(self.seed, "timestep", draw) for draw in draws])
        level = self.schedule.at(self.distribution(uniform))
        masks = self.masks(draws)
        return Batch(
            clean=self._placed(clean),
            noise=self._placed(noise),
            noised=self._placed(level.noised(clean, noise)),
            level=level.to(self.device),
            conditioning=collate([sample.conditioning for sample in samples]).to(self.device, self.dtype),
            names=tuple(sample.name for sample in samples),
            masks=None if masks is None else masks.to(self.device, self.dtype),
        )

    def _placed(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()  # lets the copy run beside the device's work
        return tensor.to(self.device, memory_format=self.memory_format, non_blocking=True)


def prefetched(maker: BatchMaker, steps: range) -> Iterator[tuple[int, list[Batch]]]:
    """Each step with its batches, made one step ahead on another thread."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lorasmith-batches") as pool:
        coming = pool.submit(maker.step, steps[0])
        for step in steps:
            batches = coming.result()
            if step + 1 in steps:
                coming = pool.submit(maker.step, step + 1)
            yield step, batches
