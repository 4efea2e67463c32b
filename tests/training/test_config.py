"""Settings: each default stands once in the package, names of choices are those of the tables, nothing needs torch."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_args

import pytest

import lorasmith
from lorasmith.core import choices
from lorasmith.core.errors import OptionError
from lorasmith.core.options import options_of
from lorasmith.core.quantization import PACKINGS
from lorasmith.diffusion.loss_functions import LOSSES
from lorasmith.training.config import ResolvedConfig, TrainConfig
from lorasmith.training.section import Section

SETTINGS = options_of(TrainConfig)

OTHER_CONCEPTS = {
    "families.forms.Defaults": "of a model, where the setting is open",
    "adapters.variants.Variant": "the plain algorithm, whatever a run's settings are",
    "runs.preview_budget.PreviewProgram": "steps after which previews are drawn",
    "runs.sweep_results.SweepEntry": "steps that a run has made so far",
    "report.sweep_page.UnrankedRun": "steps that a run has made so far",
    "server.jobs.job_shapes.SweepRunRow": "steps that a run has made so far",
    "runs.drawing.load_with_loras": "LoRAs of pictures",
    "runs.drawing.with_loras": "LoRAs of pictures",
    "runs.library.evaluate": "the seed of a picture",
    "runs.library.generate": "steps of a sampler, the seed and the LoRAs of a picture",
    "cli.lora_files.convert": "a file's metadata",
    "report.pictures.animation": "the effort of a WebP encoder",
    "core.adapter_state.PeftKind": "the name of a field",
    "cli.train.demo": "the demo's own run",
    "cli.lora_files.extract": "the size of a LoRA made of two checkpoints",
    "cli.generate.generate": "steps of a sampler, the seed and the LoRAs of a picture",
    "cli.evaluate.evaluate": "the seed of a picture",
    "evaluation.evaluation_record.DrawingSettings": "the seed of a picture",
    "diffusion.schedule.DiscreteSchedule.scaled_linear": "the length of a noise schedule",
    "diffusion.schedule.FlowSchedule": "the length of a noise schedule",
    "formats.spelling.spelled": "whether a file has alphas",
    "sampling.generate.generate": "steps of a sampler, and the seed of a picture",
    "sampling.generate.Sampling": "steps of a sampler, and the seed of a picture",
    "server.runs.run_shapes.DrawingBody": "the seed of a picture",
    "server.runs.run_result_answers.draw_request": "the seed of a picture",
    "toolbox.convert.convert_lora": "a file's metadata",
    "toolbox.extract.extract": "whether differences are extracted",
    "training.events.StepDone": "the rate that a step was taken at",
    "training.job._Existing": "steps of a LoRA that is continued",
    "training.run_requests.DrawRequest": "the seed of a picture",
    "training.lora_handle.Lora.merged_into": "one LoRA, wherever it is applied",
    "training.lora_handle.Lora": "whether a graph keeps itself out of the file",
    "training.lora_handle.Lora.applied": "one LoRA, wherever it is applied",
    "training.lora_handle.Lora.applied_to": "one LoRA, wherever it is applied",
    "training.lora_handle.Lora.applied_to_text": "one LoRA, wherever it is applied",
}
"""Where a parameter is called as a setting is and has a default, because it is another thing."""


def callables() -> Iterator[tuple[str, Any]]:
    """Functions, methods and constructors of the package, by name without `lorasmith.`."""
    for module in pkgutil.walk_packages(lorasmith.__path__, "lorasmith."):
        for name, thing in vars(importlib.import_module(module.name)).items():
            if getattr(thing, "__module__", None) != module.name:
                continue
            where = f"{module.name}.{name}".removeprefix("lorasmith.")
            if inspect.isfunction(thing) and not hasattr(thing, "__signature__"):  # which is made of the declarations
                yield where, thing
            elif inspect.isclass(thing) and not issubclass(thing, Section):
                methods = {key: getattr(value, "__func__", value) for key, value in vars(thing).items()}
                for key, method in methods.items():
                    if inspect.isfunction(method) and not hasattr(method, "__signature__"):
                        yield where if key == "__init__" else f"{where}.{key}", method


def second_defaults() -> dict[str, list[str]]:
    """Parameters and fields that are called as a setting is and have a default; None and empty say "not given"."""
    found: dict[str, list[str]] = {}
    for where, function in callables():
        for parameter in inspect.signature(function).parameters.values():
            is_given = parameter.default not in (None, inspect.Parameter.empty)
            if parameter.name in SETTINGS and is_given and repr(parameter.default) != "<factory>":
                found.setdefault(where, []).append(f"{parameter.name}={parameter.default!r}")
    return found


def test_the_default_of_a_setting_stands_in_one_place() -> None:
    found = second_defaults()
    assert {where: names for where, names in found.items() if where not in OTHER_CONCEPTS} == {}
    assert OTHER_CONCEPTS.keys() - found.keys() == set(), "an exception that nothing needs any more"


def test_tables_have_an_entry_for_each_choice() -> None:
    assert set(get_args(choices.Quantization)) == set(PACKINGS)
    for registry in (LOSSES, choices.WEIGHTINGS, choices.TIMESTEP_DISTRIBUTIONS):
        assert [name for name, _ in registry.items()] == list(registry)


def test_choices_are_those_of_the_annotated_type_or_of_the_registry() -> None:
    assert SETTINGS["activations"].choices == get_args(choices.ActivationPlan)
    assert SETTINGS["timesteps"].choices is choices.TIMESTEP_DISTRIBUTIONS
    assert SETTINGS["timesteps"].type is str


def test_settings_are_declared_without_torch() -> None:
    program = "import sys, lorasmith.training.config as c; c.TrainConfig(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_resolved_settings_have_nothing_open() -> None:
    decided = {"learning_rate": 1e-4, "alpha": 4.0, "targets": "all", "schedule": "constant", "timesteps": "uniform"}
    decided |= {"min_noise": 0.0, "max_noise": 1.0}
    config = ResolvedConfig.of(TrainConfig(rank=4), **decided, training_dtype="fp32")
    assert (config.rank, config.alpha, config.steps) == (4, 4.0, SETTINGS["steps"].default)
    assert options_of(ResolvedConfig).keys() == SETTINGS.keys()
    with pytest.raises(OptionError, match="training_dtype must be one of bf16, fp32, none, got 'auto'"):
        ResolvedConfig.of(TrainConfig(), **decided)
    with pytest.raises(AssertionError):
        ResolvedConfig.of(TrainConfig(), **{**decided, "timesteps": None}, training_dtype="fp32")
