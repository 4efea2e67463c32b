"""Every optimizer goes on from its stored state to the bit, and a step that may not proceed changes nothing at all."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.training.optim.flat import FlatParameters
from lorasmith.training.optim.optimizers import GatedOptimizer, check_optimizer
from lorasmith.training.optim.update_rules import OPTIMIZERS

PATHS = [
    "torch.optim.Adagrad",
    "torch.optim.AdamW",
    "torch.optim.NAdam",
    "torch.optim.RAdam",
    "torch.optim.Rprop",
    "schedulefree.RAdamScheduleFree",
]
ONE_RATE = {"Prodigy"}
YES, NO = torch.tensor(True), torch.tensor(False)


@pytest.fixture(params=[*OPTIMIZERS, *PATHS])
def name(request: pytest.FixtureRequest) -> str:
    """Each optimizer that is installed."""
    chosen: str = request.param
    modules = [path.partition(".")[0] for path in (OPTIMIZERS[chosen].paths if "." not in chosen else (chosen,))]
    if not any(importlib.util.find_spec(module) for module in modules):
        pytest.skip(f"{modules[0]} is not installed")
    return chosen


class Run:
    """An optimizer on four parameters at two rates, with gradients that depend on the step and the weights alone."""

    def __init__(self, name: str, arguments: str | None = None, *, weight_decay: float = 0.01, rates: Any = None):
        g = torch.Generator().manual_seed(0)
        shapes = {"up": (80, 64), "down": (64, 80), "conv": (4, 8, 3, 3), "bias": (7,)}
        values = {key: nn.Parameter(torch.randn(shape, generator=g)) for key, shape in shapes.items()}
        with torch.no_grad():
            values["up"].zero_()
        slow = 1e-2 if name in ONE_RATE else 3e-3
        self.flat = FlatParameters(
            values,
            device=torch.device("cpu"),
            dtype=torch.float32,
            rates=rates or {"up": 1e-2, "down": 1e-2, "conv": slow, "bias": slow},
        )
        self.optimizer = GatedOptimizer(name, self.flat.groups, weight_decay=weight_decay, arguments=arguments)

    def gradients(self, step: int) -> None:
        self.flat.grad.zero_()
        for key in ("up", "down", "conv", "bias"):
            weights = self.flat.view(self.flat.master, key)
            where = torch.arange(weights.numel()).view(weights.shape)
            self.flat.view(self.flat.grad, key).copy_(weights.sin() + (where * 0.37 + step).cos())

    def take(self, steps: range, *, factor: float = 1.0) -> Run:
        for step in steps:
            self.gradients(step)
            self.optimizer.step(YES, factor * (1 + step % 3) / 3)
        return self

    def stored(self) -> tuple[dict[str, Tensor], Any]:
        """The state as it comes back from a disk."""
        tensors, numbers = self.optimizer.state()
        return {key: tensor.clone() for key, tensor in tensors.items()}, json.loads(json.dumps(numbers))


def same(one: tuple[dict[str, Tensor], Any], other: tuple[dict[str, Tensor], Any]) -> bool:
    return (
        one[1] == other[1]
        and one[0].keys() == other[0].keys()
        and all(torch.equal(tensor, other[0][key]) for key, tensor in one[0].items())
    )


def test_the_state_holds_all_that_the_next_steps_depend_on(name: str) -> None:
    """For an optimizer that is made again, and for one that goes back to a state of its own, or to its start."""
    run, again = Run(name), Run(name)
    start, first = run.stored(), run.flat.master.clone()
    stored, master = run.take(range(3)).stored(), run.flat.master.clone()
    end = run.take(range(3, 6)).flat.master.clone()
    assert all(type(tensor) is Tensor for tensor in stored[0].values())
    assert not torch.equal(master, end)
    loads = ((again, stored, master, range(3, 6)), (run, stored, master, range(3, 6)), (run, start, first, range(6)))
    for one, state, weights, steps in loads:
        one.flat.master.copy_(weights)
        one.optimizer.load(*state)
        assert torch.equal(one.flat.master, weights) and same(one.stored(), state)
        assert torch.equal(one.take(steps).flat.master, end)
    assert same(again.stored(), run.stored())


def test_a_step_that_may_not_proceed_changes_nothing(name: str) -> None:
    run = Run(name)
    for steps in (range(0), range(3), range(3, 4)):  # before there is state, and with some
        run.take(steps)
        before, state = run.flat.master.clone(), run.stored()
        run.flat.grad.fill_(float("nan"))
        run.optimizer.step(NO)
        assert torch.equal(run.flat.master, before)
        assert same(run.stored(), state)
    assert torch.equal(run.take(range(4, 6)).flat.master, Run(name).take(range(6)).flat.master)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SGD", "momentum=0.9 nesterov=True"),
        ("AdamW", "amsgrad=True fused=False"),
        ("RMSprop", "centered=True momentum=0.9"),
        ("Adafactor", "beta1=0.9 scale_parameter=True"),
        ("Prodigy", "safeguard_warmup=True use_bias_correction=True growth_rate=1.02"),
        ("ScheduleFree", "warmup_steps=3 foreach=False"),
    ],
)
def test_state_that_arguments_add_is_stored_and_gated(name: str, arguments: str) -> None:
    if package := OPTIMIZERS[name].package:
        pytest.importorskip(package)
    whole = Run(name, arguments).take(range(3))
    again = Run(name, arguments)
    again.flat.master.copy_(whole.flat.master)
    again.optimizer.load(*whole.stored())
    again.flat.grad.fill_(float("nan"))
    again.optimizer.step(NO)
    assert same(again.stored(), whole.stored())
    assert torch.equal(again.take(range(3, 6)).flat.master, whole.take(range(3, 6)).flat.master)
    assert not torch.equal(again.flat.master, Run(name).take(range(6)).flat.master)


def test_groups_learn_at_their_rates(name: str) -> None:
    check_optimizer(name, weight_decay=0.01, rates=(1e-3,) if name in ONE_RATE else (1e-3, 1e-2))
    if name in ONE_RATE:
        pytest.skip("has one rate for everything")
    fast, slow = {"up": 1e-2, "down": 1e-2}, {"conv": 3e-3, "bias": 3e-3}
    together = Run(name).take(range(8)).flat
    rates = (dict.fromkeys({**fast, **slow}, 1e-2), dict.fromkeys({**fast, **slow}, 3e-3))
    apart = [Run(name, rates=one).take(range(8)).flat for one in rates]
    for flat, parts in zip(apart, (fast, slow), strict=True):
        for part in parts:
            # Blocks of 8-bit state lie otherwise where the other parameters stand in front.
            tolerance = 0.02 if name == "AdamW8bit" else 1e-6
            ours, theirs = (one.view(one.master, part) for one in (together, flat))
            assert torch.allclose(ours, theirs, atol=tolerance)
    assert not torch.allclose(*(one.view(one.master, "bias") for one in apart))


def test_the_factor_scales_the_rate(name: str) -> None:
    if name == "torch.optim.Rprop":
        pytest.skip("has step sizes of its own")
    before = Run(name).flat.master
    still, half, one = (Run(name).take(range(8), factor=factor).flat.master for factor in (0.0, 0.5, 1.0))
    assert torch.equal(still, before)
    assert 0 < (half - before).norm() < (one - before).norm()


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "RMSprop", "Lion", "torch.optim.AdamW"])
def test_nothing_waits_for_the_flag_after_the_first_step(name: str) -> None:
    class Silent(Tensor):
        def __bool__(self) -> bool:
            raise AssertionError("the host has asked")

    if name == "Lion":
        pytest.importorskip("lion_pytorch")
    run = Run(name).take(range(1))
    for step, flag in ((1, YES), (2, NO), (2, YES)):
        run.gradients(step)
        run.optimizer.step(flag.as_subclass(Silent), (1 + step % 3) / 3)
    assert torch.equal(run.flat.master, Run(name).take(range(3)).flat.master)


def adafactor_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    settings = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    return Adafactor(parameters, lr=1e-2, weight_decay=0.1, **settings)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("AdamW", lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
        ("torch.optim.AdamW", lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
        ("Adafactor", adafactor_of),
        ("torch.optim.NAdam", lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1)),
    ],
)
def test_the_buffer_learns_as_parameters_of_their_own_do(name: str, theirs: Any) -> None:
    ours = Run(name, weight_decay=0.1, rates=dict.fromkeys(("up", "down", "conv", "bias"), 1e-2))
    apart = {key: nn.Parameter(ours.flat.view(ours.flat.master, key).clone()) for key in ("up", "down", "conv", "bias")}
    optimizer = theirs(list(apart.values()))
    for step in range(5):
        ours.gradients(step)
        for key, parameter in apart.items():
            parameter.grad = ours.flat.view(ours.flat.grad, key).clone()
        ours.optimizer.step(YES)
        optimizer.step()
    for key, parameter in apart.items():
        assert torch.allclose(ours.flat.view(ours.flat.master, key), parameter, rtol=1e-5, atol=1e-7)


def test_eight_bits_are_eight_bits() -> None:
    pytest.importorskip("torchao")
    run = Run("AdamW8bit").take(range(2))
    codes = {key: tensor for key, tensor in run.stored()[0].items() if key.endswith(".codes")}
    assert {tensor.dtype for tensor in codes.values()} == {torch.uint8}
    # The whole group, padding included; the other group is smaller than the least that is quantized.
    assert [tensor.numel() for tensor in codes.values()] == [run.flat.groups[0].flat.numel()] * 2


def test_arguments_and_kinds_of_optimizers_matter() -> None:
    def weights(arguments: str | None) -> Tensor:
        return Run("AdamW", arguments).take(range(3)).flat.master

    assert not torch.equal(weights("betas=(0.5,0.9)"), weights(None))
    assert torch.equal(weights("betas=(0.9,0.999)"), weights(None))
    run = Run("Adafactor").take(range(1))
    assert sum(tensor.numel() for tensor in run.stored()[0].values()) < run.flat.master.numel() / 10
    stored = Run("AdamW").take(range(1)).stored()
    with pytest.raises(TrainingError, match="must be of the same optimizer and layers"):
        Run("RMSprop").optimizer.load(*stored)


def test_a_schedule_free_average_is_seen_within_and_gone_afterwards() -> None:
    pytest.importorskip("schedulefree")
    run = Run("ScheduleFree", "betas=(0.9,0.999)").take(range(6))
    training = run.flat.master.clone()
    stored = run.stored()
    with run.optimizer.evaluation_weights():
        average = run.flat.master.clone()
    assert torch.equal(run.flat.master, training)
    assert same(run.stored(), stored)
    assert not torch.allclose(average, training, atol=1e-4)
    z = torch.cat([tensor for key, tensor in stored[0].items() if key.endswith(".z")])
    assert torch.allclose(0.9 * average + 0.1 * z, training, atol=1e-6)  # y = β₁ x + (1 - β₁) z
    assert torch.equal(run.take(range(6, 8)).flat.master, Run("ScheduleFree").take(range(8)).flat.master)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("torch.optim.SparseAdam", None, "cannot be used with these settings: SparseAdam does not support dense"),
        ("torch.optim.LBFGS", None, "asks for several"),
        ("AdamW", "betas=(0.9,)", "cannot be used with"),
        (f"{__name__}.CountsForItself", None, "must continue exactly from its saved state, but .* keeps state"),
        (f"{__name__}.KeepsAList", None, "is not JSON serializable; choose another"),
    ],
)
def test_what_cannot_be_stored_is_refused_at_the_start(name: str, arguments: str | None, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        check_optimizer(name, weight_decay=0.01, arguments=arguments)


def test_one_rate_for_all_is_said() -> None:
    pytest.importorskip("prodigyopt")
    with pytest.raises(OptionError, match=r"optimizer Prodigy .*; give all layers one learning rate or"):
        check_optimizer("Prodigy", weight_decay=0.0, rates=(1.0, 16.0))


def test_state_made_of_several_tensors_is_stored_as_those() -> None:
    name = f"{__name__}.TwoMomenta"
    whole = Run(name).take(range(3))
    stored = whole.stored()
    assert {key.split(".", 1)[1] for key in stored[0]} == {"momentum.a", "momentum.b"}
    again = Run(name)
    again.flat.master.copy_(whole.flat.master)
    again.optimizer.load(*stored)
    assert torch.equal(again.take(range(3, 6)).flat.master, whole.take(range(3, 6)).flat.master)
    run = Run(name).take(range(3))
    run.flat.grad.fill_(float("nan"))
    run.optimizer.step(NO)
    assert same(run.stored(), stored)


class _Momentum(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def fresh(self, parameter: Tensor) -> Any:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = self.fresh(parameter)
                self.move(parameter, self.state[parameter]["momentum"], group["lr"])

    def move(self, parameter: Tensor, momentum: Any, rate: float) -> None:
        raise NotImplementedError


class TwoMomenta(_Momentum):
    def fresh(self, parameter: Tensor) -> Any:
        return TwoTensor(torch.zeros_like(parameter), torch.ones_like(parameter))

    def move(self, parameter: Tensor, momentum: Any, rate: float) -> None:
        momentum.a.mul_(0.9).add_(parameter.grad)
        momentum.b.mul_(0.5).sub_(parameter.grad)
        parameter.sub_(momentum.a - momentum.b, alpha=rate)


class KeepsAList(_Momentum):
    def fresh(self, parameter: Tensor) -> Any:
        return [torch.zeros_like(parameter)]

    def move(self, parameter: Tensor, momentum: Any, rate: float) -> None:
        momentum.append(parameter.grad.clone())
        parameter.sub_(sum(momentum), alpha=rate)


class CountsForItself(_Momentum):
    steps = 0

    def fresh(self, parameter: Tensor) -> Any:
        return torch.zeros_like(parameter)

    def move(self, parameter: Tensor, momentum: Any, rate: float) -> None:
        self.steps += 1
        parameter.sub_(parameter.grad, alpha=rate / self.steps)


def test_the_check_is_of_matrices_on_the_device_that_are_large_enough_for_8_bits() -> None:
    Looking.seen.clear()
    with pytest.raises(OptionError, match="cannot be used with"):  # numbers on `meta` cannot be read
        check_optimizer(f"{__name__}.Looking", weight_decay=0.0, device=torch.device("meta"))
    assert {parameter.device.type for parameter in Looking.seen} == {"meta"}
    assert all(parameter.numel() >= 4096 and parameter.ndim == 2 for parameter in Looking.seen)


class Looking(_Momentum):
    seen: list[Tensor] = []  # noqa: RUF012

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.seen.extend(parameter for group in self.param_groups for parameter in group["params"])
