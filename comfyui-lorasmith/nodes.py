"""The nodes, in ComfyUI's first form of them, which each of its versions has."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import torch
from PIL import Image
from torch import Tensor

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.core.options import options_of
from lorasmith.core.printable import count_text
from lorasmith.formats.lora_file import lora_tensors
from lorasmith.nodes.training import METHODS, SETTINGS, TLORA, beginning
from lorasmith.runs.run import Host, run
from lorasmith.runs.run_previews import PreviewFrames, RunPreviews
from lorasmith.runs.view import ViewPublisher, note_of
from lorasmith.training.adapter_settings import NONE_LORA, lora_settings
from lorasmith.training.config import TrainConfig, settings_from_file
from lorasmith.training.events import Event, Outcome, Previewed, RunStarted, StepDone, Validated
from lorasmith.training.job import plan_job
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.records import RunRecord, read_record
from lorasmith.training.text_encoder_settings import TextEncoderSettings
from lorasmith.training.train import Plan
from lorasmith.workflow import Input

from .comfy_model import ComfyModel
from .comparison import CompareTrainers
from .inputs import CATEGORY, NODE, SETTINGS_TYPE, TEXTS, TRAINED, Texts, config_of, show_text, widget
from .lora_nodes import CheckLora, LoraTensors, SaveLora, ValidateLora
from .previews import PREVIEWS_TYPE, Previews, PreviewsNode, run_previews

_SWAPPED = 18
"""Inputs of ComfyUI's own Train LoRA after its sockets, with which `SETTINGS` begins."""

_NOT_HERE = (
    *("previews", "preview_every", "quantization", "compile", "training_adapter"),
    *("training_guidance", "guidance_loss", "guidance_loss_schedule", *options_of(TextEncoderSettings)),
    *("tread_rate", "tread_first", "tread_last"),
    *TLORA,
)
"""Settings that a MODEL does not follow: ComfyUI holds its weights and text encoders, draws its pictures with all
ranks, has its guidance in the conditioning, and networks of its own, of which it is not known where tokens are."""

_log = logging.getLogger("lorasmith")


class LoraSettings:
    """Everything else that a training may be told."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Further settings of Train LoRA (Lorasmith). Each is as if it were not there until it is changed."
    RETURN_TYPES = (SETTINGS_TYPE,)
    RETURN_NAMES = ("settings",)
    OUTPUT_TOOLTIPS = ("For settings of Train LoRA (Lorasmith).",)
    FUNCTION = "settings"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {one.name: widget(one, advanced=False) for one in further_settings()}}

    def settings(self, **values: Any) -> tuple[dict[str, Any]]:
        return (values,)


class TrainLora:
    """ComfyUI's Train LoRA, on Lorasmith's engine; with the same inputs in the same order."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Trains a LoRA on the loaded model, with the inputs of ComfyUI's own node. The run is recorded in a folder in "
        "output/runs; interrupted, it keeps what was learnt, and the same inputs again continue it."
    )
    RETURN_TYPES = ("LORA_MODEL", "LOSS_MAP", "INT")
    RETURN_NAMES = ("lora", "loss_map", "steps")
    OUTPUT_TOOLTIPS = (
        "The LoRA, as ComfyUI's trainer gives it: for Load LoRA Model, Save LoRA Weights and the nodes of this pack.",
        "The loss of each step, for Plot Loss Graph.",
        "Steps trained, those of existing_lora included.",
    )
    FUNCTION = "train"
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        loras = [*folder_paths.get_filename_list("loras"), NONE_LORA]
        others: dict[str, dict[str, Any]] = {
            "gradient_checkpointing": {
                "tooltip": "Recompute what does not fit into memory, and no more. LoRA Settings can say how."
            }
        }
        widgets = {one.name: widget(one, **others.get(one.name, {})) for one in SETTINGS[:_SWAPPED]}
        widgets["existing_lora"] = (loras, widgets["existing_lora"][1])
        return {
            "required": {**TRAINED, **widgets},
            "optional": {"settings": (SETTINGS_TYPE, {"tooltip": "Of LoRA Settings."}), **_DRAWN, **TEXTS},
            "hidden": _HIDDEN,
        }

    def train(
        self,
        model: Sequence[Any],
        latents: Sequence[Mapping[str, Tensor]],
        positive: Sequence[Sequence[Any]],
        settings: Sequence[Mapping[str, Any]] = (),
        previews: Sequence[Previews] = (),
        clip: Sequence[Any] = (),
        captions: Sequence[str] = (),
        trigger: Sequence[str] = (),
        prompt: Sequence[Any] = (),
        unique_id: Sequence[str] = (),
        **values: Sequence[Any],
    ) -> Any:
        with torch.inference_mode(False):
            trained = ComfyModel(model[0])
            given = {name: value[0] for name, value in values.items()}
            config = config_of(given, settings, trained)
            host = NodeHost(trained, config.steps, _first(unique_id), _first(previews))
            texts = Texts(_first(clip), captions, _first(trigger) or "")
            return _trained(host, config, latents, positive, texts, prompt=_first(prompt))


