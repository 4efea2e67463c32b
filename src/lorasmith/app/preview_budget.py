"""Previews that nobody asked for: as many pictures as fit into a tenth of the run.

The first preview measures: the time of a training step by the events of the run so far, and that of a picture on a few
sampling steps. From these follows a program: the LoRA over the steps and at all strengths, the finished LoRA alone at
all strengths, or beside the base model alone, at last with fewer sampling steps. That last one is drawn in any case.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from lorasmith.sampling.previews import PictureCost
from lorasmith.sampling.sample import SamplingCancelledError
from lorasmith.training.events import Event, RunStarted, StepDone, Warned

__all__ = ["BudgetedPreviews", "PreviewProgram", "program_within"]

_SHARE = 0.1
"""Of the time of the training steps, for all previews."""

_OVER_STEPS = 3
"""Rows of pictures before the end: a preview every quarter of the run."""

_FEWER_STEPS = (12, 8)
"""Sampling steps of the last resort."""

_REMEMBERED = 200  # steps whose times are kept


@dataclass(frozen=True)
class PreviewProgram:
    """What is drawn in a run.

    Attributes:
        sampling_steps: of a picture.
        strengths: at which the finished LoRA is drawn, besides full strength.
        is_final_only: whether nothing is drawn before the end.
    """

    sampling_steps: int
    strengths: tuple[float, ...]
    is_final_only: bool

    @property
    def pictures(self) -> int:
        """Number of pictures for a prompt, that of the base model included."""
        others = sum(one != 1 for one in self.strengths)
        return 2 + others + (0 if self.is_final_only else _OVER_STEPS)


def program_within(budget_s: float, cost: PictureCost, whole: PreviewProgram) -> PreviewProgram:
    """The first program that fits into a time; the smallest one if none does.

    Args:
        budget_s: seconds for all pictures.
        cost: of a picture.
        whole: the program without a limit.
    """
    programs = list(_smaller_and_smaller(whole))
    fitting = (one for one in programs if one.pictures * cost.picture_s(one.sampling_steps) <= budget_s)
    return next(fitting, programs[-1])


def _smaller_and_smaller(whole: PreviewProgram) -> Iterator[PreviewProgram]:
    yield whole
    last = replace(whole, is_final_only=True)
    yield last
    yield (smallest := replace(last, strengths=()))
    yield from (replace(smallest, sampling_steps=min(steps, whole.sampling_steps)) for steps in _FEWER_STEPS)


class _Drawn(Protocol):
    def __call__(self, step: int, lora: Path, *, final: bool = False) -> list[Event]: ...


class BudgetedPreviews:
    """Draws previews by a program that is chosen at the first one.

    Args:
        whole: the program without a limit.
        make: from a program to the function that draws by it.
        measure: what a picture takes.
        run_steps: steps of the run.
    """

    def __init__(
        self,
        whole: PreviewProgram,
        make: Callable[[PreviewProgram], _Drawn],
        measure: Callable[[], PictureCost],
        *,
        run_steps: int,
    ) -> None:
        self._whole, self._make, self._measure, self._run_steps = whole, make, measure, run_steps
        self._times: list[float] = []
        self._draw: _Drawn | None = None
        self.program: PreviewProgram | None = None

    def hear(self, event: Event) -> None:
        """Take note of an event of the run."""
        if isinstance(event, RunStarted | StepDone):
            self._times = [*self._times[-_REMEMBERED:], event.at]

    @property
    def is_final_only(self) -> bool:
        """Whether the finished LoRA alone is drawn from here on."""
        return self.program is not None and self.program.is_final_only

    def __call__(self, step: int, lora: Path, *, final: bool = False) -> list[Event]:
        """Draw the LoRA saved at `lora` after `step` updates, if the program has it; see `RunPreviews`."""
        if self._draw is None:
            try:
                cost = self._measure()
            except SamplingCancelledError:
                return []
            except Exception as error:  # any: nobody asked for it, and training continues
                self.program = replace(self._whole, is_final_only=True)
                self._draw = lambda *_, **__: []
                return [
                    Warned(message=f"no preview can be drawn ({type(error).__name__}: {error}); training continues")
                ]
            budget = _SHARE * self._run_steps * _step_s(self._times)
            self.program = program_within(budget, cost, self._whole)
            self._draw = self._make(self.program)
        return self._draw(step, lora, final=final) if final or not self.is_final_only else []


def _step_s(times: Sequence[float]) -> float:
    """Seconds of a step, from the times of the start and of each step: the median, as some wait for a validation."""
    between = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(between) if between else 0.0
