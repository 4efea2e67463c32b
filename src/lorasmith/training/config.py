"""Every setting of a training run, declared once: nodes, command line, library and reference pages derive from here.

The defaults are the best known ones; `Train LoRA` in a graph overrides those in which ComfyUI's differ, so that a graph
keeps its meaning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lorasmith.adapters.catalogue import ADAPTERS, ALGORITHMS, known_facts
from lorasmith.core.choices import (
    TIMESTEP_DISTRIBUTIONS,
    WEIGHTINGS,
    ActivationPlan,
    AttentionChoice,
    Objective,
    ProductFormat,
    Quantization,
)
from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import Code, is_import_path
from lorasmith.core.options import Option, check_options, config_from, option, options_of, short_repr
from lorasmith.core.rank_schedule import RankSchedule
from lorasmith.diffusion.loss_functions import LOSSES
from lorasmith.training.optim.update_rules import OPTIMIZERS, RULES, SCHEDULES, rate_factor, rule_of

DtypeSetting = Literal["bf16", "fp32", "none"]
"""Resolved values of `training_dtype`."""

NONE_LORA = "[None]"
"""Value of LoRA file settings for no file, as in ComfyUI's list."""

USUAL_TRAINING_GUIDANCE = 1.0
"""That of the other trainers: pictures to train on are not guided ones (docs/models.md)."""

_FACTORS = ", ".join(name for name, facts in ALGORITHMS.items() if facts.rank_meaning == "factor")
_BLOCKS = " and ".join(name for name, facts in ALGORITHMS.items() if facts.rank_meaning == "block size")


def _needed_packages() -> str:
    needing = {name: rule.package for name, rule in RULES.items() if rule.package}
    return f"Packages to install first: {', '.join(f'{package} for {name}' for name, package in needing.items())}."


def unused_settings(algorithm: str) -> frozenset[str]:
    """Settings that have no effect with an algorithm, whose name may be in any case; empty if it is not known yet."""
    facts = known_facts(algorithm)
    return frozenset() if facts is None else facts.unused


