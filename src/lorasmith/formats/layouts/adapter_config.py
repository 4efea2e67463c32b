"""The configuration of a LoRA beside its tensors, as PEFT has it (LoraConfig): ranks and alphas.

diffusers keeps the fields in a file's header, as JSON under `lora_adapter_metadata`, each with the prefix of its
component (`unet.lora_alpha`) or in an object of the component's. SimpleTuner has an entry of the header for each field
(`transformer.lora_alpha`, `transformer.r`), others the same without a prefix. A folder's fields (`adapter_config.json`)
get the prefix of its keys, so that all are read alike.

PEFT matches the keys of `rank_pattern` and `alpha_pattern` as regular expressions against the end of a module path, and
a list of `target_modules` as ends of paths; a string of them is a regular expression for the whole path.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lorasmith.adapters.algorithms import algorithms
from lorasmith.core.errors import LoraError
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.formats.scales import checked_scale
from lorasmith.formats.spelling import component_of

ADAPTER_METADATA = "lora_adapter_metadata"
"""Header entry in which diffusers keeps the fields of PEFT's LoraConfig, each after its component's name."""

_ALPHA = "lora_alpha"
_LOOSE = ("network_alpha", "alpha")  # entries that SGLang reads, and diffusers for one family
_FIELDS = (_ALPHA, "r", "rank_pattern", "alpha_pattern", "use_rslora")  # that decide a scale

# Initializations that change the base model's weights, so that the adapter fits the changed model alone.
_STARTS_THAT_CHANGE_THE_MODEL = ("pissa", "olora", "corda", "loftq")

_REPETITION = re.compile(r"(?<!\\)(?:[*+{]|(?<!\()\?)")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")
_MOST_REPETITIONS = 3
_MOST_EXPRESSIONS = 100
_LONGEST_EXPRESSION = 2_000
_MOST_STEPS = 500_000_000
_MOST_PREFIXES = 16
_MOST_CHOICES = 100_000


class _Expression(NamedTuple):
    """A pattern that is a regular expression."""

    place: int  # among the patterns
    pattern: re.Pattern[str]
    value: float
    choices: int  # the time to match a path of length n is at most choices · n^repetitions
    repetitions: int


@dataclass(frozen=True)
class _Patterns:
    """Values by pattern, of which the first that matches a path counts."""

    # place and value by path, or end of a path after a dot; those after a caret stand for the whole path
    ends: Mapping[str, tuple[int, float]]
    expressions: tuple[_Expression, ...]  # all other patterns

    def value(self, path: str, otherwise: float) -> float:
        """The value of a path, `otherwise` if no pattern matches it."""
        dots = (index + 1 for index, letter in enumerate(path) if letter == ".")
        names = (f"^{path}", path, *(path[start:] for start in dots))
        found = [self.ends[name] for name in names if name in self.ends] if self.ends else []
        found += [
            (expression.place, expression.value) for expression in self.expressions if expression.pattern.match(path)
        ]
        return min(found)[1] if found else otherwise

    def refuse_slow(self, paths: Collection[str]) -> None:
        """Raise LoraError if matching all paths could take longer than some seconds."""
        steps = sum(
            expression.choices * (path.count(".") + 1) * len(path) ** expression.repetitions
            for expression in self.expressions
            for path in paths
        )
        if steps > _MOST_STEPS:
            raise LoraError(
                f"the patterns in {ADAPTER_METADATA} must match the names of {len(paths)} modules in a short time, and "
                "could take minutes; save the file again with the names of modules instead of regular expressions"
            )


@dataclass(frozen=True)
class Config:
    """The fields of a configuration that decide the scale."""

    rank: float  # of modules that no pattern matches
    alpha: float
    rank_pattern: _Patterns  # values by the end of a path
    alpha_pattern: _Patterns
    rank_stabilized: bool  # whether the scale is alpha / √rank

    @property
    def is_uniform(self) -> bool:
        """Whether all modules have one alpha."""
        return not self.alpha_pattern.ends and not self.alpha_pattern.expressions

    def rank_of(self, path: str) -> float:
        """The rank of a module."""
        return self.rank_pattern.value(path, self.rank)

    def alpha_of(self, path: str, rank: int | None) -> float:
        """The numerator of alpha / rank. rsLoRA scales by alpha / √rank, which is an alpha √rank times as large."""
        alpha = self.alpha_pattern.value(path, self.alpha)
        return alpha * math.sqrt(rank) if self.rank_stabilized and rank else alpha


def configs_of(metadata: Mapping[str, str]) -> Mapping[str, Config]:
    """Configurations by prefix of their keys, longest last: `unet.`, or empty where diffusers saved a single model.

    Raises LoraError when they are malformed.
    """
    if ADAPTER_METADATA in metadata:
        return _parsed(metadata[ADAPTER_METADATA], ADAPTER_METADATA)
    entries = {key: _value(metadata[key]) for key in _config_entries(metadata)}
    return _parsed(json.dumps(entries), min(entries)) if entries else {}


def without_config(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata without configurations, for tensors with other alphas."""
    return {key: text for key, text in metadata.items() if key not in {ADAPTER_METADATA, *_config_entries(metadata)}}


