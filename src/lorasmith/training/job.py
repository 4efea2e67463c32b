"""Planning of a run: trained modules, their initial values and learning rates.

Settings that have no effect in a run are listed in the job's notes. Targets are text, presets and patterns with
optional settings:

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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter
from lorasmith.adapters.catalogue import INITS, facts_of, rank_words
from lorasmith.adapters.inject import (
    AdapterPlan,
    Difference,
    Rule,
    create_adapters,
    is_norm,
    load_adapters,
    load_differences,
    plan_adapters,
)
from lorasmith.adapters.patch import Patch, patches_merged
from lorasmith.adapters.variants import Variant
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights
from lorasmith.core.errors import LoraError, OptionError
from lorasmith.core.extensions import Extension
from lorasmith.core.folders import Folders
from lorasmith.core.named_code import code_of
from lorasmith.core.options import options_of
from lorasmith.core.placement import best_device
from lorasmith.core.printable import count_text
from lorasmith.core.registry import Registry, extensions_of, nearest
from lorasmith.core.typed_json import Scalar
from lorasmith.data.dataset import Sample
from lorasmith.families.model import Denoiser, training_adapter_in
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.metadata import steps_of
from lorasmith.formats.names import encoder_module
from lorasmith.training.adapter_settings import NO_TARGETS
from lorasmith.training.config import WHOLE_RANGE, ResolvedConfig, TrainConfig
from lorasmith.training.engine import Engine
from lorasmith.training.lora_handle import Lora
from lorasmith.training.loss_settings import USUAL_TRAINING_GUIDANCE
from lorasmith.training.memory.compilation import sizes_vary
from lorasmith.training.methods.all_methods import check_methods, methods_of
from lorasmith.training.new_word import NEW_WORD
from lorasmith.training.notes import notes_on, notes_on_file, notes_on_products
from lorasmith.training.optim.optimizers import check_optimizer
from lorasmith.training.optim.update_rules import rule_of
from lorasmith.training.token_routes import TokenRoutes
from lorasmith.training.trainable import Trainable, trainable
from lorasmith.training.way import Way, dtype_on_device, notes_on_device, products_on_device


@dataclass(frozen=True)
class TrainJob:
    """A planned run."""

    config: ResolvedConfig
    requested: TrainConfig  # as passed to `plan_job`, some settings open
    way: Way
    adapters: dict[str, Adapter]  # trained, by module path, as `differences`
    model: Trainable  # frozen, with its LoRAs and the training adapter
    differences: dict[str, Difference] = field(default_factory=dict)
    text_adapters: dict[str, Adapter] = field(default_factory=dict)  # trained, by path in `model.encoders`
    carried: AdapterState = field(default_factory=AdapterState)  # parts of a continued LoRA that are saved untrained
    notes: tuple[str, ...] = ()  # remarks for the user, one sentence each
    steps_before: int = 0  # of the LoRA that is continued
    learning_rates: Mapping[str, float] = field(default_factory=dict)  # by module path, where not the configuration's

    def for_samples(self, samples: Sequence[Sample]) -> TrainJob:
        """The job with what its way depends on of the samples."""
        varying = sizes_vary(samples, self.model.routing)
        return replace(self, way=replace(self.way, varying_sizes=varying))

    @property
    def draws(self) -> range:
        """Global indices of all draws of the run."""
        first, per_step = self.steps_before, self.config.samples_per_step
        return range(first * per_step, (first + self.config.steps) * per_step)

    @property
    def all_adapters(self) -> dict[str, Adapter]:
        """Those of the denoiser and of text encoders, by path, which begins with the component for the latter."""
        return {**self.adapters, **self.text_adapters}

    @property
    def trained(self) -> list[tuple[str, nn.Module]]:
        """All trained modules with their paths."""
        word = [] if self.model.word is None else [(NEW_WORD, self.model.word)]
        return [*self.all_adapters.items(), *self.differences.items(), *word]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for _, module in self.trained for parameter in module.parameters())

    @property
    def extensions(self) -> tuple[Extension, ...]:
        """What the run uses of other packages."""
        chosen = ((setting.choices, getattr(self.config, name)) for name, setting in _DECLARED.items())
        used: list[tuple[Registry[Any], object]] = [
            *((choices, value) for choices, value in chosen if isinstance(choices, Registry)),
            *((ADAPTERS, adapter.algorithm) for adapter in self.all_adapters.values()),
            (LAYOUTS, self.model.names.portable),
        ]
        return tuple(dict.fromkeys((*extensions_of(used), *self.model.facts.extensions)))

    def starting_from(self, state: Scalar) -> TrainJob:
        changes: dict[str, Any] = {"existing_state": state}
        return replace(self, config=replace(self.config, **changes), requested=replace(self.requested, **changes))

    @property
    def summary(self) -> str:
        """Algorithm, targets and parameter count in one line."""
        config, facts = self.config, facts_of(self.config.algorithm)
        words = [config.algorithm]
        chosen = {name: getattr(config, name) for name in sorted(facts.variants) if not config.is_default(name)}
        words += [name if value is True else f"{name} {value}" for name, value in chosen.items()]
        words += [rank_words(config.algorithm, config.rank)] if facts.rank_meaning else []
        words += [] if "alpha" in facts.unused else [f"alpha {config.alpha:g}"]
        also = f" and {count_text(len(self.differences), 'difference')}" if self.differences else ""
        layers = f"{count_text(len(self.all_adapters), 'layer')}{also}, {count_text(self.parameters, 'parameter')}"
        text = " and text encoders" if self.text_adapters else ""
        word = ""
        if self.model.word is not None:
            word = f", and {count_text(config.new_word_vectors, 'vector')} of {self.model.word.text}"
        return f"{', '.join(words)}, on {config.targets}{text}{word}: {layers}"


def variant_of(config: TrainConfig) -> Variant:
    """The variant of the algorithm that the settings select."""
    return Variant(
        dora=config.dora,
        rslora=config.rslora,
        pissa=config.pissa,
        tucker=config.tucker,
        started=config.init is not None,
        orthogonal=config.tlora == "orthogonal",
    )


def plan_job(
    model: Trainable | Denoiser,
    config: TrainConfig,
    device: str | torch.device | None = None,
    *,
    folders: Folders | None = None,
) -> TrainJob:
    """Decide everything about a run that does not depend on the data; `device` None is the first GPU, or the CPU.

    Among the LoRAs of `folders` notes name the one that a distilled model is usually trained with.

    Raises OptionError or LoraError if the settings or an existing LoRA do not fit the model.
    """
    model = trainable(model)
    device = torch.device(device or best_device())
    facts_of(config.algorithm)  # imported here at last, an extension's rules are checked with the resolved settings
    requested, config = config, _decided(model, config, device)
    config.check_for(model.diffusion)
    if config.init is not None and not callable(code_of(config.init, INITS)):
        raise OptionError(f"init must be a function of a layer, which {config.init} is not")
    plan = resolve_targets(model, config)
    existing = _Existing() if config.existing_lora is None else _existing(Path(config.existing_lora), model, config)
    model = existing.patched(model)
    beneath = ""
    if config.training_adapter is not None:
        model, beneath = _with_adapter(model, Path(config.training_adapter), strict=config.strict)
    model, text_layers, existing = _with_texts(model.guided(requested.training_guidance), config, existing)
    fresh = replace(plan, adapters=tuple(adapter for adapter in plan.adapters if adapter.path not in existing.adapters))
    module = model.module
    # DoRA and PiSSA are initialized from the weights as they are in training.
    patches = [replace(patch, bypass=False) for patch in model.patches]
    with patches_merged(module, patches, dtype=torch.float32, unpacking=True):
        adapters = load_adapters(module, existing.adapters) | _fresh_adapters(module, fresh, requested, config)
    if config.tlora == "orthogonal" and existing.adapters and fresh.adapters:
        raise OptionError(
            f"tlora orthogonal starts all layers, but {len(existing.adapters)} of them continue "
            f"{existing.name}; use tlora plain, or choose targets that it has"
        )
    text_adapters = _on_text(model, text_layers, existing, requested, config) if text_layers else {}
    fresh_text = len(text_adapters) - len(existing.on_text)
    TokenRoutes.of(model, config)  # raises
    check_methods(methods_of(config), model.facts, {**adapters, **text_adapters})
    differences = fresh_differences(model, plan, config) | load_differences(module, existing.differences)
    rates = _learning_rates(model, requested, plan, existing.adapters)
    rates |= dict.fromkeys(text_adapters, _rate_of(config.text_encoder_rate, config, factor=0.1))
    if model.word is not None:
        rates[NEW_WORD] = _rate_of(config.new_word_rate, config, factor=10.0)
    if not (adapters or text_adapters or differences):
        _check_word_alone(model, config)
    check_optimizer(
        config.optimizer,
        weight_decay=config.weight_decay,
        arguments=config.optimizer_args,
        rates=_distinct_rates(config, [*adapters, *text_adapters, *([NEW_WORD] if model.word else [])], rates),
        device=device,
    )
    for step in (config.warmup_steps, config.steps):
        config.scheduled(step)  # a schedule of the user's fails here, and not in the run
    return TrainJob(
        config,
        requested,
        Way.of(config, model.module, device),
        adapters,
        model,
        differences,
        text_adapters,
        existing.carried,
        (
            *existing.notes(len(fresh.adapters) + fresh_text),
            *(
                ["new_word_start has no effect: the word continues the vectors of existing_lora."]
                if config.new_word_start and existing.carried.words
                else []
            ),
            *([f"{beneath}."] if beneath else []),
            *notes_on_device(requested, model.module, device),
            *notes_on_products(requested, model, device),
            *notes_on(
                replace(requested, schedule=config.schedule),
                model,
                fresh,
                adapters,
                len(differences),
                has_fresh_text=fresh_text > 0,
                adapter=_usual_adapter(model, folders),
            ),
            *notes_on_file(model, adapters, differences, text_adapters),
        ),
        existing.steps,
        rates,
    )


def engine_of(job: TrainJob) -> Engine:
    """The engine that trains a job."""
    return Engine(
        job.model,
        job.adapters,
        job.config,
        job.way,
        job.differences,
        job.text_adapters,
        steps_before=job.steps_before,
        learning_rates=job.learning_rates,
    )


def _fresh_adapters(
    module: nn.Module, plan: AdapterPlan, requested: TrainConfig, config: ResolvedConfig
) -> dict[str, Adapter]:
    return create_adapters(
        module,
        plan,
        algorithm=config.algorithm,
        alpha=requested.alpha,
        seed=config.seed,
        zero=config.zero_init,
        variant=variant_of(config),
    )


def _with_texts(
    model: Trainable, config: ResolvedConfig, existing: _Existing
) -> tuple[Trainable, tuple[str, ...], _Existing]:
    """The model with text encoders and a word in training, the encoders' layers, and the continued LoRA split so."""
    layers = tuple[str, ...]()
    if config.train_text_encoder:
        model, layers = model.with_encoders()
        existing = existing.with_text(model, layers)
    if config.new_word is not None:
        return model.with_word(config, existing.carried.words, existing.name), layers, existing
    if existing.carried.words:
        raise LoraError(
            f"{existing.name} has the word {' and '.join(existing.carried.words)}, without which it draws something "
            "else; set new_word to continue it"
        )
    return model, layers, existing


