"""The budget of previews: how many pictures a run draws, and when.

Default previews are as many pictures as fit into a share of the run (`preview_share`, a tenth), or none; those of an
edit model are of several pairs, if these fit, too. The cost of a run and of a picture is counted before the first step,
in forward passes of the denoiser times the size of the latents, so equal runs draw the same on every machine. All begin
with the base model, before the first step. The programs, from the most expensive: the LoRA over the steps, and at all
strengths in the end; at full strength alone; near the start and in the middle of the run; with fewer sampling steps;
near the start alone; only in the end. A slider is drawn at all strengths over the steps as well, if that fits, and in
the end with fewer sampling steps rather than at one strength. What is left of the share evaluates the saved LoRAs in
the end (`evaluate`), as many of them as fit. An evaluation of the page afterwards has a budget of time
(`evaluation_effort`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.dataset import Sample
from lorasmith.evaluation import likeness
from lorasmith.evaluation.evaluation_record import DrawingSettings
from lorasmith.evaluation.wishes import BUILT_IN_WISHES, WISHES
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from lorasmith.runs.evaluate import Prompts, loras_within
from lorasmith.sampling.generate import Sampling
from lorasmith.sampling.previews import parse_prompts, parse_strengths
from lorasmith.training.config import TrainConfig
from lorasmith.training.train import Plan
from lorasmith.training.watchers import likeness_steps, preview_steps

_STEP_PASSES = 2
"""Forward passes that a training step of one sample costs at least: a backward pass without gradients of weights is as
long as a forward pass (docs/lab-log.md), and checkpointing repeats that."""

_OTHER_PASSES = 4  # forward passes that the rest of a picture costs: placing the model, and decoding
_STRENGTHS = (0.5, 1.0)  # at which finished LoRAs are drawn, where the settings have none
_FEWER_STEPS = (12, 8)  # sampling steps where the usual ones do not fit
_STOP_SHARE = 0.25  # of the work of training, that previews may take which stop it
_LOOKS = (10, 7, 5)  # previews of a run that they stop, its end included
_MOST_PAIRS = 4  # that previews are drawn from unasked

_EFFORTS = ((3, 20, 1, 4), (1, 20, 1, 4), (1, 12, 1, 4), (1, 8, 1, 4), (1, 8, 2, 4), (1, 8, 2, 2))
"""Evaluations from the most thorough: noises, sampling steps, every how many-th wish, and LoRAs."""

_EVALUATION_SHARE = 0.5  # of the time of training, that an evaluation afterwards may take
_SHORT_S, _LONG_S = 60.0, 300.0  # that it always may, and never longer


@dataclass(frozen=True)
class PreviewProgram:
    """The pictures that a run draws."""

    sampling_steps: int
    strengths: tuple[float, ...]  # of the finished LoRA, besides full strength
    steps: Sequence[int] = ()  # of the run, after which the LoRA is drawn before it is finished
    prompts: tuple[str, ...] = ()
    is_strip: bool = False  # previews over the steps are at all strengths, too
    wishes: tuple[str, ...] = ()  # of the last prompts, by which a run is stopped early: the trigger with one each

    @property
    def pictures(self) -> int:
        """Number of pictures for a prompt, that of the base model included."""
        others = sum(strength != 1 for strength in self.strengths)
        return 2 + others + len(self.steps) * (1 + others * self.is_strip)

    def passes(self, each_step: int) -> int:
        """Forward passes for a prompt, with `each_step` of them in a sampling step."""
        return self.pictures * (self.sampling_steps * each_step + _OTHER_PASSES)


def preview_program(plan: Plan) -> PreviewProgram | None:
    """The pictures of a run; where its settings have none, those of its prompt, if they fit into its share."""
    config = plan.job.config
    if config.stops_by_likeness:
        return _watched_program(plan)
    if config.previews is None and plan.prompt and plan.denoiser is not None:
        prompt = config.consequences().prompt or plan.prompt
        return unasked_program(config, plan.denoiser.base, plan.data.samples, prompt)
    whole = whole_program(config, None if plan.denoiser is None else plan.denoiser.base)
    return whole if whole.prompts else None


def with_early_stop(plan: Plan, *, has_folder: bool) -> Plan:
    """The plan with `early_stop auto` decided: by likeness, as often as a share of the work allows, or by validation.

    A run by likeness keeps the LoRAs that it looks at. What is decided follows from counts, so a resumed run decides
    the same. OptionError where `early_stop likeness` was asked for and cannot work.
    """
    config = plan.job.config
    if config.stops_by_likeness:
        likeness.check_installed("early_stop likeness")
        if reason := _unlike(plan, has_folder):
            raise OptionError(f"early_stop likeness needs {reason}; change that, or use early_stop validation")
    if config.early_stop != "auto" or not config.stop_patience:
        return plan
    if not likeness.is_installed():
        reason = "the extra likeness"
    elif (reason := _unlike(plan, has_folder)) is None and (found := _stop_settings(plan)) is not None:
        return replace(plan, job=replace(plan.job, config=replace(config, early_stop="likeness", **found)))
    why = f"needs {reason}" if reason else "would take more than a quarter of this run, which is short"
    note = (
        f"early_stop auto: stopping by previews {why}, so the loss of held-out images ends the run, if there are some."
    )
    validated = replace(config, early_stop="validation", patience=config.stop_patience)
    return replace(plan, job=replace(plan.job, config=validated, notes=(*plan.job.notes, note)))


def _stop_settings(plan: Plan) -> dict[str, Any] | None:
    """Settings of previews that stop the run within the share, the most looks first; None if even few do not fit."""
    assert plan.denoiser is not None
    base, config = plan.denoiser.base, plan.job.config
    side, frames = base.defaults.resolution, config.preview_frames or base.defaults.frames
    size = math.prod(base.components.latent.shape(side, side, frames))
    budget = _STOP_SHARE * _run_passes(config, plan.data.samples, size)
    usual = config.preview_steps or base.defaults.steps
    for looks in _LOOKS:
        every = config.preview_every or max(1, config.steps // looks)
        for steps in dict.fromkeys(min(count, usual) for count in (usual, *_FEWER_STEPS)):
            chosen = replace(
                config, early_stop="likeness", preview_every=every, preview_steps=steps, preview_strengths="1"
            )
            program = _watched_program(replace(plan, job=replace(plan.job, config=chosen)))
            if (
                len(program.steps) >= max(_LOOKS[-1] - 1, chosen.stop_patience + 1)
                and program.passes(_each_step(base)) * len(program.prompts) <= budget
            ):
                return {
                    "preview_every": every,
                    "preview_steps": steps,
                    "preview_strengths": config.preview_strengths or "1",
                    "save_every": config.save_every or every,
                }
    return None


def _unlike(plan: Plan, has_folder: bool) -> str | None:
    """What a run lacks to be stopped by likeness: a model that draws, a prompt, a folder; None for nothing."""
    config, reason = plan.job.config, None
    if plan.denoiser is None:
        reason = f"a model of a known family, got {plan.job.model.title}"
    elif not has_folder:
        reason = "a folder of the run for its previews, got no output"
    elif config.previews is not None and not parse_prompts(config.previews):
        reason = "previews, which are turned off"
    elif config.consequences().learns_no_subject:
        reason = "images that are to be alike, which a slider or preference has not"
    elif different_pairs(plan.data.samples):
        reason = "a model that draws from a prompt alone, got pairs"
    elif not _subject(plan):
        reason = "a prompt to draw, got neither a trigger nor previews"
    return reason


def _watched_program(plan: Plan) -> PreviewProgram:
    """The prompts of the settings, or the run's own, and those by which it is stopped early."""
    assert plan.denoiser is not None
    base, subject = plan.denoiser.base, _subject(plan)
    program = whole_program(plan.job.config, base)
    wishes = (BUILT_IN_WISHES if is_built_in(plan) else WISHES)[::2]  # half of them, as they are drawn many times
    prompts = dict.fromkeys((*program.prompts, subject))
    asked = tuple(f"{subject}, {wish}" for wish in wishes)
    shown = (*(prompt for prompt in prompts if prompt not in asked), *asked)
    return replace(program, steps=likeness_steps(plan.job.config), prompts=shown, wishes=wishes)


