"""Train LoRA: ComfyUI's training node on this project's engine.

Inputs are declared once, in `TrainConfig`, and overridden by ComfyUI's defaults, so that a graph's learning rate keeps
its meaning: alpha 1, the down matrix starting at zero, every Linear and convolution trained, no clipping. With a CLIP
texts are encoded in training, for methods that compare prompts and for LoRAs on text encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorasmith.core.errors import CancelledError, DataError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.options import options_of
from lorasmith.core.printable import count_text, printable
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.forms import LatentFormat
from lorasmith.families.model import Denoiser, TextEncoder
from lorasmith.nodes.loaders import check_part_files
from lorasmith.nodes.outputs import save_lora
from lorasmith.nodes.values import (
    Latent,
    LossMap,
    check_latents,
    first_frames,
    flat_conditionings,
    flat_latents,
    for_model,
    one_for_each,
    single,
    with_frames,
)
from lorasmith.runs.run import Host, run
from lorasmith.runs.run_previews import PreviewFrames
from lorasmith.runs.view import ViewPublisher, note_of
from lorasmith.training.adapter_settings import NONE_LORA, lora_settings, unused_settings
from lorasmith.training.config import TrainConfig, settings_from_file
from lorasmith.training.events import Event, Outcome, Previewed, RunStarted, StepDone, Validated
from lorasmith.training.job import plan_job
from lorasmith.training.lora_handle import Lora
from lorasmith.training.methods.all_methods import texts_needed_by
from lorasmith.training.methods.method_settings import MethodSettings
from lorasmith.training.notes import OtherProgram, ReportNote
from lorasmith.training.results import TrainResult
from lorasmith.training.text_encoder_settings import TextEncoderSettings
from lorasmith.training.train import Plan
from lorasmith.training.trainable import TrainableDenoiser
from lorasmith.workflow import Input, NodeContext, Output, node, socket
from lorasmith.workflow.graph import Graph, GraphNode

_OPTIONS = options_of(TrainConfig)
_WITHOUT_CLIP = (
    "{} encodes texts in training, for which Train LoRA needs the text encoders; link the CLIP of the captions to "
    "clip, or leave it out"
)
_ALIKE = 1e-2  # part of the greatest value by which two encodings of a text may differ
_AUTO = "auto"  # choice of an option for the model's default
_TITLE = "lora"  # title of every LoRA that a graph trains; SaveLoRA sets the file name


def _setting(name: str, **overrides: Any) -> Input:
    return Input.from_option(_OPTIONS[name], **overrides)


def _own(name: str, **overrides: Any) -> Input:
    """A setting that ComfyUI's node does not have; most are advanced, as there are many."""
    return _setting(name, optional=True, **{"advanced": True, **overrides})


def _open(name: str, **overrides: Any) -> Input:
    """One whose default is decided later: editors have no empty value, so an empty text or 0 stands for it."""
    declared = _OPTIONS[name]
    if declared.type is str:
        empty: dict[str, Any] = {"default": "", "multiline": declared.is_prompt}
    else:
        empty = {"default": declared.type(0), "min": 0}
    tooltip = declared.help.replace("Default: ", "Empty: " if declared.type is str else "0: ")
    return _own(name, **{**empty, "tooltip": tooltip, **overrides})


_LORA_FILE: dict[str, Any] = {
    "type": "COMBO",
    "default": NONE_LORA,
    "options": lambda folders: [*folders.files("loras"), NONE_LORA],
    "file": lambda folders, name: None if name == NONE_LORA else folders.find("loras", name),
}

