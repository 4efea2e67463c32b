"""How programs spell the tensors of one module: key = base + suffix.

The base says which module a tensor belongs to and is the layouts' business. The suffix says what the tensor is, and any
suffix may follow any base, because real files mix: `transformer.x.lora_down.weight`, `lora_unet_x.hada_w1_a`. Here
suffixes are translated into roles, which are the canonical tensor names of `AdapterWeights` plus a few that become
something else (`alpha`, differences).

Shapes: r is the rank, (out, in) a Linear's weight and (out, in, kh, kw) a convolution's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorasmith.core.adapter_state import AdapterWeights

__all__ = [
    "KOHYA",
    "PEFT",
    "UNREADABLE",
    "XLABS",
    "ModuleTensors",
    "assembled",
    "fits",
    "grouped",
    "kronecker_shapes",
    "multiplied",
    "rank_of",
    "scale_of",
    "scales_outputs",
    "spelled",
    "split_key",
    "without_core",
]


@dataclass(frozen=True)
class ModuleTensors:
    """What a file holds for one base.

    Attributes:
        adapter: its adapter, if any.
        differences: `weight` and `bias` differences.
    """

    adapter: AdapterWeights | None = None
    differences: Mapping[str, Tensor] = field(default_factory=dict)


def split_key(key: str) -> tuple[str, str] | None:
    """(base, role) of a tensor's key, or None when the suffix is not a known one."""
    if match := _XLABS.fullmatch(key):
        return match[1], match[2]
    for suffix, role in _ROLES.items():
        if key.endswith(suffix):
            return key[: -len(suffix)], role
    return None