def _check_word_alone(model: Trainable, config: ResolvedConfig) -> None:
    """Raise OptionError if a new word, where no layer is trained, is missing or ends before the run."""
    if model.word is None:
        raise OptionError(f"targets {NO_TARGETS} leaves nothing to train; set new_word, or choose layers")
    if config.new_word_steps is not None and config.new_word_steps < config.steps:
        raise OptionError(
            f"new_word_steps {config.new_word_steps} leaves nothing to train afterwards with targets {NO_TARGETS}; "
            "set steps to it"
        )


def _on_text(
    model: Trainable, layers: Sequence[str], existing: _Existing, requested: TrainConfig, config: ResolvedConfig
) -> dict[str, Adapter]:
    """Adapters on these layers of text encoders, by path; those of a continued LoRA as they are there."""
    encoders = model.encoders
    assert encoders is not None
    plan = plan_adapters(
        encoders,
        [Rule(tuple(layers))],
        rank=config.text_encoder_rank or config.rank,
        capped=facts_of(config.algorithm).rank_meaning == "rank",
    )
    plan = replace(plan, adapters=tuple(adapter for adapter in plan.adapters if adapter.path not in existing.on_text))
    patches = [replace(patch, bypass=False) for patch in model.text_patches]
    with patches_merged(encoders, patches, dtype=torch.float32, unpacking=True):
        return load_adapters(encoders, existing.on_text) | _fresh_adapters(encoders, plan, requested, config)


