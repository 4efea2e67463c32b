"""Previews of a run: drawn during training, written to its folder and reported as events; `preview_budget` says which.

Drawing combines rooms that do not import each other: `sampling` draws, `training` loads LoRAs and defines the events,
`report` writes the files. A failing preview is a warning and does not end the run.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
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
from lorasmith.core.folders import TRIED
from lorasmith.core.placement import chosen_dtype
from lorasmith.data.dataset import Sample
from lorasmith.data.image_files import open_image
from lorasmith.evaluation import likeness
from lorasmith.evaluation.evaluation_record import DrawingSettings
from lorasmith.evaluation.recognition import recogniser_of
from lorasmith.families.model import Denoiser, Model
from lorasmith.report.contact_sheet import PreviewFolder, contact_sheet
from lorasmith.report.pictures import PictureOrClip, picture_uri
from lorasmith.runs.drawing import draw_beside
from lorasmith.runs.evaluate import evaluate, subject_of
from lorasmith.runs.preview_budget import PreviewProgram, different_pairs, is_built_in, loras_evaluated
from lorasmith.runs.preview_likeness import PreviewLikeness, trained_pictures
from lorasmith.runs.run_page import loras_of_run
from lorasmith.runs.sidecars import give_picture
from lorasmith.sampling.generate import Sampling, clip_of, to_images
from lorasmith.sampling.previews import Partner, Previewer
from lorasmith.sampling.sample import SamplingCancelledError
from lorasmith.sampling.sketches import Sketcher
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Drawing, Event, Previewed, Sketched, Warned
from lorasmith.training.lora_handle import Lora
from lorasmith.training.run_requests import DrawRequest
from lorasmith.training.train import Plan, RunHost
from lorasmith.training.way import dtype_on_device

_MOST_FAILURES = 2  # consecutive failures after which a run draws no more previews


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
    if config.preview_frames is not None and any("known" in pair.conditioning.tensors for pair in pairs):
        message = "preview_frames has no effect: a preview has as many frames as the clip that it is given frames of"
        host.on_event(Warned(message=message))
    previewer = Previewer(
        drawn,
        program.prompts,
        pictures=[pair.conditioning.pictures for pair in pairs],
        seen=[[picture.pixels() for picture in pair.seen] for pair in pairs],
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
        sketcher=Sketcher(lambda picture: host.on_event(Sketched(picture=picture_uri(picture)[0]))),
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

    @cache
    def measuring() -> PreviewLikeness:
        return PreviewLikeness(trained_pictures(plan), recogniser_of(is_built_in=is_built_in(plan)), program.wishes)

    is_measured = likeness.is_installed() and not config.consequences().learns_no_subject
    return RunPreviews(
        previewer.draw,
        plan,
        program,
        folder,
        host,
        made_with,
        decoded,
        evaluated if most else None,
        measuring if is_measured else None,
        in_place=in_place,
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
    different = different_pairs(plan.data.samples)
    return [different[index % len(different)] for index in range(count)] if different else []


def _decoded(base: Model, pairs: Sequence[Sample], device: torch.device) -> dict[str, list[PictureOrClip]]:
    """Controls and what is trained, a picture or clip of each for each prompt, by the stem of their files."""
    if not pairs:
        return {}
    if frames := base.control_form.frames:
        with base.autoencoder.active(device):
            clips = [clip_of(base, pair.latents[None]) for pair in pairs]
        control_frames = zip(("control", "control-2"), frames, strict=False)
        return {**{stem: [clip.frames[place] for clip in clips] for stem, place in control_frames}, "target": [*clips]}
    rows = {"target": [pair.latents[None] for pair in pairs]}
    for index in range(min(len(pair.conditioning.controls) for pair in pairs)):
        rows[f"control-{index + 1}" if index else "control"] = [pair.conditioning.controls[index] for pair in pairs]
    latent, autoencoder, masks = base.components.latent, base.autoencoder, dict[str, list[PictureOrClip]]()
    if base.control_form.is_fill:
        known = [pair.conditioning.tensors["known"].split(latent.channels, dim=1) for pair in pairs]
        rows["control"] = [control for control, *_ in known]
        covered = [functional.pixel_shuffle(torch.cat(mask, dim=1), latent.downscale) for _, *mask in known]
        masks["mask"] = [to_images(mask_.expand(-1, 3, -1, -1) * 2 - 1)[0] for mask_ in covered]
    with autoencoder.active(device):
        return masks | {
            stem: [to_images(autoencoder.decode(latent.from_model(latents)))[0] for latents in row]
            for stem, row in rows.items()
        }


class RunPreviews:
    """Draws previews of a saved LoRA into `samples/` in the folder of a run, with contact sheets, and yields events.

    `draw` makes a picture or clip of each of the program's prompts, with a LoRA at a strength, or without one (the
    same each time); those at full strength are measured by what `measuring` returns, after they are reported.
    `made_with` is that of `PreviewFolder`, `beside` has what prompts edit, by the stem of their files; `evaluate` is
    called after the last preview. The host receives a `Drawing` before each row of pictures. `in_place` is as of
    `Draw`.
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
        measuring: Callable[[], PreviewLikeness] | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        self._draw, self._prompts, self._beside = draw, program.prompts, beside
        self._sampling_steps = program.sampling_steps
        self._files = PreviewFolder(folder / "samples", program.prompts, title=plan.title, sampling=made_with)
        self.steps, self._strengths = program.steps, program.strengths
        self._on_the_way = (
            tuple(strength for strength in program.strengths if strength != 1) if program.is_strip else ()
        )
        self._evaluate = evaluate
        self._host, self._private, self._job, self.in_place = host, plan.job.config.private, plan.job, in_place
        self._base_is_written = False
        self._failures = 0
        self._measuring = measuring

    def has_drawn(self, step: int) -> bool:
        """Whether the pictures of a step are in the folder."""
        return self._files.has_step(step)

    def draw_base(self, step: int) -> Generator[Event]:
        """Draw the model without the LoRA, before the first step; yields events as a call does."""
        yield from self._drawn(step, self._frozen(self._base(step, self._counted(1))))
        torch.cuda.empty_cache()  # which training needs

    def __call__(self, step: int, lora: Path, *, final: bool = False) -> Generator[Event]:
        """Draw the LoRA saved at `lora` after `step` updates, without the adapters attached to the model.

        Yields a `Previewed` per row, the first time also for the base model, what was measured, and a `Warned` on
        failure; after the second consecutive failure nothing is drawn. A cancelled preview ends after
        the rows drawn so far.
        """
        if self._failures == _MOST_FAILURES:
            return
        rows = self._previews(step, lora, final)
        yield from self._drawn(step, self._frozen(rows) if final else rows)
        if final and self._evaluate is not None and not self._host.cancelled():
            try:
                self._evaluate()
            except SamplingCancelledError:
                pass
            except Exception as error:  # any: the LoRA is saved
                yield Warned(message=f"the LoRAs could not be evaluated ({_reason(error)})")
        # The allocator caches blocks in sampling's sizes, and after a failure training needs all memory.
        torch.cuda.empty_cache()

    def _frozen(self, rows: Iterator[Event]) -> Iterator[Event]:
        """Rows that are drawn with the bare model, which is as for those on the way inside."""
        with self._job.model.frozen(self._job.config, self._job.way) if self.in_place else contextlib.nullcontext():
            yield from rows

    def _drawn(self, step: int, rows: Iterator[Event]) -> Iterator[Event]:
        try:
            yield from rows
            self._failures = 0
        except SamplingCancelledError:
            pass
        except Exception as error:  # any: a preview must not end training
            self._failures += 1
            yield Warned(message=self._complaint(step, error))

    def _base(self, step: int, draw: Callable[[Path | None], Sequence[PictureOrClip]]) -> Iterator[Event]:
        for stem, pictures in self._beside.items():
            self._files.write_pair(stem, pictures)
        yield self._previewed(step, self._files.write_base(draw(None)), 0.0)
        self._base_is_written = True

    def _previews(self, step: int, lora: Path, final: bool) -> Iterator[Event]:
        files = self._files
        strengths = self._strengths if final else self._on_the_way
        rows = (not self._base_is_written) + 1 + sum(strength != 1 for strength in strengths)
        draw = self._counted(rows)
        if not self._base_is_written:
            yield from self._base(step, draw)
        full = draw(lora)
        paths = files.write_step(full, step, lora.name)
        yield self._previewed(step, paths, 1.0)
        if self._measuring is not None:
            yield self._measuring().measured(step, full, self._draw(None, 0.0))
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
        return Previewed(
            step=step,
            prompts=self._prompts,
            paths=tuple(map(str, paths)),
            strength=strength,
            sampling_steps=self._sampling_steps,
        )

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
            strengths=[request.strength],
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