def grouped(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Keys by base and role. Keys without a known suffix are left out."""
    groups: dict[str, dict[str, str]] = {}
    for key in keys:
        if parts := split_key(key):
            groups.setdefault(parts[0], {})[parts[1]] = key
    return groups


def assembled(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, stated_alpha: float | None = None
) -> ModuleTensors | None:
    """One module's tensors in canonical form.

    Args:
        tensors: by role.
        shape: shape of the module's weight, None when it is not known.
        stated_alpha: alpha where no tensor gives it.

    Returns:
        None when the tensors do not make up whole adapters and differences.
    """
    rest = dict(tensors)
    differences = {parameter: rest.pop(role) for role, parameter in _DIFFERENCES.items() if role in rest}
    if not rest:
        return ModuleTensors(None, differences)
    alpha = rest.pop("alpha", None)
    up_bias = rest.pop("up_bias", None)
    magnitude = rest.pop("magnitude", None)
    if magnitude is not None:
        rest["dora_scale"] = magnitude.reshape(-1)
    algorithm = next((name for name, needed in _NEEDED if needed <= rest.keys()), None)
    if algorithm is None or not rest.keys() <= _ROLES_OF[algorithm] or (alpha is not None and alpha.numel() != 1):
        return None
    if algorithm == "oft" and rest["oft_blocks"].ndim == 4:
        algorithm = "boft"
    weights = AdapterWeights(algorithm, rest, stated_alpha if alpha is None else float(alpha))
    if algorithm == "lora":
        canonical = _canonical_lora(weights, shape)
        if canonical is None:
            return None
        weights = canonical
    if up_bias is not None:
        differences["bias"] = up_bias * scale_of(weights)
    return ModuleTensors(weights, differences)


def spelled(
    module: ModuleTensors, suffixes: Mapping[str, str], *, alpha: bool = True, norm_names: bool = False
) -> dict[str, Tensor]:
    """One module's tensors by suffix: the inverse of `split_key` and `assembled`.

    Args:
        module: what to spell.
        suffixes: suffix by role, `KOHYA` or `PEFT`.
        alpha: whether a LoRA gets an `.alpha`; the other algorithms always do, because for some it is no mere scale.
        norm_names: whether differences of one-dimensional weights are called `w_norm` and `b_norm`.
    """
    result = {}
    if (weights := module.adapter) is not None:
        for role, tensor in weights.tensors.items():
            if role == "dora_scale" and suffixes is PEFT and scales_outputs(weights):
                result[".lora_magnitude_vector"] = tensor.reshape((-1,) if tensor.ndim == 2 else (1, -1, 1, 1))
            else:
                result[suffixes[role]] = tensor
        if alpha or weights.algorithm != "lora":
            result[".alpha"] = _alpha_tensor(weights)
    norm = norm_names and "weight" in module.differences and module.differences["weight"].ndim == 1
    for parameter, tensor in module.differences.items():
        result[_NORM_SUFFIXES[parameter] if norm else _DIFFERENCE_SUFFIXES[parameter]] = tensor
    return result


def rank_of(weights: AdapterWeights) -> int | None:
    """The r of the scale alpha / r, or None for adapters that have none (OFT, LoKr with two full factors)."""
    for role, dimension in _RANK_DIMENSION.items():
        if role in weights.tensors:
            return weights.tensors[role].shape[dimension]
    return None


def scale_of(weights: AdapterWeights) -> float:
    """alpha / r; 1 where the file states no alpha or the algorithm has no rank."""
    rank = rank_of(weights)
    return 1.0 if weights.alpha is None or not rank else weights.alpha / rank


def multiplied(tensor: Tensor, factor: float) -> Tensor:
    """`tensor` times `factor`, in its own dtype where that loses nothing (powers of two), else in fp32."""
    if factor == 1:
        return tensor
    product = tensor.float() * factor
    back = product.to(tensor.dtype)
    return back if torch.equal(back.float(), product) else product


def scales_outputs(weights: AdapterWeights) -> bool:
    """Whether DoRA's magnitudes are per output, the only kind that PEFT knows."""
    return weights.algorithm == "lora" and weights.tensors["dora_scale"].shape[0] == weights.tensors["up"].shape[0]


def without_core(weights: AdapterWeights) -> AdapterWeights:
    """A LoRA or LoKr whose Tucker core, which few programs know, is multiplied into a factor, in fp32."""
    tensors = dict(weights.tensors)
    if "mid" in tensors:
        core, down = tensors.pop("mid").float(), tensors["down"].float()
        tensors["down"] = torch.einsum("mn...,ni->mi...", core, down.flatten(1))
        return AdapterWeights(weights.algorithm, tensors, weights.alpha)
    if "lokr_t2" in tensors:
        core, outer, inner = (tensors.pop(f"lokr_{name}").float() for name in ("t2", "w2_a", "w2_b"))
        tensors["lokr_w2"] = torch.einsum("ij...,ip,jq->pq...", core, outer, inner).contiguous() * scale_of(weights)
        whole = AdapterWeights(weights.algorithm, tensors)
        return replace(whole, alpha=float(rank_of(whole) or 1))
    return weights


def fits(module: ModuleTensors, shape: tuple[int, ...]) -> bool:
    """Whether tensors belong to a module whose weight has this shape."""
    weight = module.differences.get("weight")
    bias = module.differences.get("bias")
    return (
        (weight is None or tuple(weight.shape) == shape)
        and (bias is None or tuple(bias.shape) == shape[:1])
        and (module.adapter is None or _adapter_fits(module.adapter, shape))
    )


def _adapter_fits(weights: AdapterWeights, shape: tuple[int, ...]) -> bool:
    tensors, out, inside = weights.tensors, shape[0], math.prod(shape[1:])
    match weights.algorithm:
        case "lora":
            kernel = tensors["mid"].shape[2:] if "mid" in tensors else tensors["down"].shape[2:]
            return tensors["up"].shape[0] == out and (tensors["down"].shape[1], *kernel) == shape[1:]
        case "loha":
            if "hada_t1" in tensors:
                return tensors["hada_w1_a"].shape[1] == out
            return tensors["hada_w1_a"].shape[0] == out and tensors["hada_w1_b"].shape[1] == inside
        case "lokr":
            first, second = kronecker_shapes(tensors)
            return first[0] * second[0] == out and first[1] * math.prod(second[1:]) == inside
        case "oft" | "boft":
            blocks = tensors["oft_blocks"]
            return blocks.shape[-3] * blocks.shape[-1] == out
        case _:
            return tensors["b1"].shape[0] == out


def kronecker_shapes(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of LoKr's two factors, (out_l, in_m) and (out_k, in_n[, kh, kw]), whether they are whole or products."""
    shapes: list[tuple[int, ...]] = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in tensors:
            shapes.append(tuple(tensors[name].shape))
        elif name == "lokr_w2" and "lokr_t2" in tensors:
            sides = (tensors[f"{name}_a"].shape[1], tensors[f"{name}_b"].shape[1])
            shapes.append((*sides, *tensors["lokr_t2"].shape[2:]))
        else:
            shapes.append((tensors[f"{name}_a"].shape[0], tensors[f"{name}_b"].shape[1]))
    return shapes[0], shapes[1]


def _canonical_lora(weights: AdapterWeights, shape: tuple[int, ...] | None) -> AdapterWeights | None:
    """A LoRA whose factors have the dimensions of the module's weight, or None for factors that do not belong together.

    Files flatten convolutions to two dimensions (ComfyUI's trainer), or give a Linear the 1×1 kernel of the convolution
    that stands in its place in another version of the model.
    """
    down, up = weights.tensors["down"], weights.tensors["up"]
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1:
        return None
    tensors = dict(weights.tensors)
    if shape is not None and "mid" not in tensors and math.prod(down.shape[1:]) == math.prod(shape[1:]):
        tensors["down"] = down.reshape(down.shape[0], *shape[1:])
    tensors["up"] = up.reshape(*up.shape[:2], *(1,) * (tensors["down"].ndim - 2))
    if "dora_scale" in tensors and tensors["dora_scale"].ndim == 1:
        tensors["dora_scale"] = tensors["dora_scale"].reshape(-1, *(1,) * (tensors["down"].ndim - 1))
    return AdapterWeights(weights.algorithm, tensors, weights.alpha)


def _alpha_tensor(weights: AdapterWeights) -> Tensor:
    """Alpha as files carry it: a scalar in the tensors' dtype, in fp32 where that dtype would round it."""
    alpha = _default_alpha(weights) if weights.alpha is None else weights.alpha
    dtype = next(iter(weights.tensors.values())).dtype
    scalar = torch.tensor(alpha, dtype=dtype)
    return scalar if scalar.item() == alpha else torch.tensor(alpha, dtype=torch.float32)


def _default_alpha(weights: AdapterWeights) -> float:
    """The alpha that changes nothing: for OFT it bounds the rotation, and zero means no bound."""
    if weights.algorithm in ("oft", "boft"):
        return 0.0
    return float(rank_of(weights) or 1)


_LYCORIS_ROLES = {
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "oft": ("oft_blocks", "rescale"),
    "glora": ("a1", "a2", "b1", "b2", "bm"),
}

_COMMON_SUFFIXES = {
    "dora_scale": ".dora_scale",
    **{role: f".{role}" for algorithm in ("loha", "lokr", "oft") for role in _LYCORIS_ROLES[algorithm]},
    **{role: f".{role}.weight" for role in _LYCORIS_ROLES["glora"]},
}

KOHYA: Mapping[str, str] = {
    "down": ".lora_down.weight",
    "up": ".lora_up.weight",
    "mid": ".lora_mid.weight",
    **_COMMON_SUFFIXES,
}
"""Suffix by role as kohya's scripts, LyCORIS and ComfyUI write them."""

PEFT: Mapping[str, str] = {
    "down": ".lora_A.weight",
    "up": ".lora_B.weight",
    "mid": ".lora_mid.weight",
    **_COMMON_SUFFIXES,
}
"""Suffix by role as PEFT writes them, LyCORIS' names where PEFT has none."""

_DIFFERENCE_SUFFIXES = {"weight": ".diff", "bias": ".diff_b"}
_NORM_SUFFIXES = {"weight": ".w_norm", "bias": ".b_norm"}
_DIFFERENCES = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}

# Suffixes by which files are read, the longer before the shorter that they end with.
_ROLES: dict[str, str] = {
    **{suffix: role for table in (KOHYA, PEFT) for role, suffix in table.items()},
    ".alpha": "alpha",
    **{f".{role}": role for role in _DIFFERENCES},
    ".lora_A": "down",  # Mochi
    ".lora_B": "up",
    ".lora_A.default.weight": "down",  # PEFT, saved with the adapter's name
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",  # diffusers before PEFT
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",  # diffusers' attention processors
    "_lora.up.weight": "up",
    ".lora_magnitude_vector": "magnitude",  # (out,) for Linear, (1, out, 1, 1) for convolutions
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_B.bias": "up_bias",  # PEFT's lora_bias: added after the up matrix, so it is scaled like it
}

# XLabs' trainer numbers the streams of a double block behind what would be the suffix: that number tells the module.
XLABS = r".*\.processor\.(?:qkv|proj)_lora[12]?"
"""Regular expression for the bases of XLabs' trainer."""

_XLABS = re.compile(rf"({XLABS})\.(down|up)\.weight")

UNREADABLE: Mapping[str, tuple[str, str]] = {
    ".oft_diag": (
        "is an OFT of LyCORIS before 2.0 (oft_diag), whose versions kept different things under that name",
        "train it again, with a program that writes oft_blocks",
    ),
    ".oft_blocks.0": (
        "is an OFT of sd-scripts for Flux (oft_blocks.0), which has a list of rotations for each layer",
        "use it with sd-scripts, or train it again with another program",
    ),
}
"""Suffix → the format of adapters that cannot be read, and what to do about it."""

# What makes an adapter of each kind, tried in this order.
_NEEDED: tuple[tuple[str, frozenset[str]], ...] = (
    ("lora", frozenset({"down", "up"})),
    ("loha", frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})),
    ("lokr", frozenset({"lokr_w1", "lokr_w2"})),
    ("lokr", frozenset({"lokr_w1", "lokr_w2_a", "lokr_w2_b"})),
    ("lokr", frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2"})),
    ("lokr", frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"})),
    ("oft", frozenset({"oft_blocks"})),
    ("glora", frozenset({"a1", "a2", "b1", "b2"})),
)
_ROLES_OF = {
    "lora": frozenset({"down", "up", "mid", "dora_scale"}),
    **{algorithm: frozenset((*roles, "dora_scale")) for algorithm, roles in _LYCORIS_ROLES.items()},
}

# Which dimension of which tensor is the rank; of LoKr the second factor decides (LyCORIS).
_RANK_DIMENSION = {"down": 0, "hada_w1_b": 0, "lokr_w2_b": 0, "lokr_w1_b": 0, "b2": 0}
