"""The loss plot of a run: every step's loss, and the smoothed loss that shows where it is going."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorasmith.core.errors import OutputError

__all__ = ["plot_losses", "smoothed"]

_LOG_RATIO = 20
_RAW, _SMOOTH, _GRID, _TEXT = "#9ab8d8", "#1f5fa8", "#e4e8ec", "#3e4c59"


def plot_losses(
    losses: Sequence[float],
    *,
    title: str = "Training loss",
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """A PNG picture of a run's losses.

    NaN and infinite losses are gaps. The axis is logarithmic when the smoothed loss spans more than a factor of 20.

    Args:
        losses: one for each step, beginning with step 1.
        title: heading, taken literally.
        metadata: text entries of the PNG file, by keyword (such as ComfyUI's `prompt` and `workflow`).

    Raises:
        OutputError: there is no finite loss.
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
    _draw_curves(axes, [loss if math.isfinite(loss) else math.nan for loss in losses])
    _style(axes, title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "Lorasmith", **(metadata or {})})
    return buffer.getvalue()


def smoothed(losses: Sequence[float], *, span: float) -> list[float]:
    """Exponential moving average with weights (1 − 1/span)^age, bias-corrected: it starts at the first loss."""
    decay = 1 - 1 / span
    total = weight = 0.0
    result = []
    for loss in losses:
        total = decay * total + loss
        weight = decay * weight + 1
        result.append(total / weight)
    return result


def _draw_curves(axes: Any, losses: Sequence[float]) -> None:
    """Raw and smoothed loss; the raw one has gaps where a loss is NaN, the smoothed one goes on across them."""
    steps = range(1, len(losses) + 1)
    finite_steps = [step for step, loss in zip(steps, losses, strict=True) if not math.isnan(loss)]
    finite = [losses[step - 1] for step in finite_steps]
    trend = smoothed(finite, span=min(max(len(finite) / 12, 5), 100))

    axes.plot(steps, losses, color=_RAW, linewidth=0.9, label="each step", zorder=2)
    # A line does not show a step between two gaps, and few steps are told apart only by their dots.
    dotted = [step for step in finite_steps if len(losses) <= 60 or _is_lonely(losses, step - 1)]
    axes.plot(dotted, [losses[step - 1] for step in dotted], ".", color=_RAW, zorder=2)
    axes.plot(finite_steps, trend, color=_SMOOTH, linewidth=2.2, label="smoothed", zorder=3)
    _mark_last(axes, finite_steps[-1], trend[-1])

    margin = max(0.5, 0.02 * len(losses))
    axes.set_xlim(1 - margin, len(losses) + margin)
    if min(finite) > 0 and max(trend) > _LOG_RATIO * min(trend):
        axes.set_yscale("log")


def _mark_last(axes: Any, step: int, loss: float) -> None:
    axes.plot(step, loss, "o", color=_SMOOTH, markersize=5, zorder=4)
    offset = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(f"{loss:.4g}", (step, loss), color=_SMOOTH, fontweight="bold", **offset)


def _is_lonely(losses: Sequence[float], i: int) -> bool:
    return all(not 0 <= j < len(losses) or math.isnan(losses[j]) for j in (i - 1, i + 1))


def _style(axes: Any, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    # parse_math off: a title is somebody's file name, and a $ in it is no formula.
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_TEXT, wrap=True, parse_math=False)
    axes.set_xlabel("step", color=_TEXT)
    axes.set_ylabel("loss", color=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(colors=_TEXT, length=0)
    axes.grid(color=_GRID, linewidth=0.8, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.legend(loc="upper right", frameon=False, labelcolor=_TEXT)
