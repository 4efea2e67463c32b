"""What is made of a run: an installed LoRA, a longer run, pictures drawn with it, and the equivalent graph.

That graph is the run's own, or one made from a run on a folder of images.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from lorasmith.core.errors import DataError, ModelError, OptionError, OutputError, TrainingError
from lorasmith.core.files import atomic_path, ensure_folder, write_atomic
from lorasmith.core.folders import TRIED, Folders, safe_name
from lorasmith.core.options import changed, options_of
from lorasmith.data.crops import pixel_step
from lorasmith.data.image_files import ImageError, open_reduced
from lorasmith.families.base import FAMILIES
from lorasmith.families.loading import load_structure
from lorasmith.families.locating import BUILT_IN, named_path
from lorasmith.families.model import Model
from lorasmith.nodes import load_nodes
from lorasmith.runs.evaluate import STRENGTHS
from lorasmith.runs.recorded_run import Typed, repeated, rights_needed
from lorasmith.runs.run_images import images_in
from lorasmith.runs.run_log import followed
from lorasmith.runs.run_page import is_own, lora_of_run
from lorasmith.runs.spec import SETTINGS, RunSpec
from lorasmith.server.datasets.dataset_answers import CONTROL
from lorasmith.server.datasets.dataset_folders import UnknownFileError, is_name, stays_in
from lorasmith.server.jobs.plan_answers import structure_of
from lorasmith.server.questions import question, shaped
from lorasmith.server.runs.run_answers import digest_of, is_trainable_on, saves_of
from lorasmith.server.runs.run_list_answers import run_folder_of
from lorasmith.server.runs.run_shapes import DrawingBody, DrawingFacts, InstalledLora, KeptControl, RequestAnswer
from lorasmith.server.server_disk import disk_space
from lorasmith.training.adapter_settings import NONE_LORA, lora_settings
from lorasmith.training.config import TrainConfig
from lorasmith.training.methods.method_settings import MethodSettings
from lorasmith.training.run_requests import DrawRequest, request
from lorasmith.training.storage.records import RECORD, RunRecord, read_record
from lorasmith.training.storage.run_folder import RunFolder

_INSTALLING = threading.Lock()  # held while a free name is found and used


@question
def install_run(folders: Folders, id: str, *, step: int | None = None, name: str = "") -> InstalledLora:
    """Copy a LoRA of a run, saved at `step` (None: the final one), into `models/loras`, where other programs find it;
    existing files are not replaced. Raises UnknownFileError, OptionError if there is no such LoRA, and OutputError.
    """
    folder = run_folder_of(folders, id)
    lora = _lora_at(folder, read_record(folder), step)
    target = folders.base / "models" / "loras"
    stem = safe_name(name.strip().removesuffix(".safetensors") or lora.stem)
    with _INSTALLING:
        taken = {file.name.casefold(): file for file in ensure_folder(target).iterdir()}
        for number in range(1, 10_000):
            copy = target / f"{stem if number == 1 else f'{stem}-{number}'}.safetensors"
            if (there := taken.get(copy.name.casefold())) is None:
                break
            copy = there
            if copy.stat().st_size == lora.stat().st_size and digest_of(copy) == digest_of(lora):
                return InstalledLora(installed=copy.name, was_there=True)
        _copy(lora, copy)
    picture = lora.with_suffix(".png")
    if is_own(picture, folder) and not copy.with_suffix(".png").exists():
        _copy(picture, copy.with_suffix(".png"))
    return InstalledLora(installed=copy.name)


@question
def train_on_request(folders: Folders, id: str, *, steps: int, evaluate: bool = False) -> dict[str, Any]:
    """The request of a job that continues a complete run up to `steps` steps in total. The run's record is untrusted:
    it may name only files below the base folder and in the model folders. Raises UnknownFileError, and OptionError if
    the run is incomplete or cannot be continued here.
    """
    SETTINGS["steps"].check(steps)
    folder = run_folder_of(folders, id)
    with followed(folder) as run:
        record, is_complete = run.record, is_trainable_on(run)
    if record.source.get("command") != "train":
        raise OptionError(f"{id} was not trained on a folder; change the steps in its graph or script instead")
    if not is_complete:
        raise OptionError(f"{id} is not complete, or has no run state to start from; continue it first")
    before = record.config.get("steps")
    if isinstance(before, int) and steps <= before:
        raise OptionError(f"steps must be more than the {before:,} of the run, got {steps:,}; add some")
    try:
        mine = RunSpec.from_record(record.source, {})
        known = RunSpec(
            model=mine.model if _is_model(folders, mine.model) else "",
            text_encoders=mine.text_encoders
            if all(_is_model(folders, text_encoder) for text_encoder in mine.text_encoders)
            else (),
            vae=mine.vae if mine.vae and _is_model(folders, mine.vae) else None,
        )
        # Whether links are followed is a setting of the server, not of the record.
        plain = replace(record, source={**record.source, "follow_links": False})
        spec = repeated(plain, folder / RECORD, Typed(spec=known))
    except ValueError as error:
        raise TrainingError(
            f"{folder / RECORD} is damaged ({error}); restore it from a copy, or train again"
        ) from error
    state = RunFolder(folder).states().paths()[0].resolve()
    settings = {**changed(spec.data), **changed(spec.config), "steps": steps, "existing_state": str(state)}
    settings |= {"follow_links": True} if folders.follow_links else {}
    request = replace(spec, settings=settings).to_request()
    return {**request, **({"evaluate": True} if evaluate else {})}


@question
def request_of_run(
    folders: Folders, id: str, *, what: Literal["preview", "save", "drawing"], drawing: DrawingBody | None = None
) -> RequestAnswer:
    """Ask a run that trains, in whatever process, for previews, its LoRA or a drawing. Raises UnknownFileError,
    OptionError if it does not train, or as `draw_request`, and OutputError.
    """
    folder = run_folder_of(folders, id)
    if what != "drawing":
        return RequestAnswer(id=request(folder, what))
    if drawing is None:
        raise OptionError("a drawing must say what is drawn, got none; give drawing")
    _check_drawing(folders, id, drawing)
    if drawing.lora:
        _lora_named(folder, drawing.lora)
    if drawing.strengths:
        raise OptionError("a run that trains draws at one strength; leave strengths out")
    return RequestAnswer(id=request(folder, shaped(DrawRequest, drawing)))


@question
def drawing_facts(folders: Folders, id: str) -> DrawingFacts:
    """What drawing with the LoRA of a run takes. Raises UnknownFileError, OptionError if it cannot be drawn with here,
    and ModelError.
    """
    _, spec, model = drawn_with(folders, id)
    return DrawingFacts(
        control=model.control_form.need,
        least_strength=_least_strength(spec),
        strengths=usual_strengths(spec),
    )


@question
def keep_control(folders: Folders, id: str, *, temporary: str) -> KeptControl:
    """Store an uploaded picture in the folder of what is drawn with a run, named by its content. Raises
    UnknownFileError, DataError and OutputError.
    """
    try:
        picture = open_reduced(Path(temporary), _LONGEST)
    except ImageError as error:
        raise DataError(f"the picture {error.reason}; choose another one") from error
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=4)
    name = f"control-{hashlib.sha256(content.getvalue()).hexdigest()[:16]}.png"
    place = _tried(run_folder_of(folders, id))
    with disk_space(place, content.tell()):
        write_atomic(place / name, content.getvalue())
    return KeptControl(control=name)


@question
def draw_request(
    folders: Folders,
    id: str,
    *,
    prompt: str,
    strength: float = 1.0,
    seed: int = 0,
    control: str = "",
    lora: str = "",
    strengths: tuple[float, ...] = (),
) -> dict[str, Any]:
    """The request of a job that draws a prompt without and with a LoRA of a run. Raises as `drawing_facts`, and
    OptionError for a value out of its range, for a LoRA that there is not, and for a picture that is missing or not
    taken.
    """
    asked = DrawingBody(prompt=prompt, strength=strength, seed=seed, control=control, lora=lora, strengths=strengths)
    folder, spec, model = _check_drawing(folders, id, asked)
    return {
        **drawing_of(id, spec, model),
        "lora": _lora_named(folder, lora).name,
        "text": prompt,
        "strength": strength,
        "strengths": [other for other in strengths if other != strength],
        "seed": seed,
        "control": control,
    }


def drawing_of(id: str, spec: RunSpec, model: Model) -> dict[str, Any]:
    """What all drawings with a run's model take."""
    frames = spec.config.preview_frames or model.defaults.frames
    return {
        "run": id,
        "model": spec.model,
        "files": asdict(spec.files),
        "frames": model.components.latent.whole_frames(frames),
    }


