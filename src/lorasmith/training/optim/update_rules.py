"""Registries of optimizers (import path, package, properties, the text syntax of their arguments) and of schedules.

They are those of torch, transformers and small packages; any optimizer class can be named by its import path.
`optimizers.py` runs them. torch is imported on the first look-up, not with this module, from which the settings read
the names.

Schedules are pure functions of the step, so that resuming needs no state. Warm-up is linear, then the schedule decays
to `final_rate`. As in torch, progress is counted before the step: the first step after the warm-up has the full rate,
and the last is one step short of the end, so that no step has a rate of zero.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorasmith.core.errors import OptionError
from lorasmith.core.registry import Registry, nearest

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorasmith.training.optim.flat import ParameterGroup


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """Properties of an optimizer.

    Attributes:
        paths: import paths of its class; the first with an installed package is used.
        package: its package on PyPI; empty for required dependencies.
        settings: arguments whose defaults here differ from the class's.
        elementwise: whether updates do not depend on parameter shapes, so that it can run on a flat buffer.
        decays: whether it takes the setting weight_decay.
        own_rate: default learning rate, if the model's does not suit it.
        anneals: whether a linear decay to zero was measured to suit it.
        eager_on_cpu: whether to disable its own compiling on a CPU, which takes half a minute and a C++ compiler.
    """

    paths: tuple[str, ...]
    package: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    elementwise: bool = True
    decays: bool = True
    own_rate: float | None = None
    anneals: bool = False
    eager_on_cpu: bool = False


def _as_rule(name: str, thing: Any) -> UpdateRule:
    """The rule of a registered optimizer, which may be a class."""
    if isinstance(thing, UpdateRule):
        return thing
    if not _is_optimizer(thing):
        raise TypeError("it must be a class of torch optimizers or an UpdateRule")
    return rule_of(f"{thing.__module__}.{thing.__qualname__}")


OPTIMIZERS: Registry[UpdateRule] = Registry("optimizer", group="optimizers", checked=_as_rule)

_FUSED = {"fused": True}
RULES = {
    "AdamW": UpdateRule(paths=("torch.optim.AdamW",), settings=_FUSED, anneals=True),
    # No weight decay, as in ComfyUI: in these three it would be an L2 penalty, unlike AdamW's.
    "Adam": UpdateRule(paths=("torch.optim.Adam",), settings=_FUSED, decays=False),
    "SGD": UpdateRule(paths=("torch.optim.SGD",), settings=_FUSED, decays=False),
    "RMSprop": UpdateRule(paths=("torch.optim.RMSprop",), decays=False),
    "AdamW8bit": UpdateRule(
        paths=("torchao.optim.AdamW8bit", "bitsandbytes.optim.AdamW8bit"),
        package="torchao",
        anneals=True,
        eager_on_cpu=True,
    ),
    # torch's own Adafactor always scales the rate by the size of the parameter, which is 0 for one half of a new LoRA.
    "Adafactor": UpdateRule(
        paths=("transformers.optimization.Adafactor",),
        settings={"relative_step": False, "scale_parameter": False, "warmup_init": False},
        elementwise=False,
    ),
    "Lion": UpdateRule(paths=("lion_pytorch.Lion",), package="lion-pytorch"),
    "Prodigy": UpdateRule(paths=("prodigyopt.Prodigy",), package="prodigyopt", own_rate=1.0),
    "ScheduleFree": UpdateRule(paths=("schedulefree.AdamWScheduleFree",), package="schedulefree"),
}
for _name, _rule in RULES.items():
    OPTIMIZERS.register(_name)(_rule)


def rule_of(name: str) -> UpdateRule:
    """Properties of a registered name or an import path. Raises OptionError for unknown names."""
    if "." not in name:
        return OPTIMIZERS[name]
    return UpdateRule(paths=(name,), elementwise=False, decays="weight_decay" in _parameters(_class_at(name)))


def build_optimizer(
    name: str, groups: Sequence[ParameterGroup], *, weight_decay: float, arguments: str | None
) -> Optimizer:
    """The optimizer over the groups' flat buffers or, if it is not element-wise, over their views.

    `name` is registered or the import path of an optimizer class; `arguments` are text such as `betas=(0.9,0.99)
    eps=1e-7`. Raises OptionError if it is unknown, not installed, or refuses its arguments.
    """
    rule = rule_of(name)
    kind = _class_of(name, rule)
    given = {**rule.settings, **_parsed(arguments, name, kind)}
    decay = {"weight_decay": weight_decay} if rule.decays else {}
    parts = [
        {"params": [group.flat] if rule.elementwise else list(group.views), "lr": group.rate, **decay}
        for group in groups
    ]
    try:
        return kind(parts, lr=max(group.rate for group in groups), **given)  # type: ignore[call-arg]
    except Exception as error:
        raise OptionError(f"{name} cannot be used with its settings: {one_line(error)}") from error


def _class_of(name: str, rule: UpdateRule) -> type[Optimizer]:
    for path in rule.paths:
        if not rule.package or importlib.util.find_spec(path.partition(".")[0]) is not None:
            return _class_at(path)
    raise OptionError(
        f"optimizer {name} needs the package {rule.package}, which is not installed; get it with: "
        f"pip install {rule.package}"
    )


def _class_at(path: str) -> type[Optimizer]:
    where, _, what = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(where), what)
    except ImportError as error:
        raise OptionError(
            f"optimizer must be a known name or the import path of an installed class, got {path!r}: {one_line(error)}"
        ) from error
    except AttributeError:
        kinds = (key for key, value in vars(importlib.import_module(where)).items() if _is_optimizer(value))
        raise OptionError(f"{where} has no optimizer class {what!r}{nearest(what, kinds)}") from None
    if not _is_optimizer(found):
        raise OptionError(f"optimizer must be a class of torch optimizers, which {path} is not; try torch.optim.NAdam")
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise OptionError(f"optimizer must take a step from one gradient, but {path} asks for several; use another one")
    if "lr" not in _parameters(found):
        raise OptionError(f"optimizer must take a learning rate, which {path} does not; use another one")
    return found  # type: ignore[no-any-return]


def _is_optimizer(thing: Any) -> bool:
    from torch.optim import Optimizer

    return isinstance(thing, type) and issubclass(thing, Optimizer) and thing is not Optimizer


def _parameters(kind: type[Optimizer]) -> frozenset[str]:
    return frozenset(inspect.signature(kind).parameters) - {"params"}


_OURS = {"lr": "learning_rate", "weight_decay": "weight_decay", "params": "targets"}
_SEPARATORS = ", \t\r\n"
_PAIR = re.compile(r"(?:^|(?<=[\s,]))([A-Za-z_]\w*)\s*=")  # in linear time, whatever the text


def _parsed(arguments: str | None, name: str, kind: type[Optimizer]) -> dict[str, Any]:
    """`betas=(0.9, 0.99) eps=1e-7` as a mapping; values are Python literals, separators spaces or commas."""
    before, *pairs = _PAIR.split(arguments or "")
    if before := before.strip(_SEPARATORS):
        raise OptionError(
            f"optimizer_args must be name=value, separated by blanks, such as betas=(0.9,0.99) eps=1e-7, got {before!r}"
        )
    values: dict[str, Any] = {}
    for key, text in zip(pairs[::2], pairs[1::2], strict=True):
        if key in _OURS:
            raise OptionError(f"optimizer_args must not have {key}, which is for the setting {_OURS[key]}; use that")
        if key not in (known := _parameters(kind)):
            listed = ", ".join(sorted(known - _OURS.keys()))
            raise OptionError(f"{name} has no argument {key!r}{nearest(key, known - _OURS.keys())}; it has {listed}")
        if key in values:
            raise OptionError(f"optimizer_args must have each argument once, got {key} twice; leave one out")
        try:
            values[key] = ast.literal_eval(text.strip(_SEPARATORS))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise OptionError(
                f"{key} of optimizer_args must be a number, True, False, None, a text in quotes or a tuple of those, "
                f"got {text.strip()!r}"
            ) from None
    return values


def one_line(error: Exception) -> str:
    """Another package's error message on one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


