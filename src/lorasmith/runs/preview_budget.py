"""Default previews: as many pictures as fit into a tenth of the run, or none.

The cost of a run and of a picture is counted before the first step, in forward passes of the denoiser times the size of
the latents, so equal runs draw the same on every machine. The programs, from the most expensive: the LoRA over the
steps and at all strengths; the finished LoRA alone at all strengths; beside the base model alone; with fewer sampling
steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lorasmith.data.dataset import Sample
from lorasmith.families.model import Model
from lorasmith.sampling.previews import parse_strengths
from lorasmith.training.config import TrainConfig

_SHARE = 0.1  # of the training steps, for all previews

_STEP_PASSES = 2
"""Forward passes that a training step of one sample costs at least: a backward pass without gradients of weights is as
long as a forward pass (docs/lab-log.md), and checkpointing repeats that."""

_OTHER_PASSES = 4  # forward passes that the rest of a picture costs: placing the model, and decoding

_OVER_STEPS = 3  # rows of pictures before the end: a preview every quarter of the run

_FEWER_STEPS = (12, 8)  # sampling steps of the last resort


@dataclass(frozen=True)
class PreviewProgram:
    """The pictures that a run draws."""

    sampling_steps: int
    strengths: tuple[float, ...]  # of the finished LoRA, besides full strength
    is_final_only: bool = False

    @property
    def pictures(self) -> int:
        """Number of pictures for a prompt, that of the base model included."""
        others = sum(one != 1 for one in self.strengths)
        return 2 + others + (0 if self.is_final_only else _OVER_STEPS)

    def passes(self, each_step: int) -> int:
        """Forward passes for a prompt, with `each_step` of them in a sampling step."""
        return self.pictures * (self.sampling_steps * each_step + _OTHER_PASSES)


def whole_program(config: TrainConfig) -> PreviewProgram:
    """The pictures of prompts in the settings. OptionError if a strength is out of range."""
    return PreviewProgram(config.preview_steps, parse_strengths(config.preview_strengths))


def unasked_program(config: TrainConfig, base: Model, samples: Sequence[Sample]) -> PreviewProgram | None:
    """The program for one prompt that fits into a tenth of a run on these samples; None if none does."""
    side, frames = base.defaults.resolution, config.preview_frames or base.defaults.frames
    size = math.prod(base.components.latent.shape(side, side, frames))
    trained = statistics.fmean(one.latents.numel() for one in samples)
    budget = _SHARE * config.steps * config.samples_per_step * _STEP_PASSES * trained / size
    return program_within(budget, whole_program(config), each_step=1 if base.defaults.guidance == 1 else 2)


def program_within(budget: float, whole: PreviewProgram, *, each_step: int) -> PreviewProgram | None:
    """The first program within `budget` forward passes, `each_step` of them per sampling step; None if none fits."""
    return next((one for one in _smaller_and_smaller(whole) if one.passes(each_step) <= budget), None)


def _smaller_and_smaller(whole: PreviewProgram) -> Iterator[PreviewProgram]:
    yield whole
    last = replace(whole, is_final_only=True)
    yield last
    yield (smallest := replace(last, strengths=()))
    yield from (replace(smallest, sampling_steps=min(steps, whole.sampling_steps)) for steps in _FEWER_STEPS)
