"""Previews of a run: which pictures it draws, drawn during training, written to its folder and reported as events.

Default previews are as many pictures as fit into a share of the run (`preview_share`, a tenth), or none; those of an
edit model are of several pairs, if these fit, too. The cost of a run and of a picture is counted before the first step,
in forward passes of the denoiser times the size of the latents, so equal runs draw the same on every machine. All begin
with the base model, before the first step. The programs, from the most expensive: the LoRA over the steps, and at all
strengths in the end; at full strength alone; near the start and in the middle of the run; with fewer sampling steps;
near the start alone; only in the end. A slider is drawn at all strengths over the steps as well, if that fits. What is
left of the share evaluates the saved LoRAs in the end (`evaluate`), as many of them as fit.

Drawing combines rooms that do not import each other: `sampling` draws, `training` loads LoRAs and defines the events,
`report` writes the files. A failing preview is a warning and does not end the run.
"""

from __future__ import annotations

import contextlib
import io
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch.nn import functional

from lorasmith.adapters.frozen_layer import sampling_dtype
from lorasmith.core.adapter_state import AdapterState
from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.folders import BUILT_IN_BASE, TRIED
from lorasmith.core.placement import chosen_dtype
from lorasmith.data.dataset import Sample
from lorasmith.data.image_files import open_image
from lorasmith.evaluation import likeness
from lorasmith.evaluation.evaluation_record import MOST_LORAS
from lorasmith.evaluation.sight import sight_of
from lorasmith.evaluation.wishes import BUILT_IN_WISHES, WISHES
from lorasmith.families.model import Denoiser, Model
from lorasmith.report.contact_sheet import PreviewFolder, contact_sheet
from lorasmith.report.pictures import PictureOrClip
from lorasmith.runs.drawing import draw_beside
from lorasmith.runs.evaluate import DrawingSettings, evaluate, loras_within, subject_of
from lorasmith.runs.preview_likeness import PreviewLikeness, trained_pictures
from lorasmith.runs.run_page import loras_of_run
from lorasmith.runs.sidecars import give_picture
from lorasmith.sampling.generate import Sampling, clip_of, to_images
from lorasmith.sampling.previews import Partner, Previewer, parse_prompts, parse_strengths
from lorasmith.sampling.sample import SamplingCancelledError
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Drawing, Event, Previewed, Warned
from lorasmith.training.lora_handle import Lora
from lorasmith.training.run_requests import DrawRequest
from lorasmith.training.train import Plan, RunHost
from lorasmith.training.watchers import likeness_steps, preview_steps
from lorasmith.training.way import dtype_on_device

_MOST_FAILURES = 2  # consecutive failures after which a run draws no more previews

_STEP_PASSES = 2
"""Forward passes that a training step of one sample costs at least: a backward pass without gradients of weights is as
long as a forward pass (docs/lab-log.md), and checkpointing repeats that."""

_OTHER_PASSES = 4  # forward passes that the rest of a picture costs: placing the model, and decoding

_STRENGTHS = (0.5, 1.0)  # at which finished LoRAs are drawn, where the settings have none

_FEWER_STEPS = (12, 8)  # sampling steps where the usual ones do not fit

_MOST_PAIRS = 4  # that previews are drawn from unasked


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
        others = sum(one != 1 for one in self.strengths)
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


def check_likeness_stop(plan: Plan, *, has_folder: bool) -> None:
    """Raise OptionError where `early_stop likeness` cannot work: without a model that draws, a prompt or a folder."""
    config = plan.job.config
    if not config.stops_by_likeness:
        return
    likeness.check_installed("early_stop likeness")
    reason = None
    if plan.denoiser is None:
        reason = f"a model of a known family, got {plan.job.model.title}"
    elif not has_folder:
        reason = "a folder of the run for its previews, got no output"
    elif config.previews is not None and not parse_prompts(config.previews):
        reason = "previews, which are turned off"
    elif config.consequences().learns_no_subject:
        reason = "images that are to be alike, which a slider or preference has not"
    elif _different_pairs(plan.data.samples):
        reason = "a model that draws from a prompt alone, got pairs"
    elif not _subject(plan):
        reason = "a prompt to draw, got neither a trigger nor previews"
    if reason is not None:
        raise OptionError(f"early_stop likeness needs {reason}; change that, or use early_stop validation")


