"""How programs spell keys of LoRA files: key = base + suffix.

The suffix names the tensor, and any suffix may follow any base, because real files mix them:
`transformer.x.lora_down.weight`, `lora_unet_x.hada_w1_a`. Suffixes are translated into roles: the canonical tensor
names of `AdapterWeights`, and a few others (`alpha`, differences). The base names the tensor's module and is up to the
layout; its prefix, widths and names of blocks tell the component and the family without a model.

Shapes: r is the rank, (out, in) a Linear's weight and (out, in, kh, kw) a convolution's.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

import torch
from torch import Tensor

from lorasmith.adapters.algorithms import algorithm_names, algorithms, facts_of, format_named, format_of
from lorasmith.core.adapter_state import DENOISER, AdapterWeights, first_misfit
from lorasmith.formats.scales import checked_scale, idle_alpha, scale_of


class Suffixes(Enum):
    """Tensor names of a file: those of kohya's scripts, LyCORIS and ComfyUI, or PEFT's for algorithms that it has."""

    KOHYA = "kohya"
    PEFT = "peft"


KOHYA, PEFT = Suffixes


@dataclass(frozen=True)
class Unfit:
    """Why a module's tensors make no adapter."""

    role: str  # of the tensor at fault
    problem: str  # text that follows the tensor's name: the rule, and what the tensor is


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of one base."""

    adapter: AdapterWeights | None = None  # its adapter, if any
    differences: Mapping[str, Tensor] = field(default_factory=dict)  # `weight` and `bias` differences


BUNDLE = "bundle_emb."
"""Start of the keys of a word's vectors in a LoRA file: `bundle_emb.WORD.clip_l` (A1111, Forge, OneTrainer)."""


def split_key(key: str) -> tuple[str, str] | None:
    """(base, role) of a tensor's key, or None if the suffix is unknown."""
    if ".processor." in key and (match := _XLABS.fullmatch(key)):
        return match[1], match[2]
    roles, lengths = _roles(algorithm_names(), key[-1:])
    for length in lengths:  # the longest first, as it may end with a shorter one
        if (role := roles.get(suffix := key[-length:])) is not None:
            return key[: -len(suffix)], role
    return None


@functools.lru_cache
def _roles(names: tuple[str, ...], end: str) -> tuple[dict[str, str], list[int]]:
    """Role by suffix, of those with this last letter, and the suffixes' lengths, the longest first."""
    formats = [format_named(name) for name in names]
    roles = {suffix: role for form in formats for role, suffix in (*form.suffixes.items(), *form.peft_suffixes.items())}
    roles = {suffix: role for suffix, role in (roles | _OTHER_ROLES).items() if suffix.endswith(end)}
    return roles, sorted(set(map(len, roles)), reverse=True)


