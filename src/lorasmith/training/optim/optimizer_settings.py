"""Settings of the updates: how many steps, at which rate, by which rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.core.named_code import Code
from lorasmith.core.options import option
from lorasmith.training.optim.update_rules import OPTIMIZERS, RULES, SCHEDULES, check_schedule, rule_of
from lorasmith.training.section import Section

if TYPE_CHECKING:
    from lorasmith.families.forms import Diffusion


def _needed_packages() -> str:
    needing = {name: rule.package for name, rule in RULES.items() if rule.package}
    return f"Packages to install first: {', '.join(f'{package} for {name}' for name, package in needing.items())}."


@dataclass(frozen=True, kw_only=True)
class StepSettings(Section, group="Training"):
    """How many steps of how many images, at which rate."""

    steps: int = option(500, min=1, max=100_000, is_main=True, help="Number of optimizer updates.")
    batch_size: int = option(
        1,
        min=1,
        max=10_000,
        is_main=True,
        costs=True,
        help="Images per forward pass. Larger batches reduce gradient noise and need more memory.",
    )
    grad_accumulation_steps: int = option(
        1,
        min=1,
        max=1024,
        costs=True,
        help="Batches whose gradients are accumulated for one update: a larger effective batch without its memory.",
    )
    learning_rate: float | None = option(
        None,
        min=1e-7,
        max=1.0,
        step=1e-7,
        is_main=True,
        short="rate",
        help="Learning rate. Default: chosen by model and algorithm (1e-4 for LoRA on Stable Diffusion and Flux).",
    )

    @property
    def samples_per_step(self) -> int:
        """Samples of an update, over all of its batches and processes."""
        return self.batch_size * self.grad_accumulation_steps


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(StepSettings, group="Training"):
    """Updates of the weights, and the schedule of their rate."""

    optimizer: Code = option(
        "AdamW",
        choices=OPTIMIZERS,
        code="an optimizer class or a function of parameter groups that makes one, not one of other parameters",
        costs=True,
        help="Update rule, or an optimizer class of your own or of a package by its import path, such as "
        f"torch.optim.NAdam or module:Class. {_needed_packages()}",
    )
    optimizer_args: str | None = option(
        None,
        costs=True,
        help="Further arguments of the optimizer, separated by blanks, such as betas=(0.9,0.99) eps=1e-7.",
    )
    weight_decay: float = option(
        0.01, min=0.0, max=1.0, help="Weight decay, for optimizers that take it; Adam, SGD and RMSprop have none here."
    )
    schedule: Code | None = option(
        None,
        choices=SCHEDULES,
        code="a function of the progress, or one of torch's schedulers with all arguments but its optimizer",
        help="Schedule of the learning rate after the warm-up, or a function of your own by its import path, "
        "module:name. Default: constant if learning_rate is set, otherwise linear decay from twice the model's own "
        "rate.",
    )
    warmup_steps: int = option(
        0, min=0, max=100_000, help="Steps over which the learning rate rises from zero at the start."
    )
    final_rate: float = option(
        0.0, min=0.0, max=1.0, help="Final learning rate of the schedule, as a share of the learning rate."
    )
    schedule_cycles: int = option(3, min=1, max=1000, help="Number of cycles of cosine_restarts.")
    schedule_power: float = option(2.0, min=0.1, max=10.0, help="Exponent of the polynomial schedule.")
    ema_decay: float = option(
        0.0,
        min=0.0,
        max=0.99999,
        costs=True,
        help="Decay of an exponential moving average of the trained weights, which is saved instead of the last "
        "weights. 0 disables it.",
    )
    post_hoc_ema: int = option(
        0,
        min=0,
        max=100,
        costs=True,
        help="Times in a run at which two moving averages of the trained weights are saved, from which `lorasmith "
        "average` makes that of any length afterwards (arXiv:2312.02696). 8 are usual, 0 saves none.",
    )
    max_grad_norm: float = option(
        1.0, min=0.0, max=1e6, help="Gradient norm to which larger gradients are clipped. 0 disables it."
    )

    def own_check(self, diffusion: Diffusion) -> None:
        check_schedule(steps=self.steps, warmup_steps=self.warmup_steps)

    def own_idle(self) -> Iterator[str]:
        if not self.is_default("weight_decay") and not rule_of(self.optimizer).decays:
            yield f"weight_decay {self.weight_decay:g} has no effect with {self.optimizer}, which has none here."
        usual = rule_of(self.optimizer).own_rate
        if usual is not None and self.learning_rate is not None and self.learning_rate <= usual / 10:
            yield (
                f"learning_rate {self.learning_rate:g} multiplies the rate that {self.optimizer} estimates itself; "
                f"{usual:g} is usual."
            )
        schedule = self.schedule or "constant"
        used = {
            "final_rate": schedule != "constant",
            "schedule_cycles": schedule == "cosine_restarts",
            "schedule_power": schedule == "polynomial",
        }
        for name, is_used in used.items():
            if not self.is_default(name) and not is_used:
                yield f"{name} {getattr(self, name):g} has no effect with schedule {self.schedule}."
