"""Settings of noise levels, noise and loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorasmith.core.choices import (
    TIMESTEP_DISTRIBUTIONS,
    WEIGHTINGS,
    Objective,
)
from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import Code
from lorasmith.core.options import option
from lorasmith.diffusion.loss_functions import LOSSES, check_loss
from lorasmith.training.section import Section

if TYPE_CHECKING:
    from lorasmith.families.forms import Diffusion

USUAL_TRAINING_GUIDANCE = 1.0
"""That of the other trainers: pictures to train on are not guided ones (docs/models.md)."""


@dataclass(frozen=True, kw_only=True)
class LossSettings(Section, group="Training"):
    """Noise levels, noise and loss."""

    loss_function: Code = option(
        "MSE",
        choices=LOSSES,
        code="a function of prediction, target and batch that returns a loss for each sample",
        help="Distance between prediction and target, or a function of your own by its import path, module:name.",
    )
    objective: Objective = option(
        "native",
        help="What the loss compares: native the model's prediction (noise, velocity or flow), x0 the clean picture "
        "as in ComfyUI's trainer, which puts most of the weight on the noisiest timesteps.",
    )
    timesteps: Code | None = option(
        None,
        choices=TIMESTEP_DISTRIBUTIONS,
        code="a function of uniform numbers that returns quantiles of the noise levels",
        help="Distribution of the noise levels: shifted is uniform with timestep_shift, sigmoid is an alias of "
        "logit_normal; or a function of your own by its import path, module:name. Default: the model's own.",
    )
    timestep_shift: float | None = option(
        None,
        min=0.01,
        max=100.0,
        help="Shift of the noise levels towards the noisy end, in place of the model's own; 1 is none. Default: "
        "computed from the size of the picture with shifted, the model's own with the others.",
    )
    min_noise: float | None = option(
        None,
        min=0.0,
        max=0.99,
        help="Least noise level in training, as diffusion time from 0 for clean to 1 for noise. Default: 0; for an "
        "expert, known by its file's name, the least of its own.",
    )
    max_noise: float | None = option(
        None,
        min=0.01,
        max=1.0,
        help="Greatest noise level in training. Default: 1; for an expert the greatest of its own.",
    )
    stratified: bool = option(
        True,
        help="Stratify the noise levels of consecutive draws, so that each batch covers the range. The distribution "
        "is the same and the gradient varies less.",
    )
    loss_weighting: str = option(
        "none",
        choices=WEIGHTINGS,
        help="Weight of a noise level in the loss: min_snr caps it at min_snr_gamma towards the clean end, "
        "soft_min_snr does so smoothly; debiased and p2 lower the weight of the clean end of epsilon models, "
        "sigma_sqrt and cosmap are for flows.",
    )
    min_snr_gamma: float = option(
        5.0, min=0.01, max=1000.0, help="Signal-to-noise ratio at which min_snr and soft_min_snr level off."
    )
    noise_offset: float = option(
        0.0,
        min=0.0,
        max=1.0,
        help="Strength of additional noise that is constant over the picture, one value per channel, for training "
        "very dark and very bright pictures. 0.03 to 0.1 are usual.",
    )
    training_guidance: float | None = option(
        None,
        min=0.0,
        max=100.0,
        of_model=True,
        help="Input of guidance while training, for models with distilled guidance; previews have their own. 0 is what "
        f"the model draws with, or that of a graph's conditioning. Default: {USUAL_TRAINING_GUIDANCE:g}.",
    )
    pyramid_noise: float = option(
        0.0,
        min=0.0,
        max=0.99,
        help="Discount of noise of coarser scales, each so much fainter than the one before, for older epsilon models; "
        "0.3 is usual. 0 disables it.",
    )
    input_perturbation: float = option(
        0.0,
        min=0.0,
        max=1.0,
        help="Further noise in the model's input that is not in its target (arXiv:2301.11706), against accumulating "
        "errors; 0.1 is usual.",
    )
    huber_c: float = option(
        0.1, min=1e-6, max=100.0, help="Error from which the loss PseudoHuber is linear, so that outliers count less."
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = option(
        "constant", help="huber_c over noise levels: exponential and snr raise it to 1 towards the clean end."
    )
    huber_scale: float = option(
        1.0, min=1e-3, max=1000.0, help="Factor of the scheduled huber_c, of constant and exponential."
    )
    zero_terminal_snr: bool = option(
        False,
        help="Rescale the noise schedule so that its last step is pure noise. Only for v-prediction models of the "
        "Stable Diffusion kind; pictures must be sampled with the same schedule.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        least, greatest = self.min_noise or 0.0, 1.0 if self.max_noise is None else self.max_noise
        if least >= greatest:
            raise OptionError(f"min_noise must be below max_noise, got {least:g} and {greatest:g}; swap them")

    def own_check(self, diffusion: Diffusion) -> None:
        from lorasmith.diffusion.own_functions import check_timesteps, check_weighting
        from lorasmith.diffusion.schedule import check_noising

        schedule, parameterization = diffusion.schedule, diffusion.parameterization
        check_noising(schedule, parameterization, zero_terminal_snr=self.zero_terminal_snr)
        check_loss(self.loss_function)
        if isinstance(self.timesteps, str):
            check_timesteps(self.timesteps)
        check_weighting(
            self.loss_weighting,
            gamma=self.min_snr_gamma,
            schedule=schedule,
            parameterization=parameterization,
            objective=self.objective,
        )

    def own_idle(self) -> Iterator[str]:
        if self.loss_function != "PseudoHuber":
            names = ("huber_c", "huber_schedule", "huber_scale")
            yield from self.has_no_effect(*names, without="loss_function PseudoHuber")
        elif self.huber_schedule == "snr" and not self.is_default("huber_scale"):
            yield f"huber_scale {self.huber_scale:g} has no effect with huber_schedule snr."
        if "min_snr" not in self.loss_weighting:
            yield from self.has_no_effect("min_snr_gamma", without="loss_weighting min_snr or soft_min_snr")
        if self.loss_weighting != "none" and self.objective == "x0" and self.loss_function == "MSE":
            yield (
                f"objective x0 has no effect with loss_weighting {self.loss_weighting}, which weights the error of the "
                "clean picture for either objective; it has one with a loss_function other than MSE."
            )
