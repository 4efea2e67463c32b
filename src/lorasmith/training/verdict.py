"""Statistics and a verdict from the validations of a run; pure functions.

Held-out images are evaluated repeatedly at the same noise (`validation`), so that two losses are compared by pairs: the
difference is taken per image, then its mean and confidence interval over images. Two sources of chance are separated:

- *Which images.* A difference is significant if its 95 % interval (Student's t) excludes zero. Fewer than `FEW_IMAGES`
  images give no usable interval, so each pair of image and noise level is then one observation: the interval is valid
  for these images only, and the verdict says for how many.
- *Which step.* Weights fluctuate from step to step, which moves the loss of all images. This jitter is estimated from
  second differences of the curve, which a linear trend does not affect, and a rise or fall must exceed it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorasmith.core.errors import OptionError
from lorasmith.core.printable import count_text
from lorasmith.training.events import Validated

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
        self._base_table = np.asarray(base, dtype=np.float64)
        self.images = len(self._base_table)
        self._base = self._units(self._base_table)
        self._steps: list[int] = []
        self._tables: list[Array] = []  # (images, draws) each
        self._curve: list[Array] = []  # the same by observation
        if len(self._base) < 2:
            raise OptionError(
                "validation needs two images or two noise levels at least, got one of each; raise validation_draws"
            )

    def add(self, step: int, losses: Sequence[Sequence[float]]) -> Validated:
        """Add the losses, (images, draws), after `step` updates; entries from that step on are replaced."""
        while self._steps and self._steps[-1] >= step:
            for column in (self._steps, self._tables, self._curve):
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
        return [(step, float(mean)) for step, mean in zip(self._steps, self._means(), strict=True)]

    @property
    def best_step(self) -> int:
        """Step of the lowest loss; the earliest on ties."""
        return self._steps[self._best]

    @property
    def since_best(self) -> int:
        return len(self._steps) - 1 - self._best

    def should_stop(self, patience: int) -> bool:
        """Whether `patience` validations have passed without an improvement; 0 never stops."""
        return bool(self._steps) and 0 < patience <= self.since_best

    @property
    def verdict(self) -> str:
        """Interpretation of the validations, in a sentence without a full stop."""
        if not self._steps:
            return TOO_EARLY
        few = f" (on {count_text(self.images, 'held-out image')} alone)"
        return self._trend() + (few if self.images < FEW_IMAGES else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self._base_table.tolist(),
            "validations": [[step, table.tolist()] for step, table in zip(self._steps, self._tables, strict=True)],
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> History:
        history = cls(state["base"])
        for step, losses in state["validations"]:
            history._append(step, losses)
        return history

    @property
    def _best(self) -> int:
        return int(np.argmin(self._means()))

    def _append(self, step: int, losses: Sequence[Sequence[float]]) -> None:
        self._steps.append(step)
        self._tables.append(np.asarray(losses, dtype=np.float64))
        self._curve.append(self._units(self._tables[-1]))

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
        since = self._steps[int(np.argmax(means <= near))]
        best = "" if since == self.best_step else f", best at {self.best_step}"
        return f"levelled off at about step {since}{best}"

    def _still_falling(self, means: Array) -> bool:
        if len(means) <= _SMOOTH:
            return self.since_best == 0 and float(means[-1]) < self._base.mean()
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
        return float(max(self._base.mean(), means[0]) - means.min())


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
