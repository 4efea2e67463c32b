"""`lorasmith train` and `demo`: a folder of images in, a LoRA out; and the same in two minutes, without downloads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.cli.console import echo, print_note, print_result
from lorasmith.cli.flags import (
    AnyBaseModel,
    AsRecorded,
    BaseDir,
    Device,
    EditModel,
    ExtraModelPaths,
    Gpus,
    Mirror,
    RunOutput,
    TextEncoderFiles,
    VaeFile,
    Verify,
    folders_of,
    is_typed,
    named,
    with_first,
    with_flags,
)
from lorasmith.cli.together import check_alone, started_on_gpus, together
from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.options import options_of
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.families.locating import BUILT_IN
from lorasmith.runs.spec import KIND, PRESET, RunSpec
from lorasmith.training.config import TrainConfig, code_settings


def _main(config: type) -> list[str]:
    return [name for name, setting in options_of(config).items() if setting.is_main]


_FIRST = ("model", "preset", "kind", *_main(DataConfig), "name", "output", *_main(TrainConfig), "no_previews", "config")
"""The options that `--help` shows."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("demo")(demo)
    declared = {**options_of(DataConfig), **options_of(TrainConfig)}
    app.command("train", cls=with_first(*_FIRST), help=train.__doc__)(
        with_flags(train, declared, aliases={"training_dtype": "--dtype", "early_stop": "--stop"})
    )


def train(
    context: typer.Context,
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="FOLDER",
            help="Folder of images (png, jpg, ...), with captions in .txt files; or a ZIP file of them, or its URL.",
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help='Further images: a folder or metadata file, such as "more repeats=2 weight=0.5". Repeatable.',
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Settings in TOML, by their names here, or the run.json of an earlier run, which gives its images, "
            "model and settings. What is on the command line comes first.",
        ),
    ] = None,
    model: AnyBaseModel = None,
    preset: Annotated[str | None, named(PRESET)] = None,
    kind: Annotated[str | None, named(KIND)] = None,
    low_noise_model: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Second expert of a model of two, such as Wan 2.2 A14B, whose --model is for high noise: both "
            "are trained, one after the other, each on its part of the noise levels.",
        ),
    ] = None,
    text_encoder: TextEncoderFiles = None,
    vae: VaeFile = None,
    edit: EditModel = None,
    output: RunOutput = None,
    mirror: Mirror = None,
    name: Annotated[str | None, typer.Option(help="Name of the LoRA. Default: that of the folder of images.")] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Folder of held-out images, instead of a share of the training images.")
    ] = None,
    no_previews: Annotated[bool, typer.Option("--no-previews", help="Draw no previews.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start from scratch instead of continuing the run in the output.")
    ] = False,
    verify: Verify = False,
    as_recorded: AsRecorded = False,
    device: Device = None,
    gpus: Gpus = None,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
    **settings: Any,
) -> None:
    """Train a LoRA on a folder of images.

    Captions are read from text files of the same name; pictures without one use the trigger. Prints the plan, trains,
    and saves the LoRA with a report in the folder of the run. Ctrl-C stops and saves; the same command resumes. A
    finished run in --output trains on if --steps are more.
    """
    if started_on_gpus(gpus):
        return
    from lorasmith.cli.run_output import TerminalHost, print_trained, train_experts_and_report
    from lorasmith.runs.mirrored import output_for
    from lorasmith.runs.plan import plan
    from lorasmith.runs.presets import USUAL_PRESET
    from lorasmith.runs.recorded_run import Typed, read_run_file
    from lorasmith.runs.run import run

    typed = RunSpec(
        sources=tuple(map(ImageSource.parse, [*([] if folder is None else [folder]), *(also or ())])),
        model=model or "",
        low_noise_model=low_noise_model,
        text_encoders=tuple(text_encoder or ()),
        vae=vae,
        edit=edit,
        name=name or "",
        output=str(output) if output is not None else None if mirror is None else output_for(mirror),
        validation=None if validation is None else str(validation),
        device=device,
        preset=preset or "",
        kind=kind or "",
        settings={name: value for name, value in settings.items() if is_typed(context, name)}
        | ({"previews": ""} if no_previews else {}),
    )
    given = typed
    if config is not None:
        given = typed.completed(read_run_file(config, Typed(spec=typed, files=as_recorded)))
        tracker = given.settings.get("track")
        if tracker not in (None, "none") and "track" not in typed.settings:
            print_note(f"{config} names a tracker, which is not started; --track {tracker} starts it.")
    folders = folders_of(base_dir, extra_model_paths)
    if not given.model:
        raise OptionError(_which_models(folders))
    code = [typed.settings[name] for name in code_settings() if name in typed.settings]
    given = replace(given, preset=given.preset or USUAL_PRESET)
    spec = given.trusted(imports=code, track=typed.settings.get("track")).resolved()
    host = TerminalHost(folders)
    host.mirror = mirror
    with together():
        if spec.low_noise_model is not None:
            if mirror is not None:
                raise OptionError(f"a mirror is of one run, got --mirror {mirror} with two experts; leave one out")
            train_experts_and_report(spec, host, fresh=fresh, verify=verify)
            return
        with host.planning():
            planned = plan(spec, host)
        with host.training():
            result = run(replace(planned, fresh=fresh, verify=verify), host)
        print_trained(planned, result)
        host.stop.exit_if_set()


def _which_models(folders: Folders) -> str:
    names = [name for kind in ("checkpoints", "diffusion_models") for name in folders.files(kind)]
    own = [name for name in names if name != f"{BUILT_IN}.safetensors"]
    shown = f"; found here: {', '.join(own)}" if own else ""
    return (
        "--model must be a .safetensors or .gguf file, a diffusers folder or a hub id, but none is given"
        f"{shown}; --model {BUILT_IN} is the small model of lorasmith-tiny"
    )


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Training steps, of eight pictures each.")] = 150,
    seed: Annotated[int, typer.Option(help="Seed of training and pictures.")] = 1,
    output: RunOutput = None,
    device: Annotated[str | None, typer.Option(help="Where to train, such as cuda or cpu.")] = None,
) -> None:
    """Train a drawing style from sixteen pictures on the built-in model, and draw before and after.

    Takes about two minutes on two processor cores and needs no network.
    """
    check_alone("demo")
    from lorasmith.cli.run_output import TerminalHost, plain_result, report_result
    from lorasmith.runs.demo import demo_spec
    from lorasmith.runs.plan import plan
    from lorasmith.runs.run import run

    spec = demo_spec(steps=steps, seed=seed, output=output, device=device)
    echo(f"Lorasmith comes with a small model, {BUILT_IN}, that draws coloured emoji.")
    echo("It was not trained on black line art. This trains the style from sixteen")
    echo("pictures, and then draws subjects that are not among them.")
    echo()
    host = TerminalHost()
    with host.planning():
        planned = plan(spec, host)
    with host.training():
        result = run(replace(planned, fresh=True), host)
    echo()
    print_result(lambda: plain_result(result), lambda: report_result(result))
    host.stop.exit_if_set()
    echo()
    echo("On a page in the browser:")
    echo("  lorasmith serve --open")
    echo("With your own pictures and a model that you have:")
    echo('  lorasmith train ./photos --model sd15.safetensors --trigger "sks dog"')
