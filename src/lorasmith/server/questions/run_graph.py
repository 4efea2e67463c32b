"""The graph equivalent to a run: that of the run itself, or one made from a run on a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasmith.app.run_spec import SETTINGS, RunSpec
from lorasmith.core.errors import ModelError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.options import changed, options_of
from lorasmith.data.crops import pixel_step
from lorasmith.families import known  # noqa: F401  (registers the families)
from lorasmith.families.base import FAMILIES
from lorasmith.families.locating import built_in_models
from lorasmith.families.structure import load_structure
from lorasmith.nodes import load_nodes
from lorasmith.training.config import NONE_LORA, TrainConfig, lora_settings
from lorasmith.training.runs.records import RunRecord

Graph = dict[str, dict[str, Any]]

_TRAIN = "TrainLoraNode"
_ENCODER_LOADERS = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader", 4: "QuadrupleCLIPLoader"}
_FOLLOWED = ("trigger", "resolution")  # data settings that the graph can represent


def graph_of_run(record: RunRecord, folders: Folders) -> tuple[Graph, list[str]]:
    """A graph in API format, and its differences from the run, one sentence each. Raises OptionError if the run was
    made by a script, or its images or model are outside the input and model folders.
    """
    prompt = record.source.get("prompt")
    if record.source.get("command") == "run" and isinstance(prompt, dict):
        return prompt, []
    try:
        spec = RunSpec.from_record(record.source, record.asked)
    except ValueError as error:
        raise OptionError(
            f"only runs on folders and of graphs can be made a graph ({error}); use its command"
        ) from error
    notes: list[str] = []
    loaders, model, clip, vae = _loaders(spec, record, folders)
    images = _images(spec, folders, notes)
    defaults = load_structure(spec.model).defaults
    side, step = spec.data.all_resolutions(defaults.resolution)[0], pixel_step(spec.data, defaults.pixel_multiple)
    graph: Graph = {
        **loaders,
        "10": _node("LoadImageTextDataSetFromFolder", "Images and texts", folder=images),
        "11": _node(
            "ImageScaleToTotalPixels",
            "Scale the images",
            image=["10", 0],
            upscale_method="lanczos",
            megapixels=max(0.01, round(side**2 / 2**20, 4)),
            resolution_steps=step,
        ),
    }
    notes.append("Pictures are scaled to whole sizes without a crop, so that they may differ by some pixels.")
    texts: list[Any] = ["10", 1]
    if spec.data.trigger:
        graph["12"] = _node("AddTextPrefix", "Trigger", texts=texts, prefix=f"{spec.data.trigger}, ")
        texts = ["12", 0]
        notes.append("The trigger is put in front of all captions, also of those that have it.")
    graph["13"] = _node("MakeTrainingDataset", "Encode", images=["11", 0], vae=vae, clip=clip, texts=texts)
    graph["14"] = _node("ResolutionBucket", "Buckets of one size", latents=["13", 0], conditioning=["13", 1])
    graph["20"] = _node(
        _TRAIN, "Train LoRA", model=model, latents=["14", 0], positive=["14", 1], **_settings(record, folders, notes)
    )
    graph["21"] = _node("SaveLoRA", "Save the LoRA", lora=["20", 0], prefix=f"loras/{record.title}", steps=["20", 2])
    graph["22"] = _node("LossGraphNode", "Plot the loss", loss=["20", 1], filename_prefix=f"{record.title}_loss")
    return graph, notes


def _node(class_type: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}


def _loaders(spec: RunSpec, record: RunRecord, folders: Folders) -> tuple[Graph, list[Any], list[Any], list[Any]]:
    """The nodes that load the model, and links to its denoiser, text encoders and autoencoder."""
    path = built_in_models().get(spec.model, Path(spec.model))
    checkpoint, denoiser = _name(folders, "checkpoints", path), _name(folders, "diffusion_models", path)
    if checkpoint is not None:
        graph = {"1": _node("CheckpointLoaderSimple", "Checkpoint", ckpt_name=checkpoint)}
    elif denoiser is not None:
        graph = {"1": _node("UNETLoader", "Denoiser", unet_name=denoiser, weight_dtype="default")}
    else:
        raise OptionError(
            f"a graph finds models in the model folders alone, got {path.name}; put it into "
            f"{folders.roots('checkpoints')[0]}"
        )
    clip, vae = ["1", 1], ["1", 2]
    if spec.text_encoders:
        graph["2"], clip = _encoders(spec.text_encoders, record.model.family, folders), ["2", 0]
    if spec.vae:
        graph["3"], vae = _node("VAELoader", "Autoencoder", vae_name=_required(folders, "vae", spec.vae)), ["3", 0]
    return graph, ["1", 0], clip, vae


def _encoders(files: Sequence[str], family: str, folders: Folders) -> dict[str, Any]:
    names = [_required(folders, "text_encoders", one) for one in files]
    types = FAMILIES[family].clip_types if family in FAMILIES else ()
    kind = {"type": types[0] if types else "stable_diffusion"} if len(names) < 3 else {}
    inputs = {"clip_name": names[0]} if len(names) == 1 else {f"clip_name{i}": one for i, one in enumerate(names, 1)}
    return _node(_ENCODER_LOADERS[min(len(names), 4)], "Text encoders", **inputs, **kind)


def _required(folders: Folders, kind: str, path: str) -> str:
    name = _name(folders, kind, Path(path))
    if name is None:
        raise OptionError(
            f"a graph finds {Path(path).name} in models/{kind} alone, got {path}; put it into {folders.roots(kind)[0]}"
        )
    return name


def _name(folders: Folders, kind: str, path: Path) -> str | None:
    """The name of a file for a node that loads `kind`; None if it is outside its folders."""
    for root in folders.roots(kind):
        for given, within in ((path, root), (path.resolve(), root.resolve())):
            if given.is_relative_to(within):
                name = given.relative_to(within).as_posix()
                try:
                    if folders.find(kind, name).resolve() == path.resolve():
                        return name
                except ModelError:
                    continue
    return None


def _images(spec: RunSpec, folders: Folders, notes: list[str]) -> str:
    """The name of the images' folder below the input folder."""
    path = Path(spec.folder).resolve()
    for name in folders.input_folders():
        if folders.find_input_folder(name).resolve() == path:
            if len(spec.sources) > 1:
                notes.append(f"It trains on {name} alone, the first of {len(spec.sources)} folders.")
            others = [
                one.replace("_", " ")
                for one in changed(spec.data)
                if one not in _FOLLOWED and SETTINGS[one].changes_numbers
            ]
            if others:
                notes.append(f"Nodes have no {', '.join(others)}.")
            return name
    raise OptionError(
        f"a graph finds images in the input folder alone, got {spec.folder}; copy them into {folders.place('input')}"
    )


