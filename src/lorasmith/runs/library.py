"""The Python library's functions: `load_dataset`, `encode`, `train`, `train_together`, `generate` and `evaluate`.

They add bars, and models, data and LoRAs by name, to the functions of the rooms below.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, Protocol

import torch
from PIL import Image

from lorasmith.core.arguments import typed_arguments
from lorasmith.core.errors import DataError, OptionError
from lorasmith.core.options import changed
from lorasmith.core.placement import chosen_device
from lorasmith.core.printable import described, printable
from lorasmith.data import encoding
from lorasmith.data.data_config import DataConfig
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.data.image_files import open_image, open_mask
from lorasmith.data.picture_encoding import EncodingProgress
from lorasmith.diffusion.loss_functions import Loss
from lorasmith.evaluation.evaluation_record import DrawingSettings, Evaluation
from lorasmith.evaluation.likeness import check_installed
from lorasmith.families.loading import DiffusersPipeline
from lorasmith.families.model import Denoiser, Model, TextEncoder
from lorasmith.runs.class_images import class_scan
from lorasmith.runs.drawing import with_loras
from lorasmith.runs.evaluate import evaluate as evaluated
from lorasmith.runs.evaluate import subject_of
from lorasmith.runs.library_inputs import (
    check_data,
    denoiser_of,
    model_of,
    samples_of,
    taken,
    trainable_of,
    with_settings,
)
from lorasmith.runs.presets import model_name, with_recipe
from lorasmith.runs.progress_bars import counted, note, run_shown, void
from lorasmith.runs.run import Host, run
from lorasmith.runs.run_plan import ClassImageDrawn
from lorasmith.runs.spec import NO_PRESET, RunSpec
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
from lorasmith.training.trainable import Trainable, TrainableDenoiser

P = ParamSpec("P")
AnyModel = Model | Denoiser | str | os.PathLike[str] | DiffusersPipeline
"""A model, or what `load_model` loads as one."""

Trained = Trainable | AnyModel
"""What `train` trains on: a `Trainable`, or a model."""

Control = str | os.PathLike[str] | Image.Image
Controls = Control | Sequence[Control]
"""Pictures that an edit model edits or refers to, or their paths."""

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


@dataclass(frozen=True, kw_only=True)
class EncodeArguments(DataConfig):
    """Keyword arguments of `encode`: every setting of `DataConfig`, and these.

    Attributes:
        mask: white where the loss counts: a picture, an array (height, width), or a path.
        name: for messages, and what is held out for validation; by default the file's, or made of the content.
        config: base settings; those passed as keywords override them.
        device: where to encode; the first GPU, or the CPU, if None.
    """

    mask: object = None
    name: str = ""
    config: DataConfig | None = None
    device: str | torch.device | None = None


@dataclass(frozen=True, kw_only=True)
class TrainArguments(TrainConfig):
    """Keyword arguments of `train`: every setting of `TrainConfig`, and these.

    Attributes:
        config: base settings; those passed as keywords override them.
        preset: quick, balanced or thorough: how long to train, and the recipe for the number of pictures, their kind
            and the model. Settings in `config` or passed as keywords come first, and settings of data are for
            `load_dataset`. Without one, or with none, settings have their own defaults.
        kind: subject or style, which the recipe follows; guessed from trigger and captions without one.
        mirror: URL to which the folder of the run is copied at each run state, such as s3://bucket/dog; the same call
            on another machine continues from there. One that ends in / gets the name of the folder.
        output: folder of the run, or None to write nothing. If it holds the same run (settings, model, data),
            unfinished, that run is resumed bit-identically; a complete one with fewer steps is moved aside and
            continued from its end. If it holds other files, the run is in a subfolder with its title.
        loss: the setting `loss_function`: MSE, L1, Huber, SmoothL1, or a function of (prediction, target, batch) that
            returns a loss for each sample; see `lorasmith.diffusion.loss_functions.Loss`.
        title: name of the LoRA, and of its file in `output`.
        trigger: trigger phrase, for the metadata, and for the captions of data that are not encoded yet.
        device: where to train; the first GPU, or the CPU, if None.
        validation: held-out images, instead of a share of the data; as data.
        fresh: move an existing run in `output` aside, and start from scratch.
        progress: show a bar and the run's notes on standard error; False shows nothing.
        on_event: receives all events; without it and without progress, warnings are logged (logger `lorasmith.runs`),
            which prints nothing unless the program configures logging.
        cancelled: called between steps; True ends the run and saves the result.
    """

    config: TrainConfig | None = None
    preset: str = NO_PRESET
    kind: str = ""
    output: str | os.PathLike[str] | None = None
    mirror: str | None = None
    loss: str | Loss | None = None
    title: str = Plan.title
    trigger: str | None = None
    device: str | torch.device | None = None
    validation: object = None
    fresh: bool = False
    progress: bool = True
    on_event: EventHandler | None = None
    cancelled: Callable[[], bool] | None = None


class _LoadDataset(Protocol[P]):
    def __call__(self, images: object, model: AnyModel, *args: P.args, **arguments: P.kwargs) -> EncodedDataset: ...


def _loads(arguments: Callable[P, DataConfig]) -> Callable[[Callable[..., EncodedDataset]], _LoadDataset[P]]:
    """Decorator: `**arguments` get the signature of their dataclass, for type checkers and `help`."""
    return lambda function: with_settings(function, arguments)


class _Encode(Protocol[P]):
    def __call__(
        self,
        model: AnyModel,
        image: object,
        caption: str | Sequence[str] | None = None,
        *args: P.args,
        **arguments: P.kwargs,
    ) -> Sample: ...


def _encodes(arguments: Callable[P, DataConfig]) -> Callable[[Callable[..., Sample]], _Encode[P]]:
    return lambda function: with_settings(function, arguments)


class _Train(Protocol[P]):
    def __call__(self, model: Trained, data: object, *args: P.args, **arguments: P.kwargs) -> TrainResult: ...


def _trains(arguments: Callable[P, TrainConfig]) -> Callable[[Callable[..., TrainResult]], _Train[P]]:
    return lambda function: with_settings(function, arguments)


@_loads(DatasetArguments)
def load_dataset(images: object, model: AnyModel, **arguments: Any) -> EncodedDataset:
    """Read and encode images with captions.

    Encodings are kept on disk, so that the next call with the same images, captions and encoders reads them.

    Pictures in memory are PIL pictures of any mode, or numpy arrays and torch tensors: uint8, or floats in 0..1, of the
    shape (height, width), (height, width, C) or (C, height, width), with C of 1 for grey, 3 for RGB, 4 for RGB and
    alpha; clips of models of videos have frames in front, (frames, height, width, C) or (frames, C, height, width).
    Floats in -1..1 and other integers are refused. A generator or dataset is read once, one picture at a time; pictures
    wait in a temporary folder until they are encoded.

    Args:
        images: a folder of images, a metadata file, a folder that `datasets` saved, a `datasets.Dataset` with a column
            of images, an `ImageSource`, or a list of these; or pictures: a list, a generator, or a torch dataset of
            either style. Of these each is a pair (picture, caption) or (picture, caption, mask), whose caption is a
            text, a list of texts of which each draw takes one, or None; a dict with image (or video), text, mask,
            file_name, repeats, weight, frame_rate; or the path of a picture, whose caption is beside it.
        model: its autoencoder and text encoders are used; a name, a path or a pipeline is loaded first.
        **arguments: below.

    Returns:
        The samples: latents fp32 (channels, [frames,] height, width) on the CPU, and conditionings of the captions.

    Raises:
        DataError: the images cannot be used, or are of another type, shape or range.
        ModelError: the model cannot be loaded, or lacks a text encoder or an autoencoder.
        OptionError: a setting is unknown or out of range, or there is no such device.
        OutputError: the temporary folder is full.
    """
    own, settings = taken(DatasetArguments, "load_dataset", arguments)
    check_data(images)
    base = model_of(model)
    bars = own.progress if isinstance(own.progress, bool) else False
    with (
        counted("Hashing", bars) as hashing,
        counted("Captions", bars) as captions,
        counted("Pictures of the class", bars) as drawn,
        counted("Images", own.progress) as pictures,
    ):

        def on_event(event: Event) -> None:
            if isinstance(event, ClassImageDrawn) and drawn is not None:
                drawn(event.done, event.total)

        host = _LibraryHost(TrainArguments(), on_event)
        data = encoding.load_dataset(
            images,
            base,
            device=own.device,
            progress=pictures,
            caption_progress=captions,
            hash_progress=hashing,
            find_class=lambda config, place: class_scan(config, base, device=place, host=host),
            config=own.config,
            **settings,
        )
    for sentence in data.notes if own.progress is True else ():
        note(sentence)
    return data


@_encodes(EncodeArguments)
def encode(model: AnyModel, image: object, caption: str | Sequence[str] | None = None, **arguments: Any) -> Sample:
    """Encode one picture with its caption, for a list of samples that `train` takes.

    `load_dataset` of a list or a generator gives the same samples faster, as it loads the encoders once.

    Args:
        model: its autoencoder and text encoders are used; a name, a path or a pipeline is loaded first.
        image: a picture as for `load_dataset`, or the path of one, whose caption may be beside it.
        caption: a text, several of which each draw takes one, or None for the trigger alone.
        **arguments: below.

    Returns:
        The sample: latents fp32 (channels, [frames,] height, width) on the CPU, and the conditioning.

    Raises:
        DataError: the picture cannot be used, or is of another type, shape or range.
        ModelError: the model cannot be loaded, or lacks a text encoder or an autoencoder.
        OptionError: a setting is unknown or out of range, or its captions have too many variants.
    """
    own, settings = taken(EncodeArguments, "encode", arguments)
    is_path = isinstance(image, str | os.PathLike)
    item = {("file_name" if is_path else "image"): image, "text": caption, "mask": own.mask}
    data = encoding.load_dataset([item], model_of(model), device=own.device, config=own.config, **settings)
    sample = data[0] if is_path and not own.name else replace(data[0], name=own.name)
    if (variants := sample.variants) is not None:
        captions = variants.possible(_MOST_CAPTIONS)
        if captions is None:
            raise OptionError(
                f"a sample may have at most {_MOST_CAPTIONS:,} variants of its caption, and these are more; encode "
                "with load_dataset, which encodes those that are drawn"
            )
        variants.encoded.encode_ahead(captions)
    return sample


@_trains(TrainArguments)
def train(model: Trained, data: object, **arguments: Any) -> TrainResult:
    """Train a LoRA.

    Args:
        model: the base model, with or without LoRAs applied, or a `Trainable` of your own; it is not modified. A name,
            a path or a pipeline of diffusers is loaded first.
        data: encoded samples: an `EncodedDataset`, or a list of `Sample`s. Whatever else `load_dataset` takes, such as
            a folder, is encoded with its default settings and the trigger.
        **arguments: below.

    Returns:
        The LoRA, the loss of each step, and where the files are if there is an output folder.

    Raises:
        OptionError: a setting is unknown, out of range or does not fit the model, or there is no such device.
        LoraError: an existing LoRA cannot be read or is for another model.
        ModelError: the model cannot be loaded, or is none.
        DataError: the samples do not fit the model, or are none.
        OutputError: `output` holds another run, this one complete, or one that another process trains, is a file, or
            cannot be used.
        TrainingError: the loss became non-finite more often than `max_rollbacks`, or memory is too small. If steps were
            taken and there is an output folder, their LoRA is saved and the message names the file.
        KeyboardInterrupt: the run was interrupted. Its LoRA and its state are in the output folder, if there is one,
            and its notes name them; the same call continues it.
    """
    own, plan = _planned(model, data, arguments)
    silent = void if own.progress else _logged
    with run_shown(own.progress) as show:
        try:
            return run(plan, _LibraryHost(own, show, own.on_event or silent))
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(_place_of(plan))
            if own.progress:
                note(f"Interrupted: {'; '.join(interrupt.__notes__)}.")
            raise


@typed_arguments
def train_together(
    model: Trained, data: object, runs: Sequence[Mapping[str, Any]], **arguments: Any
) -> list[TrainResult | Exception]:
    """Train several LoRAs at once over one model, which is held in memory once.

    Each result equals that of `train`, to rounding. Rates, ranks, seeds, algorithms, targets, optimizers, batch sizes,
    steps and data may differ; settings of the model and of memory are shared by all.

    Args:
        model, data: as for `train`.
        runs: the arguments of each run as for `train`, such as `{"rank": 8, "output": "runs/8"}`; `data` are samples of
            its own.
        **arguments: shared by all runs. No bars are shown.

    Returns:
        The result of each run, or the error that ended it; other runs continue.

    Raises:
        OptionError: as `train`, or the runs cannot train together.
        KeyboardInterrupt: they were interrupted; those with an output folder have saved.
    """
    if not runs:
        raise OptionError("runs must be a list of at least one run's arguments, got none; add one, such as {'rank': 8}")
    shared, _ = taken(TrainArguments, "train_together", arguments)
    stop = StopOfAll(shared.cancelled or (lambda: False))
    jobs, works = [], []
    trained, loaded = trainable_of(model), dict[int, EncodedDataset]()
    for own in runs:
        asked = {**arguments, "cancelled": stop.is_set, **own}
        samples = asked.pop("data", data)
        given, plan = _planned(trained, loaded.get(id(samples), samples), asked)
        loaded[id(samples)] = plan.data  # encoded once, and read once if they come from a generator
        check_captions(plan.job, plan.data)
        jobs.append(plan.job)
        works.append(partial(run, plan, _LibraryHost(given, given.on_event or _logged)))
    return train_jointly(jobs, works, each_round=stop.look)


_MOST_CAPTIONS = 1000  # of one sample
_LOGGER = logging.getLogger("lorasmith.runs")
_LOGGER.addHandler(logging.NullHandler())  # else Python prints what no program asked to see


class _LibraryHost(Host):
    """Passes events on; writes no files without an output."""

    runs = None

    def __init__(self, arguments: TrainArguments, *handlers: EventHandler) -> None:
        self._cancelled, self._handlers, self.mirror = arguments.cancelled, handlers, arguments.mirror

    def on_event(self, event: Event) -> None:
        for handler in self._handlers:
            handler(event)

    def cancelled(self) -> bool:
        return self._cancelled is not None and self._cancelled()


def _logged(event: Event) -> None:
    """Log the warnings of a run without a watcher, such as a preview that cannot be drawn."""
    if isinstance(event, RolledBack | Shrunk) or (isinstance(event, Warned) and not event.is_remark):
        _LOGGER.warning(event.message)


def _planned(model: object, data: object, arguments: Mapping[str, Any]) -> tuple[TrainArguments, Plan]:
    """The arguments of `train` that are not settings, and the plan of the run."""
    given, settings = taken(TrainArguments, "train", arguments)
    config = config_over(given.config, {**settings, "loss": given.loss})
    if given.mirror is not None and given.output is None:
        raise OptionError(f"mirror copies the folder of a run, got {given.mirror} without output; name a folder, too")
    device = chosen_device(given.device)
    trained = trainable_of(model)
    denoiser = trained.denoiser if isinstance(trained, TrainableDenoiser) else None

    def load(images: object) -> EncodedDataset:
        check_data(images)
        if denoiser is None:
            raise DataError(
                f"data for a Trainable must be samples, as nothing encodes pictures for it, got {described(images)}; "
                "make a lorasmith.Sample of each: its latents and what predict gets as conditioning"
            )
        return load_dataset(
            images,
            denoiser.base,
            trigger=given.trigger or "",
            controls="opposite" if config.consequences().are_pairs else "required",
            device=given.device,
            progress=given.progress,
        )

    samples = samples_of(data, load)
    own = {} if given.config is None else changed(given.config)
    spec = RunSpec(
        preset=given.preset, kind=given.kind, settings={**own, **settings, "trigger": given.trigger or samples.trigger}
    )
    name = "" if denoiser is None else model_name(denoiser.base.path, denoiser.base.family.name)
    captions = {sample.name: sample.conditioning.text or "" for sample in samples if not sample.is_class}
    spec, recipe = with_recipe(spec, [*captions.values()], model=name)
    chosen = {} if recipe is None else {name: recipe.settings[name] for name in recipe.of_training}
    job = plan_job(trained, replace(config, **chosen), device)
    if recipe is not None:
        job = replace(job, notes=(recipe.sentence, *job.notes))
    plan = Plan(
        denoiser=denoiser,
        job=job,
        data=samples,
        validation=None if given.validation is None else samples_of(given.validation, load),
        title=given.title,
        trigger=given.trigger,
        source={"command": "lorasmith.train", "images": samples.origin} if samples.origin else {},
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


@typed_arguments
def generate(
    model: AnyModel,
    prompts: str | Sequence[str],
    *,
    loras: LoraStrengths = (),
    strict: bool = False,
    text_encoder: TextEncoder | None = None,
    negative: str = "",
    controls: Controls = (),
    mask: Control | None = None,
    seed: int = Sampling.seed,
    steps: int | None = None,
    cfg: float | None = Sampling.cfg,
    sampler: str = Sampling.sampler,
    scheduler: str = Sampling.scheduler,
    width: int | None = Sampling.width,
    height: int | None = Sampling.height,
    dtype: torch.dtype | None = Sampling.dtype,
    device: str | torch.device | None = None,
    progress: bool | Callable[[int, int], None] | None = True,
    cancelled: Callable[[], bool] | None = None,
) -> list[Image.Image]:
    """Generate one picture per prompt, all from noise of the same seed.

    Args:
        model: the model, its denoiser with LoRAs applied, or a name, a path or a pipeline, which is loaded first.
        prompts: one or more prompts, `(word:1.2)` weights included.
        loras: LoRAs with their strengths, `{"dog.safetensors": 0.8}`, or a list of files or `Lora`s, at strength 1
            unless each is a pair with its own. They are applied to denoiser and text encoders.
        strict: whether a LoRA of which a part does not apply is refused; else a Python warning says so.
        text_encoder: text encoders with LoRAs applied; the model's if None.
        negative: negative prompt.
        controls: pictures that an edit model edits or refers to, or their paths, for all prompts.
        mask: a picture, or its path, for models that fill masks: white is painted, the rest is the control's.
        seed: of the noise.
        steps: sampling steps, from 1; those of the model if None: 20, and fewer of a distilled one.
        cfg: guidance scale; the model's own if None.
        sampler, scheduler: names as in ComfyUI's KSampler.
        width, height: in pixels, multiples of the model's; the size of the first control or else the model's resolution
            if None.
        dtype: of the denoiser's products; None for that of the weights on a GPU, and on a CPU for fp32, or bf16 where a
            large model is in 16 bits and the CPU has units for it. fp32 casts such weights in every pass.
        device: where to sample; the first GPU, or the CPU, if None.
        progress: True for a bar, False for none, or a function that is called with (steps done, total) of all prompts
            together.
        cancelled: called between evaluations of the network; True ends sampling.

    Returns:
        RGB pictures, one per prompt.

    Raises:
        OptionError: a size does not fit the model, a name is unknown, a strength is not finite, or the model needs a
            control or takes none.
        ImageError: a control or the mask cannot be read.
        ModelError: the model lacks a text encoder or an autoencoder.
        LoraError: a LoRA cannot be read, is for another model, or is refused.
        CancelledError: `cancelled` returned True.
    """
    if steps is not None and steps < 1:
        raise OptionError(f"steps must be at least 1, got {steps}")
    if dtype is not None and not dtype.is_floating_point:
        raise OptionError(f"dtype must be a format of floats, got {dtype}; choose torch.float32 or torch.bfloat16")
    denoiser = denoiser_of(model)
    encoder = text_encoder or denoiser.base.text_encoder
    denoiser, encoder = with_loras(denoiser, encoder, _pairs(loras), strict=strict)
    with counted("Sampling", progress) as shown:
        return sampling.generate(
            denoiser,
            prompts,
            text_encoder=encoder,
            negative=negative,
            controls=[
                control if isinstance(control, Image.Image) else open_image(Path(control))
                for control in _listed(controls)
            ],
            mask=mask if mask is None or isinstance(mask, Image.Image) else open_mask(Path(mask)),
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


@typed_arguments
def evaluate(
    model: AnyModel,
    loras: str | os.PathLike[str] | TrainResult | Sequence[str | os.PathLike[str] | TrainResult],
    *,
    trigger: str | None = None,
    images: str | os.PathLike[str] | None = None,
    prompts: Sequence[str] = (),
    class_word: str | None = None,
    most: int = DrawingSettings.most,
    seed: int = DrawingSettings.seed,
    noises: int = DrawingSettings.noises,
    clip: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    width: int | None = None,
    height: int | None = None,
    output: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    progress: bool | Callable[[int, int], None] | None = True,
    cancelled: Callable[[], bool] | None = None,
) -> Evaluation:
    """Say which LoRA of a run is good, as `lorasmith evaluate` does.

    Each LoRA draws the trigger alone, the trigger with additions, and prompts without it, all from the same noise.
    It is measured whether pictures look like the training pictures, and whether additions are followed. Needs the
    extra likeness.

    Args:
        model: the base model; a name, a path or a pipeline is loaded first.
        loras: folders of runs, LoRA files of any trainer, and results of `train` that have a folder; one, or a list.
        trigger: phrase for the subject; that of the run, or of the file's metadata, if None.
        images: folder of pictures of the subject to compare with; those of the run if None.
        prompts: what to ask for beside the trigger, such as `on a beach`, or prompts that have it, at least two; by
            default backgrounds, places, times of day and styles.
        class_word: what the subject is, such as `dog`; the trigger without its first word if None.
        most: LoRAs to draw, at least 1; of more, evenly spaced ones.
        seed: of the initial noise, at least 0.
        noises: from which the trigger and each wish are drawn, 1 to 16.
        clip: folder of a CLIP of transformers, which recognises what was asked for more surely.
        steps: sampling steps, at least 1; the model's if None.
        width, height: in pixels; the model's if None.
        output: folder of page, contact sheet and pictures, in which an earlier evaluation is replaced; `evaluation` in
            that of the first run, or `NAME-evaluation` for a file, if None.
        device: where to draw; the first GPU, or the CPU, if None.
        progress: True for a bar and notes, False for neither, or a function that is called with (sampling steps done,
            total).
        cancelled: called between evaluations of the network; True ends the drawing.

    Returns:
        The measures of each LoRA, the verdict and its sentence.

    Raises:
        OptionError: a folder holds no run or one without LoRAs, there is not exactly one trigger, a number is out of
            range, the model cannot draw from prompts alone, or the extra is missing.
        ModelError: the model cannot be loaded, or lacks a text encoder or an autoencoder.
        LoraError: a LoRA cannot be read, or is for another model.
        DataError: the images cannot be read.
        OutputError: `output` holds other files.
        CancelledError: `cancelled` returned True; an earlier evaluation stays.
    """
    drawing = DrawingSettings(
        prompts=tuple([prompts] if isinstance(prompts, str) else prompts),
        class_word=class_word,
        most=most,
        seed=seed,
        noises=noises,
        steps=steps,
        width=width,
        height=height,
    )
    check_installed()
    sources = [loras] if isinstance(loras, str | os.PathLike | TrainResult) else loras
    subject = subject_of(
        [_run_or_file(source) for source in sources],
        trigger=trigger,
        images=None if images is None else Path(images),
        most=most,
    )
    with counted("Drawing", progress) as shown:
        found = evaluated(
            model_of(model),
            subject,
            drawing,
            None if output is None else Path(output),
            clip=None if clip is None else Path(clip),
            device=chosen_device(device),
            progress=shown,
            cancelled=cancelled,
        )
    for sentence in found.notes if progress is True else ():
        note(sentence)
    return found


def _run_or_file(source: str | os.PathLike[str] | TrainResult) -> Path:
    if not isinstance(source, TrainResult):
        return Path(source)
    if source.folder is None:
        raise OptionError("a run that is evaluated must have a folder, got a result without one; give train an output")
    return source.folder


def _listed(controls: Controls) -> Sequence[Control]:
    return [controls] if isinstance(controls, str | os.PathLike | Image.Image) else controls


def _pairs(loras: LoraStrengths) -> list[tuple[_Lora, float]]:
    if isinstance(loras, Mapping):
        return list(loras.items())
    return [lora if isinstance(lora, tuple) else (lora, 1.0) for lora in loras]
