"""Loss on held-out images, always with the same noise and noise levels, and a verdict from all of a run.

All random numbers are keyed by a constant and the image's name, and the loss is unweighted MSE of the native objective,
whatever the run's settings, restricted to the mask of an image that has one. The losses of two steps, or of two runs
with different settings, can therefore be compared pair by pair: the difference is taken per image, then its mean and
confidence interval over images. The verdict separates two sources of chance:

- *Which images.* A difference is significant if its 95 % interval (Student's t) excludes zero. Fewer than `FEW_IMAGES`
  images give no usable interval, so each pair of image and noise level is then one observation: the interval is valid
  for these images only, and the verdict says for how many.
- *Which step.* Weights fluctuate from step to step, which moves the loss of all images. This jitter is estimated from
  second differences of the curve, which a linear trend does not affect, and a rise or fall must exceed it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorasmith.adapters.variants import RankMasks
from lorasmith.core.allocator import is_out_of_memory
from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.placement import memory_format_for
from lorasmith.core.printable import count_text
from lorasmith.core.processes import ALONE, Processes
from lorasmith.core.random import keyed_normal, keyed_uniform
from lorasmith.data.dataset import Sample, places_of
from lorasmith.diffusion.losses import diffusion_loss
from lorasmith.diffusion.schedule import quantile_range
from lorasmith.training.batches import Batch
from lorasmith.training.config import WHOLE_RANGE
from lorasmith.training.events import Validated
from lorasmith.training.trainable import Trainable

_SEED = 0  # a constant, so that runs with different seeds can be compared


_ALL_RANKS = RankMasks({}, rank_dropout=0, module_dropout=0, seed=0, schedule=None)


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
        model: Trainable,
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
        self._model = model
        self._samples = list({id(sample): sample for sample in samples}.values())
        self._keys = _distinct([sample.name for sample in self._samples])
        self._device, self._dtype = device, dtype
        self._memory_format = memory_format_for(model.module)
        self.names = tuple(sample.name for sample in self._samples)  # of the images, one per row of the result
        offsets = torch.tensor([keyed_uniform(_SEED, "validation timestep", key) for key in self._keys])
        low, high = quantile_range(model.diffusion.schedule, *noise_range)
        # (images, draws) fp32, of the noise level of each loss: 0 is clean, 1 is noise.
        self.quantiles = low + (high - low) * (torch.arange(draws) + offsets[:, None]) / draws
        self._processes = processes
        self._equal_passes = equal_passes
        lengths_apart = equal_passes and model.facts.predicts_by_length
        batches = _grouped(self._samples, draws, batch_size, lengths_apart=lengths_apart)
        self._batches = batches[processes.rank :: processes.size]
        # Batches of other processes; their losses are discarded.
        missing = -(-len(batches) // processes.size) - len(self._batches)
        self._padding = batches[:missing] if equal_passes else []

    @torch.no_grad()
    def __call__(self, rank_masks: RankMasks = _ALL_RANKS) -> Tensor:
        """Losses (images, draws), fp32 on the CPU. Raises TrainingError if one is not finite.

        The caller has placed the denoiser on the device and attached adapters, whose ranks by noise level are those of
        `rank_masks`. Without adapters, these are the losses of the base model.
        """
        losses = torch.zeros(self.quantiles.shape)
        measured = self._measured(rank_masks)
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

    def _measured(self, rank_masks: RankMasks) -> list[Tensor]:
        """Losses of the batches; falls back to single images when memory runs out, unless passes must be equal."""
        try:
            batches = [*self._batches, *self._padding]
            return [self._losses(batch, rank_masks) for batch in batches][: len(self._batches)]
        except (RuntimeError, MemoryError) as error:
            if self._equal_passes or not is_out_of_memory(error) or all(len(batch) == 1 for batch in self._batches):
                raise
        self._batches = [[pair] for batch in self._batches for pair in batch]
        return self._measured(rank_masks)

    def _losses(self, batch: Sequence[tuple[int, int]], rank_masks: RankMasks) -> Tensor:
        """Losses (batch,) of (image, draw) pairs."""
        samples = [self._samples[row] for row, _ in batch]
        clean = torch.stack([sample.latents for sample in samples])
        noise = torch.stack(
            [
                keyed_normal(tuple(clean.shape[1:]), _SEED, "validation noise", f"{self._keys[row]}/{draw}")
                for row, draw in batch
            ]
        )
        diffusion = self._model.diffusion
        level = diffusion.schedule.at(torch.stack([self.quantiles[row, draw] for row, draw in batch]))
        noised = level.noised(clean, noise)
        masks = rank_masks.at(diffusion.schedule.share(level.time))
        level = level.to(self._device)
        clean, noise, noised = (
            tensor.to(self._device, memory_format=self._memory_format) for tensor in (clean, noise, noised)
        )
        conditioning = self._model.join([sample.conditioning for sample in samples])
        conditioning = conditioning.to(self._device, self._dtype)
        places = places_of(samples)
        drawn = Batch(
            clean=clean,
            noise=noise,
            noised=noised,
            level=level,
            conditioning=conditioning,
            names=tuple(sample.name for sample in samples),
            places=None if places is None else places.to(self._device),
        )
        with rank_masks.masks_applied(None if masks is None else masks.to(self._device, self._dtype)):
            prediction = self._model.predict(noised.to(self._dtype), level.time, conditioning)
        return diffusion_loss(
            prediction,
            drawn,
            parameterization=diffusion.parameterization,
            objective="native",
            loss_function="MSE",
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


FEW_IMAGES = 5
"""Below this many held-out images the interval is over pairs of image and noise level."""

UNJUDGED = "overfitting cannot be judged: nothing is held out"
"""The verdict where nothing is held out."""

TOO_EARLY = "too early to say: no validation yet"
"""The verdict before the first validation."""

_SMOOTH = 3  # validations averaged before two points of the curve are compared
_FALL = 2.0  # jitters by which the curve must have fallen
_RISE = 4.0  # jitters by which it must have risen: the lowest of many values is low by chance too
_STEADY_RISE = 2.0  # enough if its slope since the best is this many standard errors:
_STEADY_SLOPE = 3.0
_SHARE_RISEN = 0.1  # of the total gain, for a rise to matter
_SHARE_FALLEN = 0.05  # of the total gain, for a fall to matter

Array = NDArray[np.float64]


class History:
    """The validations of a run so far; `base` are losses of the base model, (images, draws).

    Raises OptionError for a single loss, too little to estimate an error.
    """

    def __init__(self, base: Sequence[Sequence[float]]) -> None:
        self.base_table = np.asarray(base, dtype=np.float64)
        self.images = len(self.base_table)
        self._base = self._units(self.base_table)
        self.steps: list[int] = []
        self.tables: list[Array] = []  # (images, draws) each
        self._curve: list[Array] = []  # the same by observation
        if len(self._base) < 2:
            raise OptionError(
                "validation needs two images or two noise levels at least, got one of each; raise validation_draws"
            )

    def add(self, step: int, losses: Sequence[Sequence[float]]) -> Validated:
        """Add the losses, (images, draws), after `step` updates; entries from that step on are replaced."""
        while self.steps and self.steps[-1] >= step:
            for column in (self.steps, self.tables, self._curve):
                column.pop()
        self._append(step, losses)
        loss, base_loss = float(self._curve[-1].mean()), self.base_loss
        low, high = interval(self._curve[-1] - self._base)
        return Validated(
            step=step,
            loss=loss,
            base_loss=base_loss,
            low=low,
            high=high,
            best=self.since_best == 0,
            best_step=self.best_step,
            verdict=self.verdict,
        )

    @property
    def base_loss(self) -> float:
        return float(self._base.mean())

    @property
    def losses(self) -> list[tuple[int, float]]:
        return [(step, float(mean)) for step, mean in zip(self.steps, self._means(), strict=True)]

    @property
    def best_step(self) -> int:
        """Step of the lowest loss; the earliest on ties."""
        return self.steps[self._best]

    @property
    def since_best(self) -> int:
        return len(self.steps) - 1 - self._best

    def should_stop(self, patience: int) -> bool:
        """Whether `patience` validations have passed without an improvement; 0 never stops."""
        return bool(self.steps) and 0 < patience <= self.since_best

    @property
    def verdict(self) -> str:
        """Interpretation of the validations, in a sentence without a full stop."""
        if not self.steps:
            return TOO_EARLY
        few = f" (on {count_text(self.images, 'held-out image')} alone)"
        return self._trend() + (few if self.images < FEW_IMAGES else "")

    @classmethod
    def of(
        cls, base: Sequence[Sequence[float]], validations: Iterable[tuple[int, Sequence[Sequence[float]]]]
    ) -> History:
        """The history of these losses, by step."""
        history = cls(base)
        for step, losses in validations:
            history._append(step, losses)
        return history

    @property
    def _best(self) -> int:
        return int(np.argmin(self._means()))

    def _append(self, step: int, losses: Sequence[Sequence[float]]) -> None:
        self.steps.append(step)
        self.tables.append(np.asarray(losses, dtype=np.float64))
        self._curve.append(self._units(self.tables[-1]))

    def _units(self, table: Array) -> Array:
        """Values per observation: an image, or with few images an (image, noise level) pair."""
        return table.mean(axis=1) if self.images >= FEW_IMAGES else table.reshape(-1)

    def _means(self) -> Array:
        return np.array([row.mean() for row in self._curve])

    def _trend(self) -> str:
        means = self._means()
        falling = self._still_falling(means)
        won = self._base - self._best_stretch()
        if interval(won)[0] <= 0 or won.mean() <= _FALL * _jitter(means):
            worse = interval(self._last_stretch() - self._base)[0] > 0 and not falling
            if worse and len(means) > _SMOOTH:
                return "worse than the base model; try a lower learning rate"
            return ("still learning, but " if falling else "") + "no better than the base model so far"
        if self._overfits(means):
            return f"best at step {self.best_step}, overfitting since"
        if falling:
            return "still learning"
        if len(means) <= _SMOOTH:
            return "too early to say: better than the base model so far"
        near = self._last_stretch().mean() + max(_FALL * _jitter(means), _SHARE_FALLEN * self._gain(means))
        since = self.steps[int(np.argmax(means <= near))]
        best = "" if since == self.best_step else f", best at {self.best_step}"
        return f"levelled off at about step {since}{best}"

    def _still_falling(self, means: Array) -> bool:
        if len(means) <= _SMOOTH:
            return self.since_best == 0 and float(means[-1]) < float(self._base.mean())
        back = max(_SMOOTH, len(means) // 4)
        before = means[max(0, len(means) - back - _SMOOTH) : len(means) - back].mean()
        fallen = float(before - means[-_SMOOTH:].mean())
        return fallen > max(_FALL * _jitter(means), _SHARE_FALLEN * self._gain(means))

    def _overfits(self, means: Array) -> bool:
        if self.since_best <= _SMOOTH:
            return False
        risen = self._last_stretch() - self._best_stretch()
        jitter, rise = _jitter(means), float(risen.mean())
        steady = _slope(means[self._best + 1 :]) > _STEADY_SLOPE * jitter
        clear = rise > (_STEADY_RISE if steady else _RISE) * jitter and rise > _SHARE_RISEN * self._gain(means)
        return clear and interval(risen)[0] > 0

    def _best_stretch(self) -> Array:
        """The best validation averaged with the next ones, as a single minimum is low by chance too."""
        best: Array = np.mean(self._curve[self._best : self._best + _SMOOTH], axis=0)
        return best

    def _last_stretch(self) -> Array:
        last: Array = np.mean(self._curve[-_SMOOTH:], axis=0)
        return last

    def _gain(self, means: Array) -> float:
        """Decrease of the loss since the start."""
        return float(max(self._base.mean(), means[0]) - np.min(means))


# Quantiles 0.975 of Student's t for 1 to 10 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval(differences: Array) -> tuple[float, float]:
    """95 % confidence interval of the mean of at least two differences (Student's t)."""
    n = len(differences)
    half = _t_quantile(n - 1) * float(differences.std(ddof=1)) / math.sqrt(n)
    mean = float(differences.mean())
    return mean - half, mean + half


def _t_quantile(freedom: int) -> float:
    """Quantile 0.975; beyond the table by an expansion in 1 / freedom, exact to 0.003 (Abramowitz & Stegun 26.7.5)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def _jitter(means: Array) -> float:
    """Standard deviation of a curve about its trend, from the median size of its second differences.

    For independent noise with deviation s these have deviation √6·s, and half of them are below 0.6745 times that. 0
    for fewer than four values.
    """
    if len(means) < 4:
        return 0.0
    return float(np.median(np.abs(np.diff(means, n=2)))) / (0.6745 * math.sqrt(6))


def _slope(values: Array) -> float:
    """Slope of the straight line through equally spaced values, in standard errors for values of deviation 1."""
    x = np.arange(len(values)) - (len(values) - 1) / 2
    return float(x @ values / np.sqrt(x @ x))