def _settings(record: RunRecord, folders: Folders, notes: list[str]) -> dict[str, Any]:
    """Inputs of Train LoRA, all explicit, as the node's defaults differ from the run's."""
    declared, options = load_nodes()[_TRAIN].slots, options_of(TrainConfig)
    inputs: dict[str, Any] = {}
    for name, slot in declared.items():
        if name not in options or (slot.default is None and name not in record.config):
            continue
        value = record.config.get(name, options[name].default)
        if name in lora_settings():
            value = NONE_LORA if not value else _lora(folders, str(value))
        elif name == "validation_share" and value is None:
            value = 0.1 if record.data.get("held_out") else 0.0
        elif name in ("previews", "preview_every") and not value:
            value = "" if name == "previews" else 0
        inputs[name] = slot.default if value is None else value
    lost = [
        name.replace("_", " ")
        for name, value in record.config.items()
        if name in options and name not in inputs and options[name].changes_numbers and value != options[name].default
    ]
    if lost:
        notes.append(f"Train LoRA has no input for {', '.join(lost)}, which the run had set.")
    return inputs


def _lora(folders: Folders, path: str) -> str:
    name = _name(folders, "loras", Path(path))
    if name is None:
        raise OptionError(
            f"a graph finds LoRAs in models/loras alone, got {path}; put it into {folders.roots('loras')[0]}"
        )
    return name
