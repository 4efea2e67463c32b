"""Settings of what surrounds the steps of a run: validation, previews, run states and files on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lorasmith.core.options import option
from lorasmith.training.section import Section

_LIKENESS_PATIENCE = 2  # previews
_AUTO_PATIENCE = 3  # validations


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(Section, group="Validation and previews"):
    """Held-out images, and when a run stops early."""

    validation_share: float | None = option(
        None,
        min=0.0,
        max=0.5,
        help="Share of the images that is held out for validation. Default: a tenth from 12 images on, none below.",
    )
    validate_every: int | None = option(
        None, min=1, max=100_000, help="Steps between validations. Default: a tenth of the run."
    )
    validation_draws: int = option(8, min=2, max=1000, help="Noise levels at which each held-out image is evaluated.")
    early_stop: Literal["validation", "likeness", "auto"] = option(
        "validation",
        changes_numbers=False,
        help="What ends a run before its steps: validation, where the loss of held-out images no longer falls; "
        "likeness, where previews look no more like the images than before and follow prompts less. likeness needs the "
        "extra likeness, and draws the trigger with four wishes, ten times in a run. auto is likeness, drawn as often "
        "as a quarter of the work of training allows, or validation where that is too seldom or cannot be drawn.",
    )
    patience: int | None = option(
        None,
        min=0,
        max=1000,
        changes_numbers=False,
        help="Stop after this many validations, or previews with early_stop likeness, without improvement; the best "
        "LoRA is saved either way. Default: 0, which disables early stopping, 2 with early_stop likeness, and 3 "
        "validations with auto.",
    )

    @property
    def stop_patience(self) -> int:
        """`patience`, or its default."""
        if self.patience is not None:
            return self.patience
        return {"likeness": _LIKENESS_PATIENCE, "auto": _AUTO_PATIENCE}.get(self.early_stop, 0)

    @property
    def stops_by_likeness(self) -> bool:
        return self.early_stop == "likeness" and self.stop_patience > 0

    def own_idle(self) -> Iterator[str]:
        if self.early_stop != "validation" and not self.stop_patience:
            yield f"early_stop {self.early_stop} has no effect with patience 0."


@dataclass(frozen=True, kw_only=True)
class PreviewSettings(Section, group="Validation and previews", changes_numbers=False):
    """Pictures on the way, and trackers."""

    previews: str | None = option(
        None,
        is_main=True,
        is_prompt=True,
        help="Prompts of previews during training, separated by |, drawn with and without the LoRA. Default: the "
        "trigger or a caption on a folder of images, in at most preview_share of the run; none in workflows and in "
        "runs too short for that. An empty text is none.",
    )
    preview_share: float = option(
        0.1,
        min=0.0,
        max=1.0,
        help="Share of the work of training that previews without prompts of yours, and the evaluation in the end, may "
        "take.",
    )
    preview_every: int | None = option(
        None,
        min=1,
        max=100_000,
        help="Steps between previews. Default: after 30 steps, a twentieth, a quarter, a half and three quarters of "
        "the run. The base model is drawn before the first step, and the finished LoRA always.",
    )
    preview_strengths: str | None = option(
        None,
        help="Strengths at which the finished LoRA is drawn, separated by commas. Default: 0.5,1, and of a slider "
        "-2,-1,1,2.",
    )
    preview_steps: int | None = option(
        None, min=1, max=1000, help="Sampling steps of a preview. Default: 20, and fewer of a distilled model."
    )
    preview_frames: int | None = option(
        None,
        min=1,
        max=257,
        help="Frames of a preview, for models of videos; other numbers than one more than a multiple of 4 are rounded "
        "down, and 1 is a picture. Default: the model's.",
    )
    track: Literal["none", "tensorboard", "wandb"] = option(
        "none",
        door="typed",
        help="Log losses and rates to TensorBoard (in the folder of the run) or to Weights & Biases, if installed.",
    )


@dataclass(frozen=True, kw_only=True)
class SavingSettings(Section, group="Saving and recovery", changes_numbers=False):
    """Run states, files on the way and rollbacks."""

    save_state_every: int = option(
        100,
        min=0,
        max=100_000,
        help="Steps between saves of the run state, from which an interrupted run resumes. 0 saves none by steps.",
    )
    save_state_minutes: float = option(
        10.0,
        min=0.0,
        max=10_000.0,
        help="Minutes between saves of the run state, whichever comes first. 0 saves none by time.",
    )
    keep_states: int = option(2, min=1, max=1000, help="Number of run states to keep; older ones are deleted.")
    save_every: int = option(
        0,
        min=0,
        max=100_000,
        help="Steps between LoRAs that are kept on the way, named by their step, such as dog-step00000100. 0 keeps "
        "none.",
    )
    sidecars: bool = option(
        False,
        help="Write trigger, base model and hashes of the LoRA into files beside it, for model browsers: "
        "NAME.civitai.info (Civitai Helper, LoRA Manager) and NAME.json (A1111, Forge).",
    )
    max_rollbacks: int = option(
        3,
        min=0,
        max=100,
        changes_numbers=True,
        help="Number of rollbacks to the last good snapshot, each halving the learning rate, when the loss explodes or "
        "becomes NaN, before the run stops.",
    )


@dataclass(frozen=True, kw_only=True)
class WatcherSettings(SavingSettings, PreviewSettings, ValidationSettings):
    """What surrounds the steps of a run."""
