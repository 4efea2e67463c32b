"""The Python library's functions that show their progress: `load_dataset`, `train`, `train_together` and `generate`.

They add bars, and LoRAs by name, to the functions of the rooms below.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, Protocol, get_type_hints

import torch
from PIL import Image

from lorasmith.core.options import options_of
from lorasmith.core.placement import chosen_device
from lorasmith.core.printable import printable
from lorasmith.data import encoding
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.picture_encoding import EncodingProgress
from lorasmith.diffusion.loss_functions import Loss
from lorasmith.families.model import Denoiser, Model, TextEncoder
from lorasmith.runs.drawing import with_loras
from lorasmith.runs.progress_bars import counted, note, run_shown, void
from lorasmith.runs.run import Host, run
from lorasmith.sampling import generate as sampling
from lorasmith.sampling.generate import Sampling
from lorasmith.training.config import TrainConfig, config_over
from lorasmith.training.events import Event, EventHandler, RolledBack, Shrunk, Warned
from lorasmith.training.job import plan_job
from lorasmith.training.joint import StopOfAll, check_captions, train_jointly
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.records import RECORD
from lorasmith.training.storage.run_folder import output_folder
from lorasmith.training.train import Plan

P = ParamSpec("P")
_Lora = str | os.PathLike[str] | Lora
LoraStrengths = (
    Mapping[str, float] | Mapping[Path, float] | Mapping[str | Path, float] | Sequence[_Lora | tuple[_Lora, float]]
)
"""LoRAs with strengths: `{"dog.safetensors": 0.8}`, or a list of files, LoRAs and pairs of one and its strength."""


@dataclass(frozen=True, kw_only=True)
class DatasetArguments(DataConfig):
    """Keyword arguments of `load_dataset`: every setting of `DataConfig`, and these.

    Attributes:
        config: base settings; those passed as keywords override them.
        device: where to encode; the first GPU, or the CPU, if None.
        progress: True for bars of captions and images, False for none, or a function that is called after each image
            with (images done, total, name of the image).
    """

    config: DataConfig | None = None
    device: str | torch.device | None = None
    progress: bool | EncodingProgress | None = True


_AROUND_DATA = [field.name for field in fields(DatasetArguments) if "option" not in field.metadata]
"""Names of the arguments of `load_dataset` that are not settings."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments(TrainConfig):
    """Keyword arguments of `train`: every setting of `TrainConfig`, and these.

    Attributes:
        config: base settings; those passed as keywords override them.
        output: folder of the run, or None to write nothing. If it holds the same run (settings, model, data),
            unfinished, that run is resumed bit-identically; a complete one with fewer steps is moved aside and
            continued from its end. If it holds other files, the run is in a subfolder with its title.
        loss: the setting `loss_function`: MSE, L1, Huber, SmoothL1, or a function of (prediction, target, batch) that
            returns a loss for each sample; see `lorasmith.diffusion.loss_functions.Loss`.
        title: name of the LoRA, and of its file in `output`.
        trigger: trigger phrase, for the metadata.
        device: where to train; the first GPU, or the CPU, if None.
        validation: held-out images, instead of a share of the data.
        fresh: move an existing run in `output` aside, and start from scratch.
        progress: show a bar and the run's notes on standard error; False shows nothing.
        on_event: receives all events; without it and without progress, warnings are logged (logger `lorasmith`).
        cancelled: called between steps; True ends the run and saves the result.
    """

    config: TrainConfig | None = None
    output: str | Path | None = None
    loss: str | Loss | None = None
    title: str = Plan.title
    trigger: str | None = None
    device: str | torch.device | None = None
    validation: EncodedDataset | None = None
    fresh: bool = False
    progress: bool = True
    on_event: EventHandler | None = None
    cancelled: Callable[[], bool] | None = None


_AROUND_TRAINING = [field.name for field in fields(TrainArguments) if "option" not in field.metadata]


def shown_signature(function: Callable[..., Any], arguments: Any) -> Any:
    """The function with the fields of the dataclass in place of `**arguments` in its signature, non-options first."""
    plain, hints = inspect.signature(function, eval_str=True), get_type_hints(arguments)
    first = [one for one in plain.parameters.values() if one.kind is not one.VAR_KEYWORD]
    others = [one.replace(annotation=hints[one.name]) for one in inspect.signature(arguments).parameters.values()]
    settings = options_of(arguments)
    others.sort(key=lambda one: one.name in settings)
    function.__signature__ = plain.replace(parameters=[*first, *others])  # type: ignore[attr-defined]
    return function


class _LoadDataset(Protocol[P]):
    def __call__(
        self,
        images: str | os.PathLike[str] | Sequence[ImageSource] | object,
        model: Model,
        *args: P.args,
        **arguments: P.kwargs,
    ) -> EncodedDataset: ...


def _loads(arguments: Callable[P, DataConfig]) -> Callable[[Callable[..., EncodedDataset]], _LoadDataset[P]]:
    """Decorator: `**arguments` get the signature of their dataclass, for type checkers and `help`."""
    return lambda function: shown_signature(function, arguments)