def _rate_of(rate: float | None, config: ResolvedConfig, *, factor: float) -> float:
    """A rate of its own, or the learning rate times a factor, unless the optimizer estimates rates itself."""
    if rate is not None:
        return rate
    return config.learning_rate * (1.0 if rule_of(config.optimizer).own_rate is not None else factor)


def _decided(model: Trainable, config: TrainConfig, device: torch.device) -> ResolvedConfig:
    defaults, expert = model.facts.defaults, WHOLE_RANGE
    if (named := model.facts.expert) is not None and config.min_noise is None and config.max_noise is None:
        expert = named.noise_range
    alpha = variant_of(config).default_alpha(config.algorithm, config.rank) if config.alpha is None else config.alpha
    return ResolvedConfig.of(
        config,
        learning_rate=config.learning_rate
        or rule_of(config.optimizer).own_rate
        or _default_rate(model, config, config.algorithm),
        schedule=config.schedule or ("linear" if _anneals(config) else "constant"),
        alpha=alpha,
        targets=config.targets or defaults.targets,
        timesteps=config.timesteps or defaults.timestep_distribution,
        min_noise=expert[0] if config.min_noise is None else config.min_noise,
        max_noise=expert[1] if config.max_noise is None else config.max_noise,
        training_dtype=dtype_on_device(config, model.module, device),
        products=products_on_device(config, device),
        training_guidance=_training_guidance(model, config),
    )


