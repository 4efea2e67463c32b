"""Loss on held-out images, always with the same noise and noise levels.

All random numbers are keyed by a constant and the image's name, and the loss is unweighted MSE of the native objective,
whatever the run's settings, restricted to the mask of an image that has one. The losses of two steps, or of two runs
with different settings, can therefore be compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.core.allocator import is_out_of_memory
from lorasmith.core.errors import TrainingError
from lorasmith.core.placement import memory_format_for
from lorasmith.core.processes import ALONE, Processes
from lorasmith.core.random import keyed_normal, keyed_uniform
from lorasmith.data.dataset import Sample, places_of
from lorasmith.diffusion.losses import diffusion_loss
from lorasmith.diffusion.schedule import quantile_range
from lorasmith.families.model import Denoiser
from lorasmith.training.config import WHOLE_RANGE

_SEED = 0  # a constant, so that runs with different seeds can be compared


class Validator:
    """Computes the loss of held-out images on the denoiser in its current state.

    Noise levels are stratified: each image has one level in each of `draws` equal parts of `noise_range` (diffusion
    time), at its own offset, so that all images together cover it finely. Noise is drawn again at each call: that is
    cheap beside a forward pass, and storing it would take `draws` times the memory of the latents. Repeated samples are
    evaluated once.

    `processes` share the batches, and each gets all losses; `equal_passes` makes them run equally many, as required
    with sharded weights.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        samples: Sequence[Sample],
        *,
        draws: int,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        processes: Processes = ALONE,
        equal_passes: bool = False,
        noise_range: tuple[float, float] = WHOLE_RANGE,
    ) -> None:
        self._denoiser = denoiser
        self._samples = list({id(sample): sample for sample in samples}.values())
        self._keys = _distinct([sample.name for sample in self._samples])
        self._device, self._dtype = device, dtype
        self._memory_format = memory_format_for(denoiser.module)
        self.names = tuple(sample.name for sample in self._samples)  # of the images, one per row of the result
        offsets = torch.tensor([keyed_uniform(_SEED, "validation timestep", key) for key in self._keys])
        low, high = quantile_range(denoiser.diffusion.schedule, *noise_range)
        # (images, draws) fp32, of the noise level of each loss: 0 is clean, 1 is noise.
        self.quantiles = low + (high - low) * (torch.arange(draws) + offsets[:, None]) / draws
        self._processes = processes
        self._equal_passes = equal_passes
        lengths_apart = equal_passes and denoiser.base.family.predicts_by_length
        batches = _grouped(self._samples, draws, batch_size, lengths_apart=lengths_apart)
        self._batches = batches[processes.rank :: processes.size]
        # Batches of other processes; their losses are discarded.
        missing = -(-len(batches) // processes.size) - len(self._batches)
        self._padding = batches[:missing] if equal_passes else []

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Losses (images, draws), fp32 on the CPU. Raises TrainingError if one is not finite.

        The caller has placed the denoiser on the device, attached adapters and disabled dropout. Without adapters,
        these are the losses of the base model.
        """
        losses = torch.zeros(self.quantiles.shape)
        measured = self._measured()
        for batch, values in zip(self._batches, measured, strict=True):  # synchronizes with a GPU once, not per batch
            rows, draws = zip(*batch, strict=True)
            losses[list(rows), list(draws)] = values.cpu()
        self._processes.summing(losses)()
        unsound = [name for name, row in zip(self.names, losses, strict=True) if not row.isfinite().all()]
        if unsound:
            raise TrainingError(
                f"the loss of held-out images must be finite, got NaN or infinity for {', '.join(unsound)}; try a "
                "lower learning rate" + ("" if self._dtype == torch.float32 else " or training_dtype fp32")
            )
        return losses

    def _measured(self) -> list[Tensor]:
        """Losses of the batches; falls back to single images when memory runs out, unless passes must be equal."""
        try:
            return [self._losses(batch) for batch in [*self._batches, *self._padding]][: len(self._batches)]
        except (RuntimeError, MemoryError) as error:
            if self._equal_passes or not is_out_of_memory(error) or all(len(batch) == 1 for batch in self._batches):
                raise
        self._batches = [[pair] for batch in self._batches for pair in batch]
        return self._measured()

    def _losses(self, batch: Sequence[tuple[int, int]]) -> Tensor:
        """Losses (batch,) of (image, draw) pairs."""
        samples = [self._samples[row] for row, _ in batch]
        clean = torch.stack([sample.latents for sample in samples])
        noise = torch.stack(
            [
                keyed_normal(tuple(clean.shape[1:]), _SEED, "validation noise", f"{self._keys[row]}/{draw}")
                for row, draw in batch
            ]
        )
        diffusion = self._denoiser.diffusion
        level = diffusion.schedule.at(torch.stack([self.quantiles[row, draw] for row, draw in batch]))
        noised = level.noised(clean, noise)
        level = level.to(self._device)
        clean, noise, noised = (
            tensor.to(self._device, memory_format=self._memory_format) for tensor in (clean, noise, noised)
        )
        conditioning = self._denoiser.base.family.join([sample.conditioning for sample in samples])
        conditioning = conditioning.to(self._device, self._dtype)
        places = places_of(samples)
        return diffusion_loss(
            self._denoiser.predict(noised.to(self._dtype), level.time, conditioning),
            clean=clean,
            noise=noise,
            noised=noised,
            level=level,
            parameterization=diffusion.parameterization,
            objective="native",
            loss_function="MSE",
            places=None if places is None else places.to(self._device),
        )


def _distinct(names: Sequence[str]) -> list[str]:
    """Keys of random numbers: the names, numbered if they repeat."""
    seen: dict[str, int] = {}
    keys = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        keys.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return keys


def _grouped(
    samples: Sequence[Sample], draws: int, batch_size: int, *, lengths_apart: bool
) -> list[list[tuple[int, int]]]:
    """(image, draw) pairs in batches of equal shapes, and of equal numbers of tokens if `lengths_apart`."""
    groups: dict[object, list[tuple[int, int]]] = {}
    for row, sample in enumerate(samples):
        shapes = frozenset((key, tensor.shape) for key, tensor in sample.conditioning.tensors.items())
        lengths = sample.conditioning.lengths if lengths_apart else ()
        groups.setdefault((sample.latents.shape, shapes, lengths), []).extend((row, draw) for draw in range(draws))
    return [
        pairs[start : start + batch_size] for pairs in groups.values() for start in range(0, len(pairs), batch_size)
    ]
