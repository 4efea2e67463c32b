"""`lorasmith resume`, `reproduce`, `request` and `report`: a run, from its folder or its LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import echo, heading, print_result
from lorasmith.cli.flags import (
    AllowImport,
    AsRecorded,
    DataNow,
    Mirror,
    ModelNow,
    RunOutput,
    TextEncodersNow,
    TrackNow,
    VaeNow,
    Verify,
)
from lorasmith.cli.together import check_alone, together
from lorasmith.core.stores import is_url
from lorasmith.data.data_config import ImageSource


class _Request(StrEnum):
    PREVIEW = "preview"
    SAVE = "save"


if TYPE_CHECKING:
    from lorasmith.runs.recorded_run import Typed
    from lorasmith.runs.reproduce import Reproduced


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("resume")(resume)
    app.command("reproduce")(reproduce)
    app.command("request")(request)
    app.command("report")(report)


def resume(
    run: Annotated[
        str, typer.Argument(help="Folder of the run, such as runs/dog-001, or the URL of its mirror, s3://bucket/dog.")
    ],
    model: ModelNow = None,
    text_encoder: TextEncodersNow = None,
    vae: VaeNow = None,
    data: DataNow = None,
    device: Annotated[
        str | None, typer.Option(help="Device to train on, such as cuda or cpu. Default: that of the run.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Train on from the end of this run, which is complete, up to so many steps, in a folder of its own."
        ),
    ] = None,
    as_recorded: AsRecorded = False,
    allow_import: AllowImport = None,
    track: TrackNow = None,
    verify: Verify = False,
    mirror: Mirror = None,
) -> None:
    """Continue a run that was stopped or killed, from its last run state.

    With the same versions, device and number of threads the result is bit-identical to that of an uninterrupted run;
    differences are reported. Other images, other settings or another base model are refused. A run at a URL is fetched
    to runs/ first, and mirrored there again; a complete one is only fetched, or uploaded to --mirror.
    """
    from lorasmith.cli.run_output import TerminalHost, print_trained
    from lorasmith.runs.mirrored import fetched, uploaded
    from lorasmith.runs.reproduce import plan_again
    from lorasmith.runs.run import run as train

    typed = _typed(model, text_encoder, vae, data, device, files=as_recorded, imports=allow_import, track=track)
    host = TerminalHost()
    host.mirror = run if is_url(run) and mirror is None else mirror
    with together():
        with host.planning():
            folder, is_complete = fetched(run, host) if is_url(run) else (Path(run), False)
            if steps is None and (is_complete or (mirror is not None and uploaded(folder, mirror))):
                where = mirror or run
                print_result(
                    lambda: {"run": folder, "mirror": where},
                    lambda: echo(f"The run is complete, in {folder} and at {where}."),
                )
                return
            planned = plan_again(folder, host, typed, steps=steps)
        with host.training():
            result = train(replace(planned, verify=verify), host)
        print_trained(planned, result)
        host.stop.exit_if_set()


def _typed(
    model: str | None,
    text_encoders: Sequence[str] | None,
    vae: str | None,
    data: Path | None,
    device: str | None,
    output: Path | None = None,
    *,
    files: bool,
    imports: Sequence[str] | None,
    track: str | None,
) -> Typed:
    """What both commands replace in a record, and what it may name."""
    from lorasmith.runs.recorded_run import Typed
    from lorasmith.runs.spec import RunSpec

    spec = RunSpec(
        sources=() if data is None else (ImageSource(str(data)),),
        model=model or "",
        text_encoders=tuple(text_encoders or ()),
        vae=vae,
        output=None if output is None else str(output),
        device=device,
    )
    return Typed(spec=spec, files=files, imports=tuple(imports or ()), track=track)


def request(
    what: Annotated[_Request, typer.Argument(metavar="preview|save", help="Previews, or the LoRA as it is.")],
    run: Annotated[Path, typer.Argument(help="Folder of a run that is being trained, such as runs/dog-001.")],
) -> None:
    """Have a run that is being trained draw previews, or save its LoRA, after the step that it takes.

    It may be trained by any process: a command, the server, a notebook or ComfyUI. Neither changes the run. Previews
    are in samples/, the LoRA is NAME-step00000120.safetensors.
    """
    from lorasmith.training.run_requests import request as make_request

    make_request(run, what.value)
    done = "draws previews" if what is _Request.PREVIEW else "saves its LoRA"
    print_result(lambda: {"run": run, "request": what.value}, lambda: echo(f"{run} {done} after the step it takes."))


def reproduce(
    lora: Annotated[Path, typer.Argument(help="A LoRA that Lorasmith trained.")],
    model: ModelNow = None,
    text_encoder: TextEncodersNow = None,
    vae: VaeNow = None,
    data: DataNow = None,
    output: RunOutput = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what differs, without training.")] = False,
    device: Annotated[
        str | None, typer.Option(help="Device to train on, such as cuda or cpu. Default: that of the original run.")
    ] = None,
    as_recorded: AsRecorded = False,
    allow_import: AllowImport = None,
    track: TrackNow = None,
    verify: Verify = False,
) -> None:
    """Train a LoRA again from the metadata in its file, and compare the results.

    Reports what differs from the original run (base model, images, settings, versions). If it is the same run, trains
    it and reports whether the tensors are equal. The exit status is 1 if the inputs or the result differ.
    """
    check_alone("reproduce")
    from lorasmith.cli.run_output import TerminalHost
    from lorasmith.runs.reproduce import Reproduction

    typed = _typed(model, text_encoder, vae, data, device, output, files=as_recorded, imports=allow_import, track=track)
    host = TerminalHost()
    with host.planning():
        again = Reproduction(lora, host, typed, dry_run=dry_run)
    planned = again.plan.job.config.steps
    if again.steps < planned:  # cancelled, stopped early, or the best LoRA
        echo(f"{lora.name} is from step {again.steps} of {planned}; training ends there.")
    with host.training():
        reproduced = again.reproduce(verify=verify)
    print_result(lambda: _plain_reproduced(reproduced), lambda: _print_reproduced(reproduced, lora))
    if reproduced.result is not None:
        host.stop.exit_if_set()
    if reproduced.differs or (reproduced.result is not None and not reproduced.is_same):
        raise typer.Exit(1)


def _plain_reproduced(reproduced: Reproduced) -> dict[str, Any]:
    """As JSON, where `same` is null if nothing was trained or training stopped early."""
    from lorasmith.cli.run_output import plain_result

    return {
        "differs": reproduced.differs,
        "same": reproduced.is_same if reproduced.is_complete else None,
        "result": None if reproduced.result is None else plain_result(reproduced.result),
    }


def _print_reproduced(reproduced: Reproduced, lora: Path) -> None:
    if reproduced.differs:
        return  # each was printed when it was found
    if reproduced.result is None:
        echo("Base model, images, settings and initial weights are the same.")
        return
    from lorasmith.cli.run_output import report_result

    report_result(reproduced.result)
    if reproduced.is_complete:
        same = "bit-identical" if reproduced.is_same else "not the same"
        echo()
        echo(f"The tensors of {reproduced.result.path} and {lora} are {same}.")


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/photos-001; it may still be running.")],
) -> None:
    """Write report.html into the folder of a run: losses, results, and commands to repeat it.

    The report is one self-contained file. Every run writes it at its end; this command writes it for a run that is
    still running or was killed.
    """
    from lorasmith.runs.run_page import write_report

    path = write_report(run)
    print_result(lambda: {"report": path}, lambda: heading("Report", path))