def _check_drawing(folders: Folders, id: str, asked: DrawingBody) -> tuple[Path, RunSpec, Model]:
    """As `drawn_with`, of what can be drawn."""
    if len(asked.prompt) > _MOST_PROMPT:
        raise OptionError(
            f"a prompt must have at most {_MOST_PROMPT:,} characters, got {len(asked.prompt):,}; shorten it"
        )
    if not 0 <= asked.seed < 2**32:
        raise OptionError(f"seed must be between 0 and {2**32 - 1}, got {asked.seed}; choose another")
    folder, spec, model = drawn_with(folders, id)
    least = _least_strength(spec)
    if (
        wrong := next(
            (strength for strength in (asked.strength, *asked.strengths) if not least <= strength <= _GREATEST), None
        )
    ) is not None:
        raise OptionError(f"strength must be between {least:g} and {_GREATEST:g}, got {wrong:g}; choose another")
    if len(asked.strengths) > _MOST_STRENGTHS:
        raise OptionError(f"at most {_MOST_STRENGTHS} further strengths are drawn, got {len(asked.strengths):,}")
    form, control = model.control_form, asked.control
    if control and not form.most:
        raise OptionError(f"{model.title} ({model.family.title}) takes no controls, got one; leave it out")
    if not control and form.is_required:
        raise OptionError(f"{model.title} ({model.family.title}) draws from a picture and needs one; choose one")
    place = _tried(folder)
    if control and not (is_name(control) and is_own(place / control, place)):
        raise UnknownFileError(f"there is no picture {control!r} in {TRIED} of {id}; send it first")
    return folder, spec, model


