"""Every setting of a training run, declared once: nodes, command line, library and reference pages derive from here.
Each section stands beside the code that it sets.

The defaults are the best known ones; `Train LoRA` in a graph overrides those in which ComfyUI's differ, so that a graph
keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import is_import_path
from lorasmith.core.options import Option, config_from, option, options_of, short_repr
from lorasmith.training.adapter_settings import LoraSettings, VariantSettings
from lorasmith.training.loss_settings import LossSettings
from lorasmith.training.memory.memory_settings import MemorySettings
from lorasmith.training.methods.method_settings import MethodSettings
from lorasmith.training.optim.optimizer_settings import OptimizerSettings, StepSettings
from lorasmith.training.optim.update_rules import rate_factor
from lorasmith.training.section import Section
from lorasmith.training.text_encoder_settings import TextEncoderSettings
from lorasmith.training.watcher_settings import WatcherSettings

DtypeSetting = Literal["bf16", "fp32", "none"]
"""Resolved values of `training_dtype`."""


def config_over(base: TrainConfig | None, settings: Mapping[str, Any]) -> TrainConfig:
    """`base` with the settings that Python code gives, in which `loss` may stand for `loss_function`."""
    others = dict(settings)
    if (loss := others.pop("loss", None)) is not None:
        if "loss_function" in others:
            raise OptionError("loss and loss_function are one setting, got both; leave one of them out")
        others["loss_function"] = loss
    config: TrainConfig = config_from(TrainConfig, {**(vars(base) if base else {}), **others})
    return config


def settings_from_file(values: Mapping[str, Any]) -> TrainConfig:
    """Settings from a file, such as a graph. Raises OptionError as `names_alone` and `config_from`."""
    config: TrainConfig = config_from(TrainConfig, names_alone(values))
    return config


def names_alone(
    values: Mapping[str, Any], *, imports: Collection[str] = (), track: str | None = None, allowing: str | None = None
) -> dict[str, Any]:
    """Settings from a file, such as a graph or a run record, restricted to registered names.

    Importing code runs it and a tracker uploads numbers, so the user must type both: `imports` are the import paths
    that are accepted (otherwise OptionError), `track` replaces the file's, and messages name the flag `allowing`, or
    that of the setting.
    """
    for name, declared in code_settings().items():
        value = values.get(name)
        if isinstance(value, str) and is_import_path(value) and value not in imports and not declared.offers(value):
            typed = f"{allowing or '--' + name.replace('_', '-')} {value}"
            raise OptionError(
                f"{name} in a file must be one of {', '.join(declared.choices) or 'those of installed packages'}, got "
                f"{value!r}: importing it would run code; if you trust that, type {typed}"
            )
    own = {key: value for key, value in values.items() if key != "track"}
    return own if track is None else {**own, "track": track}


@dataclass(frozen=True, kw_only=True)
class NumberSettings(Section, group="Precision and reproducibility"):
    """Number formats and the seed."""

    seed: int = option(
        0,
        min=0,
        max=2**64 - 1,
        help="Seed of initial weights, order, noise and timesteps: the same seed gives the same LoRA.",
    )
    training_dtype: Literal["auto", "bf16", "fp32", "none"] = option(
        "auto",
        of_model=True,
        costs=True,
        help="Number format of matrix products. Trained weights are always updated in fp32. auto is bf16 where the "
        "device has units for it, else fp32; on a CPU with such units, runs of 100 steps or more time both first. none "
        "keeps the format of the loaded model. Products in a format that the device would emulate are in fp32, which "
        "is faster; see exact_dtype.",
    )
    exact_dtype: bool = option(
        False,
        changes_numbers=False,
        costs=True,
        help="Compute products in training_dtype even where the device has no units for it and emulates them, slowly. "
        "A resumed run does so, as its products keep their format.",
    )
    lora_dtype: Literal["bf16", "fp32"] = option("bf16", help="Number format of the saved LoRA.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    WatcherSettings,
    MemorySettings,
    NumberSettings,
    TextEncoderSettings,
    MethodSettings,
    LossSettings,
    OptimizerSettings,
    VariantSettings,
    LoraSettings,
    StepSettings,
    group="Precision and reproducibility",
):
    """Settings of one run. Raises OptionError for values of the wrong type or out of range."""

    # A dataclass has the fields of its last base first.
    deterministic: bool = option(
        False,
        of_model=True,
        costs=True,
        help="Use only deterministic GPU kernels, at some cost in speed; CPU kernels always are.",
    )
    private: bool = option(
        False,
        changes_numbers=False,
        help="Leave paths, prompts, captions and the workflow out of the LoRA's metadata. The run folder still holds "
        "them.",
    )

    __repr__ = short_repr


WHOLE_RANGE = (0.0, 1.0)
"""Noise levels of a model that has no experts."""


class ResolvedConfig(TrainConfig):
    """Settings with every open one (None or `auto`) resolved from model, algorithm and device."""

    # A setting of `code_settings` is a `NamedCode` if Python code passed a class or function.
    optimizer: str
    loss_function: str
    learning_rate: float
    alpha: float
    targets: str
    schedule: str
    timesteps: str
    min_noise: float
    max_noise: float
    training_dtype: DtypeSetting

    def __post_init__(self) -> None:
        super().__post_init__()
        assert all(getattr(self, name) is not None for name in ResolvedConfig.__annotations__)

    @property
    def noise_range(self) -> tuple[float, float]:
        return self.min_noise, self.max_noise

    def scheduled(self, step: int) -> float:
        """Factor of all learning rates at a step of the run, counted from 0."""
        return rate_factor(
            step,
            schedule=self.schedule,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            final_rate=self.final_rate,
            cycles=self.schedule_cycles,
            power=self.schedule_power,
            learning_rate=self.learning_rate,
        )

    @classmethod
    def of(cls, config: TrainConfig, **decided: Any) -> ResolvedConfig:
        return cls(**{**vars(config), **decided})


def code_settings() -> dict[str, Option]:
    """The settings that may name functions and classes of users."""
    return {name: declared for name, declared in options_of(TrainConfig).items() if declared.code}


def cost_options() -> dict[str, Option]:
    """The options that affect time or memory of a step."""
    return {name: declared for name, declared in options_of(TrainConfig).items() if declared.costs}