def config_over(base: TrainConfig | None, settings: Mapping[str, Any]) -> TrainConfig:
    """`base` with the settings that Python code gives, in which `loss` may stand for `loss_function`."""
    given = dict(settings)
    if (loss := given.pop("loss", None)) is not None:
        if "loss_function" in given:
            raise OptionError("loss and loss_function are one setting, got both; leave one of them out")
        given["loss_function"] = loss
    config: TrainConfig = config_from(TrainConfig, {**(vars(base) if base else {}), **given})
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
                f"{name} in a file must be one of {', '.join(declared.choices)}, got {value!r}: importing it would run "
                f"code; if you trust that, type {typed}"
            )
    own = {key: value for key, value in values.items() if key != "track"}
    return own if track is None else {**own, "track": track}


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of a section of settings, in which the rules between them stand; keywords are details that all share."""

    SHARED: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **shared: Any) -> None:
        super().__init_subclass__()
        cls.SHARED = shared

    def __post_init__(self) -> None:
        check_options(self)

    def is_default(self, name: str) -> bool:
        return bool(getattr(self, name) == options_of(type(self))[name].default)

    def idle_settings(self) -> Iterator[str]:
        """A sentence for each setting of the section that has no effect beside the others."""
        yield from ()


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
class LoraSettings(Section, group="LoRA and targets"):
    """The adapters, and the layers that get one."""

    rank: int = option(
        16,
        min=1,
        max=128,
        is_main=True,
        of_fresh=True,
        costs=True,
        help="Inner dimension of the LoRA: sets its capacity and the size of the file. Capped at each layer's size. "
        f"For {_FACTORS} it is the factor, for {_BLOCKS} the block size.",
    )
    alpha: float | None = option(
        None,
        min=0.0,
        max=100_000.0,
        of_fresh=True,
        costs=True,
        help="The LoRA is scaled by alpha / rank. Default: the rank, a scale of 1, so that the learning rate keeps its "
        f"meaning when the rank changes. For {_BLOCKS} it bounds the rotation; 0, the default there, sets no bound.",
    )
    targets: str | None = option(
        None,
        costs=True,
        help="Which layers are trained: attention, attention+ff, transformer, all-linear, all, or patterns on module "
        "paths such as *.attn2.*, separated by commas. A pattern may be followed by its own settings "
        "(rank=32 alpha=16 lr=2e-4); ! in front excludes. none trains a new_word or text encoders alone. Default: the "
        "preset of the model's family.",
    )
    algorithm: str = option(
        "LoRA",
        choices=ADAPTERS,
        of_fresh=True,
        costs=True,
        help="Kind of adapter. " + " ".join(f"{name}: {facts.summary}" for name, facts in ALGORITHMS.items()),
    )
    differences: Literal["none", "norms", "biases", "norms+biases"] = option(
        "none",
        costs=True,
        help="Also train differences of norms (all norms of the model) or biases (those of the target layers). "
        "ComfyUI and A1111 apply them; other programs ignore them or refuse the file.",
    )
    zero_init: Literal["up", "down"] = option(
        "up",
        of_fresh=True,
        costs=True,
        help="Which of the two matrices starts at zero: up is usual, down is ComfyUI's choice.",
    )
    existing_lora: str | None = option(
        None,
        is_path=True,
        help="LoRA file to continue training. Its layers keep their algorithm, rank and alpha, and its step count "
        "continues.",
    )
    existing_state: str | None = option(
        None,
        is_path=True,
        door="typed",
        help="Run state from which the run starts, optimizer and steps included: that of a finished run of the same "
        "settings and images with fewer steps. `lorasmith resume RUN --steps N` sets it.",
    )
    training_adapter: str | None = option(
        None,
        is_path=True,
        help="LoRA file that is applied to the model while training, and left out of previews and of the saved LoRA, "
        "such as one that lets a distilled model be trained.",
    )
    strict: bool = option(
        False,
        changes_numbers=False,
        costs=True,
        help="Refuse an existing_lora or training_adapter of which a part does not apply to the model, instead of a "
        "note.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in lora_settings():
            if getattr(self, name) == NONE_LORA:
                object.__setattr__(self, name, None)


@dataclass(frozen=True, kw_only=True)
class VariantSettings(LoraSettings, group="Variants of the algorithm", costs=True):
    """Variants of the algorithm, and dropout."""

    dora: Literal["none", "input", "output"] = option(
        "none",
        of_fresh=True,
        help="DoRA: train magnitude and direction of the weight separately. input has one magnitude per input, which "
        "ComfyUI and A1111 reproduce; output has one per output, as in the paper and PEFT.",
    )
    rslora: bool = option(
        False,
        of_fresh=True,
        help="Scale by alpha / √rank, which suits high ranks better. The default of alpha is then 4: a scale of 1 at "
        "rank 16.",
    )
    pissa: bool = option(
        False,
        of_fresh=True,
        help="Start from the principal components of each weight (PiSSA). The file is a plain LoRA of twice the rank.",
    )
    tucker: bool = option(
        False,
        of_fresh=True,
        help="Decompose convolutions larger than 1×1 into a core between two small matrices, with far fewer "
        "parameters. In the portable layout the core is multiplied in.",
    )
    tlora: Literal["none", "plain", "orthogonal"] = option(
        "none",
        help="T-LoRA: the noisier a sample, the fewer ranks it uses, against overfitting to one or few pictures. "
        "orthogonal starts from singular vectors of a random matrix, so that ranks differ; the file has twice the "
        "rank. Other programs use all ranks at each noise level; `lorasmith bands` cuts the file for ComfyUI.",
    )
    tlora_min_rank: int = option(1, min=1, max=127, help="Ranks that T-LoRA uses in pure noise; below the rank.")
    tlora_alpha: float = option(
        1.0,
        min=0.1,
        max=10.0,
        help="Exponent of T-LoRA's ranks over noise levels: 1 is linear, above 1 uses fewer between the ends.",
    )
    lora_plus_ratio: float = option(
        1.0, min=0.01, max=1000.0, help="LoRA+: the learning rate of the up matrix as a multiple of the learning rate."
    )
    rank_dropout: float = option(
        0.0, min=0.0, max=0.95, help="Probability of dropping each inner dimension of a layer for a sample."
    )
    module_dropout: float = option(
        0.0, min=0.0, max=0.95, help="Probability of dropping a layer's whole LoRA for a sample."
    )

    @property
    def rank_schedule(self) -> RankSchedule | None:
        """Ranks by noise level; None for all at every level."""
        return None if self.tlora == "none" else RankSchedule(self.tlora_min_rank, self.tlora_alpha)

    def __post_init__(self) -> None:
        super().__post_init__()
        facts = known_facts(self.algorithm)  # that of an extension is known where it trains; see `plan_job`
        for name in sorted(frozenset().union(*(facts.variants for facts in ALGORITHMS.values()))):
            if facts is not None and name not in facts.variants and not self.is_default(name):
                takers = ", ".join(kind for kind, facts in ALGORITHMS.items() if name in facts.variants)
                raise OptionError(f"{name} is for {takers}, got algorithm {self.algorithm}; leave one of the two out")
        if self.pissa and self.tucker:
            raise OptionError("pissa and tucker are two starts of a convolution, got both; leave one of them out")
        if self.tlora == "none":
            return
        mixing = {"dora": "whose magnitudes are", "tucker": "whose core is", "pissa": "whose start is"}
        for name, what in mixing.items():
            if not self.is_default(name):
                raise OptionError(
                    f"tlora uses some of the ranks, got {name}, {what} of all of them; leave one of the two out"
                )
        if self.tlora_min_rank >= self.rank:
            raise OptionError(
                f"tlora_min_rank must be below the rank, {self.rank}, got {self.tlora_min_rank}; raise the rank"
            )

    def idle_settings(self) -> Iterator[str]:
        start = "pissa" if self.pissa else "tlora orthogonal" if self.tlora == "orthogonal" else ""
        for name in sorted({"zero_init"} if start else unused_settings(self.algorithm)):
            if not self.is_default(name):
                variant = start or self.algorithm
                yield f"{name} {getattr(self, name)} has no effect with {variant}, which does not use it."
        if self.tlora == "none":
            for name in ("tlora_min_rank", "tlora_alpha"):
                if not self.is_default(name):
                    yield f"{name} {getattr(self, name):g} has no effect without tlora."


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

    def idle_settings(self) -> Iterator[str]:
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

    def idle_settings(self) -> Iterator[str]:
        if self.loss_function != "PseudoHuber":
            for name in ("huber_c", "huber_schedule", "huber_scale"):
                if not self.is_default(name):
                    yield f"{name} {getattr(self, name)} has no effect without loss_function PseudoHuber."
        elif self.huber_schedule == "snr" and not self.is_default("huber_scale"):
            yield f"huber_scale {self.huber_scale:g} has no effect with huber_schedule snr."
        if "min_snr" not in self.loss_weighting and not self.is_default("min_snr_gamma"):
            yield f"min_snr_gamma {self.min_snr_gamma:g} has no effect without loss_weighting min_snr or soft_min_snr."
        if self.loss_weighting != "none" and self.objective == "x0" and self.loss_function == "MSE":
            yield (
                f"objective x0 has no effect with loss_weighting {self.loss_weighting}, which weights the error of the "
                "clean picture for either objective; it has one with a loss_function other than MSE."
            )


_WORD = re.compile(r"(?=.*[^\W_])[\w<>-]{1,60}")
"""What `new_word` may be: no part of the syntax of prompts, and one part of the key of a tensor."""


def guidance_range(text: str) -> tuple[float, float]:
    """Least and greatest guidance of `guidance_loss`. Raises OptionError."""
    try:
        least, *most = map(float, text.split("-"))
        greatest = most.pop() if most else least
    except ValueError:
        least, greatest, most = 0.0, 0.0, []
    if most or not 1 <= least <= greatest <= 100:
        raise OptionError(f"guidance_loss must be a number from 1 to 100, or a range such as 2-4, got {text!r}")
    return least, greatest


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Section, group="Methods", costs=True):
    """What a step does besides comparing one prediction with its target; see `training.methods`."""

    preserve: Literal["none", "class", "blank"] = option(
        "none",
        help="Output preservation, without pictures of the class: hold the prediction for another text to the base "
        "model's. class is the caption with preserve_class in place of the trigger, blank the empty text, which keeps "
        "the unconditional side of guidance. A step takes 2.4 times as long.",
    )
    preserve_class: str | None = option(
        None, is_prompt=True, help="Name of the subject's class for preserve class, such as dog or person."
    )
    preserve_weight: float = option(1.0, min=0.0, max=1000.0, help="Weight of the loss of preserve.")
    weight_change: float = option(
        0.0,
        min=0.0,
        max=1000.0,
        help="Weight in the loss of the squared change of all weights (arXiv:2505.19519), which keeps what the model "
        "knew; of low-rank adapters. 0 disables it.",
    )
    prior_target: Literal["picture", "model"] = option(
        "picture",
        help="Target of pictures of the class (prior preservation): the picture, which the base model should have "
        "drawn, or what the base model predicts for it, for which any pictures of the class serve.",
    )
    mask_prior_weight: float = option(
        0.0,
        min=0.0,
        max=1000.0,
        help="Weight of the loss outside of masks towards what the base model predicts there, which keeps backgrounds "
        "as they are. 0 disables it; 0.5 is usual.",
    )
    guidance_loss: str | None = option(
        None,
        help="Guidance loss, for models with distilled guidance: the guidance by which targets are guided, which is "
        "also the model's input, as a number or a range to draw from, such as 3 or 2-4. Default: none.",
    )
    guidance_loss_schedule: Literal["constant", "sigma"] = option(
        "constant", help="Guidance of guidance_loss over noise levels: sigma has it fall to 1 towards the clean end."
    )
    tread_rate: float = option(
        0.0,
        group="Speed",
        min=0.0,
        max=0.9,
        help="Share of a picture's tokens that skip the blocks in the middle of a transformer (TREAD, "
        "arXiv:2501.04765), others in each step, which makes steps faster. Text, controls and, as far as the share "
        "allows, what is inside of masks go through all blocks. 0 disables it; 0.1 to 0.25 suit LoRAs.",
    )
    tread_first: int = option(
        2,
        group="Speed",
        min=-1000,
        max=1000,
        help="First block that tokens skip, counted from 0 over all blocks, or from -1 backwards.",
    )
    tread_last: int = option(
        -2, group="Speed", min=-1000, max=1000, help="Last block that tokens skip, counted likewise."
    )

    pairs: Literal["none", "slider", "dpo"] = option(
        "none",
        help="Train on pairs of pictures: each image, and its control as its opposite, of the same name. slider makes "
        "the LoRA's strength the amount of what differs, images at 1 and opposites at -1; a step takes twice as long. "
        "dpo has the model prefer images to their opposites (Diffusion-DPO, Flow-DPO), three times as long.",
    )
    pair_focus: float = option(
        1.0,
        min=0.0,
        max=1.0,
        help="Share of the weight of the loss of pairs slider that follows how much the pictures of a pair differ at a "
        "place; with 0 all places weigh alike.",
    )
    dpo_beta: float = option(
        5000.0,
        min=0.1,
        max=1e6,
        help="Strength with which pairs dpo holds the model to the base model; the paper has 2000 for Stable Diffusion "
        "1 and 5000 for SDXL.",
    )
    slider_positive: str | None = option(
        None,
        is_prompt=True,
        help="Prompt of a slider's positive end: train a LoRA whose strength is the amount of an attribute, from "
        "prompts. The pictures are not learnt, but what the prompts make of them.",
    )
    slider_negative: str = option("", is_prompt=True, help="Prompt of a slider's negative end.")
    slider_neutral: str | None = option(
        None, is_prompt=True, help="Prompt between a slider's ends. Default: the caption of each picture."
    )
    slider_anchors: str | None = option(
        None, is_prompt=True, help="Prompts that a slider must not change, separated by |."
    )
    slider_guidance: float = option(3.0, min=0.1, max=100.0, help="Distance of a slider's ends at strengths of ±1.")

    @property
    def is_slider(self) -> bool:
        """Whether the strength of the LoRA is the amount of an attribute, negative ones included."""
        return self.slider_positive is not None or self.pairs == "slider"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slider_positive is not None and self.slider_positive == self.slider_negative:
            raise OptionError(
                f"the ends of a slider must be two prompts, got {self.slider_positive!r} for both; change "
                "slider_negative"
            )
        if self.preserve == "class" and not (self.preserve_class or "").strip():
            raise OptionError("preserve class needs the name of the class, got none; set preserve_class, such as dog")
        if self.guidance_loss is not None:
            guidance_range(self.guidance_loss)

    def idle_settings(self) -> Iterator[str]:
        if self.preserve_class is not None and self.preserve != "class":
            yield f"preserve_class {self.preserve_class} has no effect without preserve class."
        if not self.is_default("preserve_weight") and self.preserve == "none":
            yield f"preserve_weight {self.preserve_weight:g} has no effect without preserve."
        if self.slider_positive is None:
            for name in options_of(MethodSettings):
                if name.startswith("slider_") and not self.is_default(name):
                    yield f"{name} {getattr(self, name)} has no effect without slider_positive."
        for name in ("tread_first", "tread_last"):
            if not self.tread_rate and not self.is_default(name):
                yield f"{name} {getattr(self, name)} has no effect without tread_rate."
        if not self.is_default("pair_focus") and self.pairs != "slider":
            yield f"pair_focus {self.pair_focus:g} has no effect without pairs slider."
        if not self.is_default("dpo_beta") and self.pairs != "dpo":
            yield f"dpo_beta {self.dpo_beta:g} has no effect without pairs dpo."
        if self.guidance_loss is None and not self.is_default("guidance_loss_schedule"):
            yield f"guidance_loss_schedule {self.guidance_loss_schedule} has no effect without guidance_loss."


@dataclass(frozen=True, kw_only=True)
class TextEncoderSettings(Section, group="Text encoders"):
    """Adapters on the text encoders."""

    train_text_encoder: bool = option(
        False,
        costs=True,
        help="Train the CLIP text encoders as well, with the algorithm of the LoRA, for words that the model does not "
        "know: those of Stable Diffusion 1 and 2, SDXL, SD 3.5 and Flux.1. They stay on the device, and captions are "
        "encoded in every step. rank_dropout and module_dropout leave them out.",
    )
    text_encoder_rate: float | None = option(
        None,
        min=1e-8,
        max=1.0,
        step=1e-8,
        help="Learning rate of the text encoders. Default: a tenth of the learning rate, or all of it with an "
        "optimizer that estimates rates itself.",
    )
    text_encoder_rank: int | None = option(
        None, min=1, max=128, of_fresh=True, costs=True, help="Rank on the text encoders. Default: that of the LoRA."
    )
    text_encoder_steps: int | None = option(
        None,
        min=1,
        max=100_000,
        help="Steps after which the text encoders keep their weights, as they overfit first. Default: all of the run.",
    )
    new_word: str | None = option(
        None,
        is_prompt=True,
        costs=True,
        help="Train a new word (textual inversion): vectors that stand for it in captions, such as the trigger. "
        "Together with a LoRA this is pivotal tuning; with targets none the word is learnt alone. For CLIP of Stable "
        "Diffusion 1 and 2, SDXL, SD 3.5 and Flux.1, and T5; captions are encoded in every step. Programs read it from "
        "NAME_emb.safetensors.",
    )
    new_word_vectors: int = option(
        1, min=1, max=64, help="Vectors of the new word, each of which takes the place of a token."
    )
    new_word_start: str | None = option(
        None,
        is_prompt=True,
        help="Text from whose tokens the new word starts, such as the name of the class. Default: random vectors.",
    )
    new_word_rate: float | None = option(
        None,
        min=1e-8,
        max=10.0,
        step=1e-8,
        help="Learning rate of the new word. Default: ten times the learning rate, or the learning rate with an "
        "optimizer that estimates rates itself.",
    )
    new_word_steps: int | None = option(
        None,
        min=1,
        max=100_000,
        help="Steps after which the new word keeps its vectors, while the LoRA learns on. Default: all of the run.",
    )
    new_word_t5: bool = option(
        False,
        costs=True,
        help="Vectors of the new word for T5, too, which then stays on the device: 9.5 GB. Without, T5 reads the word "
        "as text.",
    )
    new_word_bundle: bool = option(
        True,
        help="Hold the new word in the LoRA, too, from which A1111, Forge, SD.Next, OneTrainer and Lorasmith read it. "
        "ComfyUI and sd-scripts ignore it there, and diffusers refuses such a file.",
    )

    @property
    def text_setting(self) -> str | None:
        """Name of the setting for which text encoders are in training; None for none."""
        return "new_word" if self.new_word is not None else "train_text_encoder" if self.train_text_encoder else None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.new_word is not None and not _WORD.fullmatch(self.new_word):
            raise OptionError(
                "new_word must be one word of at most 60 letters, digits and - _ < >, with a letter or digit, got "
                f"{self.new_word!r}; leave out blanks and other characters"
            )

    def idle_settings(self) -> Iterator[str]:
        if not self.train_text_encoder:
            for name in ("text_encoder_rate", "text_encoder_rank", "text_encoder_steps"):
                if not self.is_default(name):
                    yield f"{name} {getattr(self, name):g} has no effect without train_text_encoder."
        if self.new_word is None:
            for name in options_of(TextEncoderSettings):
                if name.startswith("new_word_") and not self.is_default(name):
                    yield f"{name} {getattr(self, name)} has no effect without new_word."


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
class MemorySettings(Section, group="Memory", of_model=True, costs=True):
    """Memory of a step against its time."""

    gradient_checkpointing: bool = option(
        False,
        help="Activation checkpointing: recompute blocks in the backward pass. A third slower, needs far less memory.",
    )
    checkpoint_depth: int = option(
        1,
        min=1,
        max=5,
        help="Level of the recomputed blocks: 1 is the outermost (least memory), each further level is nested inside.",
    )
    activations: ActivationPlan = option(
        "keep",
        changes_numbers=False,
        help="How activations are kept until the backward pass. keep stores all; lean recomputes cheap ones (norms, "
        "activation functions), which saves 20 to 40 % of their memory; selective also recomputes the wide layers "
        "of feed-forward networks; host offloads them from the GPU to host memory; auto measures and selects the "
        "fastest that fits memory_budget, activation checkpointing included. All give the same numbers.",
    )
    memory_budget: float | None = option(
        None,
        min=0.1,
        max=10_000.0,
        changes_numbers=False,
        help="Device memory in GiB that activations auto may use, weights included. Default: all free memory.",
    )
    memory_cap: float | None = option(
        None,
        min=0.1,
        max=10_000.0,
        changes_numbers=False,
        help="GPU memory in GiB that the run may take at all. A step that needs more is repeated in smaller "
        "micro-batches; without a cap, Windows gives it host memory instead, and steps take many times as long. "
        "Default: none.",
    )
    quantization: Quantization = option(
        "none",
        help="Quantize the frozen weights of Linear layers and convolutions during training; each is dequantized where "
        "it is used. Compared with bf16, fp8, mxfp8 and int8 save half of their memory, nf4 and nvfp4 (4 bits) 72 %; "
        "int8 changes the weights least, with _convrot even less if they have outliers, as it rotates them. There is "
        "one scale per output, per weight with _tensor, per 32 inputs in mxfp8 and per 16 in nvfp4. With none, a "
        "quantized checkpoint stays as it is.",
    )
    offloading: bool = option(
        False,
        help="Keep the frozen weights in host memory and copy them to the device as they are used. The numbers stay "
        "the same.",
    )
    offloading_share: float | None = option(
        None,
        min=0.01,
        max=1.0,
        changes_numbers=False,
        help="Share of the model's blocks that offloading keeps in host memory; the others stay on the device. "
        "Default: the least for which a step fits into the free memory, or into memory_budget.",
    )
    sharding: bool = option(
        False,
        changes_numbers=False,
        of_model=False,
        help="Of several processes that train one run, each keeps its part of the frozen weights, and the parts of a "
        "block are gathered while it is computed (FSDP2), for models beyond one GPU. Has no effect in one process.",
    )
    products: ProductFormat = option(
        "training_dtype",
        help="Number format of products with frozen weights, in the forward and backward pass, to which activations "
        "and gradients are rounded. fp8 needs weights in fp8 and a GPU that multiplies them (NVIDIA, compute "
        "capability 8.9 or later); int8 needs weights in int8 and such a GPU (8.0 or later) or a processor with VNNI; "
        "mxfp8 and nvfp4 need weights in mxfp8 or nvfp4 and such a GPU (10.0 or later).",
    )
    quantized_backward: bool = option(False, door="graph", help="ComfyUI's name of products fp8.")
    compile: bool = option(
        False,
        group="Speed",
        of_model=False,
        trains_alone=True,
        help="Compile the model's blocks (torch.compile): the first step takes minutes, all others are faster. Needs "
        "a C++ compiler, on GPUs triton, and changes the last bits of the numbers.",
    )
    attention: AttentionChoice = option(
        "auto",
        group="Speed",
        help="Kernel of attention on NVIDIA GPUs, used wherever it accepts a call. auto times all of them once for "
        "each GPU and shape, before the first step, and keeps the times; torch measures nothing and takes torch's own "
        "choice, as auto does with deterministic. Changes the last bits of the numbers.",
    )
    cuda_graphs: bool = option(
        False,
        group="Speed",
        changes_numbers=False,
        of_model=False,
        trains_alone=True,
        help="Capture a batch's forward and backward pass as a CUDA graph, once for each shape, and replay it, so that "
        "the host no longer limits steps of small pictures on a fast GPU. Best with few sizes and lengths of captions. "
        "Takes more GPU memory.",
    )
    autotune: bool = option(
        False,
        group="Speed",
        of_model=False,
        trains_alone=True,
        help="Time steps in several ways before the first one, take the fastest, and keep the times for later runs: "
        "activations where auto finds several plans that fit, products in the format of quantized weights, and, in "
        "runs of more than ten minutes, compiled blocks. Changes the numbers as these settings do.",
    )
    bucket_mode: bool = option(
        False,
        group="Training",
        door="graph",
        of_model=False,
        costs=False,
        help="The latents are buckets of equal size, from Resolution Bucket. Mixed sizes are trained correctly either "
        "way.",
    )
    bypass_mode: bool = option(
        False,
        door="graph",
        of_model=False,
        costs=False,
        help="Apply adapters beside the weights instead of merging them. Training always does, so it has no effect.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantized_backward:
            if self.products not in ("training_dtype", "fp8"):
                raise OptionError(
                    f"quantized_backward is ComfyUI's name of products fp8, got products {self.products}; turn it off"
                )
            object.__setattr__(self, "products", "fp8")
            object.__setattr__(self, "quantized_backward", False)
        if self.sharding and self.offloading:
            raise OptionError(
                "sharding and offloading are two places for frozen weights, got both; leave one of them out"
            )

    def idle_settings(self) -> Iterator[str]:
        if self.bucket_mode:
            yield "bucket_mode has no effect here: sizes are mixed correctly with and without it."
        if self.bypass_mode:
            yield (
                "bypass_mode has no effect here: training always runs adapters beside the weights, and how a LoRA is "
                "applied is chosen when it is loaded."
            )
        if self.compile and not self.is_default("activations"):
            kept = f"activations {self.activations}"
            yield f"{kept} has no effect with compile, which selects the kept activations itself."
        elif self.activations == "auto":
            if self.gradient_checkpointing:
                yield "gradient_checkpointing has no effect with activations auto, which measures whether it is needed."
        elif self.memory_budget is not None and (not self.offloading or self.offloading_share is not None):
            yield f"memory_budget {self.memory_budget:g} has no effect without activations auto or offloading."
        if self.offloading_share is not None and not self.offloading:
            yield f"offloading_share {self.offloading_share:g} has no effect without offloading."
        if not self.gradient_checkpointing and not self.is_default("checkpoint_depth"):
            yield f"checkpoint_depth {self.checkpoint_depth} has no effect without gradient_checkpointing."


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
    early_stop: Literal["validation", "likeness"] = option(
        "validation",
        changes_numbers=False,
        help="What ends a run before its steps: validation, where the loss of held-out images no longer falls; "
        "likeness, where previews look no more like the images than before and follow prompts less. likeness needs the "
        "extra likeness, and draws the trigger with four wishes, ten times in a run.",
    )
    patience: int | None = option(
        None,
        min=0,
        max=1000,
        changes_numbers=False,
        help="Stop after this many validations, or previews with early_stop likeness, without improvement; the best "
        "LoRA is saved either way. Default: 0, which disables early stopping, and 2 with early_stop likeness.",
    )

    @property
    def stop_patience(self) -> int:
        """`patience`, or its default."""
        if self.patience is not None:
            return self.patience
        return _LIKENESS_PATIENCE if self.early_stop == "likeness" else 0

    @property
    def stops_by_likeness(self) -> bool:
        return self.early_stop == "likeness" and self.stop_patience > 0

    def idle_settings(self) -> Iterator[str]:
        if self.early_stop == "likeness" and not self.stop_patience:
            yield "early_stop likeness has no effect with patience 0."


_LIKENESS_PATIENCE = 2  # previews


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
        help="Steps between previews. Default: after 30 steps, a tenth, a quarter, a half and three quarters of the "
        "run. The base model is drawn before the first step, and the finished LoRA always.",
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
class TrainConfig(
    SavingSettings,
    PreviewSettings,
    ValidationSettings,
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cuda_graphs:
            return
        if self.compile:
            raise OptionError("cuda_graphs and compile are two ways to start fewer kernels, got both; leave one out")
        on_host = {
            "offloading": self.offloading,
            "activations host": self.activations == "host",
            str(self.text_setting): self.text_setting is not None,
            "guidance_loss": self.guidance_loss is not None,
        }
        if found := next((name for name, is_on in on_host.items() if is_on), None):
            raise OptionError(
                f"cuda_graphs replays what the GPU did and runs nothing on the host, which {found} does in each step; "
                "leave one out"
            )


NO_TARGETS = "none"
"""Value of `targets` for no layers of the denoiser."""

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


def lora_settings() -> tuple[str, ...]:
    """Names of the settings that are LoRA files."""
    return tuple(
        name for name, declared in options_of(TrainConfig).items() if declared.is_path and declared.door == "any"
    )


def code_settings() -> dict[str, Option]:
    """The settings that may name functions and classes of users."""
    return {name: declared for name, declared in options_of(TrainConfig).items() if declared.code}


def cost_options() -> dict[str, Option]:
    """The options that affect time or memory of a step."""
    return {name: declared for name, declared in options_of(TrainConfig).items() if declared.costs}