def _watched_program(plan: Plan) -> PreviewProgram:
    """The prompts of the settings, or the run's own, and those by which it is stopped early."""
    assert plan.denoiser is not None
    base, subject = plan.denoiser.base, _subject(plan)
    program = whole_program(plan.job.config, base)
    wishes = (BUILT_IN_WISHES if _is_built_in(plan) else WISHES)[::2]  # half of them, as they are drawn many times
    prompts = dict.fromkeys((*program.prompts, subject))
    asked = tuple(f"{subject}, {wish}" for wish in wishes)
    shown = (*(one for one in prompts if one not in asked), *asked)
    return replace(program, steps=likeness_steps(plan.job.config), prompts=shown, wishes=wishes)


def _is_built_in(plan: Plan) -> bool:
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
    pairs = _different_pairs(samples)
    if any(one.conditioning.controls for one in pairs):  # a picture has the size of its first control
        given = [
            [control.numel() for control in one.conditioning.controls] for one in pairs if one.conditioning.controls
        ]
        size = statistics.fmean(sizes[0] + sum(sizes) for sizes in given)
    budget = _budget(config, samples, size)
    each_step = _each_step(base)
    found = program_within(budget, whole_program(config, base), each_step=each_step)
    if found is None or not pairs:
        return None if found is None else replace(found, prompts=(prompt,))
    fitting = min(_MOST_PAIRS, len(pairs), int(budget / found.passes(each_step)))
    return replace(found, prompts=tuple(one.conditioning.text or prompt for one in pairs[:fitting]))


def loras_evaluated(plan: Plan, program: PreviewProgram) -> int:
    """How many LoRAs of a run are evaluated in its end: those that fit into what previews leave of the share; 0 without
    a trigger or the extra `likeness`, and for models that draw from pictures or in two parts.
    """
    if plan.denoiser is None or not (plan.trigger or plan.data.trigger) or not likeness.is_installed():
        return 0
    base, config = plan.denoiser.base, plan.job.config
    if base.named_expert is not None or base.control_form is not None or config.consequences().is_slider:
        return 0
    side = base.defaults.resolution
    budget = _budget(config, plan.data.samples, math.prod(base.components.latent.shape(side, side, 1)))
    left = budget - program.passes(_each_step(base)) * len(program.prompts)
    return min(MOST_LORAS, loras_within(left / (program.sampling_steps * _each_step(base) + _OTHER_PASSES)))


def _budget(config: TrainConfig, samples: Sequence[Sample], size: float) -> float:
    """Forward passes that previews of a run may take, of latents of a size."""
    trained = statistics.fmean(one.size for one in samples)
    return config.preview_share * config.steps * config.samples_per_step * _STEP_PASSES * trained / size


def _each_step(base: Model) -> int:
    return 1 if base.defaults.guidance == 1 else 2


def program_within(budget: float, whole: PreviewProgram, *, each_step: int) -> PreviewProgram | None:
    """The first program within `budget` forward passes, `each_step` of them per sampling step; None if none fits."""
    return next((one for one in _smaller_and_smaller(whole) if one.passes(each_step) <= budget), None)


def _smaller_and_smaller(whole: PreviewProgram) -> Iterator[PreviewProgram]:
    yield whole
    yield replace(whole, is_strip=False)
    yield (plain := replace(whole, is_strip=False, strengths=()))
    usual, (fewer, least) = whole.sampling_steps, _FEWER_STEPS
    first = whole.steps[:1]
    middle = sorted(whole.steps, key=lambda step: abs(2 * step - whole.steps[0] - whole.steps[-1]))[:1]
    for steps, sampling in (
        (sorted({*first, *middle}), (usual, fewer, least)),
        (first, (least,)),
        ((), (fewer, least)),
    ):
        yield from (replace(plain, steps=tuple(steps), sampling_steps=min(one, usual)) for one in sampling)


