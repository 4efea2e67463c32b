"""`lorasmith models`, `targets` and `plan`: models in ComfyUI's folders, their layers, and the memory of a run."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lorasmith.adapters.catalogue import facts_of
from lorasmith.cli.console import (
    console,
    echo,
    heading,
    print_facts,
    print_note,
    print_result,
    progress_shown,
    stoppable,
)
from lorasmith.cli.flags import (
    BaseDir,
    BaseModel,
    EditModel,
    ExtraModelPaths,
    TextEncoderFiles,
    VaeFile,
    folders_of,
    with_flags,
)
from lorasmith.core.errors import OptionError
from lorasmith.core.options import options_of
from lorasmith.core.printable import memory_text
from lorasmith.training.config import TrainConfig

if TYPE_CHECKING:
    from lorasmith.core.folders import Folders
    from lorasmith.runs.hub_download import HubFile
    from lorasmith.runs.memory_estimate import MemoryEstimate
    from lorasmith.runs.model_list import KnownModel, ListedFile, ListedModel, ModelList
    from lorasmith.training.targets_summary import TargetGroup, TargetSummary


def register(app: typer.Typer) -> None:
    """Add the commands."""
    settings = options_of(TrainConfig)
    app.command("targets", help=targets.__doc__)(
        with_flags(targets, {name: setting for name, setting in settings.items() if name in _TARGET_SETTINGS})
    )
    app.command("models")(models)
    app.command("plan", help=plan.__doc__)(
        with_flags(
            plan,
            {name: value for name, value in settings.items() if name in _PLAN_SETTINGS},
            aliases={"training_dtype": "--dtype", "batch_size": "--batch"},
        )
    )


def models(
    known: Annotated[
        bool, typer.Option("--known", help="List the model families that can be trained instead, with their files.")
    ] = False,
    get: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Download a released model or captioner from the hub into the model folders instead; --known lists "
            "the names. What is there already stays, and an interrupted download continues.",
        ),
    ] = None,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
) -> None:
    """List the models in the base folder by family, and the parts that each has or lacks.

    Files are recognised by their tensors; only their headers are read. `lorasmith train` and `generate` take the parts
    that are listed here if none are given.
    """
    if known and get is not None:
        raise OptionError("--known and --get do different things; give one of them")
    if known:
        _print_known()
        return
    if get is not None:
        _get(get, folders_of(base_dir, extra_model_paths))
        return
    from lorasmith.runs.model_list import list_models

    with console.status("Reading headers"):
        listed = list_models(folders_of(base_dir, extra_model_paths))
    whole = [{**dataclasses.asdict(model), "is_whole": model.is_whole} for model in listed.models]
    print_result(lambda: {**dataclasses.asdict(listed), "models": whole}, lambda: _print_models(listed))


def _get(name: str, folders: Folders) -> None:
    from lorasmith.runs.captioner_shelf import CAPTIONER_RELEASES, captioner_files, captioner_place
    from lorasmith.runs.shelf import wanted_files

    if (captioner := CAPTIONER_RELEASES.get(name)) is not None:
        print_note(
            f"{captioner.title} is under the {captioner.licence} (https://huggingface.co/{captioner.repository})."
        )
        with console.status("Asking the hub"):
            files = captioner_files(folders, name)
        _download(captioner.title, files)
        place = captioner_place(folders, name)
        print_result(lambda: {"captioner": str(place)}, lambda: echo(f"{'captioner':<16}{place}"))
        return
    with console.status("Reading headers"):
        wanted = wanted_files(folders, name)
    release = wanted.release
    print_note(f"{release.title} is under the {release.licence} (https://huggingface.co/{release.card}).")
    _download(release.title, [download.hub for download in wanted.missing])
    got = {file.component: str(file.found or file.hub.path) for file in wanted.files}
    print_result(lambda: got, lambda: echo("\n".join(f"{part:<16}{path}" for part, path in got.items())))


def _download(title: str, files: list[HubFile]) -> None:
    from lorasmith.runs.hub_download import Progress, download

    with stoppable(at_once=True), progress_shown(f"MB of {title}") as progress:

        def show(state: Progress) -> None:
            doing = (
                f", checking {state.file}"
                if state.is_checking
                else f", {state.bytes_per_s / 1e6:.1f} MB/s, {state.file}"
            )
            progress(state.done_bytes // 10**6, state.total_bytes // 10**6, more=doing)

        download(files, on_progress=show)


def _print_known() -> None:
    from lorasmith.runs.model_list import known_models

    with console.status("Reading the families"):
        families = known_models()
    print_result(lambda: [dataclasses.asdict(family) for family in families], lambda: _print_families(families))


def _print_families(families: list[KnownModel]) -> None:
    from lorasmith.runs.captioner_shelf import CAPTIONER_RELEASES

    console.print(_table(families))
    echo(f"Captioners for --get: {', '.join(CAPTIONER_RELEASES)}")


def _table(families: list[KnownModel]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title, width in _COLUMNS.items():
        table.add_column(title, width=width, overflow="fold")
    for family in families:
        encoders = ", ".join(_stem(part.usual_file) for part in family.text_encoders)
        weights, side = f"{family.parameters / 1e9:.1f} B", f"{family.defaults.resolution} px"
        autoencoder, names = _stem(family.autoencoder.usual_file), ", ".join(family.releases)
        table.add_row(family.title, weights, encoders, autoencoder, side, names)
    return table


_COLUMNS = {"Model": 13, "Weights": 7, "Text encoders": 18, "Autoencoder": 11, "Side": 7, "--get": 14}


def _stem(usual_file: str) -> str:
    return usual_file.replace(".safetensors", "")


def _print_models(listed: ModelList) -> None:
    for family, models in itertools.groupby(listed.models, key=lambda model: model.family):
        heading(family)
        for model in models:
            precision = f", {model.precision}" if model.precision else ""
            echo(f"  {model.path.name} ({_size(model.size_bytes)}{precision}) in {model.place}")
            for line in (*_parts(model), *_controls(model)):
                echo(f"    {line}")
    _print_files("Text encoders and autoencoders that fit none of these", listed.unused)
    _print_files("Not recognised", listed.unknown)


def _parts(model: ListedModel) -> list[str]:
    besides = [part.path.name for part in model.parts if part.path is not None and part.path != model.path]
    if model.is_whole:
        return [f"whole, with {', '.join(besides)}" if besides else "whole"]
    missing = [f"missing: {part.kind} (usually {part.usual_file})" for part in model.missing]
    return [*([f"with {', '.join(besides)}"] if besides else []), *missing]


def _controls(model: ListedModel) -> list[str]:
    if model.edit:
        return [f"edit model {model.edit}, by its {model.edit_recognised_by} (--edit none if it is not)"]
    form = model.form
    ways = [f"{form.about}, {'as all of its family' if form.are_files else 'by its tensors'}"] if form.most else []
    ways += [f"draws from the {source} with --edit {name}" for name, source in model.also.items()]
    if ways:
        return ways
    return [f"no edit model, by its name (--edit {' or '.join(model.edits)} if it is)"] if model.edits else []


def _print_files(title: str, files: tuple[ListedFile, ...]) -> None:
    if not files:
        return
    heading(title)
    for file in files:
        details = f" ({_size(file.size_bytes)}, {file.precision})" if file.precision else ""
        echo(f"  {file.path.name}{details} in {file.place}: {file.what}")


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


_TARGET_SETTINGS = (
    "targets",
    "algorithm",
    "rank",
    "alpha",
    "differences",
    "dora",
    "pissa",
    "init",
    "tucker",
    "lora_dtype",
)


def targets(
    model: BaseModel, base_dir: BaseDir = None, extra_model_paths: ExtraModelPaths = None, **settings: Any
) -> None:
    """Summarise a choice of target layers: kinds of layers, counts, ranks, parameters, size of the file.

    Takes the options of `lorasmith train` that affect it. Only the structure of a single-file checkpoint is read.
    """
    from lorasmith.families.loading import load_structure
    from lorasmith.families.locating import MODEL_FOLDERS
    from lorasmith.families.model_search import in_folders
    from lorasmith.training.targets_summary import summarise_targets

    config = TrainConfig(**settings)
    with console.status(f"Reading {model}"):
        base = load_structure(in_folders(model, folders_of(base_dir, extra_model_paths), MODEL_FOLDERS))
    preview = summarise_targets(base.denoiser, config)
    print_result(lambda: preview, lambda: _print_targets(preview, config))


def _print_targets(preview: TargetSummary, config: TrainConfig) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    rank = facts_of(config.algorithm).rank_meaning
    rated = any(group.learning_rate is not None for group in preview.groups)
    scaled = any(group.alpha is not None for group in preview.groups)
    columns = ["Layers", "Kind", "Count", rank.capitalize(), "Alpha" * scaled, "Rate" * rated, "Parameters"]
    for name in filter(None, columns):
        table.add_column(name, justify="left" if name in ("Layers", "Kind") else "right", no_wrap=True)
    for group in preview.groups:
        cells = [group.name, group.layer, str(group.count)]
        cells += [_ranks(group)] if rank else []
        cells += [_number(group.alpha)] if scaled else []
        cells += [_number(group.learning_rate)] if rated else []
        table.add_row(*cells, f"{group.parameters:,}")
    echo(f"{config.algorithm} on {preview.targets}")
    console.print(table)
    echo(
        f"{preview.layers} of {preview.targetable} layers, {preview.parameters:,} parameters, "
        f"a file of about {preview.size_bytes / 2**20:.1f} MiB in {config.lora_dtype}"
    )
    for note in preview.notes:
        print_note(note)


def _ranks(group: TargetGroup) -> str:
    low, high = group.ranks
    if not high:
        return ""
    return str(low) if low == high else f"{low}–{high}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


_PLAN_SETTINGS = (
    "batch_size", "algorithm", "rank", "targets", "differences", "dora", "tucker", "training_dtype",
    "train_text_encoder", "text_encoder_rank", "new_word", "new_word_t5",
)  # fmt: skip
"""Options that affect memory and are not proposed by the command itself."""


def plan(
    model: BaseModel,
    memory: Annotated[float, typer.Option(min=1, help="Memory of the graphics card in GB, as cards are sold.")],
    text_encoder: TextEncoderFiles = None,
    vae: VaeFile = None,
    edit: EditModel = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the square pictures in pixels. Default: the model's own.")
    ] = None,
    frames: Annotated[
        int, typer.Option(min=1, help="Frames of a clip, for models of videos. 1 is for training on pictures.")
    ] = 1,
    control_count: Annotated[
        int | None,
        typer.Option(
            min=0, help="Controls of each picture, for edit models. Default: as many as the model needs, 0 or 1."
        ),
    ] = None,
    cards: Annotated[
        int, typer.Option(min=1, help="Cards of that memory that train together; each may keep a part of the weights.")
    ] = 1,
    desktop: Annotated[
        bool | None,
        typer.Option(
            help="Whether the card drives a display, for which 0.75 GiB are left. Default: what nvidia-smi says of the "
            "first card of this machine."
        ),
    ] = None,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
    **settings: Any,
) -> None:
    """Estimate the memory of a run, and propose the cheapest settings that fit a card.

    No weights are loaded: shapes suffice. Activations are counted as `--activations auto` does. Settings that change no
    numbers are proposed first (of several cards, sharding is one; up to 30 % of the blocks are offloaded), then
    quantization, then the offloading of all blocks. The exit status is 1 if training or the text encoders do not fit.
    """
    from lorasmith.core.placement import drives_display
    from lorasmith.families.locating import ModelFiles
    from lorasmith.runs.memory_estimate import DESKTOP_BYTES, estimate_memory

    files = ModelFiles(model, tuple(text_encoder or ()), vae, edit)
    with console.status(f"Estimating {model}"):
        estimate = estimate_memory(
            files,
            TrainConfig(**settings),
            card_bytes=int(memory * 2**30),
            resolution=resolution,
            frames=frames,
            controls=control_count,
            cards=cards,
            folders=folders_of(base_dir, extra_model_paths),
        )
    if drives_display() if desktop is None else desktop:
        estimate = dataclasses.replace(estimate, desktop_bytes=DESKTOP_BYTES)
    print_result(lambda: _plain_plan(estimate), lambda: _print_plan(estimate))
    if not estimate.fits:
        raise typer.Exit(1)


def _plain_plan(estimate: MemoryEstimate) -> dict[str, Any]:
    proposal = {**dataclasses.asdict(estimate.proposal), "settings": estimate.proposal.settings}
    whole = {
        **dataclasses.asdict(estimate),
        "proposal": proposal,
        "fits": estimate.fits,
        "encoders_fit": estimate.encoders_fit,
    }
    for plan in (proposal["plan"], *whole["plans"]):
        del plan["blocks"]
    return whole


def _print_plan(estimate: MemoryEstimate) -> None:
    plans = [
        f"{f'checkpointing at depth {plan.checkpoint_depth}' if plan.checkpoint_depth else plan.activations} "
        f"{memory_text(plan.needed_bytes)}"
        for plan in estimate.plans
    ]
    encoders = [f"{name} {memory_text(size)}" for name, size in estimate.text_encoders.items()]
    encoders += [f"{name} is missing (usually {file})" for name, file in estimate.missing.items()]
    facts = {
        "Model": f"{estimate.model} ({estimate.family})",
        "Trains": estimate.trained,
        "Pictures": f"{estimate.pixels}×{estimate.pixels} pixels"
        f"{f', {estimate.frames} frames' if estimate.frames > 1 else ''}, batch {estimate.batch_size}, "
        f"products in {estimate.dtype}",
        "Controls": ", ".join(f"{width}×{height} pixels" for width, height in estimate.controls),
        "Weights": _by_kind(estimate.weights),
        "Offloaded": _by_kind(estimate.offloaded),
        "Host": f"{_by_kind({kind: sizes[1.0] for kind, sizes in estimate.on_host.items()})}, if all is offloaded",
        "Desktop": f"{memory_text(estimate.desktop_bytes)} are left to it" if estimate.desktop_bytes else "",
        "Sharded": _by_kind(estimate.sharded),
        "Trained": f"{memory_text(estimate.trained_bytes)} of weights, gradients and optimizer state",
        "Step": ", ".join(plans),
        "Before": f"text encoders, which are used before training: {', '.join(encoders)}",
    }
    print_facts(facts, 10, {"Model": [part.line for part in estimate.found]})
    proposal, card = estimate.proposal, memory_text(estimate.card_bytes)
    flags = " ".join(proposal.flags) or "the defaults"
    echo()
    host = f", and {memory_text(proposal.host_bytes)} of host memory" if proposal.host_bytes else ""
    if estimate.fits:
        echo(f"Fits {card} with {flags}: about {memory_text(proposal.needed_bytes)}{host}.")
    else:
        echo(
            f"Does not fit {card}: with {flags} it needs about {memory_text(proposal.needed_bytes)}, "
            f"{memory_text(proposal.short_bytes)} too much; use smaller pictures, a smaller batch or fewer targets."
        )
    if not estimate.encoders_fit:
        size = memory_text(sum(estimate.text_encoders.values()))
        print_note(
            f"The text encoders need {size} at once, more than {card} has free: their weights are copied from host "
            "memory for each caption, which takes seconds; files in fp8 or GGUF are smaller."
        )


def _by_kind(sizes: Any) -> str:
    return ", ".join(
        f"{'as in the file' if kind == 'none' else kind} {memory_text(size)}" for kind, size in sizes.items()
    )