def is_built_in(plan: Plan) -> bool:
    """Whether a run is on the built-in model."""
    path = plan.job.model.facts.path
    return path is not None and path.is_relative_to(BUILT_IN_BASE)


def _subject(plan: Plan) -> str:
    return plan.trigger or plan.prompt or next(iter(parse_prompts(plan.job.config.previews)), "")


def whole_program(config: TrainConfig, base: Model | None = None) -> PreviewProgram:
    """The pictures of the prompts in the settings. OptionError if there are too many, or a strength is out of range."""
    follows = config.consequences()
    strengths = follows.strengths or _STRENGTHS
    if config.preview_strengths is not None:
        strengths = parse_strengths(config.preview_strengths)
    steps = config.preview_steps or (Sampling.steps if base is None else base.defaults.steps)
    return PreviewProgram(
        steps, strengths, preview_steps(config), prompts=parse_prompts(config.previews), is_strip=follows.is_slider
    )


def unasked_program(config: TrainConfig, base: Model, samples: Sequence[Sample], prompt: str) -> PreviewProgram | None:
    """The program that fits into the share of a run on these samples; None if none does.

    It has one prompt, or where samples have controls, the captions of as many of them as fit.
    """
    side, frames = base.defaults.resolution, config.preview_frames or base.defaults.frames
    size: float = math.prod(base.components.latent.shape(side, side, frames))
    pairs = different_pairs(samples)
    if any(pair.conditioning.controls for pair in pairs):  # a picture has the size of its first control
        picture_sizes = [
            [control.numel() for control in pair.conditioning.controls] for pair in pairs if pair.conditioning.controls
        ]
        size = statistics.fmean(sizes[0] + sum(sizes) for sizes in picture_sizes)
    budget = config.preview_share * _run_passes(config, samples, size)
    each_step = _each_step(base)
    found = program_within(budget, whole_program(config, base), each_step=each_step)
    if found is None or not pairs:
        return None if found is None else replace(found, prompts=(prompt,))
    fitting = min(_MOST_PAIRS, len(pairs), int(budget / found.passes(each_step)))
    return replace(found, prompts=tuple(pair.conditioning.text or prompt for pair in pairs[:fitting]))


