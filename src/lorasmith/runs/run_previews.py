"""Previews of a run: pictures drawn during training, written to its folder and reported as events.

It combines rooms that do not import each other: `sampling` draws, `training` loads LoRAs and defines the events,
`report` writes the files. A failing preview is a warning and does not end the run.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from PIL import Image

from lorasmith.core.adapter_state import AdapterState
from lorasmith.core.errors import LorasmithError
from lorasmith.core.placement import best_device, chosen_dtype
from lorasmith.families.model import Denoiser, Model
from lorasmith.report.contact_sheet import PreviewFolder, contact_sheet
from lorasmith.report.pictures import PictureOrClip
from lorasmith.runs.lora_picture import give_picture
from lorasmith.runs.preview_budget import PreviewProgram
from lorasmith.sampling.generate import Sampling
from lorasmith.sampling.previews import Partner, Previewer
from lorasmith.sampling.sample import SamplingCancelledError
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Drawing, Event, EventHandler, Previewed, Warned
from lorasmith.training.lora_handle import Lora
from lorasmith.training.runtime import dtype_on_device

_MOST_FAILURES = 2  # consecutive failures after which a run draws no more previews


def run_previews(
    denoiser: Denoiser,
    config: TrainConfig,
    folder: Path,
    *,
    prompts: Sequence[str],
    program: PreviewProgram,
    title: str,
    device: torch.device | str | None = None,
    cancelled: Callable[[], bool] | None = None,
    on_event: EventHandler = lambda event: None,
    partner: Partner | None = None,
) -> RunPreviews:
    """Encode the prompts; returns the object that draws them into `samples/` in the folder of the run.

    A `Drawing` is emitted before each row of pictures; `cancelled` is called between evaluations of the network.
    ModelError if the model lacks a text encoder or an autoencoder.
    """
    base, device = denoiser.base, torch.device(device or best_device())
    text_encoder = base.text_encoder
    # Text encoders are not trained, but a continued LoRA may have layers for them.
    carried = Lora.load(config.existing_lora, base) if config.existing_lora else Lora(AdapterState(), base.names)
    previewer = Previewer(
        denoiser,
        prompts,
        load=lambda path, strength: Lora.load(path, base).applied(denoiser, None, strength=strength).denoiser,
        strengths=(1.0, *program.strengths),
        encoder=lambda strength: carried.applied(None, text_encoder, strength=strength).encoder,
        sampling=Sampling(
            seed=config.seed,
            steps=program.sampling_steps,
            frames=_frames(config, base),
            dtype=_sampling_dtype(denoiser, config, device),
        ),
        device=device,
        cancelled=cancelled,
        partner=partner,
    )
    return RunPreviews(
        previewer,
        folder / "samples",
        title=title,
        model=base.title,
        program=program,
        on_event=on_event,
        private=config.private,
    )


class RunPreviews:
    """Draws previews of a saved LoRA, writes pictures and contact sheets, and returns events.

    If `private`, the finished LoRA gets no picture in its header.
    """

    def __init__(
        self,
        previewer: Previewer,
        folder: Path,
        *,
        title: str,
        model: str,
        program: PreviewProgram,
        on_event: EventHandler = lambda event: None,
        private: bool,
    ) -> None:
        sampling = previewer.sampling
        made_with = {
            "Steps": sampling.steps,
            "Sampler": f"{sampling.sampler} {sampling.scheduler}",
            "CFG scale": sampling.cfg,
            "Seed": sampling.seed,
            "Model": model,
        }
        self._previewer = previewer
        self._files = PreviewFolder(folder, previewer.prompts, title=title, sampling=made_with)
        self.is_final_only, self._strengths = program.is_final_only, program.strengths
        self._on_event, self._private = on_event, private
        self._base_is_written = False
        self._failures = 0

    def __call__(self, step: int, lora: Path, *, final: bool = False) -> list[Event]:
        """Draw the LoRA saved at `lora` after `step` updates, without the adapters attached to the model.

        Returns a `Previewed` per row, the first time also for the base model, and a `Warned` on failure; after the
        second consecutive failure nothing is drawn. A cancelled preview returns the rows drawn so far.
        """
        events: list[Event] = []
        if self._failures == _MOST_FAILURES:
            return events
        try:
            for previewed in self._previews(step, lora, final):
                events.append(previewed)
            self._failures = 0
        except SamplingCancelledError:
            pass
        except Exception as error:  # any: a preview must not end training
            self._failures += 1
            events.append(Warned(message=self._complaint(step, error)))
        # The allocator caches blocks in sampling's sizes, and after a failure training needs all memory.
        torch.cuda.empty_cache()
        return events

    def _previews(self, step: int, lora: Path, final: bool) -> Iterator[Previewed]:
        files, is_last = self._files, final
        final = final and bool(self._strengths)
        rows = (not self._base_is_written) + 1 + (sum(one != 1 for one in self._strengths) if final else 0)
        draw = self._counted(rows)
        if not self._base_is_written:
            yield self._previewed(step, files.write_base(draw(None)), 0.0)
            self._base_is_written = True
        full = draw(lora)
        paths = files.write_step(full, step, lora.name)
        yield self._previewed(step, paths, 1.0)
        files.write_steps_sheet()
        if is_last:
            give_picture(lora, paths[0], private=self._private)
        if not final:
            return
        for strength in self._strengths:
            drawn = full if strength == 1 else draw(lora, strength)
            paths = files.write_strength(drawn, strength, step, lora.name)
            if strength != 1:  # reported above
                yield self._previewed(step, paths, strength)
        files.write_strengths_sheet(self._strengths, step)

    def _counted(self, rows: int) -> Callable[..., Sequence[PictureOrClip]]:
        """`Previewer.draw`, with an event before each row of pictures."""
        row, each = count(), len(self._previewer.prompts)

        def draw(lora: Path | None, strength: float = 1.0) -> Sequence[PictureOrClip]:
            self._on_event(Drawing(done=each * next(row), total=each * rows))
            return self._previewer.draw(lora, strength)

        return draw

    def _previewed(self, step: int, paths: tuple[Path, ...], strength: float) -> Previewed:
        return Previewed(step=step, prompts=self._previewer.prompts, paths=tuple(map(str, paths)), strength=strength)

    def _complaint(self, step: int, error: Exception) -> str:
        what = f"the preview at step {step} could not be drawn ({_reason(error)})"
        if self._failures < _MOST_FAILURES:
            return f"{what}; training continues"
        return f"{what}, nor could the one before; training continues without previews"


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
    """On GPUs training's dtype, so that a preview fits if training fits; on CPUs that of `generate`, without a copy."""
    if device.type == "cpu":
        return torch.float32
    return chosen_dtype(dtype_on_device(config, denoiser.module, device), denoiser.module)


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    text = next(iter(str(error).splitlines()), "").strip()
    return text if isinstance(error, LorasmithError) else f"{type(error).__name__}: {text}".removesuffix(": ")
