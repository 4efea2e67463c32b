"""Registries of optimizers (import path, package, properties, the text syntax of their arguments) and of schedules.

They are those of torch, transformers and small packages; users pass others, or name them by import path
(`core.named_code`). `optimizers.py` runs them. torch is imported on the first look-up, not with this module, from which
the settings read the names.

Schedules are pure functions of the step, so that resuming needs no state; a scheduler of torch becomes one by computing
the rates of the whole run beforehand. Warm-up is linear, then the schedule decays to `final_rate`. As in torch,
progress is counted before the step: the first step after the warm-up has the full rate, and the last is one step short
of the end, so that no step has a rate of zero.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import Code, NamedCode, code_of, package_of, parsed_arguments
from lorasmith.core.printable import one_line_of
from lorasmith.core.registry import Registry

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
    return thing if isinstance(thing, UpdateRule) else rule_of(thing)


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


def rule_of(name: Code) -> UpdateRule:
    """Properties of the optimizer that a setting names. Raises OptionError for unknown names."""
    name = name if isinstance(name, str) else NamedCode.of(name)
    rule = code_of(name, OPTIMIZERS)
    if isinstance(rule, UpdateRule):
        return rule
    maker = _checked(rule, name)
    # A function decides itself which groups decay.
    return UpdateRule(
        paths=(name,), elementwise=False, decays=isinstance(maker, type) and "weight_decay" in _parameters(maker)
    )


def build_optimizer(
    name: str, groups: Sequence[ParameterGroup], *, weight_decay: float, arguments: str | None
) -> Optimizer:
    """The optimizer over the groups' flat buffers or, if it is not element-wise, over their views.

    `name` is registered, an import path or a `NamedCode`; `arguments` are text such as `betas=(0.9,0.99) eps=1e-7`.
    Raises OptionError if it is unknown, not installed, or refuses its arguments.
    """
    rule = rule_of(name)
    maker = _maker_of(name, rule)
    if arguments and not isinstance(maker, type):
        raise OptionError(
            f"optimizer_args are for names and classes, but {name} is a function, got {arguments!r}; give them in the "
            "function, as functools.partial(torch.optim.NAdam, betas=(0.9, 0.99)) does"
        )
    parsed = parsed_arguments(arguments, maker, name, setting="optimizer_args", ours=_OURS) if arguments else {}
    keywords = {**rule.settings, **parsed}
    decay = {"weight_decay": weight_decay} if rule.decays else {}
    parts = [
        {"params": [group.flat] if rule.elementwise else list(group.views), "lr": group.rate, **decay}
        for group in groups
    ]
    if isinstance(maker, type):
        keywords["lr"] = max(group.rate for group in groups)
    try:
        made = maker([{**part} for part in parts], **keywords)
    except Exception as error:
        raise OptionError(f"{name} cannot be used with its settings: {one_line_of(error)}") from error
    if not isinstance(maker, type):
        _check_made(made, parts, name)
    return made  # type: ignore[no-any-return]


def _check_made(made: Any, parts: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raise OptionError unless a user's function made an optimizer of these groups."""
    if not _is_optimizer(type(made)):
        raise OptionError(f"optimizer must return a torch optimizer, but {name} returned {type(made).__name__}")
    if _identities(made.param_groups) != _identities(parts):
        raise OptionError(
            f"optimizer must keep the parameter groups that it gets, in their order, but that of {name} has others; "
            "pass them on, as lambda groups: torch.optim.NAdam(groups) does"
        )
    _check_step(type(made), name)


