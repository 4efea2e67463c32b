"""Every setting of a training run, declared once: nodes, command line, library and reference pages derive from here.

The defaults are the best known ones; `Train LoRA` in a graph overrides those in which ComfyUI's differ, so that a graph
keeps its meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.core.choices import (
    ActivationPlan,
    LossFunction,
    LossWeighting,
    Objective,
    Quantization,
    TimestepDistribution,
)
from lorasmith.core.errors import OptionError
from lorasmith.core.options import check_options, option, options_of
from lorasmith.training.optim.schedules import SCHEDULES
from lorasmith.training.optim.update_rules import OPTIMIZERS

__all__ = ["NONE_LORA", "ResolvedConfig", "TrainConfig", "unused_settings"]

NONE_LORA = "[None]"
"""What `existing_lora` says when there is none, as ComfyUI's list spells it."""

_WHAT, _HOW, _MEMORY, _NUMBERS = "What is trained", "How it learns", "Memory", "Precision and repeatability"
_SPEED = "Speed"
_VARIANTS = "Variants of the algorithm"
_WATCH, _KEEP = "Knowing whether it works", "Saving and recovery"
_FACTORS = ", ".join(name for name, facts in ALGORITHMS.items() if facts.rank_meaning == "factor")
_BLOCKS = " and ".join(name for name, facts in ALGORITHMS.items() if facts.rank_meaning == "block size")


def _needed_packages() -> str:
    needing = {name: rule.package for name, rule in OPTIMIZERS.items() if rule.package}
    return f"Packages to install first: {', '.join(f'{package} for {name}' for name, package in needing.items())}."