def previews_of(
    plan: Plan, program: PreviewProgram, folder: Path, host: RunHost, partner: Partner | None = None
) -> RunPreviews:
    """The previews of a run on a model of ours, whose prompts are encoded at once.

    The host is asked between evaluations of the network whether to stop. ModelError if the model lacks a text encoder
    or an autoencoder.
    """
    denoiser, config, device = plan.denoiser, plan.job.config, plan.job.way.device
    assert denoiser is not None
    base, text_encoder = denoiser.base, denoiser.base.text_encoder
    in_place = partner is None and _may_stay(plan)
    if config.quantization != "none" and not in_place:
        remark = "Previews are drawn with the original base model, not with the quantized one of training."
        host.on_event(Warned(message=remark, is_remark=True))
    drawn = replace(denoiser, patches=()) if in_place else denoiser  # which has the others already
    # Where text encoders are not trained, a continued LoRA may have layers for them.
    carried = Lora.load(config.existing_lora, base) if config.existing_lora else Lora(AdapterState(), base.names)
    pairs = _pairs(plan, len(program.prompts))
    if config.preview_frames is not None and any("known" in one.conditioning.tensors for one in pairs):
        message = "preview_frames has no effect: a preview has as many frames as the clip that it is given frames of"
        host.on_event(Warned(message=message))
    previewer = Previewer(
        drawn,
        program.prompts,
        beside=[one.conditioning.beside for one in pairs],
        seen=[[picture.pixels() for picture in one.seen] for one in pairs],
        load=lambda path, strength: (
            Lora.load(path, base).applied(drawn, None, strength=strength, bypass=in_place or None).denoiser
        ),
        strengths=(1.0, *program.strengths),
        encoder=lambda strength: carried.applied(None, text_encoder, strength=strength).encoder,
        trained_encoder=(
            (lambda path, strength: Lora.load(path, base).applied(None, text_encoder, strength=strength).encoder)
            if plan.job.model.encoders is not None
            else None
        ),
        sampling=Sampling(
            seed=config.seed,
            steps=program.sampling_steps,
            frames=_frames(config, base),
            dtype=_sampling_dtype(denoiser, config, device),
        ),
        device=device,
        cancelled=host.cancelled,
        partner=partner,
    )
    sampling = previewer.sampling
    made_with = {
        "Steps": sampling.steps,
        "Sampler": f"{sampling.sampler} {sampling.scheduler}",
        "CFG scale": sampling.cfg,
        "Seed": sampling.seed,
        "Model": base.title,
    }
    most = loras_evaluated(plan, program)

    def evaluated() -> None:
        drawing = DrawingSettings(seed=config.seed, steps=program.sampling_steps)
        evaluate(
            base,
            subject_of([folder], most=most),
            drawing,
            device=device,
            progress=lambda done, total: host.on_event(Drawing(done=done, total=total)),
            cancelled=host.cancelled,
        )

    decoded = _decoded(base, pairs, device)
    measuring = None
    if likeness.is_installed() and not config.consequences().learns_no_subject:
        measuring = PreviewLikeness(trained_pictures(plan), sight_of(is_built_in=_is_built_in(plan)), program.wishes)
    last = evaluated if most else None
    return RunPreviews(
        previewer.draw, plan, program, folder, host, made_with, decoded, last, measuring, in_place=in_place
    )


def _may_stay(plan: Plan) -> bool:
    """Whether previews can be drawn with the weights as steps have them on a GPU, quantized and offloaded.

    Pictures are those of the LoRA on the base model that it is trained on. On a CPU, in fp32, weights are placed in no
    time and merged.
    """
    job, denoiser, way = plan.job, plan.denoiser, plan.job.way
    assert denoiser is not None
    return (
        way.device.type != "cpu"
        and way.dtype == _sampling_dtype(denoiser, job.config, way.device)
        and not way.sharding
        and job.model.encoders is None
        # No training adapter, which previews leave out, and no T-LoRA below, whose ranks are chosen in each evaluation.
        and [*map(id, job.model.patches)] == [*map(id, denoiser.patches)]
        and not any(patch.ranks for patch in denoiser.patches)
    )