def _config_entries(metadata: Mapping[str, str]) -> list[str]:
    """Entries for single fields of configurations."""
    prefixes = [key.removesuffix(_ALPHA) for key in metadata if f".{key}".endswith(f".{_ALPHA}")]
    return [entry for prefix in prefixes for field in _FIELDS if (entry := prefix + field) in metadata]


def _value(text: str) -> object:
    """The value that a program wrote as text, as JSON or as Python does."""
    try:
        return parse_foreign_json({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def stated_alphas(
    tensors: Mapping[str, Tensor], groups: Mapping[str, Mapping[str, str]], metadata: Mapping[str, str]
) -> dict[str, float]:
    """Alphas of `grouped` tensors by base, from the header. Raises LoraError when its entry is malformed."""
    alphas = {}
    for prefix, config, bases in _configured(groups, metadata):
        config.alpha_pattern.refuse_slow(bases)
        for base in bases:
            if "alpha" not in (keys := groups[base]):
                shape = tensors[keys["down"]].shape if "down" in keys else ()
                alphas[base] = config.alpha_of(base.removeprefix(prefix), shape[0] if shape else None)
    return alphas


def _configured(bases: Collection[str], metadata: Mapping[str, str]) -> Iterator[tuple[str, Config, Collection[str]]]:
    """Each prefix and configuration of a header, and the bases that it is for.

    These begin with the prefix. If none does, as in a file whose keys were renamed, they are those of the same
    component, unless several configurations are for it, or one has patterns, which are of the former names.
    """
    configs = configs_of(metadata)
    bases_of = {prefix: [base for base in bases if base.startswith(prefix)] for prefix in configs}
    idle = Counter(component_of(prefix) for prefix, own in bases_of.items() if not own)
    rest = set(bases).difference(*bases_of.values())
    for prefix, config in configs.items():
        component = component_of(prefix)
        if bases_of[prefix] or idle[component] > 1 or not config.is_uniform:
            yield prefix, config, bases_of[prefix]
        else:
            yield "", config, [base for base in rest if component_of(base) == component]


def unread_scales(metadata: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, float]:
    """Scales in a header that programs do not agree on, and that are not applied, by entry.

    Args:
        metadata: the header.
        ranks: rank of a LoRA without alpha, by component that has one.
    """
    stated = {prefix + _ALPHA: (component_of(prefix), config.alpha) for prefix, config in configs_of(metadata).items()}
    for entry in _LOOSE:
        value = _value(metadata.get(entry, ""))
        if isinstance(value, int | float) and ranks:
            stated[entry] = next(iter(ranks)), float(value)
    scales = {entry: alpha / ranks[component] for entry, (component, alpha) in stated.items() if component in ranks}
    return {entry: scale for entry, scale in scales.items() if scale != 1}


def header_fields(config: str, prefix: str) -> dict[str, Any]:
    """The fields of an `adapter_config.json`, with the prefix of its tensors' keys."""
    try:
        fields = parse_foreign_json(config)
        kind, start = fields.get("peft_type", "LORA"), fields.get("init_lora_weights")
    except (ValueError, AttributeError):
        raise LoraError("adapter_config.json must be a JSON object, and it is not; get the file again") from None
    kinds = {form.peft.name: form.peft for _, form in algorithms() if form.peft is not None}
    kind = str(kind)[:20]
    known = kinds.get(kind)
    if known is None or known.differs:
        why = "" if known is None else f", which {known.differs}"
        read = ", ".join(name for name, kind in kinds.items() if not kind.differs)
        raise LoraError(
            f"PEFT adapters of type {read} can be read, and this one is {kind}{why}; "
            "merge it into its model with PEFT instead"
        )
    if isinstance(start, str) and start.startswith(_STARTS_THAT_CHANGE_THE_MODEL):
        raise LoraError(
            f"this PEFT adapter was started with {start}, which changed the model's own weights, so that it fits no "
            "other model; save it again with path_initial_model_for_weight_conversion"
        )
    if known.alpha != _ALPHA:
        fields[_ALPHA] = fields.get(known.alpha, 8)
    return {prefix + name: value for name, value in fields.items()}


@functools.lru_cache(maxsize=4)
def _parsed(text: str, entry: str) -> Mapping[str, Config]:
    """The configurations in JSON, which is of this entry of a header."""
    try:
        fields = parse_foreign_json(text)
        inner = {part: own for part, own in fields.items() if isinstance(own, dict) and _ALPHA in own}
        fields |= {f"{part}.{name}": value for part, own in inner.items() for name, value in own.items()}
        prefixes = sorted({name.removesuffix(_ALPHA) for name in fields if name.endswith(_ALPHA)}, key=len)
        if len(prefixes) > _MOST_PREFIXES:
            raise ValueError(f"it has more than {_MOST_PREFIXES} components")
        return {
            prefix: Config(
                rank=_checked_rank(fields.get(f"{prefix}r", 8)),
                alpha=checked_scale(fields[prefix + _ALPHA]),
                rank_pattern=_compiled(fields.get(f"{prefix}rank_pattern"), _checked_rank),
                alpha_pattern=_compiled(fields.get(f"{prefix}alpha_pattern"), checked_scale),
                rank_stabilized=bool(fields.get(f"{prefix}use_rslora")),
            )
            for prefix in prefixes
        }
    except (ValueError, TypeError, AttributeError, re.error) as problem:
        raise LoraError(
            f"the header entry {entry} must {_RULES[entry == ADAPTER_METADATA]} of a LoraConfig, and it is not "
            f"({problem}); get the file again, or save it again with the program that made it"
        ) from problem


_RULES = "be, with those beside it, fields", "be JSON with the fields"


def _checked_rank(value: object) -> float:
    rank = checked_scale(value)
    if rank < 1:
        raise ValueError(f"a rank must be at least 1, and is {rank:g}")
    return rank


def _compiled(pattern: Any, checked: Callable[[object], float]) -> _Patterns:
    """A pattern's entries, matched as PEFT does."""
    ends: dict[str, tuple[int, float]] = {}
    expressions: list[_Expression] = []
    for place, (key, value) in enumerate(dict(pattern or {}).items()):
        plain = re.sub(r"\\(\W)", r"\1", key)
        if re.fullmatch(r"\^?[\w.-]+", plain):  # a dot matches any character, but paths have a dot where patterns do
            ends.setdefault(plain, (place, checked(value)))
            continue
        # Each group may choose among all alternatives.
        choices, repetitions = (1 + key.count("|")) ** min(key.count("("), 9), len(_REPETITION.findall(key))
        if repetitions > _MOST_REPETITIONS or choices > _MOST_CHOICES or _REPEATED_GROUP.search(key):
            raise ValueError(f"the pattern {key[:40]!r} repeats too much")
        if len(expressions) == _MOST_EXPRESSIONS or len(key) > _LONGEST_EXPRESSION:
            raise ValueError(f"a pattern has more than {_MOST_EXPRESSIONS} regular expressions, or a very long one")
        whole = re.compile(rf"(.*\.)?({key})$")
        expressions.append(_Expression(place, whole, checked(value), choices, repetitions))
    return _Patterns(ends, tuple(expressions))
