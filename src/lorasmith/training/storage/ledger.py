"""Statistics of training losses by noise level over time, and by image; pure functions.

The loss of a draw depends on its noise level by orders of magnitude. Draws are therefore compared within a bin of
diffusion time, in logarithms: an image's level is the geometric mean over its draws of loss / (geometric mean of all
losses in that bin). A level of 0.8 is a fifth below the average at these noise levels.

The input is `StepDone.draws`, live or from `events.jsonl`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MIN_LOOKS = 12
"""Draws of an image, four in each third, below which it is not judged."""

_CLEAR = 2.0  # standard errors from which a difference is significant
_FAR = 1.5  # factor from which a level is far from that of others

Standing = Literal["too few looks", "memorised", "never fit", "still learning", "learnt", "unchanged"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ImageLevels:
    """Training losses of one image, its repeats and mirrored copies included."""

    name: str
    looks: int  # number of its draws
    # Levels in the first and last third of its draws, relative to all images in the run's first third; may be NaN.
    first: float
    last: float
    # Level in the last third, relative to all images in the run's last third.
    relative: float
    standing: Standing  # see `Ledger.images`


@dataclass(frozen=True)
class QuantileCurve:
    """Training loss by noise level over time."""

    bins: tuple[float, ...]  # edges in quantiles of diffusion time, one more than bins: 0 is clean, 1 is noise
    steps: tuple[int, ...]  # last step of each averaged interval
    losses: tuple[tuple[float | None, ...], ...]  # mean by interval and bin, None without draws


class Ledger:
    """Every draw of a run, by image name and in `bins` equal parts of diffusion time."""

    def __init__(self, names: Sequence[str], *, bins: int = 10) -> None:
        self._images = list(dict.fromkeys(names))
        place = {name: index for index, name in enumerate(self._images)}
        self._image_of = [place[name] for name in names]
        self._bins = bins
        self._step, self._image = array("q"), array("q")
        self._quantile, self._loss = array("d"), array("d")

    def add(self, step: int, draws: Iterable[Sequence[float]]) -> None:
        """Add a step's draws (dataset index, quantile, loss), replacing all from that step on."""
        while self._step and self._step[-1] >= step:
            for column in (self._step, self._image, self._quantile, self._loss):
                column.pop()
        for index, quantile, loss in draws:
            if math.isfinite(loss):
                self._step.append(step)
                self._image.append(self._image_of[int(index)])
                self._quantile.append(quantile)
                self._loss.append(loss)

    def curve(self, points: int = 40) -> QuantileCurve:
        """Mean loss by bin in at most `points` intervals of equally many steps."""
        edges = tuple(float(edge) for edge in np.linspace(0, 1, self._bins + 1))
        if not self._step:
            return QuantileCurve(edges, (), ())
        step, first, last = np.array(self._step), self._step[0], self._step[-1]
        length = -(-(last - first + 1) // points)
        stretch = (step - first) // length
        count = int(stretch[-1]) + 1
        cell = stretch * self._bins + self._bin()
        looks = np.bincount(cell, minlength=count * self._bins)
        sums = np.bincount(cell, np.array(self._loss), minlength=count * self._bins)
        means = [float(total / n) if n else None for total, n in zip(sums, looks, strict=True)]
        return QuantileCurve(
            edges,
            tuple(min(first + (index + 1) * length - 1, last) for index in range(count)),
            tuple(tuple(means[row * self._bins : (row + 1) * self._bins]) for row in range(count)),
        )

    def images(self, *, held_out_fall: float | None = None) -> list[ImageLevels]:
        """Each image's record, in the dataset's order.

        Thirds are compared, and a difference is significant from `_CLEAR` (2) standard errors on. The standing is the
        first of these that holds:

        - *too few looks*: fewer than `MIN_LOOKS`.
        - *memorised*: its level fell by a factor of `_FAR` (1.5) more than that of the held-out images, whose loss late
          in the run divided by that early is `held_out_fall`. Without them, more than that of all images, which cannot
          show that all are memorised equally.
        - *never fit*: it stays above 1.5 times the level of the others. It is harder, or the caption does not match.
        - *still learning*: its level fell from the second to the last third of its draws.
        - *learnt*: it fell from the first third to the last, and no longer falls.
        - *unchanged*: none of these; few draws at a low learning rate cannot show a change.
        """
        if not self._step:
            return [ImageLevels(name, 0, math.nan, math.nan, math.nan, "too few looks") for name in self._images]
        logs, bins, image = np.log(np.maximum(np.array(self._loss), _TINY)), self._bin(), np.array(self._image)
        third = max(1, len(logs) // 3)
        early = logs - _expected(logs[:third], bins[:third], self._bins)[bins]
        late = logs - _expected(logs[-third:], bins[-third:], self._bins)[bins]
        usual = float(early[-third:].mean()) if held_out_fall is None else math.log(max(held_out_fall, _TINY))
        order = np.argsort(image, kind="stable")
        of_each = np.split(order, np.cumsum(np.bincount(image, minlength=len(self._images)))[:-1])
        return [_record(name, early[own], late[own], usual) for name, own in zip(self._images, of_each, strict=True)]

    def _bin(self) -> NDArray[np.int64]:
        return np.minimum((np.array(self._quantile) * self._bins).astype(np.int64), self._bins - 1)


_TINY = 1e-12  # keeps logarithms finite


def _expected(logs: Array, bins: NDArray[np.int64], count: int) -> Array:
    """Mean logarithm by bin, (bins,), linearly interpolated in bins without draws."""
    looks = np.bincount(bins, minlength=count)
    there = np.flatnonzero(looks)
    means = np.bincount(bins, logs, minlength=count)[there] / looks[there]
    return np.interp(np.arange(count), there, means)


def _record(name: str, early: Array, late: Array, usual_fall: float) -> ImageLevels:
    """An image's record from its log losses relative to all images early and late in the run."""
    looks = len(early)
    if not looks:
        return ImageLevels(name, 0, math.nan, math.nan, math.nan, "too few looks")
    third = max(1, looks // 3)
    first, middle, last, relative = early[:third], early[third:-third], early[-third:], late[-third:]
    standing: Standing = "unchanged"
    if looks < MIN_LOOKS:
        standing = "too few looks"
    elif _below(last, first) and _below(last, first + usual_fall - math.log(_FAR)):
        standing = "memorised"
    elif _above(relative, math.log(_FAR)):
        standing = "never fit"
    elif _below(last, middle):
        standing = "still learning"
    elif _below(last, first):
        standing = "learnt"
    return ImageLevels(name, looks, _level(first), _level(last), _level(relative), standing)


def _level(logs: Array) -> float:
    return math.exp(float(logs.mean()))


def _above(values: Array, bound: float) -> bool:
    return bool(values.mean() - bound > _CLEAR * values.std(ddof=1) / math.sqrt(len(values)))


def _below(values: Array, others: Array) -> bool:
    error = math.hypot(
        values.std(ddof=1) / math.sqrt(len(values)),
        others.std(ddof=1) / math.sqrt(len(others)),
    )
    return bool(others.mean() - values.mean() > _CLEAR * error)