def _identities(groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    return [list(map(id, group["params"])) for group in groups]


def _maker_of(name: str, rule: UpdateRule) -> Callable[..., Any]:
    for path in rule.paths:
        if not rule.package or importlib.util.find_spec(package_of(path)) is not None:
            return _checked(code_of(path, OPTIMIZERS), path)
    raise OptionError(
        f"optimizer {name} needs the package {rule.package}, which is not installed; get it with: "
        f"pip install {rule.package}"
    )


def _checked(value: Any, path: str) -> Callable[..., Any]:
    """The class, or the function that makes an optimizer; OptionError if it is neither."""
    if isinstance(value, type) or not callable(value):
        if not _is_optimizer(value):
            raise OptionError(
                f"optimizer must be a class of torch optimizers or a function that makes one, which {path} is not; try "
                "torch.optim.NAdam"
            )
        _check_step(value, path)
        if "lr" not in _parameters(value):
            raise OptionError(f"optimizer must take a learning rate, which {path} does not; use another one")
    if isinstance(value, functools.partial) and "lr" in value.keywords:
        raise OptionError(f"the rate of an optimizer is the setting learning_rate, but {path} has lr; leave it out")
    return value  # type: ignore[no-any-return]


def _check_step(kind: type, path: str) -> None:
    closure = inspect.signature(kind.step).parameters.get("closure")  # type: ignore[attr-defined]
    if closure is not None and closure.default is closure.empty:
        raise OptionError(f"optimizer must take a step from one gradient, but {path} asks for several; use another one")


def _is_optimizer(thing: Any) -> bool:
    from torch.optim import Optimizer

    return isinstance(thing, type) and issubclass(thing, Optimizer) and thing is not Optimizer


def _parameters(kind: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(kind).parameters) - {"params"}


_OURS = {"lr": "learning_rate", "weight_decay": "weight_decay", "params": "targets"}


Shape = Callable[[float, int, float], float]

SCHEDULES: Registry[Shape] = Registry("schedule", group="schedules")
"""Name → (progress in [0, 1], cycles, power) → multiplier in [0, 1], which is 1 at the start.

Those of extensions are as users pass them: functions of the progress, or schedulers of torch.
"""


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
    learning_rate: float,
) -> float:
    """Factor of the learning rate at a step, in [0, 1]; a user's schedule may have higher ones.

    Steps are counted from 0; past the end the rate stays constant. `steps` includes the warm-up, in which the factor of
    the n-th step is n / `warmup_steps`. `cycles` is for cosine_restarts, `power` for polynomial, `learning_rate` for
    torch's schedulers. Raises OptionError if a user's schedule fails, or returns no factor.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    length = max(steps - warmup_steps, 1)
    progress = min((step - warmup_steps) / length, 1.0)
    shape = code_of(schedule, SCHEDULES)
    if schedule in SCHEDULES and SCHEDULES.extension(schedule) is None:
        factor = shape(progress, cycles, power)
    else:
        factor = _own_factor(shape, schedule, min(step - warmup_steps, length - 1), length, progress, learning_rate)
    return final_rate + (1 - final_rate) * factor


def _own_factor(shape: Any, name: str, step: int, length: int, progress: float, learning_rate: float) -> float:
    """The factor by a user's function of the progress, or one of torch's schedulers."""
    try:
        factor = _scheduled(shape, length, learning_rate)[step] if _is_scheduler(shape) else float(shape(progress))
    except Exception as error:  # of any kind
        raise OptionError(
            f"schedule {name} cannot be used: {one_line_of(error)}; pass a function of the progress, as lambda "
            "progress: 1 - progress, or one of torch's schedulers with all arguments but its optimizer"
        ) from error
    if not 0 <= factor < math.inf:
        raise OptionError(
            f"schedule must return a finite factor of the learning rate, at least 0, but {name} returned {factor} at "
            f"progress {progress:g}; correct it"
        )
    if not _is_scheduler(shape) and (again := float(shape(progress))) != factor:
        raise OptionError(
            f"schedule must be a function of the progress alone, but {name} returned {factor:g} and then {again:g} at "
            f"progress {progress:g}; take no random numbers in it"
        )
    return factor


def _is_scheduler(shape: Any) -> bool:
    kind = shape.func if isinstance(shape, functools.partial) else shape
    if not isinstance(kind, type):
        return False
    from torch.optim.lr_scheduler import LRScheduler

    return issubclass(kind, LRScheduler)


@functools.lru_cache(maxsize=8)
def _scheduled(scheduler: Callable[..., Any], length: int, learning_rate: float) -> tuple[float, ...]:
    """The factors of all steps by one of torch's schedulers, on an optimizer with that rate."""
    import torch

    # Without momentum or betas, so that schedulers that would also change those refuse it.
    optimizer = torch.optim.Adagrad([torch.zeros(1)], lr=learning_rate)
    found, made = [], scheduler(optimizer)
    for _ in range(length):
        found.append(optimizer.param_groups[0]["lr"] / learning_rate)
        optimizer.step()
        made.step()
    return tuple(found)


def check_schedule(*, steps: int, warmup_steps: int) -> None:
    """Raise OptionError if the warm-up is longer than the run."""
    if warmup_steps > steps:
        raise OptionError(
            f"warmup_steps must be at most the steps of the run, got {warmup_steps} of {steps}; lower warmup_steps or "
            "raise steps"
        )
