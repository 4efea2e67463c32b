"""Description of an algorithm's tensors, so that files and tools support it without knowing its name.

Each algorithm declares one `AdapterFormat` beside its adapter. Roles are the tensor names of `AdapterWeights`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.adapter_state import AdapterWeights

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
        rules: role → rule of its shape (see `core.shape_rules`), for each set of roles that an adapter can have.
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