SETTINGS = (
    _setting("batch_size"),
    _setting("grad_accumulation_steps"),
    _setting("steps", default=16),
    _setting("learning_rate", default=5e-4, optional=False, tooltip="Learning rate, the same default for every model."),
    _setting("rank", default=8),
    _setting("optimizer"),
    _setting("loss_function"),
    _setting("seed"),
    _setting("training_dtype", default="bf16", options=("bf16", "fp32", "none")),
    _setting("lora_dtype"),
    _setting("quantized_backward", may_lack=True),
    _setting("algorithm"),
    _setting("gradient_checkpointing", default=True),
    _setting("checkpoint_depth", may_lack=True),
    _setting("offloading", may_lack=True),
    _setting("existing_lora", optional=False, **_LORA_FILE),
    _setting("bucket_mode", may_lack=True),
    _setting("bypass_mode", may_lack=True),
    _own("alpha", default=1.0),
    _own("targets", default="all"),
    _own("objective"),
    _own("timesteps", default=_AUTO, options=(_AUTO, *_OPTIONS["timesteps"].choices)),
    _own("max_grad_norm", default=0.0),
    _own("zero_init", default="down"),
    _own("quantization"),
    _own("activations"),
    _own("compile"),
    _own("schedule", default="constant"),
    _own("warmup_steps"),
    _own("ema_decay"),
    _own("validation_share", default=0.0, advanced=False),
    _open("patience"),
    _open(
        "previews",
        advanced=False,
        tooltip="Prompts of previews during training, one per line, drawn with and without the LoRA into the folder of "
        "the run. The model must be from a full checkpoint.",
    ),
    _open(
        "preview_every",
        tooltip="Steps between previews; 0 is after 30, a twentieth, a quarter, a half and three quarters of the run. "
        "The base model is drawn before the first step, and the finished LoRA always.",
    ),
    _own("private"),
    _own("training_adapter", **_LORA_FILE),
)

_PAIRS = ("pairs", "pair_focus", "dpo_beta")
_NOT_IN_GRAPHS = ("prior_target", "mask_prior_weight", "method", "method_args")
"""Methods for pictures of the class and for masks, which graphs have none of, and those of extensions."""

TLORA = ("tlora", "tlora_min_rank", "tlora_alpha")
_LEVERS = (
    *TLORA,
    *("loss_weighting", "min_snr_gamma", "huber_c", "huber_schedule", "huber_scale", "pyramid_noise"),
    *("input_perturbation", "post_hoc_ema", "early_stop"),
)

METHODS = (
    _own("training_guidance", default=0.0),  # that of the conditioning, as in ComfyUI
    *(
        _own(name) if _OPTIONS[name].default is not None else _open(name)
        for name in (*options_of(MethodSettings), *options_of(TextEncoderSettings), *_LEVERS)
        if name not in (*_NOT_IN_GRAPHS, *_PAIRS)
    ),
)
"""Settings of methods, of text encoders in training, of losses, of ranks by noise level, and of an early end."""

_OPEN = tuple(
    setting.name
    for setting in (*SETTINGS, *METHODS[1:])
    if setting.default in ("", 0) and _OPTIONS[setting.name].default is None
)


def _check_files(graph: Graph, member: GraphNode, folders: Folders) -> None:
    links = dict(member.links())
    names = (member.inputs[name] for name in lora_settings())
    check_part_files(
        graph,
        folders,
        model=links["model"],
        conditioning=links["positive"],
        latents=links["latents"],
        loras=[folders.find("loras", name) for name in names if isinstance(name, str) and name != NONE_LORA],
    )