def _training_guidance(model: Trainable, config: TrainConfig) -> float | None:
    if config.training_guidance is None and model.facts.takes_guidance:
        return USUAL_TRAINING_GUIDANCE
    return config.training_guidance


def _default_rate(model: Trainable, config: TrainConfig, algorithm: str) -> float:
    rate = model.facts.defaults.learning_rate * facts_of(algorithm).learning_rate_factor
    return 2 * rate if _anneals(config) else rate


def _anneals(config: TrainConfig) -> bool:
    """Whether the rate decays from twice the model's own, for lower loss in half of the time (docs/lab-log.md)."""
    chosen = config.learning_rate is not None or config.schedule is not None or "lr=" in (config.targets or "")
    return not chosen and rule_of(config.optimizer).anneals


def _learning_rates(
    model: Trainable, requested: TrainConfig, plan: AdapterPlan, existing: Mapping[str, AdapterWeights]
) -> dict[str, float]:
    """Rates by module path: those set for targets, and the default ones of continued layers' algorithms."""
    own = {adapter.path: adapter.learning_rate for adapter in plan.adapters if adapter.learning_rate is not None}
    if requested.learning_rate is not None or rule_of(requested.optimizer).own_rate is not None:
        return own
    return {path: _default_rate(model, requested, weights.algorithm) for path, weights in existing.items()} | own


def _distinct_rates(config: ResolvedConfig, paths: Collection[str], rates: Mapping[str, float]) -> set[float]:
    """All learning rates of the run; each is a parameter group of the optimizer."""
    found = {rates.get(path, config.learning_rate) for path in paths} or {config.learning_rate}
    return found | {rate * config.lora_plus_ratio for rate in found}


def fresh_differences(model: Trainable, plan: AdapterPlan, config: TrainConfig) -> dict[str, Difference]:
    """Zero differences for the norms and biases that `config.differences` selects, by module path."""
    wanted = {}
    if "norms" in config.differences:
        _, exclusions = parse_targets(config.targets or "", model.facts.presets)
        wanted = {
            path: module
            for path, module in model.module.named_modules()
            if is_norm(module) and not any(rule.matches(path, module) for rule in exclusions)
        }
    if "biases" in config.differences:
        layers = {adapter.path: model.module.get_submodule(adapter.path) for adapter in plan.adapters}
        wanted |= {path: layer for path, layer in layers.items() if layer.bias is not None}
    return {path: Difference.create(module) for path, module in wanted.items()}


def _usual_adapter(model: Trainable, folders: Folders | None) -> Path | None:
    name = None if folders is None else training_adapter_in(folders, model.facts.usual_adapter)
    return None if folders is None or name is None else folders.find("loras", name)


