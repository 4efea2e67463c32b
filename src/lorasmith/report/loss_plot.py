"""The loss of a run, one number everywhere; and its plot: the loss of each step, and that number after each."""

from __future__ import annotations

import io
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasmith.core.errors import OutputError

RAW, SMOOTH, HELD_OUT, GRID, TEXT = "#9ab8d8", "#1f5fa8", "#c2570c", "#e4e8ec", "#3e4c59"
_LOG_RATIO = 20
_RECENT_SHARE, _RECENT_LEAST = 10, 10


@dataclass(frozen=True)
class RecentLoss:
    """The loss of a run after a step: the mean of the last tenth of its steps, of ten at least."""

    mean: float  # of the last `steps`, those whose loss is finite; NaN without one
    steps: int

    @property
    def label(self) -> str:
        return "training loss" if self.steps == 1 else f"training loss, mean of the last {self.steps:,} steps"


class RecentLosses:
    """The losses of a run as they come in."""

    def __init__(self) -> None:
        self._last: deque[int] = deque()  # those that `recent` is the mean of
        self._total = 0

    def add(self, step: int, loss: float) -> None:
        """Add that of a later step, unless it is not finite; the first step is 1."""
        if math.isfinite(loss):
            self._last.append(_exact(loss))
            self._total += self._last[-1]
        if len(self._last) > max(_RECENT_LEAST, step // _RECENT_SHARE):
            self._total -= self._last.popleft()

    @property
    def recent(self) -> RecentLoss:
        count = len(self._last)
        return RecentLoss(self._total / (count << 1074) if count else math.nan, count)


def recent_losses(losses: Sequence[float]) -> list[RecentLoss]:
    """The loss of a run after each step."""
    taken, recent = RecentLosses(), []
    for step, loss in enumerate(losses, 1):
        taken.add(step, loss)
        recent.append(taken.recent)
    return recent


def recent_loss(losses: Sequence[float]) -> RecentLoss:
    """The loss of a run after its last step."""
    return recent_losses(losses)[-1] if losses else RecentLoss(math.nan, 0)


def _exact(loss: float) -> int:
    """A finite loss in units of 2^-1074, of which every float is a multiple: such sums lose nothing to a huge loss."""
    numerator, denominator = loss.as_integer_ratio()
    return numerator << (1075 - denominator.bit_length())


def plot_losses(
    losses: Sequence[float],
    *,
    validations: Sequence[tuple[int, float]] = (),
    base_loss: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """A PNG picture of a run's losses; see `draw_losses`. Raises OutputError if no loss is finite.

    `metadata` are the text entries of the PNG (such as ComfyUI's `prompt` and `workflow`).
    """
    # The object API, without pyplot: no global state, so that a server's threads can draw at the same time.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not any(map(math.isfinite, losses)):
        raise OutputError(f"a loss plot needs a finite loss, got none among {len(losses)}; train at least one step")
    figure = Figure(figsize=(9, 5), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw_losses(axes, losses, validations=validations, base_loss=base_loss)
    style_axes(axes)
    axes.set_title("Training loss", loc="left", fontsize=13, fontweight="bold", color=TEXT)
    axes.set_xlabel("step", color=TEXT)
    axes.legend(loc="upper right", frameon=False, labelcolor=TEXT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "Lorasmith", **(metadata or {})})
    return buffer.getvalue()


def smoothed(losses: Sequence[float], *, span: float) -> list[float]:
    """Bias-corrected exponential moving average with weights (1 − 1/span)^age."""
    decay = 1 - 1 / span
    total = weight = 0.0
    result = []
    for loss in losses:
        total = decay * total + loss
        weight = decay * weight + 1
        result.append(total / weight)
    return result


def draw_losses(
    axes: Any,
    losses: Sequence[float],
    *,
    every: int = 1,
    validations: Sequence[tuple[int, float]] = (),
    base_loss: float | None = None,
) -> None:
    """Draw the loss of each step (of a long run, of one in `every` steps), the run's loss after each, and validations
    (step, loss) with the lowest marked.

    The raw line has gaps at NaN and infinite losses, that of the means does not; at least one must be finite. The axis
    is logarithmic if the mean spans more than a factor of 20. `base_loss` is of the held-out images without the LoRA.
    """
    finite_steps = [step for step, loss in enumerate(losses, 1) if math.isfinite(loss)]
    finite = [losses[step - 1] for step in finite_steps]
    recent = recent_losses(losses)
    trend = [recent[step - 1].mean for step in finite_steps]
    raw = [loss if math.isfinite(loss) else math.nan for loss in losses]

    steps = range(every, every * len(raw) + 1, every)
    label = "each step" if every == 1 else f"every {every:,} steps"
    axes.plot(steps, raw, color=RAW, linewidth=0.9, label=label, zorder=2)
    # A line does not show a step between two gaps, and few steps are distinguishable only as dots.
    dotted = [step for step in finite_steps if len(raw) <= 60 or _is_lonely(raw, step - 1)]
    axes.plot([every * step for step in dotted], [raw[step - 1] for step in dotted], ".", color=RAW, zorder=2)
    finite_steps = [every * step for step in finite_steps]
    axes.plot(finite_steps, trend, color=SMOOTH, linewidth=2.2, label=_trend_label(recent[-1].steps), zorder=3)
    _annotate(axes, finite_steps[-1], trend[-1], SMOOTH, xytext=(8, 0), va="center")
    axes.plot(finite_steps[-1], trend[-1], "o", color=SMOOTH, markersize=5, zorder=4)
    _draw_validations(axes, [(step, loss) for step, loss in validations if math.isfinite(loss)], trend[-1])
    if base_loss is not None and math.isfinite(base_loss):
        label = "held out, without the LoRA"
        axes.axhline(base_loss, color=HELD_OUT, linewidth=1.1, linestyle=(0, (4, 3)), label=label, zorder=2)

    margin = max(0.5, 0.02 * steps[-1])
    axes.set_xlim(1 - margin, steps[-1] + margin)
    if min(finite) > 0 and max(trend) > _LOG_RATIO * min(trend):
        axes.set_yscale("log")


def _trend_label(steps: int) -> str:
    if steps > _RECENT_LEAST:
        return "mean of the last tenth"
    return f"mean of {steps} steps" if steps > 1 else "mean"


def style_axes(axes: Any) -> None:
    """Apply the shared style of all loss plots."""
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel("loss", color=TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(which="both", colors=TEXT, length=0)
    axes.grid(color=GRID, linewidth=0.8, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _draw_validations(axes: Any, validations: Sequence[tuple[int, float]], trained: float) -> None:
    """Draw validations with a star at the lowest, whose number does not overlap that of the last training loss."""
    if not validations:
        return
    steps, losses = zip(*validations, strict=True)
    axes.plot(steps, losses, ".-", color=HELD_OUT, linewidth=1.6, markersize=6, label="held out", zorder=4)
    step, loss = min(validations, key=lambda validation: validation[1])
    axes.plot(step, loss, "*", color=HELD_OUT, markersize=13, zorder=5)
    place = {"xytext": (0, 9), "va": "bottom"} if loss > trained else {"xytext": (0, -9), "va": "top"}
    _annotate(axes, step, loss, HELD_OUT, ha="center", **place)


def _annotate(axes: Any, step: int, loss: float, colour: str, **place: Any) -> None:
    text = f"{loss:.4g}"
    axes.annotate(text, (step, loss), textcoords="offset points", color=colour, fontweight="bold", zorder=6, **place)


def _is_lonely(losses: Sequence[float], i: int) -> bool:
    return all(not 0 <= j < len(losses) or math.isnan(losses[j]) for j in (i - 1, i + 1))