def grouped(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Keys by base and role. Keys without a known suffix are left out."""
    groups: dict[str, dict[str, str]] = {}
    for key in keys:
        if parts := split_key(key):
            groups.setdefault(parts[0], {})[parts[1]] = key
    return groups


def assembled(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, stated_alpha: float | None = None
) -> ModuleTensors | Unfit:
    """One module's tensors in canonical form, or what is wrong with them.

    Every algorithm's tensors are held to its `AdapterFormat` here, so that no code after it has to expect others: it
    can take products and norms of what this function returns. Whether values are finite is not looked at.
    """
    rest = {role: _widened(tensor) for role, tensor in tensors.items()}
    for role, tensor in rest.items():
        if role != "alpha" and not tensor.is_floating_point():
            return Unfit(
                role, f"must hold floating-point numbers, and holds {str(tensor.dtype).removeprefix('torch.')}"
            )
    role_tensors = {role: rest.pop(role) for role in (*_DIFFERENCES, "up_bias") if role in rest}
    differences = {parameter: role_tensors[role] for role, parameter in _DIFFERENCES.items() if role in role_tensors}
    if not rest and "up_bias" in role_tensors:
        return Unfit("up_bias", "is a bias without the up matrix that it is added to")
    if not rest:
        return _difference_misfit(role_tensors, None) or ModuleTensors(None, differences)
    weights = _adapter_of(rest, shape, stated_alpha)
    if isinstance(weights, Unfit):
        return weights
    if "up_bias" in role_tensors:
        differences["bias"] = role_tensors["up_bias"] * scale_of(weights)
    return _difference_misfit(role_tensors, weights) or ModuleTensors(weights, differences)


def _adapter_of(
    tensors: dict[str, Tensor], shape: tuple[int, ...] | None, stated_alpha: float | None
) -> AdapterWeights | Unfit:
    """The adapter of a module; arguments as for `assembled`, without differences."""
    alpha = tensors.pop("alpha", None)
    if "magnitude" in tensors:
        tensors["dora_scale"] = tensors.pop("magnitude").reshape(-1)
    algorithm = _algorithm_of(tuple((role, tuple(tensor.shape)) for role, tensor in tensors.items()), algorithm_names())
    if isinstance(algorithm, Unfit):
        return algorithm
    try:
        number = stated_alpha if alpha is None else checked_scale(alpha.item() if alpha.numel() == 1 else None)
    except ValueError as problem:
        return Unfit("alpha", f"must {problem}")
    form = format_named(algorithm)
    if form.bounded is not None and number is not None:
        number = max(number, 0.0)  # for ComfyUI and LyCORIS a negative bound is none
    weights = form.canonical(AdapterWeights(algorithm, tensors, number), shape)
    return _magnitude_misfit(weights) or weights


def all_assembled(
    tensors: Mapping[str, Tensor], groups: Mapping[str, Mapping[str, str]], alphas: Mapping[str, float]
) -> tuple[dict[str, ModuleTensors], dict[str, str]]:
    """The modules of `grouped` tensors by base, and what is wrong with those that make no adapter, in a clause each."""
    modules: dict[str, ModuleTensors] = {}
    unfit: dict[str, str] = {}
    for base, keys in groups.items():
        module = assembled({role: tensors[key] for role, key in keys.items()}, None, alphas.get(base))
        if isinstance(module, Unfit):
            role = module.role if module.role in keys else "magnitude"  # PEFT's name of dora_scale
            unfit[base] = f"{keys[role]} {module.problem}"
        else:
            modules[base] = module
    return modules, unfit


def _widened(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.element_size() > 1:
        return tensor
    return tensor.to(torch.float16 if tensor.dtype in _IN_FP16 else torch.float32)


_LARGEST_WEIGHT = 2**29
"""Numbers in the largest weight that is taken for one: those of 2026's models have at most 2^28.3."""

_IN_FP16 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Eight-bit floats of which fp16 holds all values."""


@functools.lru_cache(maxsize=1024)  # most modules of a file have the shapes of others
def _algorithm_of(tensors: tuple[tuple[str, tuple[int, ...]], ...], names: tuple[str, ...]) -> str | Unfit:
    """The algorithm, among those of these names, whose adapter has tensors of these roles and shapes."""
    shapes = dict(tensors)
    roles = shapes.keys() - {"dora_scale"}
    misfit = None
    for name in names:
        form = format_named(name)
        for rules in form.rules:
            if rules.keys() != roles:
                continue
            found = first_misfit(shapes, rules)
            if found is None:
                role, further = next(iter(rules)), form.further_rule(shapes)
                return Unfit(role, f"must {further}, and has the shape {shapes[role]}") if further else name.casefold()
            role, rule = found
            misfit = misfit or Unfit(role, f"must have the shape {rule}, and has the shape {shapes[role]}")
    return misfit or _incomplete(shapes, names)


def _incomplete(shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> Unfit:
    """What is wrong with tensors of which no algorithm has exactly these."""
    roles = shapes.keys() - {"dora_scale"}
    for name in names:
        for rules in format_named(name).rules:
            if roles and roles < rules.keys():
                lacking = " and ".join(role for role in rules if role not in roles)
                return Unfit(min(roles), f"is part of an adapter whose {lacking} is missing")
    return Unfit(next(iter(shapes), "alpha"), "is beside tensors with which it makes no adapter")


def _magnitude_misfit(weights: AdapterWeights) -> Unfit | None:
    known = format_of(weights).shape_of(weights)
    if math.prod(known) > _LARGEST_WEIGHT:
        return Unfit(next(iter(weights.tensors)), f"is for a weight {known}, which is larger than any layer's")
    if "dora_scale" not in weights.tensors:
        return None
    if "dora" not in facts_of(weights.algorithm).variants:
        return Unfit("dora_scale", f"is beside an adapter of the kind {weights.algorithm}, which has no magnitudes")
    scale = tuple(weights.tensors["dora_scale"].shape)
    by_output = bool(scale) and scale[0] == math.prod(scale) == known[0]
    by_input = scale[:1] == (1,) and len(scale) > 1 and math.prod(scale) > 0 and known[1] % math.prod(scale) == 0
    if by_output or by_input:
        return None
    return Unfit("dora_scale", f"must have a number for each output or input of {known}, and has the shape {scale}")


def _difference_misfit(tensors: Mapping[str, Tensor], weights: AdapterWeights | None) -> Unfit | None:
    """What is wrong with differences, by role, beside an adapter."""
    outputs = None if weights is None else format_of(weights).shape_of(weights)[0]
    for role, parameter in {**_DIFFERENCES, "up_bias": "bias"}.items():
        if role not in tensors:
            continue
        shape = tuple(tensors[role].shape)
        if not shape or 0 in shape or (role != "diff" and len(shape) > 1):
            wanted = "of at least one dimension" if role == "diff" else "a vector"
            return Unfit(role, f"must be {wanted}, and has the shape {shape}")
        outputs = outputs or shape[0]
        fits_adapter = weights is None or (len(shape) > 1 and _adapter_fits(weights, shape))
        if shape[0] != outputs or (parameter == "weight" and not fits_adapter):
            return Unfit(role, f"must fit the tensors beside it, of {outputs} outputs, and has the shape {shape}")
    return None


def spelled(
    module: ModuleTensors, suffixes: Suffixes, *, alpha: bool = True, norm_names: bool = False
) -> dict[str, Tensor]:
    """One module's tensors by suffix: the inverse of `split_key` and `assembled`."""
    result = {}
    if (weights := module.adapter) is not None:
        form = format_of(weights)
        of_peft = form.peft_suffixes if suffixes is PEFT else {}
        for role, tensor in weights.tensors.items():
            if role == "dora_scale" and suffixes is PEFT and scales_outputs(weights):
                result[".lora_magnitude_vector"] = tensor.reshape((-1,) if tensor.ndim == 2 else (1, -1, 1, 1))
            elif role == "dora_scale":
                result[".dora_scale"] = tensor
            else:
                result[of_peft.get(role) or form.suffixes[role]] = tensor
        if alpha or not form.is_low_rank:
            result[".alpha"] = _alpha_tensor(weights)
    norm = norm_names and "weight" in module.differences and module.differences["weight"].ndim == 1
    for parameter, tensor in module.differences.items():
        result[_NORM_SUFFIXES[parameter] if norm else _DIFFERENCE_SUFFIXES[parameter]] = tensor
    return result


def scales_outputs(weights: AdapterWeights) -> bool:
    """Whether DoRA's magnitudes are per output, the only kind in PEFT, on an algorithm for which PEFT has them."""
    tensors, form = weights.tensors, format_of(weights)
    takes = form.peft is not None and form.peft.magnitudes
    return takes and tensors["dora_scale"].shape[0] == form.shape_of(weights)[0]


def without_core(weights: AdapterWeights) -> AdapterWeights:
    """An adapter with its Tucker core, which few programs read, multiplied into a factor if its algorithm allows."""
    return format_of(weights).without_core(weights)


def fits(module: ModuleTensors, shape: tuple[int, ...]) -> bool:
    """Whether tensors fit a module whose weight has this shape."""
    weight = module.differences.get("weight")
    bias = module.differences.get("bias")
    return (
        (weight is None or tuple(weight.shape) == shape)
        and (bias is None or tuple(bias.shape) == shape[:1])
        and (module.adapter is None or _adapter_fits(module.adapter, shape))
    )


def _adapter_fits(weights: AdapterWeights, shape: tuple[int, ...]) -> bool:
    """Whether tensors fit a weight of this shape, as far as they determine it; its kernel may be flattened."""
    stored = format_of(weights).shape_of(weights)
    if len(stored) == len(shape):
        return stored == shape
    return stored[0] == shape[0] and (len(stored) == 1 or math.prod(stored[1:]) == math.prod(shape[1:]))


def _alpha_tensor(weights: AdapterWeights) -> Tensor:
    """Alpha in a file: a scalar in the tensors' dtype, in fp32 where that dtype would round it."""
    alpha = idle_alpha(weights) if weights.alpha is None else weights.alpha
    dtype = next(iter(weights.tensors.values())).dtype
    scalar = torch.tensor(alpha, dtype=dtype)
    return scalar if scalar.item() == alpha else torch.tensor(alpha, dtype=torch.float32)


_DIFFERENCE_SUFFIXES = {"weight": ".diff", "bias": ".diff_b"}
_NORM_SUFFIXES = {"weight": ".w_norm", "bias": ".b_norm"}
_DIFFERENCES = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}