def unused_settings(algorithm: str) -> frozenset[str]:
    """Settings that change nothing for an algorithm, which is named in any case; none for unknown ones."""
    folded = {name.casefold(): facts.unused for name, facts in ALGORITHMS.items()}
    return folded.get(algorithm.casefold(), frozenset())


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run. Raises OptionError for values of the wrong type or out of range."""

    steps: int = option(500, min=1, max=100_000, group=_HOW, help="Number of optimizer updates.")
    batch_size: int = option(
        1,
        min=1,
        max=10_000,
        group=_HOW,
        help="Images per forward pass. Larger batches give steadier steps and cost memory.",
    )
    grad_accumulation_steps: int = option(
        1,
        min=1,
        max=1024,
        group=_HOW,
        help="Batches per update: the effect of a larger batch, in its memory but not its time.",
    )
    learning_rate: float | None = option(
        None,
        min=1e-7,
        max=1.0,
        step=1e-7,
        group=_HOW,
        help="Size of an update. Left out, it is the one that suits model and algorithm (1e-4 for LoRA on Stable "
        "Diffusion and Flux).",
    )
    rank: int = option(
        16,
        min=1,
        max=128,
        group=_WHAT,
        help="Inner dimension of the LoRA: how much it can learn, and how large the file gets. Capped at each layer's "
        f"size. For {_FACTORS} it is the factor, for {_BLOCKS} the block size.",
    )
    alpha: float | None = option(
        None,
        min=0.0,
        max=100_000.0,
        group=_WHAT,
        help="The LoRA is scaled by alpha / rank. Left out, alpha is the rank and the scale 1, so that the learning "
        f"rate keeps its meaning when the rank changes. For {_BLOCKS} it bounds the rotation, and 0, the default "
        "there, does not.",
    )
    targets: str | None = option(
        None,
        group=_WHAT,
        help="Which layers are trained: attention, attention+ff, transformer, all-linear, all, or patterns on module "
        "paths such as *.attn2.*, separated by commas, each with settings of its own behind it if you like "
        "(rank=32 alpha=16 lr=2e-4), and ! in front of what to leave out. Left out, it is the preset that suits the "
        "model.",
    )
    algorithm: str = option(
        "LoRA",
        group=_WHAT,
        choices=ALGORITHMS,
        help="Kind of adapter. " + " ".join(f"{name}: {facts.summary}" for name, facts in ALGORITHMS.items()),
    )
    differences: Literal["none", "norms", "biases", "norms+biases"] = option(
        "none",
        group=_WHAT,
        help="Train what is added to norms and biases too: norms is all norms of the model, biases those of the target "
        "layers. ComfyUI and A1111 apply them; other programs leave them out or refuse the file.",
    )
    zero_init: Literal["up", "down"] = option(
        "up",
        group=_WHAT,
        help="Which of the two matrices starts at zero: up is the field's habit, down is ComfyUI's.",
    )
    existing_lora: str | None = option(
        None,
        group=_WHAT,
        help="A LoRA file to go on from. Its layers keep their own algorithm, rank and alpha, and its steps count on.",
    )
    dora: Literal["none", "input", "output"] = option(
        "none",
        group=_VARIANTS,
        help="DoRA: magnitude and direction of the weight are trained apart. input has a magnitude for each input, "
        "which ComfyUI and A1111 reproduce, output one for each output, as in the paper and PEFT.",
    )
    rslora: bool = option(
        False,
        group=_VARIANTS,
        help="Scale by alpha / √rank, which suits high ranks better; alpha is 4 if left out, a scale of 1 at rank 16.",
    )
    pissa: bool = option(
        False,
        group=_VARIANTS,
        help="Start from the principal components of each weight (PiSSA). The file is a plain LoRA of twice the rank.",
    )
    tucker: bool = option(
        False,
        group=_VARIANTS,
        help="Give convolutions larger than 1×1 a core between two small matrices, which trains far fewer parameters. "
        "The portable file has it multiplied in.",
    )
    lora_plus_ratio: float = option(
        1.0,
        min=0.01,
        max=1000.0,
        group=_VARIANTS,
        help="LoRA+: the up matrix learns at this multiple of the learning rate.",
    )
    rank_dropout: float = option(
        0.0,
        min=0.0,
        max=0.95,
        group=_VARIANTS,
        help="Probability with which each inner dimension of a layer is left out for a sample.",
    )
    module_dropout: float = option(
        0.0,
        min=0.0,
        max=0.95,
        group=_VARIANTS,
        help="Probability with which a layer's LoRA is left out altogether for a sample.",
    )
    optimizer: str = option(
        "AdamW",
        choices=OPTIMIZERS,
        pattern=r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+",
        group=_HOW,
        help=f"Update rule, or any optimizer class by its import path, such as torch.optim.NAdam. {_needed_packages()}",
    )
    optimizer_args: str | None = option(
        None,
        group=_HOW,
        help="Further arguments of the optimizer, separated by blanks, such as betas=(0.9,0.99) eps=1e-7.",
    )
    weight_decay: float = option(
        0.01,
        min=0.0,
        max=1.0,
        group=_HOW,
        help="Decay of the weights towards zero, for optimizers that take one; Adam, SGD and RMSprop have none here.",
    )
    schedule: str | None = option(
        None,
        choices=SCHEDULES,
        group=_HOW,
        help="How the learning rate goes down over the run, after the warm-up. Left out, a rate that you give is kept "
        "constant, and the model's own goes down linearly from twice its value.",
    )
    warmup_steps: int = option(
        0, min=0, max=100_000, group=_HOW, help="Steps over which the learning rate rises from zero at the start."
    )
    final_rate: float = option(
        0.0, min=0.0, max=1.0, group=_HOW, help="Share of the learning rate that the schedule ends at."
    )
    schedule_cycles: int = option(3, min=1, max=1000, group=_HOW, help="Number of cycles of cosine_restarts.")
    schedule_power: float = option(2.0, min=0.1, max=10.0, group=_HOW, help="Exponent of the polynomial schedule.")
    ema_decay: float = option(
        0.0,
        min=0.0,
        max=0.99999,
        group=_HOW,
        help="Save an exponential moving average of the trained weights instead of the last ones: the share of the "
        "average that stays at each step. 0 saves the last ones.",
    )
    max_grad_norm: float = option(
        1.0, min=0.0, max=1e6, group=_HOW, help="Gradients longer than this are scaled down to it. 0 leaves them alone."
    )
    loss_function: LossFunction = option(
        "MSE", group=_HOW, help="How the distance between prediction and target is measured."
    )
    objective: Objective = option(
        "native",
        group=_HOW,
        help="What is compared: native is what the model predicts (noise, velocity or flow), x0 the clean picture, as "
        "ComfyUI's trainer does, which puts most of the weight on the noisiest timesteps.",
    )
    timesteps: TimestepDistribution | None = option(
        None,
        group=_HOW,
        help="Distribution of the noise levels: shifted is uniform with timestep_shift, sigmoid another name of "
        "logit_normal. Left out, it is the one that suits the model.",
    )
    timestep_shift: float | None = option(
        None,
        min=0.01,
        max=100.0,
        group=_HOW,
        help="Shift of the noise levels towards the noisy end, in place of the model's own; 1 is none. Left out, "
        "shifted takes the one that suits the size of the picture and the others the model's own.",
    )
    stratified: bool = option(
        True,
        group=_HOW,
        help="Spread the noise levels of neighbouring draws evenly over the range, so that each batch covers it; the "
        "distribution stays the same and the gradient varies less.",
    )
    loss_weighting: LossWeighting = option(
        "none",
        group=_HOW,
        help="Weight of a noise level in the loss: min_snr keeps the clean end from counting more than min_snr_gamma, "
        "soft_min_snr does so smoothly.",
    )
    min_snr_gamma: float = option(
        5.0, min=0.01, max=1000.0, group=_HOW, help="Signal-to-noise ratio at which min_snr and soft_min_snr level off."
    )
    noise_offset: float = option(
        0.0,
        min=0.0,
        max=1.0,
        group=_HOW,
        help="Strength of noise that is the same all over a picture, one value for each channel: it teaches very dark "
        "and very bright pictures. 0.03 to 0.1 are usual.",
    )
    zero_terminal_snr: bool = option(
        False,
        group=_HOW,
        help="Rescale the noise schedule so that its last step is pure noise. For v-prediction models of the Stable "
        "Diffusion kind alone, and pictures must then be sampled so too.",
    )
    seed: int = option(
        0,
        min=0,
        max=2**64 - 1,
        group=_NUMBERS,
        help="Decides initial weights, order, noise and timesteps: the same seed gives the same LoRA.",
    )
    training_dtype: Literal["auto", "bf16", "fp32", "none"] = option(
        "auto",
        group=_NUMBERS,
        help="Number format of the frozen weights and of the products. The trained weights are always updated in fp32. "
        "auto is bf16 where the device multiplies in it, else fp32; none keeps the format that the model is loaded in.",
    )
    lora_dtype: Literal["bf16", "fp32"] = option("bf16", group=_NUMBERS, help="Number format of the saved LoRA.")
    gradient_checkpointing: bool = option(
        False,
        group=_MEMORY,
        help="Compute activations again in the backward pass: a third slower, a fraction of the memory.",
    )
    checkpoint_depth: int = option(
        1,
        min=1,
        max=5,
        group=_MEMORY,
        help="Size of the recomputed pieces: 1 is whole blocks (least memory), each step deeper is one level inside.",
    )
    activations: ActivationPlan = option(
        "keep",
        group=_MEMORY,
        changes_numbers=False,
        help="What becomes of activations until the backward pass: keep keeps them; lean makes cheap ones (norms, "
        "activation functions) again, which takes a fifth to two fifths off their memory; selective does so with "
        "the wide layers of feed-forward networks too; host moves them from the GPU to host memory; auto measures "
        "first and takes the fastest that fits memory_budget, gradient checkpointing among them. All give the same "
        "numbers.",
    )
    memory_budget: float | None = option(
        None,
        min=0.1,
        max=10_000.0,
        group=_MEMORY,
        changes_numbers=False,
        help="Memory in GiB on the device that activations auto may plan with, weights included. Left out, it is what "
        "is free.",
    )
    quantization: Quantization = option(
        "none",
        group=_MEMORY,
        help="Hold the frozen weights of Linear layers and convolutions in fewer bytes while training, and make each "
        "anew where it is used. Of their memory in bf16, fp8 and int8 save a half and nf4 (4 bits) 72 %; int8 changes "
        "the weights least. A scale belongs to each output, or with _tensor to the whole weight. A checkpoint that is "
        "quantized already stays as it is with none.",
    )
    offloading: bool = option(
        False,
        group=_MEMORY,
        help="Keep the frozen weights in host memory and stream them in as they are used. It changes no number.",
    )
    quantized_backward: bool = option(
        False,
        group=_MEMORY,
        help="Multiply with weights in fp8 in fp8 too, forwards and backwards, on GPUs that can (NVIDIA from compute "
        "capability 8.9 on). Activations and gradients are rounded to fp8 for it.",
    )
    compile: bool = option(
        False,
        group=_SPEED,
        help="Compile the model's blocks (torch.compile): the first step takes minutes, all others less time. It needs "
        "a C++ compiler, on GPUs triton, and changes the last bits of the numbers.",
    )
    bucket_mode: bool = option(
        False,
        group=_HOW,
        help="Given buckets of equal size, as Resolution Bucket makes them. Sizes are mixed correctly either way.",
    )
    bypass_mode: bool = option(
        False,
        group=_MEMORY,
        help="Apply adapters beside the weights instead of to them. Training here always does, so this changes nothing "
        "in the result.",
    )

    validation_share: float | None = option(
        None,
        min=0.0,
        max=0.5,
        group=_WATCH,
        help="Share of the images that is held out to see whether the LoRA generalises. Left out, it is a tenth from "
        "12 images on and none below.",
    )
    validate_every: int | None = option(
        None, min=1, max=100_000, group=_WATCH, help="Steps between validations. Left out, a tenth of the run."
    )
    validation_draws: int = option(
        8, min=2, max=1000, group=_WATCH, help="Noise levels at which each held-out image is looked at."
    )
    patience: int = option(
        0,
        min=0,
        max=1000,
        group=_WATCH,
        changes_numbers=False,
        help="Stop after this many validations without an improvement. 0 never stops early; the best LoRA is kept "
        "either way.",
    )
    previews: str | None = option(
        None,
        group=_WATCH,
        changes_numbers=False,
        help="Prompts that are drawn as training goes on, separated by |, with and without the LoRA.",
    )
    preview_every: int | None = option(
        None,
        min=1,
        max=100_000,
        group=_WATCH,
        changes_numbers=False,
        help="Steps between previews. Left out, a quarter of the run; there is always one at the end.",
    )
    preview_strengths: str = option(
        "0.5,1",
        group=_WATCH,
        changes_numbers=False,
        help="Strengths at which the finished LoRA is shown, separated by commas.",
    )
    preview_steps: int = option(
        20, min=1, max=1000, group=_WATCH, changes_numbers=False, help="Sampling steps of a preview."
    )
    track: Literal["none", "tensorboard", "wandb"] = option(
        "none",
        group=_WATCH,
        changes_numbers=False,
        help="Send the numbers to TensorBoard (into the folder of the run) or to Weights & Biases, where installed.",
    )
    save_state_every: int = option(
        100,
        min=0,
        max=100_000,
        group=_KEEP,
        changes_numbers=False,
        help="Steps between saves of the run state, from which a run that was interrupted continues. 0 saves none by "
        "steps.",
    )
    save_state_minutes: float = option(
        10.0,
        min=0.0,
        max=10_000.0,
        group=_KEEP,
        changes_numbers=False,
        help="Minutes between saves of the run state, whichever is first. 0 saves none by time.",
    )
    keep_states: int = option(
        2,
        min=1,
        max=1000,
        group=_KEEP,
        changes_numbers=False,
        help="Number of run states that are kept; older ones are removed.",
    )
    max_rollbacks: int = option(
        3,
        min=0,
        max=100,
        group=_KEEP,
        help="How often a run goes back to its last good state, with half the learning rate, when the loss explodes or "
        "becomes NaN, before it stops.",
    )
    deterministic: bool = option(
        False,
        group=_NUMBERS,
        help="Use only GPU kernels that give the same bits each time, at some cost; on the CPU they do anyway.",
    )
    private: bool = option(
        False,
        group=_NUMBERS,
        changes_numbers=False,
        help="Leave paths, prompts, captions and the workflow out of the LoRA's metadata. The folder of the run keeps "
        "them.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.existing_lora == NONE_LORA:
            object.__setattr__(self, "existing_lora", None)
        self._check_variants()

    def is_default(self, name: str) -> bool:
        """Whether a setting has the value that it has when nothing is said."""
        return bool(getattr(self, name) == options_of(type(self))[name].default)

    def _check_variants(self) -> None:
        for name in sorted(frozenset().union(*(facts.variants for facts in ALGORITHMS.values()))):
            if name not in ALGORITHMS[self.algorithm].variants and not self.is_default(name):
                takers = ", ".join(kind for kind, facts in ALGORITHMS.items() if name in facts.variants)
                raise OptionError(f"{name} is for {takers}, got algorithm {self.algorithm}; leave one of the two out")
        if self.pissa and self.tucker:
            raise OptionError("pissa and tucker are two starts of a convolution, got both; leave one of them out")


class ResolvedConfig(TrainConfig):
    """Settings as a run uses them: those that may be left to model, algorithm and device are decided."""

    learning_rate: float
    alpha: float
    targets: str
    schedule: str
    timesteps: TimestepDistribution
    training_dtype: Literal["bf16", "fp32", "none"]

    def __post_init__(self) -> None:
        super().__post_init__()
        assert all(getattr(self, name) is not None for name in ResolvedConfig.__annotations__)

    @classmethod
    def of(cls, config: TrainConfig, **decided: Any) -> ResolvedConfig:
        """The settings with those that are decided in place of what was left open."""
        return cls(**{**vars(config), **decided})