def _least_strength(spec: RunSpec) -> float:
    """The least strength at which the LoRA of a run is tried: the opposite of the greatest for sliders."""
    return min((0.0, *spec.config.consequences().strengths))


def usual_strengths(spec: RunSpec) -> tuple[float, ...]:
    """At which the LoRA of a run is looked at: those of sliders are their own."""
    return spec.config.consequences().strengths or STRENGTHS


_GREATEST = 2.0  # strength
_MOST_STRENGTHS = 8
_OF_DRAWINGS = ("preview_frames", *options_of(MethodSettings))  # settings that they depend on
_MOST_PROMPT = 10_000  # characters
_LONGEST = 4096  # pixels of a stored picture; models see about a megapixel


def drawn_with(folders: Folders, id: str) -> tuple[Path, RunSpec, Model]:
    """The folder of a run with a LoRA, its spec, and its model without weights. The record is untrusted: the model must
    be in the model folders or below the base folder.
    """
    folder = run_folder_of(folders, id)
    record = read_record(folder)
    if not RunFolder(folder).is_training:
        _lora_at(folder, record, None)
    try:
        spec = _drawing_spec(record)
    except ValueError as error:
        raise OptionError(f"the record of {id} names no model ({error}); draw with its LoRA in a graph") from error
    asked = record.asked
    spec = spec.with_settings(**{name: asked[name] for name in _OF_DRAWINGS if asked.get(name) is not None})
    files = (spec.model, *spec.text_encoders, spec.vae)
    elsewhere = tuple(file for file in files if file and not _is_model(folders, file))
    if rights_needed(RunSpec(text_encoders=elsewhere)):
        raise OptionError(
            f"the model of {id} is neither in the model folders nor below the base folder; put it there to draw with it"
        )
    model = structure_of(spec.model).as_edit(spec.edit)
    form = model.control_form
    if model.named_expert is not None or form.is_fill or len(form.frames) > 1:
        raise OptionError(f"{model.title} needs more than a prompt and a picture; draw with its LoRA in ComfyUI")
    return folder, spec, model