def loras_evaluated(plan: Plan, program: PreviewProgram) -> int:
    """How many LoRAs of a run are evaluated in its end: those that fit into what previews leave of the share; 0 without
    a trigger or the extra `likeness`, and for models that draw from pictures or in two parts.
    """
    if plan.denoiser is None or not (plan.trigger or plan.data.trigger) or not likeness.is_installed():
        return 0
    base, config = plan.denoiser.base, plan.job.config
    if base.named_expert is not None or base.control_form.most or config.consequences().is_slider:
        return 0
    side = base.defaults.resolution
    size = math.prod(base.components.latent.shape(side, side, 1))
    budget = config.preview_share * _run_passes(config, plan.data.samples, size)
    left = budget - program.passes(_each_step(base)) * len(program.prompts)
    return min(DrawingSettings.most, loras_within(left / (program.sampling_steps * _each_step(base) + _OTHER_PASSES)))


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What an evaluation draws."""

    drawing: DrawingSettings
    pictures: int
    seconds: float | None  # that it takes, about; None if that is not known


def evaluation_effort(
    base: Model, trigger: str, loras: int, *, training_s: float, sampling_step_s: float | None
) -> Effort:
    """The most thorough evaluation of so many LoRAs of a run that takes at most half as long as the training did, or a
    minute, and never more than five; the shortest one where none does, or where the time is not known.
    """
    usual, is_built_in = base.defaults.steps, base.title == BUILT_IN
    wishes = BUILT_IN_WISHES if is_built_in else WISHES
    budget = min(max(_EVALUATION_SHARE * training_s, _SHORT_S), _LONG_S)

    def effort(noises: int, sampling_steps: int, every: int, most: int) -> Effort:
        drawn = min(sampling_steps, usual)
        drawing = DrawingSettings(prompts=wishes[::every], noises=noises, steps=drawn, most=most)
        pictures = Prompts.of(trigger, drawing, is_built_in=is_built_in).pictures(min(most, loras), noises)
        seconds = None if sampling_step_s is None else pictures * drawn * sampling_step_s
        return Effort(drawing=drawing, pictures=pictures, seconds=seconds)

    efforts = [effort(*numbers) for numbers in _EFFORTS]
    return next((fit for fit in efforts if fit.seconds is not None and fit.seconds <= budget), efforts[-1])


def _run_passes(config: TrainConfig, samples: Sequence[Sample], size: float) -> float:
    """Forward passes that a run is worth, of latents of a size."""
    trained = statistics.fmean(sample.size for sample in samples)
    ends = 2 if config.consequences().is_slider else 1  # that a step trains
    return config.steps * config.samples_per_step * ends * _STEP_PASSES * trained / size


def _each_step(base: Model) -> int:
    return 1 if base.defaults.guidance == 1 else 2


def program_within(budget: float, whole: PreviewProgram, *, each_step: int) -> PreviewProgram | None:
    """The first program within `budget` forward passes, `each_step` of them per sampling step; None if none fits."""
    return next((program for program in _smaller_and_smaller(whole) if program.passes(each_step) <= budget), None)


def _smaller_and_smaller(whole: PreviewProgram) -> Iterator[PreviewProgram]:
    yield whole
    yield replace(whole, is_strip=False)
    usual, (fewer, least) = whole.sampling_steps, _FEWER_STEPS
    first = whole.steps[:1]
    middle = sorted(whole.steps, key=lambda step: abs(2 * step - whole.steps[0] - whole.steps[-1]))[:1]
    if whole.is_strip:
        both = sorted({*first, *middle})
        for looks, counts in (
            (both, (usual, fewer)),
            (first, (usual, fewer)),
            (both, (least,)),
            (first, (least,)),
            ((), (fewer, least)),
        ):
            ends = replace(whole, is_strip=False, steps=tuple(looks))
            yield from (replace(ends, sampling_steps=min(count, usual)) for count in counts)
    yield (plain := replace(whole, is_strip=False, strengths=()))
    for steps, sampling in (
        (sorted({*first, *middle}), (usual, fewer, least)),
        (first, (least,)),
        ((), (fewer, least)),
    ):
        yield from (replace(plain, steps=tuple(steps), sampling_steps=min(count, usual)) for count in sampling)


def different_pairs(samples: Sequence[Sample]) -> list[Sample]:
    """A sample of each image with tensors that are made of pictures."""
    return list({sample.name: sample for sample in samples if sample.conditioning.pictures}.values())
