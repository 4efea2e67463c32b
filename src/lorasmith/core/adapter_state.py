"""The interface between adapters and LoRA files: tensors by module, under names independent of layouts.

Adapters read and write `AdapterWeights`; layouts convert whole files to and from `AdapterState`. Each algorithm
declares one `AdapterFormat` beside its adapter, so that files and tools support it without knowing its name; roles are
the tensor names of `AdapterWeights`.

The format's rules of shapes say which tensors make an adapter. A rule names the dimensions of a tensor, and the rules
of one adapter share their names:

    {"down": "rank in kernel...", "up": "out rank 1..."}

A name has the same size wherever it occurs, `a*b` is the product of two names that occurred before, a number is itself.
A last word that ends in three dots stands for up to three further dimensions; `1...` for dimensions of size 1. No
dimension may be of size 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

DENOISER = "denoiser"
"""Component name of the trained network (UNet or transformer)."""


class ModuleRef(NamedTuple):
    """A module of a model: component (`denoiser`, `text_encoder`, `text_encoder_2`, ...) and its diffusers path."""

    component: str
    path: str


@dataclass(frozen=True)
class AdapterWeights:
    """One module's adapter.

    Attributes:
        algorithm: registered adapter name in lower case (`lora`, `loha`, `lokr`, `oft`, ...).
        tensors: by canonical name. For `lora`: `down` (rank, in[, kh, kw]), `up` (out, rank[, 1, 1]), optional `mid`
            (rank, rank, kh, kw) for Tucker and `dora_scale`. Other algorithms use LyCORIS' own tensor names.
        alpha: numerator of the scale alpha / rank; None if the file has none, which means scale 1. For `oft` and
            `boft` the bound of ‖Q‖ (as in ComfyUI), 0 or None for no bound.
    """

    algorithm: str
    tensors: Mapping[str, Tensor]
    alpha: float | None = None


@dataclass(frozen=True)
class AdapterState:
    """A whole LoRA.

    Attributes:
        adapters: adapter of each module.
        differences: full additive differences of a module's parameters, by parameter name (`weight`, `bias`): the
            norm and bias differences of LyCORIS and ComfyUI (`diff`, `diff_b`, `w_norm`, `b_norm`).
        unknown: tensors that no layout could attribute, by their key in the file; kept unchanged.
        metadata: as in a safetensors header.
        words: words that it was trained with, and their vectors, (number, width), by the text encoder's key in
            embedding files (`clip_l`).
    """

    adapters: dict[ModuleRef, AdapterWeights] = field(default_factory=dict)
    differences: dict[ModuleRef, dict[str, Tensor]] = field(default_factory=dict)
    unknown: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    words: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def with_metadata(self, extra: Mapping[str, str]) -> AdapterState:
        return replace(self, metadata={**self.metadata, **extra})


COMFYUI, DIFFUSERS, SD_SCRIPTS = "ComfyUI", "diffusers", "sd-scripts"
"""Programs whose loaders `docs/load-matrix.md` measures; sd-scripts is its own network, not LyCORIS."""

Tensors = Mapping[str, Tensor]  # by role

Shapes = Mapping[str, Sequence[int]]  # by role


def _nothing(adapters: Mapping[str, AdapterWeights], kernels: Mapping[str, int]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class PeftKind:
    """An algorithm in PEFT.

    Attributes:
        name: `peft_type` of its configuration.
        alpha: field of the configuration with alpha.
        differs: how PEFT's adapters of that name differ from all others; if set, they are neither read nor written.
        magnitudes: whether it has DoRA's magnitudes, which PEFT stores per output.
        fields: additional fields of the configuration, from adapters and kernel sizes by module path.
        misfits: why PEFT cannot combine some adapters with the others, by module path; arguments as for `fields`.
        unscaled: rank in the configuration for an adapter without a rank.
        scaled: role of the tensor that absorbs the scale, which PEFT, unlike others, applies to such an adapter.
    """

    name: str
    alpha: str = "alpha"
    differs: str = ""
    magnitudes: bool = False
    fields: Callable[[Mapping[str, AdapterWeights], Mapping[str, int]], dict[str, Any]] = _nothing
    misfits: Callable[[Mapping[str, AdapterWeights], Mapping[str, int]], dict[str, str]] = _nothing
    unscaled: Callable[[Tensors], int] | None = None
    scaled: str = ""


@dataclass(frozen=True, kw_only=True)
class AdapterFormat:
    """An algorithm's tensors.

    Attributes:
        suffixes: suffix of each tensor's key after the module's name, by role, as in kohya's scripts, LyCORIS and
            ComfyUI.
        peft_suffixes: the same for PEFT, where it differs.
        needed: sets of roles, each of which makes a complete adapter; other roles are optional.
        rules: role → rule of its shape (see `core.adapter_state`), for each set of roles that an adapter can have.
        further_rule: what else the shapes must be, as text after "must"; empty for shapes that are.
        weight_shape: shape of the layer's weight, as far as the tensors' shapes determine it: (out,), (out, in ·
            kernel) or all.
        canonical: the adapter with its tensors under their present names and in the dimensions of a weight (None:
            unknown), which some files flatten.
        rank_axes: role → axis of the rank; the first role present counts.
        input_axes: role → axis of the layer's inputs (times the kernel), by which a file's family is recognised.
        cores: roles of Tucker cores.
        without_core: the adapter with its Tucker core, which few programs support, multiplied into a factor in fp32.
        is_additive: whether the change of the weight does not depend on the weight.
        is_low_rank: whether the change is alpha / rank · `up` · `down`, which tools can stack, truncate and scale.
        squared_norm: squared Frobenius norm of the change at a scale of 1; None if it depends on the weight.
        vital: roles of tensors that must not be zero for the adapter to have an effect.
        difference: role of the tensor that files store as a difference of the weight instead of an adapter.
        rows: role → output rows per index of the tensor's first dimension; None if rows of the change are not rows of
            the tensors.
        stacks: whether adapters of several layers are stacked along the rank into one of a layer that fuses them.
        all_rows: roles that zero the rows for which they have no value.
        bounded: the adapter with the bound of its alpha applied to its tensors, and alpha 0; None if alpha is a scale.
        size: the setting `rank` as determined from the tensors' shapes, if it is not a rank.
        programs: programs that apply it, if all its tensors are `needed` ones.
        comfyui_lacks: role → what ComfyUI does instead of applying it.
        comfyui_needs_alpha: whether ComfyUI ignores an adapter without alpha.
        peft: its counterpart in PEFT.
    """

    suffixes: Mapping[str, str]
    needed: tuple[frozenset[str], ...]
    rules: tuple[Mapping[str, str], ...]
    weight_shape: Callable[[Shapes], tuple[int, ...]]
    peft_suffixes: Mapping[str, str] = field(default_factory=dict)
    further_rule: Callable[[Shapes], str] = lambda shapes: ""
    canonical: Callable[[AdapterWeights, tuple[int, ...] | None], AdapterWeights] = lambda weights, shape: weights
    rank_axes: Mapping[str, int] = field(default_factory=dict)
    input_axes: Mapping[str, int] = field(default_factory=dict)
    cores: frozenset[str] = frozenset()
    without_core: Callable[[AdapterWeights], AdapterWeights] = lambda weights: weights
    is_additive: bool = False
    is_low_rank: bool = False
    squared_norm: Callable[[Tensors], float] | None = None
    vital: tuple[str, ...] = ()
    difference: str = ""
    rows: Callable[[AdapterWeights], Mapping[str, int] | None] = lambda weights: None
    stacks: bool = False
    all_rows: frozenset[str] = frozenset()
    bounded: Callable[[AdapterWeights], AdapterWeights] | None = None
    size: Callable[[Shapes], int] | None = None
    programs: frozenset[str] = frozenset({COMFYUI})
    comfyui_lacks: Mapping[str, str] = field(default_factory=dict)
    comfyui_needs_alpha: bool = False
    peft: PeftKind | None = None

    def shape_of(self, weights: AdapterWeights) -> tuple[int, ...]:
        return self.weight_shape({role: tensor.shape for role, tensor in weights.tensors.items()})


def multiplied(tensor: Tensor, factor: float) -> Tensor:
    """`tensor` times `factor`, in its own dtype where that is exact (powers of two), else in fp32."""
    if factor == 1:
        return tensor
    product = tensor.float() * factor
    back = product.to(tensor.dtype)
    return back if torch.equal(back.float(), product) else product


_MORE = "..."
_MOST_FURTHER = 3


def first_misfit(shapes: Mapping[str, Sequence[int]], rules: Mapping[str, str]) -> tuple[str, str] | None:
    """The first tensor that breaks its rule, and the rule: `(out, rank, 1...) with rank 4`; None if there is none."""
    known: dict[str, tuple[int, ...]] = {}
    for name, rule in rules.items():
        before = dict(known)
        if not _follows(tuple(shapes[name]), rule.split(), known):
            return name, _in_words(rule.split(), before)
    return None


def _follows(shape: tuple[int, ...], words: Sequence[str], known: dict[str, tuple[int, ...]]) -> bool:
    """Whether a shape follows the words of its rule; sizes of new names are added to `known`."""
    rest = words[-1].removesuffix(_MORE) if words[-1].endswith(_MORE) else None
    single = words if rest is None else words[:-1]
    if 0 in shape or len(shape) < len(single) or (rest is None and len(shape) > len(single)):
        return False
    for word, size in zip(single, shape, strict=False):
        sizes = known.setdefault(word, (size,)) if word.isidentifier() else _product(word, known)
        if sizes != (size,):
            return False
    further = shape[len(single) :]
    if len(further) > _MOST_FURTHER:
        return False
    return rest is None or (set(further) <= {1} if rest == "1" else known.setdefault(rest, further) == further)


def _product(word: str, known: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return (
        math.prod(
            size for factor in word.split("*") for size in ((int(factor),) if factor.isdigit() else known[factor])
        ),
    )


def _in_words(words: Sequence[str], known: Mapping[str, tuple[int, ...]]) -> str:
    names = dict.fromkeys(name for word in words for name in word.removesuffix(_MORE).split("*") if name in known)
    sizes = [f"{name} {' × '.join(map(str, known[name])) or 'empty'}" for name in names]
    return f"({', '.join(words)})" + (f" with {' and '.join(sizes)}" if sizes else "")