def _drawing_spec(record: RunRecord) -> RunSpec:
    """The model of a run as it was named; that of a graph by the files of its parts. ValueError if it is not known."""
    base = record.model
    if record.source.get("command") == "train" or base.path is None:
        return RunSpec.from_record(record.source, {})
    if base.name == BUILT_IN:
        return RunSpec(model=BUILT_IN)
    apart = {part: path for part, path in base.files.items() if not Path(path).is_relative_to(base.path)}
    encoders = dict.fromkeys(path for part, path in apart.items() if part.startswith("text_encoder"))
    return RunSpec(model=base.path, text_encoders=tuple(encoders), vae=apart.get("vae"))


def _tried(folder: Path) -> Path:
    """The folder of what is drawn with a run. Raises OutputError."""
    place = ensure_folder(folder / TRIED)
    if not stays_in(place, folder.resolve()):
        raise OutputError(f"the folder {TRIED} of {folder.name} is a link to somewhere else; replace it by a folder")
    return place


@question
def run_graph(folders: Folders, id: str) -> dict[str, Any]:
    """`prompt`: the equivalent graph in API format; `notes`: differences. Raises UnknownFileError, OptionError."""
    prompt, notes = graph_of_run(read_record(run_folder_of(folders, id)), folders)
    return {"prompt": prompt, "notes": notes}


def _lora_at(folder: Path, record: RunRecord, step: int | None) -> Path:
    if step is None:
        if (path := lora_of_run(folder, record)) is None:
            raise OptionError(f"{folder.name} has saved no LoRA yet; continue it, or cancel it to save one")
        return path
    saves = list(saves_of(folder, record))
    found = next((save for save in saves if save.step == step), None)
    if found is None:
        known = ", ".join(sorted({f"{save.step:,}" for save in saves})) or "none"
        raise OptionError(f"{folder.name} has LoRAs of the steps {known}, got {step:,}; choose one of these")
    return folder / found.file


def _lora_named(folder: Path, name: str) -> Path:
    """A LoRA of a run by its file's name, that of its end for none."""
    record = read_record(folder)
    if not name:
        return _lora_at(folder, record, None)
    known = [save.file for save in saves_of(folder, record)]
    if name not in known:
        raise OptionError(f"{folder.name} has saved {', '.join(known) or 'no LoRA'}, got {name}; choose one")
    return folder / name


def _copy(source: Path, target: Path) -> None:
    ensure_folder(target.parent)
    with disk_space(target.parent, source.stat().st_size), atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def _is_model(folders: Folders, path: str) -> bool:
    """Whether a path is in a model folder, so that a record may name it."""
    kinds = ("checkpoints", "diffusion_models", "text_encoders", "vae")
    plain = Path(os.path.normpath(path))
    return any(plain.is_relative_to(root) for kind in kinds for root in folders.roots(kind) if root.is_absolute())


PromptJson = dict[str, dict[str, Any]]

_TRAIN = "TrainLoraNode"
_ENCODER_LOADERS = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader", 4: "QuadrupleCLIPLoader"}
_FOLLOWED = ("trigger", "resolution", "control")  # data settings that the graph can represent


