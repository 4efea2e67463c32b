"""Every setting of a training run, declared once: nodes, command line, library and reference pages derive from here.

The defaults are the best known ones; `Train LoRA` in a graph overrides those in which ComfyUI's differ, so that a graph
keeps its meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.core.errors import OptionError
from lorasmith.core.options import check_options, option, options_of

__all__ = ["NONE_LORA", "TrainConfig", "unused_settings"]

NONE_LORA = "[None]"
"""What `existing_lora` says when there is none, as ComfyUI's list spells it."""

_WHAT, _HOW, _MEMORY, _NUMBERS = "What is trained", "How it learns", "Memory", "Precision and repeatability"
_VARIANTS = "Variants of the algorithm"
_FACTORS = ", ".join(name for name, facts in ALGORITHMS.items() if facts.rank_meaning == "factor")
_BLOCKS = " and ".join(name for name, facts in ALGORITHMS.items() if facts.rank_meaning == "block size")


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
    differences: str = option(
        "none",
        choices=("none", "norms", "biases", "norms+biases"),
        group=_WHAT,
        help="Train what is added to norms and biases too: norms is all norms of the model, biases those of the target "
        "layers. ComfyUI and A1111 apply them; other programs leave them out or refuse the file.",
    )
    zero_init: str = option(
        "up",
        choices=("up", "down"),
        group=_WHAT,
        help="Which of the two matrices starts at zero: up is the field's habit, down is ComfyUI's.",
    )
    existing_lora: str | None = option(
        None,
        group=_WHAT,
        help="A LoRA file to go on from. Its layers keep their own algorithm, rank and alpha, and its steps count on.",
    )
    dora: str = option(
        "none",
        choices=("none", "input", "output"),
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
        "AdamW", choices=("AdamW", "Adam", "SGD", "RMSprop"), group=_HOW, help="Update rule, with torch's own settings."
    )
    weight_decay: float = option(
        0.01, min=0.0, max=1.0, group=_HOW, help="Decay of the weights, as AdamW applies it (other optimizers: none)."
    )
    max_grad_norm: float = option(
        1.0, min=0.0, max=1e6, group=_HOW, help="Gradients longer than this are scaled down to it. 0 leaves them alone."
    )
    loss_function: str = option(
        "MSE",
        choices=("MSE", "L1", "Huber", "SmoothL1"),
        group=_HOW,
        help="How the distance between prediction and target is measured.",
    )
    objective: str = option(
        "native",
        choices=("native", "x0"),
        group=_HOW,
        help="What is compared: native is what the model predicts (noise, velocity or flow), x0 the clean picture, as "
        "ComfyUI's trainer does, which puts most of the weight on the noisiest timesteps.",
    )
    timesteps: str | None = option(
        None,
        choices=("uniform", "logit_normal"),
        group=_HOW,
        help="Distribution of the noise levels. Left out, it is the one that suits the model.",
    )
    seed: int = option(
        0,
        min=0,
        max=2**64 - 1,
        group=_NUMBERS,
        help="Decides initial weights, order, noise and timesteps: the same seed gives the same LoRA.",
    )
    training_dtype: str = option(
        "auto",
        choices=("auto", "bf16", "fp32", "none"),
        group=_NUMBERS,
        help="Number format of the frozen weights and of the products. The trained weights are always updated in fp32. "
        "auto is bf16 where the device multiplies in it, else fp32; none keeps the format that the model is loaded in.",
    )
    lora_dtype: str = option("bf16", choices=("bf16", "fp32"), group=_NUMBERS, help="Number format of the saved LoRA.")
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
    offloading: bool = option(
        False, group=_MEMORY, help="Keep the frozen weights in host memory and stream them in. Not available yet."
    )
    quantized_backward: bool = option(
        False, group=_MEMORY, help="Run the backward products of quantized layers in low precision. Not available yet."
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

    private: bool = option(
        False,
        group=_NUMBERS,
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