class ResumeLora:
    """Goes on with a run."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Continues a run in output/runs with its own settings, from its last state: one that was interrupted to its "
        "end, or a finished one to more steps. Model, images and captions must be those of the run."
    )
    RETURN_TYPES, RETURN_NAMES = TrainLora.RETURN_TYPES, TrainLora.RETURN_NAMES
    OUTPUT_TOOLTIPS = TrainLora.OUTPUT_TOOLTIPS
    FUNCTION = "resume"
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        steps = "All steps of the run, more than it has if it is finished; 0 is as many as it has."
        return {
            "required": {
                **TRAINED,
                "run": (_runs(), {"tooltip": "A folder in output/runs."}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 10**6, "tooltip": steps}),
            },
            "optional": {**_DRAWN, **TEXTS},
            "hidden": _HIDDEN,
        }

    def resume(
        self,
        model: Sequence[Any],
        latents: Sequence[Mapping[str, Tensor]],
        positive: Sequence[Sequence[Any]],
        run: Sequence[str],
        steps: Sequence[int],
        previews: Sequence[Previews] = (),
        clip: Sequence[Any] = (),
        captions: Sequence[str] = (),
        trigger: Sequence[str] = (),
        prompt: Sequence[Any] = (),
        unique_id: Sequence[str] = (),
    ) -> Any:
        with torch.inference_mode(False):
            if run[0] not in _runs():  # which a link may be, beside the list's names
                raise OptionError(f"run must be the name of a folder in output/runs, got {run[0]!r}; choose one")
            folder = _runs_folder() / run[0]
            record = read_record(folder)
            config = recorded_settings(record, steps[0])
            host = NodeHost(ComfyModel(model[0]), config.steps, _first(unique_id), _first(previews))
            texts = Texts(_first(clip), captions, _first(trigger) or "")
            try:
                return _trained(
                    host, config, latents, positive, texts, title=record.title, output=folder, prompt=_first(prompt)
                )
            except OutputError as error:
                raise OutputError(_without_options(str(error))) from error


def _without_options(message: str) -> str:
    """A message about a folder that holds another run or a finished one, with remedies that a node has."""
    differs, *another = message.split("; undo that")
    if another:
        return f"{differs}; undo that, or train a new run with Train LoRA"
    complete, *steps = message.split("; give more steps")
    return f"{complete}; give more steps, to train on from its end" if steps else message


_DRAWN = {"previews": (PREVIEWS_TYPE, {"tooltip": "Of Previews: pictures while it trains."})}
_HIDDEN = {"prompt": "PROMPT", **NODE}


def _trained(
    host: NodeHost,
    config: TrainConfig,
    latents: Sequence[Mapping[str, Tensor]],
    positive: Sequence[Sequence[Any]],
    texts: Texts,
    *,
    title: str = "lora",
    output: Path | None = None,
    prompt: Any,
) -> Any:
    """Train, and give the node's outputs."""
    model, previews = host.model, host.previews
    if previews is not None:
        config = replace(config, preview_every=previews.every)
    job = plan_job(model, config, model.device)
    plan = Plan(
        job=job,
        data=texts.dataset(job.config, model, latents, positive),
        title=title,
        trigger=texts.trigger or None,
        output=output,
        source={"command": "ComfyUI", "prompt": prompt},
    )
    result = run(plan, host)
    if result.reason is Outcome.CANCELLED:
        _log.info(_kept(result))
        raise management.InterruptProcessingException
    outputs = _tensors_of(result.lora), {"loss": result.losses}, result.steps
    return outputs if previews is None else {"ui": {"images": _sheets(result)}, "result": outputs}


def _sheets(result: TrainResult) -> list[dict[str, str]]:
    """The sheets of a run's previews, as ComfyUI names files."""
    if result.folder is None:
        return []
    found = (result.folder / "samples" / name for name in ("steps.png", "strengths.png"))
    place = (result.folder / "samples").resolve().relative_to(Path(folder_paths.get_output_directory()).resolve())
    return [{"filename": one.name, "subfolder": place.as_posix(), "type": "output"} for one in found if one.is_file()]


