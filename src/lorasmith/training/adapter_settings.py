"""Settings of what is trained: layers, the algorithm and its variants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lorasmith.adapters.catalogue import ADAPTERS, ALGORITHMS, INITS, known_facts
from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import Code
from lorasmith.core.options import option, options_of
from lorasmith.core.rank_schedule import RankSchedule
from lorasmith.training.section import Section

NONE_LORA = "[None]"
"""Value of LoRA file settings for no file, as in ComfyUI's list."""


NO_TARGETS = "none"
"""Value of `targets` for no layers of the denoiser."""


_FACTORS = ", ".join(name for name, facts in ALGORITHMS.items() if facts.rank_meaning == "factor")
_BLOCKS = " and ".join(name for name, facts in ALGORITHMS.items() if facts.rank_meaning == "block size")


def unused_settings(algorithm: str) -> frozenset[str]:
    """Settings that have no effect with an algorithm, whose name may be in any case; empty if it is not known yet."""
    facts = known_facts(algorithm)
    return frozenset() if facts is None else facts.unused


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


def lora_settings() -> tuple[str, ...]:
    """Names of the settings that are LoRA files."""
    return tuple(
        name for name, declared in options_of(LoraSettings).items() if declared.is_path and declared.door == "any"
    )


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
    init: Code | None = option(
        None,
        choices=INITS,
        code="a function",
        of_fresh=True,
        trains_alone=True,
        help="Start from the gradient before the first step: LoRA-GA from its singular vectors, or a function of your "
        "own (docs/extending.md). The file is a plain LoRA of twice the rank.",
    )
    init_steps: int = option(
        8,
        min=0,
        max=1000,
        of_fresh=True,
        help="Steps whose draws init computes the gradient of, without an update; 0 computes none.",
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
        if self.init is not None and (self.pissa or self.tucker):
            other = "pissa" if self.pissa else "tucker"
            raise OptionError(f"init and {other} are two starts of an adapter, got both; leave one of them out")
        if self.tlora == "none":
            return
        mixing = {
            "dora": "whose magnitudes are",
            "tucker": "whose core is",
            "pissa": "whose start is",
            "init": "whose start is",
        }
        for name, what in mixing.items():
            if not self.is_default(name):
                raise OptionError(
                    f"tlora uses some of the ranks, got {name}, {what} of all of them; leave one of the two out"
                )
        if self.tlora_min_rank >= self.rank:
            raise OptionError(
                f"tlora_min_rank must be below the rank, {self.rank}, got {self.tlora_min_rank}; raise the rank"
            )

    def own_idle(self) -> Iterator[str]:
        starts = {"pissa": self.pissa, "init": self.init, "tlora orthogonal": self.tlora == "orthogonal"}
        start = next((name for name, is_on in starts.items() if is_on), "")
        for name in sorted({"zero_init"} if start else unused_settings(self.algorithm)):
            if not self.is_default(name):
                variant = start or self.algorithm
                yield f"{name} {getattr(self, name)} has no effect with {variant}, which does not use it."
        if self.init is None:
            yield from self.has_no_effect("init_steps", without="init")
        if self.tlora == "none":
            yield from self.has_no_effect("tlora_min_rank", "tlora_alpha", without="tlora")