def graph_of_run(record: RunRecord, folders: Folders) -> tuple[PromptJson, list[str]]:
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
    controls = _controls(spec, record, folders)
    defaults = load_structure(spec.model).defaults
    side, step = spec.data.all_resolutions(defaults.resolution)[0], pixel_step(spec.data, defaults.pixel_multiple)
    graph: PromptJson = {
        **loaders,
        "10": _node("LoadImageTextDataSetFromFolder", "Images and texts", folder=images),
        "11": _scaled(["10", 0], "Scale the images", side, step),
    }
    if controls:
        graph["10"] = _node("LoadImagePairDataSetFromFolder", "Pairs and texts", folder=images, control_folder=controls)
        graph["15"] = _scaled(["10", 1], "Scale the controls", side, step)
        if spec.data.controls != "opposite":
            notes.append("Controls are scaled like pictures; those of models that know other sizes differ.")
    notes.append("Pictures are scaled to whole sizes without a crop, so that they may differ by some pixels.")
    texts: list[Any] = ["10", 2 if controls else 1]
    if spec.data.trigger:
        graph["12"] = _node("AddTextPrefix", "Trigger", texts=texts, prefix=f"{spec.data.trigger}, ")
        texts = ["12", 0]
        notes.append("The trigger is put in front of all captions, also of those that have it.")
    encoded = {"images": ["11", 0], **({"controls": ["15", 0]} if controls else {})}
    encode = "MakeTrainingPairs" if controls else "MakeTrainingDataset"
    graph["13"] = _node(encode, "Encode", **encoded, vae=vae, clip=clip, texts=texts)
    graph["14"] = _node("ResolutionBucket", "Buckets of one size", latents=["13", 0], conditioning=["13", 1])
    graph["20"] = _node(
        _TRAIN, "Train LoRA", model=model, latents=["14", 0], positive=["14", 1], **_settings(record, folders, notes)
    )
    graph["21"] = _node("SaveLoRA", "Save the LoRA", lora=["20", 0], prefix=f"loras/{record.title}", steps=["20", 2])
    graph["22"] = _node("LossGraphNode", "Plot the loss", loss=["20", 1], filename_prefix=f"{record.title}_loss")
    return graph, notes


def _node(class_type: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}


def _scaled(images: list[Any], title: str, side: int, step: int) -> dict[str, Any]:
    return _node(
        "ImageScaleToTotalPixels",
        title,
        image=images,
        upscale_method="lanczos",
        megapixels=max(0.01, round(side**2 / 2**20, 4)),
        resolution_steps=step,
    )


def _loaders(spec: RunSpec, record: RunRecord, folders: Folders) -> tuple[PromptJson, list[Any], list[Any], list[Any]]:
    """The nodes that load the model, and links to its denoiser, text encoders and autoencoder."""
    path = named_path(spec.model)
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
    names = [_required(folders, "text_encoders", file) for file in files]
    types = FAMILIES[family].clip_types if family in FAMILIES else ()
    kind = {"type": types[0] if types else "stable_diffusion"} if len(names) < 3 else {}
    inputs = (
        {"clip_name": names[0]} if len(names) == 1 else {f"clip_name{i}": encoder for i, encoder in enumerate(names, 1)}
    )
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
        for full, within in ((path, root), (path.resolve(), root.resolve())):
            if full.is_relative_to(within):
                name = full.relative_to(within).as_posix()
                try:
                    if folders.find(kind, name).resolve() == path.resolve():
                        return name
                except ModelError:
                    continue
    return None


def _images(spec: RunSpec, folders: Folders, notes: list[str]) -> str:
    """The name of the images' folder below the input folder."""
    name = _input_folder(Path(spec.folder), folders)
    if len(spec.sources) > 1:
        notes.append(f"It trains on {name} alone, the first of {len(spec.sources)} folders.")
    followed = (*_FOLLOWED, *(["controls"] if spec.data.controls == "opposite" else []))
    others = [
        name.replace("_", " ") for name in changed(spec.data) if name not in followed and SETTINGS[name].changes_numbers
    ]
    if others:
        notes.append(f"Nodes have no {', '.join(others)}.")
    return name


def _controls(spec: RunSpec, record: RunRecord, folders: Folders) -> str:
    """The name of the controls' folder below the input folder; empty for a run without controls."""
    count = max((image.controls for image in images_in(record.data)), default=0)
    if not count:
        return ""
    if count > 1:
        raise OptionError(f"a graph of a run has one control for each image, got {count}; use its command")
    place = Path(spec.data.control[0]) if spec.data.control else Path(spec.folder) / CONTROL
    return _input_folder(place, folders)


def _input_folder(path: Path, folders: Folders) -> str:
    for name in folders.input_folders():
        if folders.find_input_folder(name).resolve() == path.resolve():
            return name
    raise OptionError(
        f"a graph finds images in the input folder alone, got {path}; copy them into {folders.place('input')}"
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