class _Train(Protocol[P]):
    def __call__(
        self, model: Model | Denoiser, data: EncodedDataset, *args: P.args, **arguments: P.kwargs
    ) -> TrainResult: ...


def _trains(arguments: Callable[P, TrainConfig]) -> Callable[[Callable[..., TrainResult]], _Train[P]]:
    return lambda function: shown_signature(function, arguments)


@_loads(DatasetArguments)
def load_dataset(
    images: str | os.PathLike[str] | Sequence[ImageSource] | object, model: Model, **arguments: Any
) -> EncodedDataset:
    """Read and encode images with captions.

    Encodings are kept on disk, so that the next call with the same images, captions and encoders reads them.

    Args:
        images: a folder of images, a metadata file, a folder that `datasets` saved, a `datasets.Dataset` with a column
            of images, or several of these as `ImageSource`.
        model: its autoencoder and text encoders are used.
        **arguments: settings by name (`DataConfig`), such as trigger, resolution and flip, and those of
            `DatasetArguments`: config, device, progress.

    Returns:
        The samples: latents fp32 (channels, [frames,] height, width) on the CPU, and conditionings of the captions.

    Raises:
        DataError: the folder or its images cannot be used.
        ModelError: the model lacks a text encoder or an autoencoder.
        OptionError: a setting is unknown or out of range, or there is no such device.
    """
    given = DatasetArguments(**{name: arguments.pop(name) for name in _AROUND_DATA if name in arguments})
    bars = given.progress if isinstance(given.progress, bool) else False
    with (
        counted("Hashing", bars) as hashing,
        counted("Captions", bars) as captions,
        counted("Images", given.progress) as pictures,
    ):
        data = encoding.load_dataset(
            images,
            model,
            device=given.device,
            progress=pictures,
            caption_progress=captions,
            hash_progress=hashing,
            config=given.config,
            **arguments,
        )
    for sentence in data.notes if given.progress is True else ():
        note(sentence)
    return data


@_trains(TrainArguments)
def train(model: Model | Denoiser, data: EncodedDataset, **arguments: Any) -> TrainResult:
    """Train a LoRA.

    Args:
        model: the base model, with or without LoRAs applied; it is not modified.
        data: encoded samples.
        **arguments: settings by name (`TrainConfig`), and those of `TrainArguments`: output, title, trigger, device,
            validation, fresh, progress, on_event, cancelled, config, loss.

    Returns:
        The LoRA, the loss of each step, and where the files are if there is an output folder.

    Raises:
        OptionError: a setting is unknown, out of range or does not fit the model, or there is no such device.
        LoraError: an existing LoRA cannot be read or is for another model.
        DataError: the samples do not fit the model.
        OutputError: `output` holds another run, this one complete, or one that another process trains, is a file, or
            cannot be used.
        TrainingError: the loss became non-finite more often than `max_rollbacks`, or memory is too small. If steps were
            taken and there is an output folder, their LoRA is saved and the message names the file.
        KeyboardInterrupt: the run was interrupted. Its LoRA and its state are in the output folder, if there is one,
            and its notes name them; the same call continues it.
    """
    given, plan = _planned(model, data, arguments)
    silent = void if given.progress else _logged
    with run_shown(given.progress) as show:
        try:
            return run(plan, _LibraryHost(given.cancelled, show, given.on_event or silent))
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(_place_of(plan))
            if given.progress:
                note(f"Interrupted: {'; '.join(interrupt.__notes__)}.")
            raise


def train_together(
    model: Model | Denoiser, data: EncodedDataset, runs: Sequence[Mapping[str, Any]], **arguments: Any
) -> list[TrainResult | Exception]:
    """Train several LoRAs at once over one model, which is held in memory once.

    Each result equals that of `train`, to rounding. Rates, ranks, seeds, algorithms, targets, optimizers, batch sizes,
    steps and data may differ; settings of the model and of memory are shared by all.

    Args:
        model: as for `train`.
        data: encoded samples.
        runs: the arguments of each run as for `train`, such as `{"rank": 8, "output": "runs/8"}`; `data` are samples of
            its own.
        **arguments: shared by all runs. No bars are shown.

    Returns:
        The result of each run, or the error that ended it; other runs continue.

    Raises:
        OptionError: as `train`, or the runs cannot train together.
        KeyboardInterrupt: they were interrupted; those with an output folder have saved.
    """
    stop = StopOfAll(arguments.get("cancelled") or (lambda: False))
    jobs, works = [], []
    for own in runs:
        asked = {**arguments, "cancelled": stop.is_set, **own}
        samples = asked.pop("data", data)
        given, plan = _planned(model, samples, asked)
        check_captions(plan.job, samples)
        jobs.append(plan.job)
        works.append(partial(run, plan, _LibraryHost(given.cancelled, given.on_event or _logged)))
    return train_jointly(jobs, works, each_round=stop.look)