def _pairs(plan: Plan, count: int) -> list[Sample]:
    """The sample of each prompt whose pictures it gets, in turn; none where samples have none."""
    different = _different_pairs(plan.data.samples)
    return [different[index % len(different)] for index in range(count)] if different else []


def _different_pairs(samples: Sequence[Sample]) -> list[Sample]:
    return list({one.name: one for one in samples if one.conditioning.beside}.values())


def _decoded(base: Model, pairs: Sequence[Sample], device: torch.device) -> dict[str, list[PictureOrClip]]:
    """Controls and what is trained, a picture or clip of each for each prompt, by the stem of their files."""
    if not pairs:
        return {}
    if (source := base.control_source) in ("first frame", "first and last frame"):
        with base.autoencoder.active(device):
            clips = [clip_of(base, one.latents[None]) for one in pairs]
        firsts, lasts = [clip.frames[0] for clip in clips], [clip.frames[-1] for clip in clips]
        return {"control": [*firsts], **({"control-2": [*lasts]} if "last" in source else {}), "target": [*clips]}
    rows = {"target": [one.latents[None] for one in pairs]}
    for index in range(min(len(one.conditioning.controls) for one in pairs)):
        rows[f"control-{index + 1}" if index else "control"] = [one.conditioning.controls[index] for one in pairs]
    latent, autoencoder, masks = base.components.latent, base.autoencoder, dict[str, list[PictureOrClip]]()
    if source == "mask":
        known = [one.conditioning.tensors["known"].split(latent.channels, dim=1) for one in pairs]
        rows["control"] = [given for given, *_ in known]
        covered = [functional.pixel_shuffle(torch.cat(mask, dim=1), latent.downscale) for _, *mask in known]
        masks["mask"] = [to_images(one.expand(-1, 3, -1, -1) * 2 - 1)[0] for one in covered]
    with autoencoder.active(device):
        return masks | {
            stem: [to_images(autoencoder.decode(latent.from_model(one)))[0] for one in row]
            for stem, row in rows.items()
        }