Shape = Callable[[float, int, float], float]

SCHEDULES: Registry[Shape] = Registry("schedule", group="schedules")
"""Name → (progress in [0, 1], cycles, power) → multiplier in [0, 1], which is 1 at the start."""


@SCHEDULES.register("constant")
def _constant(progress: float, cycles: int, power: float) -> float:
    return 1.0


@SCHEDULES.register("linear")
def _linear(progress: float, cycles: int, power: float) -> float:
    return 1 - progress


@SCHEDULES.register("cosine")
def _cosine(progress: float, cycles: int, power: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


@SCHEDULES.register("cosine_restarts")
def _cosine_restarts(progress: float, cycles: int, power: float) -> float:
    """Warm restarts of equal length (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    within = progress * cycles % 1 if progress < 1 else 1.0  # the end of the last cycle does not start another
    return _cosine(within, cycles, power)


@SCHEDULES.register("polynomial")
def _polynomial(progress: float, cycles: int, power: float) -> float:
    return float((1 - progress) ** power)


@SCHEDULES.register("rex")
def _rex(progress: float, cycles: int, power: float) -> float:
    """Reflected exponential: high for long, then steeply down (Chen et al. 2021, arXiv:2107.04197)."""
    return (1 - progress) / (1 - progress / 2)


def rate_factor(
    step: int,
    *,
    schedule: str,
    steps: int,
    warmup_steps: int,
    final_rate: float,
    cycles: int,
    power: float,
) -> float:
    """Factor of the learning rate at a step, in [0, 1].

    Steps are counted from 0; past the end the rate stays constant. `steps` includes the warm-up, in which the factor of
    the n-th step is n / `warmup_steps`. `cycles` is for cosine_restarts, `power` for polynomial.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return final_rate + (1 - final_rate) * SCHEDULES[schedule](progress, cycles, power)


def check_schedule(*, steps: int, warmup_steps: int) -> None:
    """Raise OptionError if the warm-up is longer than the run."""
    if warmup_steps > steps:
        raise OptionError(
            f"warmup_steps must be at most the steps of the run, got {warmup_steps} of {steps}; lower warmup_steps or "
            "raise steps"
        )
