"""Carrying out a planned run: its folder, previews, report and sidecars.

    plan.plan(spec, host)  ->  Plan  ->  run(plan, host)  ->  TrainResult

Runs on folders of images are planned by `plan`; the library and Train LoRA, which have a model and samples in memory,
make a `Plan` of these and begin here. `training` imports neither sampling nor reports, so what a run needs of them is
in `Host`, which each door inherits from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.locating import ModelFiles
from lorasmith.families.model import Model
from lorasmith.families.model_search import Completed, load_completed
from lorasmith.runs.preview_budget import preview_program, whole_program, with_early_stop
from lorasmith.runs.run_images import keep_thumbnails
from lorasmith.runs.run_page import write_report
from lorasmith.runs.run_previews import RunPreviews, draw_requested, previews_of
from lorasmith.runs.sidecars import check_sidecars, write_sidecars
from lorasmith.runs.spec import RunSpec
from lorasmith.sampling.previews import Partner
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import RunFinished
from lorasmith.training.job import engine_of
from lorasmith.training.joint import EngineMaker
from lorasmith.training.results import TrainResult
from lorasmith.training.run_requests import DrawRequest
from lorasmith.training.train import Plan, RunHost, run_job

RUNS = Path("runs")  # default parent folder of runs

_NO_PREVIEWS = (
    "No previews are drawn, as two pictures would take more than preview_share of this run; prompts in previews are "
    "drawn in any case."
)


class Host(RunHost):
    """What surrounds planning and training; a door overrides what it does differently."""

    runs: Path | None = RUNS
    folders: Folders | None = None  # ComfyUI's, in which parts that the model lacks are searched

    def load(self, files: ModelFiles, folders: Folders | None) -> Completed:
        """The base model, with parts that it lacks from `folders`."""
        return load_completed(files, folders)

    def configured(self, config: TrainConfig, base: Model) -> TrainConfig:
        """The settings, with what the model decides."""
        return config

    def samples(self, spec: RunSpec) -> tuple[EncodedDataset, EncodedDataset | None] | None:
        """Training and held-out samples that the same encoders made of the same images; None to encode them."""
        return None

    def partner(self, plan: Plan) -> Partner | None:
        """That of `Previewer`, for one of two experts."""
        return None

    def begin(self, plan: Plan, folder: Path) -> RunPreviews | None:
        program = preview_program(plan)
        previews = None if program is None else previews_of(plan, program, folder, self, self.partner(plan))
        keep_thumbnails(folder, plan.images)
        return previews

    def draw(self, plan: Plan, folder: Path, request: DrawRequest, lora: Path | None) -> tuple[Sequence[Path], str]:
        return draw_requested(plan, folder, request, lora, self)

    def write_beside(self, plan: Plan, lora: Path) -> None:
        if plan.job.config.sidecars:
            assert plan.denoiser is not None
            write_sidecars(lora, plan.denoiser.base.family)

    def write_report(self, folder: Path, end: RunFinished) -> None:
        write_report(folder, end)


def run(plan: Plan, host: Host, engine: EngineMaker = engine_of) -> TrainResult:
    """Train a planned run, with the previews of its settings.

    Where these have none, the plan's prompt is drawn, in at most `preview_share` of the run. Errors are those of
    `library.train`; OptionError also if sidecars would replace the record.
    """
    has_folder = plan.output is not None or host.runs is not None
    plan = with_early_stop(plan, has_folder=has_folder)
    config = plan.job.config
    if plan.denoiser is None and (config.sidecars or whole_program(config).prompts):
        raise OptionError(
            f"previews and sidecars need a model of a known family, got {plan.job.model.title}; leave them out and "
            "draw pictures with code of your own"
        )
    if whole_program(config).prompts and not has_folder:
        raise OptionError("previews need a folder of the run, got no output; set output, such as runs/dog")
    if config.sidecars:
        check_sidecars(plan.title, has_folder=has_folder)
    if config.previews is None and plan.prompt and not config.stops_by_likeness and preview_program(plan) is None:
        plan = replace(plan, job=replace(plan.job, notes=(*plan.job.notes, _NO_PREVIEWS)))
    return run_job(plan, host, engine=engine)
