"""`lorasmith bench` and `doctor`: cost of a training step on this machine, and what the machine can do."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import console, echo, heading, print_note, print_problem, print_result
from lorasmith.cli.flags import BaseDir, BaseModel, Device, ExtraModelPaths, folders_of, with_flags
from lorasmith.core.printable import count_text, memory_text
from lorasmith.runs.presets import PRESETS, USUAL_IMAGES
from lorasmith.training.config import TrainConfig, cost_options

if TYPE_CHECKING:
    from lorasmith.bench.benchmark import Measured
    from lorasmith.bench.measure import Counts, Spread
    from lorasmith.runs.doctor import Checkup
    from lorasmith.training.job import TrainJob


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("bench", help=bench.__doc__)(with_flags(bench, cost_options(), aliases={"training_dtype": "--dtype"}))
    app.command("doctor")(doctor)


def bench(
    model: BaseModel = "lorasmith-tiny",
    resolution: Annotated[
        int | None, typer.Option(help="Side of the square pictures in pixels. Default: the model's own.")
    ] = None,
    measured_steps: Annotated[
        int | None, typer.Option("--steps", min=2, help="Number of timed steps. Default: as many as take some seconds.")
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=1, help="Number of training pictures, for the time to a good LoRA by each preset.")
    ] = USUAL_IMAGES,
    floor: Annotated[
        bool, typer.Option("--floor/--no-floor", help="Also measure the frozen model, unquantized.")
    ] = True,
    device: Device = None,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
    **settings: Any,
) -> None:
    """Measure the cost of a training step on this machine, and report what limits it.

    Takes the options of `lorasmith train` that affect the cost of a step; pictures and captions are random. The floor
    is one forward and one backward pass of the frozen diffusers model: no training of all layers can be faster.
    """
    from lorasmith.bench.benchmark import latent_side, measured
    from lorasmith.bench.measure import synthetic_samples
    from lorasmith.core.placement import chosen_device
    from lorasmith.families.loading import load_model
    from lorasmith.families.locating import MODEL_FOLDERS
    from lorasmith.families.model_search import in_folders
    from lorasmith.training.job import plan_job
    from lorasmith.training.processor_way import on_processor

    config = TrainConfig(**settings)
    place = chosen_device(device)
    with console.status(f"Loading {model}") as status:
        base = load_model(in_folders(model, folders_of(base_dir, extra_model_paths), MODEL_FOLDERS))
        side = latent_side(base, resolution)
        job = plan_job(base.denoiser, config, place)
        samples = synthetic_samples(
            base, config.samples_per_step, side, side, are_pairs=config.consequences().are_pairs
        )
        with on_processor(job, samples) as job:
            measures = measured(
                job,
                samples,
                steps=measured_steps,
                floor=floor,
                on_stage=lambda stage: status.update(f"Measuring {stage}"),
            )
            pixels = side * base.components.latent.downscale
            print_result(
                lambda: _everything(measures, job, model, pixels, str(place), pictures),
                lambda: _print_bench(measures, job, pixels, str(place), pictures),
            )


def _everything(
    measures: Measured, job: TrainJob, model: str, pixels: int, device: str, pictures: int
) -> dict[str, Any]:
    import torch

    from lorasmith.bench.benchmark import limits, shares
    from lorasmith.core.kernels import refused_kernels
    from lorasmith.training.storage.fingerprint import environment

    return {
        "model": model,
        "pixels": pixels,
        "settings": dataclasses.asdict(job.config),
        "trained": job.parameters,
        "environment": environment(torch.device(device), job.config.optimizer, compile=job.config.compile),
        **dataclasses.asdict(measures),
        "step_s": measures.step.median,
        "of_floor": measures.of_floor,
        "waiting": measures.waiting,
        "images_per_hour": measures.images_per_hour,
        "presets": [dataclasses.asdict(length) for length in _lengths(measures, pictures)],
        "shares": [dataclasses.asdict(share) for share in shares(measures)],
        "limits": limits(measures),
        "notes": (*job.notes, *refused_kernels()),
    }


@dataclasses.dataclass(frozen=True)
class _Length:
    """How long a preset trains on a number of pictures."""

    preset: str
    pictures: int
    seen: int  # pictures, repetitions counted
    minutes: float  # of all steps as measured


def _lengths(measures: Measured, pictures: int) -> list[_Length]:
    return [
        _Length(preset.name, pictures, seen := preset.seen(pictures), 60 * seen / measures.images_per_hour)
        for preset in PRESETS.values()
    ]


def _print_bench(measures: Measured, job: TrainJob, pixels: int, device: str, pictures: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from lorasmith.bench.benchmark import limits
    from lorasmith.core.kernels import refused_kernels

    facts, config, counts = job.model.facts, job.config, measures.counts
    echo(f"{facts.title} ({facts.family_title}) on {_machine(device)}, products in {config.training_dtype}")
    echo(job.summary)
    echo(f"batch {config.batch_size} × {config.grad_accumulation_steps}, {pixels}×{pixels} pixels")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "seconds", "from", "to", "GFLOP", "operations", "kept for backward, MiB"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    if measures.forward is not None:
        table.add_row("forward", *_seconds(measures.forward))
    if measures.floor is not None:
        table.add_row("floor", *_seconds(measures.floor), *_counted(measures.floor_counts))
    table.add_row(Text("step", style="bold"), *_seconds(measures.step), *_counted(counts))
    echo()
    console.print(table)
    echo()
    heading(f"{measures.images_per_hour:,.0f}", "images an hour")
    lengths = (
        f"{length.preset} {length.seen:,} seen, {length.minutes:,.1f} min" for length in _lengths(measures, pictures)
    )
    echo(f"A LoRA of {count_text(pictures, 'picture')}: {'; '.join(lengths)}")
    if measures.of_floor is not None:
        passes = "" if measures.passes == 1 else f" × {measures.passes}"
        heading(f"{measures.of_floor:.0%}", f"of a step is the floor{passes}")
    elif measures.floor is None:
        echo("The floor is not measured" + (", or does not fit into memory." if measures.floor_counts is None else "."))
    batches = f"{1000 * measures.parts.making:.1f} ms"
    echo(f"Waiting for data: {measures.waiting:.1%} of a step, beside which its batches take {batches}")
    have = "" if measures.memory is None else f" of {measures.memory / 2**30:.1f} GiB"
    echo(
        f"Memory: {_mib(measures.weights)} of frozen weights, and {_mib(measures.above)} above them in a step, of "
        f"which {_mib(counts.state)} for what is trained; at most {_mib(measures.peak)}{have}"
    )
    if measures.plan is not None:
        echo(str(measures.plan))
    echo()
    heading("What limits it")
    for sentence in limits(measures):
        echo(f"- {sentence}")
    for note in (*job.notes, *refused_kernels()):
        print_note(note)


def _seconds(spread: Spread) -> list[str]:
    return [f"{number:.3f}" for number in (spread.median, spread.low, spread.high)]


def _counted(counts: Counts | None) -> list[str]:
    if counts is None:
        return []
    return [f"{counts.flops / 1e9:,.1f}", f"{counts.operations:,}", f"{counts.held / 2**20:,.1f}"]


def _mib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _machine(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'s' * (threads != 1)}"


def doctor(
    install: Annotated[
        bool,
        typer.Option("--install", help="Print only the command that installs the build of torch for this machine."),
    ] = False,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
) -> None:
    """Show versions, devices, memory, disks, model folders and optional packages, and what to do about problems.

    The exit status is 1 if something is wrong with machine or installation.
    """
    if install:
        _print_torch_build()
        return
    from lorasmith.runs.doctor import check_up

    with console.status("Looking"):
        checkup = check_up(folders_of(base_dir, extra_model_paths))
    print_result(lambda: checkup, lambda: _print_checkup(checkup))
    if any(problem.is_fault for problem in checkup.problems):
        raise typer.Exit(1)


def _print_torch_build() -> None:
    from lorasmith.cli.torch_builds import command_line, installer, this_machine, torch_build

    build = torch_build(this_machine(), installer())

    def say() -> None:
        print_note(f"torch for {build.title}: {build.because}.", kind="Build", colour="green")
        echo(command_line(build.command))

    print_result(lambda: build, say)
    if not build.command:
        raise typer.Exit(1)


def _print_checkup(checkup: Checkup) -> None:
    heading("Versions", ", ".join(f"{name} {version}" for name, version in checkup.versions.items()))
    for device in checkup.devices:
        heading("Device  ", f"{device.name}: {device.title}, {memory_text(device.memory_bytes)}")
        emulated = [name for name in ("bf16", "fp16") if name not in device.products]
        slow = f" ({' and '.join(emulated)} only emulated, so that fp32 is used instead)" if emulated else ""
        echo(f"         products in {', '.join(device.products)}{slow}; compiler {device.compiler}")
    threads = f"{checkup.threads} thread{'s' * (checkup.threads != 1)} on the CPU"
    heading("Threads ", f"{threads}, beside other programs that keep {checkup.busy:.1f} processors busy")
    heading("Memory  ", f"{memory_text(checkup.free_memory_bytes)} of {memory_text(checkup.memory_bytes)} are free")
    heading("Models  ", f"in {checkup.base_dir}: {', '.join(f'{kind} {n}' for kind, n in checkup.folders.items())}")
    for folder, free in checkup.disks.items():
        heading("Disk    ", f"{memory_text(free)} are free for {folder}")
    for extra in checkup.extras:
        lacks = f"{', '.join(extra.missing)} not installed, {extra.remedy}" if extra.missing else ""
        heading("Extra   ", f"{extra.name}: {'; '.join(part for part in (', '.join(extra.present), lacks) if part)}")
    for extension in checkup.extensions:
        state = "cannot be used" if extension.fault else "usable"
        heading("Extends ", f"{extension.source}: {extension.name} ({extension.kind}), {state}")
    for problem in checkup.problems:
        print_problem(problem.problem, problem.remedy, kind="Problem" if problem.is_fault else None)
    if not checkup.problems:
        echo("No problem was found.")
