"""The text syntax of targets: presets and patterns, each with optional settings.

    attention                                            a preset of the family
    *.attn2.*, *.ff.*                                    patterns on module paths, where * crosses dots
    all-linear rank=8, *.attn2.* rank=32 lr=2e-4         settings follow the entry that they apply to
    attention, !*.to_out.*                               ! excludes

Entries are separated by commas, semicolons or line ends. A layer that matches several entries gets the settings of all,
later ones taking precedence; exclusions apply in any position. Settings are `rank`, `alpha` and `lr`, in the ranges of
the run's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.adapters.inject import Plan, Rule, plan_adapters
from lorasmith.core.errors import OptionError
from lorasmith.core.options import options_of
from lorasmith.core.registry import nearest
from lorasmith.families.model import Denoiser
from lorasmith.training.config import TrainConfig

_SETTINGS = {"rank": "rank", "alpha": "alpha", "lr": "learning_rate"}
_DECLARED = options_of(TrainConfig)
_MOST_ENTRIES, _LONGEST_ENTRY = 500, 500  # each is matched with each layer, and long patterns take long to compile


def parse_targets(text: str, presets: Mapping[str, Rule]) -> tuple[list[Rule], list[Rule]]:
    """Rules, all layers if there are only exclusions, and exclusions. Raises OptionError if an entry is malformed."""
    rules, exclusions = [], []
    entries = [part.strip() for part in re.split(r"[,;\n]", text) if part.strip()]
    if len(entries) > _MOST_ENTRIES or any(len(entry) > _LONGEST_ENTRY for entry in entries):
        raise OptionError(
            f"targets must be at most {_MOST_ENTRIES} entries of {_LONGEST_ENTRY} characters, got {len(entries):,} of "
            f"up to {max(map(len, entries)):,}; use patterns with *"
        )
    for entry in entries:
        name, *settings = entry.split()
        if "=" in name:
            raise OptionError(f"settings of targets must follow a preset or pattern, got {entry!r} alone")
        if not name.startswith("!"):
            rules.append(_rule(name, presets, _settings(settings)))
        elif settings:
            raise OptionError(f"an exclusion takes no settings, got {entry!r}; put them behind a pattern")
        else:
            exclusions.append(_rule(name[1:], presets, {}))
    return rules or [Rule(("*",), name="*")], exclusions


def resolve_targets(denoiser: Denoiser, config: TrainConfig) -> Plan:
    """The layers that `config.targets` or the model's own preset match. Raises OptionError."""
    presets = denoiser.base.family.presets
    text = config.targets or denoiser.base.defaults.targets
    rules, exclusions = parse_targets(text, presets)
    capped = ALGORITHMS[config.algorithm].rank_meaning == "rank"
    try:
        return plan_adapters(denoiser.module, rules, exclude=exclusions, rank=config.rank, capped=capped)
    except OptionError as error:
        hint = next((hint for rule in rules if (hint := nearest(rule.name, presets)) and rule.name in str(error)), "")
        raise OptionError(f"{error}{hint}; use one of {', '.join(presets)}, or patterns such as *.attn2.*") from None


def _rule(name: str, presets: Mapping[str, Rule], settings: Mapping[str, Any]) -> Rule:
    preset = presets.get(name.casefold(), Rule((name,)))
    return replace(preset, name=name, **settings)


def _settings(words: list[str]) -> dict[str, Any]:
    settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in _SETTINGS:
            raise OptionError(
                f"settings of targets must be {', '.join(f'{name}=...' for name in _SETTINGS)}, got {word!r}"
                f"{nearest(key, _SETTINGS)}; patterns are separated by commas"
            )
        try:
            number: Any = float(value)
        except ValueError:
            number = value
        settings[_SETTINGS[key]] = _DECLARED[_SETTINGS[key]].check(number)
    return settings