def _with_adapter(model: Trainable, path: Path, *, strict: bool) -> tuple[Trainable, str]:
    """The model with a training adapter applied, and a note on parts that do not apply. Raises LoraError."""
    adapter = Lora.load(path, model.names)
    if not any(ref.component == DENOISER for ref in (*adapter.state.adapters, *adapter.state.differences)):
        raise LoraError(
            f"training_adapter must have layers of the denoiser, but {path} has none; give the adapter that was made "
            f"for {model.facts.family_title or model.title}"
        )
    applied = adapter.applied(model, None, strict=strict)
    return applied.denoiser, applied.note


@dataclass(frozen=True)
class _Existing:
    """A continued LoRA, split into trained modules and parts that are saved unchanged."""

    name: str = ""
    adapters: Mapping[str, AdapterWeights] = field(default_factory=dict)
    differences: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    on_text: Mapping[str, AdapterWeights] = field(default_factory=dict)  # by path in the trained text encoders
    carried: AdapterState = field(default_factory=AdapterState)
    steps: int = 0
    left_out: str = ""
    leaves_tlora: bool = False  # whether it was trained with ranks by noise level, and is not here

    def with_text(self, model: Trainable, layers: Sequence[str]) -> _Existing:
        """The same with its adapters on these layers of text encoders trained, too."""
        places = {encoder_module(model.names, path): path for path in layers}
        own = self.carried.adapters
        return replace(
            self,
            on_text={places[ref]: weights for ref, weights in own.items() if ref in places},
            carried=replace(self.carried, adapters={ref: adapter for ref, adapter in own.items() if ref not in places}),
        )

    def patched(self, model: Trainable) -> Trainable:
        carried = {
            ref.path: difference for ref, difference in self.carried.differences.items() if ref.component == DENOISER
        }
        return model.patched(Patch({}, carried)) if carried else model

    def notes(self, fresh: int) -> Iterator[str]:
        if self.name:
            also = f" and {count_text(len(self.differences), 'difference')}" if self.differences else ""
            kept = len(self.adapters) + len(self.on_text)
            yield (
                f"Continuing {self.name} ({count_text(self.steps, 'step')}): {kept} of its layers{also} "
                f"keep their algorithm, rank and alpha; {count_text(fresh, 'adapter')} of other targets "
                f"{'is' if fresh == 1 else 'are'} new."
            )
        if self.leaves_tlora:
            yield (
                f"{self.name} is a T-LoRA, of which all ranks are trained at each noise level here; set tlora to "
                "continue it as one."
            )
        if self.left_out:
            yield f"{self.left_out}; they are saved unchanged."


def _existing(path: Path, model: Trainable, config: TrainConfig) -> _Existing:
    lora = Lora.load(path, model.names)
    left_out, state = lora.applied(model, None, strict=config.strict).note, lora.state
    adapters = {ref.path: adapter for ref, adapter in state.adapters.items() if ref.component == DENOISER}
    differences: dict[str, dict[str, Tensor]] = {}
    carried = {ref: difference for ref, difference in state.differences.items() if ref.component != DENOISER}
    for ref, changes in state.differences.items():
        for name, tensor in changes.items() if ref.component == DENOISER else ():
            if tensor.ndim == 1:
                differences.setdefault(ref.path, {})[name] = tensor
            elif ref.path not in adapters:
                adapters[ref.path] = AdapterWeights("full", {"diff": tensor})
            else:  # a weight that has an adapter as well: only one of the two is trained
                carried[ref] = {name: tensor}
    others = {ref: weights for ref, weights in state.adapters.items() if ref.component != DENOISER}
    return _Existing(
        path.name,
        adapters,
        differences,
        {},
        replace(state, adapters=others, differences=carried),
        steps_of(state.metadata, path.name),
        left_out,
        config.tlora == "none" and lora.rank_schedule is not None,
    )


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


def resolve_targets(model: Trainable, config: TrainConfig) -> AdapterPlan:
    """The layers that `config.targets` or the model's own preset match. Raises OptionError."""
    presets = model.facts.presets
    text = config.targets or model.facts.defaults.targets
    if text.strip().casefold() == NO_TARGETS:
        return AdapterPlan(())
    rules, exclusions = parse_targets(text, presets)
    capped = facts_of(config.algorithm).rank_meaning == "rank"
    try:
        return plan_adapters(model.module, rules, exclude=exclusions, rank=config.rank, capped=capped)
    except OptionError as error:
        hint = next(
            (
                hint
                for rule in rules
                if rule.name not in presets and (hint := nearest(rule.name, presets)) and rule.name in str(error)
            ),
            "",
        )
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