@node(
    "TrainLoraNode",
    "Train LoRA",
    "model/training",
    inputs=[
        *SETTINGS,
        Input(
            "fresh",
            "BOOLEAN",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Start from scratch instead of resuming a cancelled run.",
        ),
        # New ones are last, as saved workflows have their values by position.
        _own("exact_dtype"),
        _own(
            "pairs",
            tooltip="Train on the pairs of Make Training Pairs: its images, and its controls as their opposites, which "
            "the model is not given. slider makes the LoRA's strength the amount of what differs, dpo has the model "
            "prefer images to opposites.",
        ),
        _own("pair_focus"),
        _own("dpo_beta"),
        *METHODS,
        Input(
            "trigger",
            "STRING",
            default="",
            optional=True,
            advanced=True,
            tooltip="What stands for the subject in the captions, in place of which preserve class has the class.",
        ),
        _own("products"),
        _own("attention"),
        _own("cuda_graphs"),
        _own("autotune", default=False),
    ],
    outputs=[Output("LORA_MODEL", "lora"), Output("LOSS_MAP", "loss_map"), Output("INT", "steps")],
    search_aliases=["LorasmithTrainLora", "LorasmithLoraSettings", "LorasmithResumeLora"],  # in ComfyUI
    is_input_list=True,
    check=_check_files,
)
def train_lora(
    context: NodeContext,
    *,
    model: list[Denoiser] = socket("MODEL", tooltip="The model to train on; LoRAs applied to it are not trained."),
    latents: list[Latent] = socket("LATENT", tooltip="The images, as a batch or as a list of batches of any sizes."),
    positive: list[list[Conditioning]] = socket(
        "CONDITIONING", tooltip="One caption per image, combined or as a list, or one for all."
    ),
    clip: list[TextEncoder] | None = socket(
        "CLIP",
        optional=True,
        tooltip="The text encoders of the captions, for preserve, sliders, guidance_loss and train_text_encoder.",
    ),
    **settings: Sequence[Any],
) -> tuple[Lora, LossMap, int]:
    """Train a LoRA on images and their captions.

    The run is recorded in a folder in `output/runs`, where the LoRA is saved however the run ends.
    """
    denoiser = single(context, "model", model)
    encoder = single(context, "clip", clip) if clip else None
    values = {name: single(context, name, entries) for name, entries in settings.items()}
    fresh, trigger = values.pop("fresh", False), values.pop("trigger", "")
    config = settings_of(values, context.folders.find)
    if encoder is None and config.text_setting is not None:
        raise OptionError(_WITHOUT_CLIP.format(config.text_setting))
    if encoder is not None:
        denoiser = denoiser.with_text_encoder(encoder)
    data = replace(_dataset(denoiser, latents, positive, are_pairs=config.consequences().are_pairs), trigger=trigger)
    if limited := sum(sample.conditioning.span != (0.0, 1.0) for sample in data.samples):
        context.warn(
            f"{limited} of {len(data)} captions are for a part of sampling (ConditioningSetTimestepRange), but "
            "training uses each at every noise level"
        )
    job = plan_job(TrainableDenoiser(denoiser, encoder), config, folders=context.folders)
    if (needing := texts_needed_by(job.config)) is not None:
        if encoder is None:
            raise OptionError(_WITHOUT_CLIP.format(needing))
        data = replace(data, captions=_texts(data, encoder, needing))
    elif encoder is not None:
        context.log("clip has no effect: no setting of this run encodes texts.")
    # A graph's LoRA is for ComfyUI; the report and `lorasmith inspect` have what other programs make of it.
    job = replace(job, notes=tuple(ReportNote(note) if isinstance(note, OtherProgram) else note for note in job.notes))
    plan = Plan(
        denoiser=denoiser,
        job=job,
        data=data,
        title=_TITLE,
        trigger=trigger or None,
        source={"command": "run", "prompt": context.prompt},
        fresh=fresh,
    )
    result = run(plan, _NodeHost(context, config.steps))
    if result.reason is Outcome.CANCELLED:
        raise CancelledError(_keep_cancelled(context, result))
    return result.lora, {"loss": result.losses}, result.steps


def settings_of(values: Mapping[str, Any], find: Callable[[str, str], Path]) -> TrainConfig:
    """The configuration from the node's inputs; missing inputs have the node's defaults.

    `find` finds a file of one of ComfyUI's folders, which is the first argument, by its name there.
    """
    defaults = {setting.name: setting.default for setting in (*SETTINGS, *METHODS)}
    chosen = {"autotune": False} | defaults | dict(values)  # a graph's steps are computed as it says
    for name in unused_settings(chosen["algorithm"]):
        if chosen[name] == defaults[name]:  # a default needs no note that it has no effect
            del chosen[name]
    for name in lora_settings():
        if chosen[name] != NONE_LORA:
            chosen[name] = str(find("loras", chosen[name]))
    if chosen["timesteps"] == _AUTO:
        chosen["timesteps"] = None
    for name in _OPEN:
        chosen[name] = chosen[name] or None
    return settings_from_file(chosen)


def _dataset(
    denoiser: Denoiser,
    latents: Sequence[Latent],
    positive: Sequence[Sequence[Conditioning]],
    *,
    are_pairs: bool = False,
) -> EncodedDataset:
    """The samples, in order, scaled for the denoiser; of pairs, the control of each is its opposite.

    Raises DataError if counts or shapes do not fit.
    """
    form = denoiser.base.components.latent
    for batch in latents:
        check_latents(with_frames(batch["samples"], form), form)
    images = [with_frames(image, form) for image in flat_latents(latents)]
    captions = one_for_each(flat_conditionings(positive), len(images), name="positive", of="conditioning")
    opposites: list[Tensor | None] = [None] * len(images)
    if are_pairs:
        opposites = [_opposite(caption, form) for caption in captions]
        captions = [caption.with_controls([]) for caption in captions]
    firsts: list[Tensor | None] = []
    for batch in latents:
        first_frames_of = first_frames(batch, denoiser.base)
        firsts += [None] * len(batch["samples"]) if first_frames_of is None else first_frames_of.split(1)
    return EncodedDataset(
        tuple(
            Sample(
                form.to_model(image.float().cpu())[0],
                for_model(caption, denoiser.base, image, first),
                f"image {number}",
                opposite=opposite,
            )
            for number, (image, caption, first, opposite) in enumerate(
                zip(images, captions, firsts, opposites, strict=True), start=1
            )
        )
    )