# Further suffixes by which files are read.
_OTHER_ROLES: dict[str, str] = {
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
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

# XLabs' trainer numbers the streams of a double block after the suffix: that number identifies the module.
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
"""Suffix → the format of adapters that cannot be read, and the remedy."""


KOHYA_PREFIXES = ("lora_unet_", "lycoris_", "lora_transformer_", "oft_unet_")
"""kohya's scripts (written), LyCORIS' wrapper, OneTrainer, and the OFT of sd-scripts for UNets."""

COMFYUI_PREFIXES = ("diffusion_model.", "model.diffusion_model.")
DIFFUSERS_EXPERTS = ("transformer_2.", "transformer.")
"""Of the experts of a model of two; without dots, the first begins with the second."""

DIFFUSERS_PREFIXES = ("unet.", *DIFFUSERS_EXPERTS)

DIFFUSERS_PARTS = ("text_conditioner.",)
"""Of parts beside the denoiser in a pipeline that are submodules of ours (`Family.denoiser_parts`)."""

PEFT_PREFIX = "base_model.model."
"""For a text encoder in a subfolder, the folder's name and a slash precede it."""

KOHYA_ENCODER, COMFYUI_ENCODER, DIFFUSERS_ENCODER = (
    r"lora_te(?P<kohya>\d*)_",
    r"text_encoders\.(?P<comfyui>\w+)\.transformer\.",
    r"text_encoder(_(?P<diffusers>\d+))?\.",
)
"""Regular expressions for the prefixes of text encoders."""


def any_of(prefixes: tuple[str, ...]) -> str:
    """A regular expression for any of some prefixes."""
    return "|".join(map(re.escape, prefixes))


_PREFIXES = (*KOHYA_PREFIXES, *COMFYUI_PREFIXES, *DIFFUSERS_PREFIXES)
FLAT = any_of(tuple(prefix.replace(".", "_") for prefix in (*_PREFIXES, PEFT_PREFIX)))
"""Regular expression for the denoiser's prefixes with underscores for dots."""

_ENCODER = re.compile("|".join((KOHYA_ENCODER, COMFYUI_ENCODER, DIFFUSERS_ENCODER)))
_ANY = re.compile(rf"{any_of(_PREFIXES)}|(\w+/)?{re.escape(PEFT_PREFIX)}|{_ENCODER.pattern}")


def component_of(base: str) -> str:
    """`denoiser`, `text_encoder`, `text_encoder_2`, ..., by the prefix of a base."""
    folder, slash, _ = base.partition("/")
    if slash:
        return folder
    if (match := _ENCODER.match(base)) is None:
        return DENOISER
    # ComfyUI names the kind of an encoder; these two are numbers two and three wherever others are beside them.
    numbers = {"clip_g": "2", "t5": "3"}
    kind = match["comfyui"] or ""
    number = match["kohya"] or match["diffusers"] or next((n for k, n in numbers.items() if kind.startswith(k)), "")
    return "text_encoder" if number in ("", "1") else f"text_encoder_{number}"


def without_prefix(base: str) -> str:
    """A base without its prefix: a module's path in a layout's spelling."""
    match = _ANY.match(base)
    return base if match is None else base[match.end() :]


DENOISER_START = rf"^({FLAT})?"
"""Optional prefix of a denoiser's first module name, for signatures that match its beginning."""


@dataclass(frozen=True)
class Signature:
    """A sign by which LoRA files of a family are recognised."""

    title: str  # display name of the family
    pattern: str  # regular expression that finds the name of one of its modules, with underscores for dots
    width: int | None = None  # input width of this module; None for any
    order: int = 0  # signatures of a lower order are tried first; one that other families share gets a high one
    # how its metadata must call the architecture, for a family whose files have the names and widths of another's; None
    # for anything
    architecture: str | None = None


SIGNATURES: list[Callable[[], Iterable[Signature]]] = []
"""Functions with the signatures of registered families (`families.base`), and of those that are known by name alone."""


def signatures() -> list[Signature]:
    """All signatures, in the order in which they are tried."""
    found = (sign for source in SIGNATURES for sign in source())
    return sorted(found, key=lambda sign: (sign.order, sign.width is None))


def guessed_family(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] = MappingProxyType({})
) -> str | None:
    """Display name of the family, or None if no signature matches."""
    architectures = {metadata.get(key, "").partition("/")[0].casefold() for key in _ARCHITECTURE_KEYS}
    inputs = {base.replace(".", "_"): width for base, width in _input_widths(shapes).items()}
    for sign in signatures():
        if sign.architecture is not None and sign.architecture not in architectures:
            continue
        pattern = re.compile(sign.pattern)
        if any(sign.width in (None, width) and pattern.search(base) for base, width in inputs.items()):
            return sign.title
    return None