class RunPreviews:
    """Draws previews of a saved LoRA into `samples/` in the folder of a run, with contact sheets, and returns events.

    `draw` makes a picture or clip of each of the program's prompts, with a LoRA at a strength, or without one (the
    same each time); those at full strength are measured by `measuring`. `made_with` is that of `PreviewFolder`,
    `beside` has what prompts edit, by the stem of their files; `evaluate` is called after the last preview. The host
    receives a `Drawing` before each row of pictures. `in_place` is as of `Draw`.
    """

    def __init__(
        self,
        draw: Callable[[Path | None, float], Sequence[PictureOrClip]],
        plan: Plan,
        program: PreviewProgram,
        folder: Path,
        host: RunHost,
        made_with: Mapping[str, Any],
        beside: Mapping[str, Sequence[PictureOrClip]] = MappingProxyType({}),
        evaluate: Callable[[], object] | None = None,
        measuring: PreviewLikeness | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        self._draw, self._prompts, self._beside = draw, program.prompts, beside
        self._files = PreviewFolder(folder / "samples", program.prompts, title=plan.title, sampling=made_with)
        self.steps, self._strengths = program.steps, program.strengths
        self._on_the_way = tuple(one for one in program.strengths if one != 1) if program.is_strip else ()
        self._evaluate = evaluate
        self._host, self._private, self._job, self.in_place = host, plan.job.config.private, plan.job, in_place
        self._base_is_written = False
        self._failures = 0
        self._measuring = measuring

    def has_drawn(self, step: int) -> bool:
        """Whether the pictures of a step are in the folder."""
        return self._files.has_step(step)

    def draw_base(self, step: int) -> list[Event]:
        """Draw the model without the LoRA, before the first step; returns events as a call does."""
        events = self._drawn(step, self._frozen(self._base(step, self._counted(1))))
        torch.cuda.empty_cache()  # which training needs
        return events

    def __call__(self, step: int, lora: Path, *, final: bool = False) -> list[Event]:
        """Draw the LoRA saved at `lora` after `step` updates, without the adapters attached to the model.

        Returns a `Previewed` per row, the first time also for the base model, what was measured, and a `Warned` on
        failure; after the second consecutive failure nothing is drawn. A cancelled preview returns the rows drawn so
        far.
        """
        if self._failures == _MOST_FAILURES:
            return []
        rows = self._previews(step, lora, final)
        events = self._drawn(step, self._frozen(rows) if final else rows)
        if final and self._evaluate is not None and not self._host.cancelled():
            try:
                self._evaluate()
            except SamplingCancelledError:
                pass
            except Exception as error:  # any: the LoRA is saved
                events.append(Warned(message=f"the LoRAs could not be evaluated ({_reason(error)})"))
        # The allocator caches blocks in sampling's sizes, and after a failure training needs all memory.
        torch.cuda.empty_cache()
        return events

    def _frozen(self, rows: Iterator[Event]) -> Iterator[Event]:
        """Rows that are drawn with the bare model, which is as for those on the way inside."""
        with self._job.model.frozen(self._job.config, self._job.way) if self.in_place else contextlib.nullcontext():
            yield from rows

    def _drawn(self, step: int, rows: Iterator[Event]) -> list[Event]:
        events: list[Event] = []
        try:
            for event in rows:
                events.append(event)
            self._failures = 0
        except SamplingCancelledError:
            pass
        except Exception as error:  # any: a preview must not end training
            self._failures += 1
            events.append(Warned(message=self._complaint(step, error)))
        return events

    def _base(self, step: int, draw: Callable[[Path | None], Sequence[PictureOrClip]]) -> Iterator[Event]:
        for stem, pictures in self._beside.items():
            self._files.write_pair(stem, pictures)
        yield self._previewed(step, self._files.write_base(draw(None)), 0.0)
        self._base_is_written = True

    def _previews(self, step: int, lora: Path, final: bool) -> Iterator[Event]:
        files = self._files
        strengths = self._strengths if final else self._on_the_way
        rows = (not self._base_is_written) + 1 + sum(one != 1 for one in strengths)
        draw = self._counted(rows)
        if not self._base_is_written:
            yield from self._base(step, draw)
        full = draw(lora)
        paths = files.write_step(full, step, lora.name)
        yield self._previewed(step, paths, 1.0)
        if self._measuring is not None:
            yield self._measuring.measured(step, full, self._draw(None, 0.0))
        files.write_steps_sheet()
        if final:
            give_picture(lora, paths[0], private=self._private)
        for strength in strengths:
            drawn = full if strength == 1 else draw(lora, strength)
            paths = files.write_strength(drawn, strength, step, lora.name, final=final)
            if strength != 1:  # reported above
                yield self._previewed(step, paths, strength)
        if final and strengths:
            files.write_strengths_sheet(strengths, step)

    def _counted(self, rows: int) -> Callable[..., Sequence[PictureOrClip]]:
        """Draw, with an event before each row of pictures."""
        row, each = count(), len(self._prompts)

        def draw(lora: Path | None, strength: float = 1.0) -> Sequence[PictureOrClip]:
            self._host.on_event(Drawing(done=each * next(row), total=each * rows))
            return self._draw(lora, strength)

        return draw

    def _previewed(self, step: int, paths: tuple[Path, ...], strength: float) -> Previewed:
        return Previewed(step=step, prompts=self._prompts, paths=tuple(map(str, paths)), strength=strength)

    def _complaint(self, step: int, error: Exception) -> str:
        what = f"the preview at step {step} could not be drawn ({_reason(error)})"
        if self._failures < _MOST_FAILURES:
            return f"{what}; training continues"
        return f"{what}, nor could the one before; training continues without previews"


def draw_requested(
    plan: Plan, folder: Path, request: DrawRequest, lora: Path | None, host: RunHost
) -> tuple[Sequence[Path], str]:
    """Draw a prompt without and with the LoRA at `lora`, or the saved one that the request names, into the folder of
    what is tried; returns the files and a note. The request is untrusted. Raises LorasmithError.
    """
    denoiser, config, device = plan.denoiser, plan.job.config, plan.job.way.device
    if denoiser is None:
        raise OptionError(
            f"drawing needs a model of a known family, got {plan.job.model.title}; draw with code of yours"
        )
    base = denoiser.base
    if base.named_expert is not None:
        raise OptionError(f"{base.title} needs its other expert to draw; draw with lorasmith generate")
    saved = {path.name: path for path, _ in loras_of_run(folder, plan.title)}
    if lora is None and (lora := saved.get(request.lora)) is None:
        raise OptionError(f"the run has saved {', '.join(saved) or 'no LoRA'}, got {request.lora}; choose one of these")
    control = folder / TRIED / Path(request.control).name
    sampling = Sampling(
        seed=request.seed,
        steps=base.defaults.steps,
        frames=_frames(config, base),
        dtype=_sampling_dtype(denoiser, config, device),
    )
    try:
        return draw_beside(
            denoiser,
            lora,
            request.prompt,
            sampling,
            strength=request.strength,
            folder=folder / TRIED,
            name=request.lora or f"{plan.title}, while it was trained",
            controls=[open_image(control)] if request.control else [],
            device=device,
            progress=lambda done, total: host.on_event(Drawing(done=2 * done // total, total=2)),
            cancelled=host.cancelled,
        )
    finally:
        torch.cuda.empty_cache()  # which training needs


class PreviewFrames:
    """A run's newest previews as one small picture for user interfaces: the base model's above those of the step.

    The first `columns` prompts are shown; `cell` is the longest edge of a picture in pixels.
    """

    def __init__(self, *, columns: int = 4, cell: int = 192) -> None:
        self._columns, self._cell = columns, cell
        self._step = 0
        self._rows: dict[float, list[Image.Image]] = {}  # by strength

    def __call__(self, event: Previewed) -> bytes | None:
        """JPEG of an event's pictures below earlier ones of its step and of the base; None if files are missing."""
        if event.step != self._step:
            self._step = event.step
            self._rows = {strength: row for strength, row in self._rows.items() if strength == 0}
        try:
            self._rows[event.strength] = [self._opened(path) for path in event.paths[: self._columns]]
        except OSError:  # deleted files must not end the run
            return None
        labels = {0.0: "base", 1.0: f"step {event.step}"}
        rows = {labels.get(strength, f"strength {strength:g}"): row for strength, row in sorted(self._rows.items())}
        sheet = contact_sheet(
            list(rows.values()), list(rows), event.prompts[: self._columns], min_cell=self._cell, max_cell=self._cell
        )
        buffer = io.BytesIO()
        sheet.save(buffer, format="JPEG", quality=90)
        return buffer.getvalue()

    def _opened(self, path: str) -> Image.Image:
        with Image.open(path) as picture:
            picture.thumbnail((self._cell, self._cell))
            return picture.copy()


def _frames(config: TrainConfig, base: Model) -> int:
    """Frames of a preview. OptionError if there are several and the model makes pictures."""
    if (frames := config.preview_frames) is None:
        return base.defaults.frames
    base.check_clips("preview_frames", frames)
    return base.components.latent.whole_frames(frames)


def _sampling_dtype(denoiser: Denoiser, config: TrainConfig, device: torch.device) -> torch.dtype:
    """On GPUs training's dtype, so that a preview fits if training fits; on CPUs that of `generate`."""
    if device.type == "cpu":
        return sampling_dtype(denoiser.module, device)
    return chosen_dtype(dtype_on_device(config, denoiser.module, device), denoiser.module)


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    text = next(iter(str(error).splitlines()), "").strip()
    return text if isinstance(error, LorasmithError) else f"{type(error).__name__}: {text}".removesuffix(": ")