class _LibraryHost(Host):
    """Passes events on; writes no files without an output."""

    runs = None

    def __init__(self, cancelled: Callable[[], bool] | None, *handlers: EventHandler) -> None:
        self._cancelled, self._handlers = cancelled, handlers

    def on_event(self, event: Event) -> None:
        for handler in self._handlers:
            handler(event)

    def cancelled(self) -> bool:
        return self._cancelled is not None and self._cancelled()


def _logged(event: Event) -> None:
    """Log the warnings of a run without a watcher, such as a preview that cannot be drawn."""
    if isinstance(event, RolledBack | Shrunk) or (isinstance(event, Warned) and not event.is_remark):
        logging.getLogger("lorasmith").warning(event.message)


def _planned(
    model: Model | Denoiser, data: EncodedDataset, arguments: Mapping[str, Any]
) -> tuple[TrainArguments, Plan]:
    """The arguments of `train` that are not settings, and the plan of the run."""
    given = TrainArguments(**{name: value for name, value in arguments.items() if name in _AROUND_TRAINING})
    settings = {name: value for name, value in arguments.items() if name not in _AROUND_TRAINING}
    config = config_over(given.config, {**settings, "loss": given.loss})
    denoiser = model if isinstance(model, Denoiser) else model.denoiser
    plan = Plan(
        denoiser=denoiser,
        job=plan_job(denoiser, config, chosen_device(given.device)),
        data=data,
        validation=given.validation,
        title=given.title,
        trigger=given.trigger,
        output=None if given.output is None else Path(given.output),
        fresh=given.fresh,
    )
    return given, plan


def _place_of(plan: Plan) -> str:
    """Where the files of an interrupted run are, in a clause."""
    if plan.output is None:
        return "nothing was saved, as the run has no folder; give one as output, such as output='runs/dog'"
    output = output_folder(plan.output, plan.title)
    if not (output / RECORD).is_file():
        return "the run had not begun"
    return f"the run is in {printable(str(output), limit=200)}; the same call continues it"


def generate(
    model: Model | Denoiser,
    prompts: str | Sequence[str],
    *,
    loras: LoraStrengths = (),
    strict: bool = False,
    text_encoder: TextEncoder | None = None,
    negative: str = "",
    seed: int = Sampling.seed,
    steps: int = Sampling.steps,
    cfg: float | None = Sampling.cfg,
    sampler: str = Sampling.sampler,
    scheduler: str = Sampling.scheduler,
    width: int | None = Sampling.width,
    height: int | None = Sampling.height,
    dtype: torch.dtype = Sampling.dtype,
    device: str | torch.device | None = None,
    progress: bool | Callable[[int, int], None] | None = True,
    cancelled: Callable[[], bool] | None = None,
) -> list[Image.Image]:
    """Generate one picture per prompt, all from noise of the same seed.

    Args:
        model: the model, or its denoiser with LoRAs applied.
        prompts: one or more prompts, `(word:1.2)` weights included.
        loras: LoRAs with their strengths, `{"dog.safetensors": 0.8}`, or a list of files or `Lora`s, at strength 1
            unless each is a pair with its own. They are applied to denoiser and text encoders.
        strict: whether a LoRA of which a part does not apply is refused; else a Python warning says so.
        text_encoder: text encoders with LoRAs applied; the model's if None.
        negative: negative prompt.
        seed: of the noise.
        steps: sampling steps, from 1.
        cfg: guidance scale; the model's own if None.
        sampler, scheduler: names as in ComfyUI's KSampler.
        width, height: in pixels, multiples of the model's; its resolution if None.
        dtype: of the denoiser's weights and products; bf16 needs half of the memory and changes pictures slightly.
        device: where to sample; the first GPU, or the CPU, if None.
        progress: True for a bar, False for none, or a function that is called with (steps done, total) of all prompts
            together.
        cancelled: called between evaluations of the network; True ends sampling.

    Returns:
        RGB pictures, one per prompt.

    Raises:
        OptionError: a size does not fit the model, a name is unknown, or a strength is not finite.
        ModelError: the model lacks a text encoder or an autoencoder.
        LoraError: a LoRA cannot be read, is for another model, or is refused.
        CancelledError: `cancelled` returned True.
    """
    denoiser = model if isinstance(model, Denoiser) else model.denoiser
    encoder = text_encoder or denoiser.base.text_encoder
    denoiser, encoder = with_loras(denoiser, encoder, _pairs(loras), strict=strict)
    with counted("Sampling", progress) as shown:
        return sampling.generate(
            denoiser,
            prompts,
            text_encoder=encoder,
            negative=negative,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler=sampler,
            scheduler=scheduler,
            width=width,
            height=height,
            dtype=dtype,
            device=chosen_device(device),
            progress=shown,
            cancelled=cancelled,
        )


def _pairs(loras: LoraStrengths) -> list[tuple[_Lora, float]]:
    if isinstance(loras, Mapping):
        return list(loras.items())
    return [one if isinstance(one, tuple) else (one, 1.0) for one in loras]