def _first(values: Sequence[Any]) -> Any:
    return values[0] if values else None


def _runs_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "runs"


def _runs() -> list[str]:
    """Names of runs, the newest first."""
    found = [path.parent for path in _runs_folder().glob("*/run.json")]
    return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def recorded_settings(record: RunRecord, steps: int) -> TrainConfig:
    """The settings of a run that this pack recorded, for `steps` in all. Raises OptionError for another run."""
    if record.source.get("command") != "ComfyUI":
        raise OptionError(
            f"a run to resume here must be one of Train LoRA (Lorasmith), and {record.title} was trained elsewhere; "
            "continue it there, or train with its LoRA as existing_lora"
        )
    values = {**record.asked, "existing_state": None}
    for name in lora_settings():  # a record may be a stranger's
        file = values.get(name)
        places = map(Path, folder_paths.get_folder_paths("loras"))
        if isinstance(file, str) and not any(Path(file).resolve().is_relative_to(one.resolve()) for one in places):
            raise OptionError(
                f"{name} of a run to resume must be in ComfyUI's folders of LoRAs, got {file}; move it there, and "
                "train with it anew"
            )
    return settings_from_file({**values, "steps": steps or values["steps"]})


def _tensors_of(lora: Lora) -> LoraTensors:
    return LoraTensors(lora_tensors(lora.state, lora.names, layout="comfy", dtype=lora.dtype), lora.metadata)


def further_settings() -> list[Input]:
    """The inputs of LoRA Settings."""
    return [one for one in (*SETTINGS[_SWAPPED:], *METHODS) if one.name not in _NOT_HERE]


@dataclass
class NodeHost(Host):
    """Shows a training on the node that runs it, in ComfyUI's progress bar and log."""

    model: ComfyModel
    steps: int
    node: str | None
    previews: Previews | None = None

    numbering = "_{:05}"

    def __post_init__(self) -> None:
        self.runs = _runs_folder()
        self._bar = comfy.utils.ProgressBar(self.steps)
        self._frames, self._publisher = PreviewFrames(), ViewPublisher(lambda view: None)

    def begin(self, plan: Plan, folder: Path) -> RunPreviews | None:
        return None if self.previews is None else run_previews(self.model, self.previews, plan, folder, self)

    def cancelled(self) -> bool:
        if management.processing_interrupted():
            management.interrupt_current_processing(False)
            self.model.interrupted = True
        return self.model.interrupted

    def on_event(self, event: Event) -> None:
        self._publisher(event)
        match event:
            case StepDone():
                self._bar.update_absolute(event.step, self.steps)
                show_text(self._publisher.view.line, self.node)
            case Previewed() if (picture := self._frames(event)) is not None:
                shown = ("JPEG", Image.open(io.BytesIO(picture)), None)
                self._bar.update_absolute(event.step, self.steps, shown)
            case Validated():
                _log.info("Step %s: %s", event.step, event.verdict)
            case RunStarted():
                _log.info(beginning(event))
        if (note := note_of(event)) is not None and note.kind != "Remark":
            (_log.warning if note.is_warning else _log.info)(note.text)


def _kept(result: TrainResult) -> str:
    if not result.losses:
        return "Training was interrupted before its first step."
    return (
        f"Training was interrupted after {count_text(len(result.losses), 'step')}; the LoRA is at {result.path}, and "
        "the same inputs again continue the run."
    )


NODE_CLASS_MAPPINGS = {
    "LorasmithTrainLora": TrainLora,
    "LorasmithLoraSettings": LoraSettings,
    "LorasmithPreviews": PreviewsNode,
    "LorasmithResumeLora": ResumeLora,
    "LorasmithValidateLora": ValidateLora,
    "LorasmithSaveLora": SaveLora,
    "LorasmithCheckLora": CheckLora,
    "LorasmithCompareTrainers": CompareTrainers,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LorasmithTrainLora": "Train LoRA (Lorasmith)",
    "LorasmithLoraSettings": "LoRA Settings (Lorasmith)",
    "LorasmithPreviews": "Previews (Lorasmith)",
    "LorasmithResumeLora": "Resume LoRA Training (Lorasmith)",
    "LorasmithValidateLora": "Validate LoRA (Lorasmith)",
    "LorasmithSaveLora": "Save LoRA, portable (Lorasmith)",
    "LorasmithCheckLora": "Check LoRA (Lorasmith)",
    "LorasmithCompareTrainers": "Compare Trainers (Lorasmith)",
}