def _opposite(caption: Conditioning, form: LatentFormat) -> Tensor:
    """The latents of the control of a pair, scaled for the denoiser."""
    if len(caption.controls) != 1:
        raise DataError(
            f"pairs are of two pictures, but a caption has {count_text(len(caption.controls), 'control')}; make them "
            "with Make Training Pairs"
        )
    latents = with_frames(caption.controls[0], form)
    check_latents(latents, form)
    return form.to_model(latents.float().cpu())[0]


def _texts(data: EncodedDataset, encoder: TextEncoder, setting: str) -> EncodedCaptions:
    """What encodes the texts of `setting`. Raises DataError for captions that it cannot encode again."""
    for sample in data.samples:
        if sample.conditioning.text is None:
            raise DataError(
                f"{setting} needs the caption of each image as text, and that of {sample.name} is unknown; encode "
                "captions with CLIP Text Encode (Prompt) or Make Training Dataset"
            )
    captions = EncodedCaptions(
        encoder.encode,
        ready=encoder.active,
        encoder_bytes=sum(
            parameter.nbytes for module in encoder.encoders.modules.values() for parameter in module.parameters()
        ),
    )
    first = data.samples[0].conditioning
    text = first.text or ""
    captions.encode_ahead([text])
    for name, tensor in captions[text].tensors.items():
        tensor_of = first.tensors[name].to(tensor)
        if tensor_of.shape != tensor.shape or (tensor_of - tensor).abs().max() > _ALIKE * tensor.abs().max():
            raise DataError(
                f"{setting} needs captions that clip encodes as they are, and it makes another conditioning of "
                f"{printable(text, limit=60)!r}; link one CLIP to the captions and to Train LoRA, and encode them with "
                "CLIP Text Encode (Prompt) or Make Training Dataset"
            )
    return captions


def beginning(event: RunStarted) -> str:
    """What is said as a training starts."""
    return (
        f"Training {count_text(event.parameters, 'parameter')} in {count_text(event.adapters, 'layer')} on "
        f"{count_text(event.samples, 'image')} for {count_text(event.steps, 'step')}, on {event.device} in "
        f"{event.dtype}; the run folder is {event.folder}."
    )


class _NodeHost(Host):
    """Shows training events in a node's progress, log and warnings, and publishes their view."""

    numbering = "_{:05}"

    def __init__(self, context: NodeContext, steps: int) -> None:
        self.runs = context.folders.output / "runs"
        self._context, self._steps = context, steps
        self._frames, self._publisher = PreviewFrames(), ViewPublisher(lambda view: context.publish("view", view))

    def cancelled(self) -> bool:
        return self._context.cancelled()

    def on_event(self, event: Event) -> None:
        context = self._context
        self._publisher(event)
        match event:
            case StepDone():
                context.progress(event.step, self._steps, text=self._publisher.view.line)
            case Previewed():
                picture = self._frames(event)
                context.progress(event.step, self._steps, text=f"preview at step {event.step}", preview=picture)
            case Validated():
                context.log(f"Step {event.step}: {event.verdict}")
            case RunStarted():
                context.log(beginning(event))
        if (note := note_of(event)) is not None and note.kind != "Remark":
            (context.warn if note.is_warning else context.log)(note.text)


def _keep_cancelled(context: NodeContext, result: TrainResult) -> str:
    """Save the LoRA of a cancelled run in the LoRA folder; returns the message for the user."""
    if not result.losses:
        return "training was cancelled before its first step"
    assert result.folder is not None
    path = save_lora(context, result.lora, f"loras/{result.folder.name}_cancelled", result.steps)
    message = (
        f"training was cancelled after {count_text(len(result.losses), 'step')}; the LoRA is at {path}, and running "
        "the workflow again resumes the run"
    )
    context.log(message)
    return message