def block_of(base: str) -> str:
    """The outermost numbered block of a base, such as `down_blocks.1` or `text_fusion.refiner_blocks.0`, or "" ."""
    match = _BLOCK.match(without_prefix(base))
    if match is None:
        return ""
    return ".".join(part for part in match.groups() if part)


def kind_of(base: str) -> str:
    """The layer of a base within its block, such as `attn1_to_q`; its name if it is in no block."""
    return _UP_TO_KIND.sub("", base.replace(".", "_"))


_ARCHITECTURE_KEYS = ("ss_base_model_version", "modelspec.architecture")
_UP_TO_KIND = re.compile(rf"^.*(blocks|block|layers|attentions|resnets|samplers)_\d+_(\d+_)?|^({FLAT})")
_BLOCK = re.compile(r"(mid_block|middle_block)|(?:text_model[._])?(?:encoder[._])?(.*?(?:blocks|layers))[._](\d+)")


def _input_widths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Input width of each module by base, 0 if no tensor determines it."""
    axes = {role: axis for _, form in algorithms() for role, axis in form.input_axes.items()}
    widths = {}
    for base, keys in grouped(shapes).items():
        role = next((role for role in axes if role in keys), "")
        shape = shapes[keys[role]] if role else ()
        widths[base] = shape[axes[role]] if len(shape) > 1 else 0
    return widths
